//! The optimizer of a run: its state by parameter name and one update of all parameters.

use std::collections::BTreeMap;

use switchyard_config::ModelConfig;
use switchyard_config::parameters::{ParameterSpec, parameters};
use switchyard_config::plan::{OptimizerKind, OptimizerPlan};
use switchyard_kernels::optimizer::{Adafactor, AdafactorState, Adamw, AdamwState, adafactor, adamw};
use switchyard_model::SwitchTransformer;

use crate::gradients::GradientSums;

/// Moments of every parameter and the rules of their update.
#[derive(Debug)]
pub struct Optimizer {
    plan: OptimizerPlan,
    specs: BTreeMap<String, ParameterSpec>,
    states: BTreeMap<String, State>,
}

#[derive(Debug, Clone, PartialEq)]
enum State {
    Adamw(AdamwState),
    Adafactor(AdafactorState),
}

/// A tensor of optimizer state, on its way to or from a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct StateTensor {
    /// Parameter and moment, such as `encoder.block.0.self_attention.q/v`.
    pub name: String,
    /// Shape; of experts the first axis counts them.
    pub shape: Vec<usize>,
    /// Values.
    pub values: Vec<f32>,
}

/// Optimizer state that does not fit the model.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("optimizer state `{name}` is missing or has the wrong size; was it written by another optimizer or model?")]
pub struct StateError {
    /// The tensor.
    pub name: String,
}

impl Optimizer {
    /// Fresh state for every parameter of `model`.
    pub fn new(plan: &OptimizerPlan, model: &ModelConfig) -> Self {
        let specs: BTreeMap<_, _> =
            parameters(model).into_iter().map(|spec| (spec.name.clone(), spec)).collect();
        let states = specs.iter().map(|(name, spec)| (name.clone(), State::new(plan.kind, spec))).collect();
        Self { plan: plan.clone(), specs, states }
    }

    /// Updates every parameter that has a gradient.
    ///
    /// `gradient_scale` multiplies all gradients (clipping); `update` counts updates from 1.
    #[must_use]
    pub fn step(
        &mut self,
        model: SwitchTransformer,
        gradients: &GradientSums,
        learning_rate: f64,
        gradient_scale: f64,
        update: u64,
    ) -> SwitchTransformer {
        model.update_parameters(|name, shape, values| {
            let (Some(gradient), Some(state)) = (gradients.get(name), self.states.get_mut(name)) else {
                return;
            };
            let plan = &self.plan;
            let gradient_scale = gradient_scale as f32;
            match state {
                State::Adamw(state) => {
                    let rules = Adamw {
                        learning_rate,
                        gradient_scale,
                        beta1: plan.beta1,
                        beta2: plan.beta2,
                        eps: plan.eps,
                        weight_decay: plan.weight_decay,
                        parameter_scale: plan.parameter_scale.then_some(plan.eps2),
                        update,
                    };
                    adamw(values, gradient, state, matrix_len(shape), rules);
                }
                State::Adafactor(state) => {
                    let rules = Adafactor {
                        learning_rate,
                        gradient_scale,
                        decay_exponent: plan.decay_exponent,
                        eps: plan.eps,
                        update_clip: plan.update_clip,
                        weight_decay: plan.weight_decay,
                        parameter_scale: plan.parameter_scale.then_some(plan.eps2),
                        update,
                    };
                    adafactor(values, gradient, shape, state, rules);
                }
            }
        })
    }

    /// All state as named tensors, in the order of their names.
    pub fn state_tensors(&self) -> Vec<StateTensor> {
        let mut tensors = Vec::new();
        for (name, state) in &self.states {
            for (moment, shape, values) in state.parts(&self.specs[name].shape) {
                tensors.push(StateTensor { name: format!("{name}/{moment}"), shape, values: values.clone() });
            }
        }
        tensors
    }

    /// Replaces all state; `find` returns the values of a named tensor.
    ///
    /// # Errors
    /// [`StateError`] names the first tensor that is missing or has the wrong size.
    pub fn load_state(
        &mut self,
        mut find: impl FnMut(&str) -> Option<Vec<f32>>,
    ) -> Result<(), StateError> {
        for (name, state) in &mut self.states {
            for (moment, values) in state.parts_mut() {
                let name = format!("{name}/{moment}");
                match find(&name) {
                    Some(found) if found.len() == values.len() => *values = found,
                    _ => return Err(StateError { name }),
                }
            }
        }
        Ok(())
    }
}

/// Values of one logical matrix: a stack of experts has one for each.
fn matrix_len(shape: &[usize]) -> usize {
    shape.iter().rev().take(2).product::<usize>().max(1)
}

impl State {
    fn new(kind: OptimizerKind, spec: &ParameterSpec) -> Self {
        match kind {
            OptimizerKind::Adamw => Self::Adamw(AdamwState::new(spec.num_elements() as usize)),
            OptimizerKind::Adafactor => Self::Adafactor(AdafactorState::new(&spec.shape)),
        }
    }

    /// Name, shape and values of each moment of a parameter of `shape`.
    fn parts(&self, shape: &[usize]) -> Vec<(&'static str, Vec<usize>, &Vec<f32>)> {
        let without = |dim: usize| {
            let mut shape = shape.to_vec();
            shape.remove(dim);
            shape
        };
        match self {
            Self::Adamw(state) => vec![("m", shape.to_vec(), &state.m), ("v", shape.to_vec(), &state.v)],
            Self::Adafactor(AdafactorState::Full(v)) => vec![("v", shape.to_vec(), v)],
            Self::Adafactor(AdafactorState::Factored { row, col }) => {
                let rank = shape.len();
                vec![("row", without(rank - 1), row), ("col", without(rank - 2), col)]
            }
        }
    }

    fn parts_mut(&mut self) -> Vec<(&'static str, &mut Vec<f32>)> {
        match self {
            Self::Adamw(state) => vec![("m", &mut state.m), ("v", &mut state.v)],
            Self::Adafactor(AdafactorState::Full(v)) => vec![("v", v)],
            Self::Adafactor(AdafactorState::Factored { row, col }) => vec![("row", row), ("col", col)],
        }
    }
}
