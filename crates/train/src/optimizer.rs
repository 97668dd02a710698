//! The optimizer of a run: its state by parameter name and one update of all parameters.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use switchyard_checkpoint::{CheckpointError, TensorSink, TensorSource};
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
    /// Updates done; steps that were skipped do not count.
    updates: u64,
}

#[derive(Debug, Clone, PartialEq)]
enum State {
    Adamw(AdamwState),
    Adafactor(AdafactorState),
}

/// Optimizer state that does not fit the model.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "optimizer state `{name}` is missing or has the wrong size; was it written by another optimizer or model?"
)]
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
        Self { plan: plan.clone(), specs, states, updates: 0 }
    }

    /// Updates every parameter that has a gradient.
    ///
    /// `gradient_scale` multiplies all gradients (clipping).
    #[must_use]
    pub fn step(
        &mut self,
        model: SwitchTransformer,
        gradients: &GradientSums,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> SwitchTransformer {
        self.updates += 1;
        let update = self.updates;
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

    /// Replaces all state, tensor by tensor, by that after `updates` updates.
    pub fn loader(&mut self, updates: u64) -> StateLoader<'_> {
        self.updates = updates;
        let missing = self.specs().into_iter().map(|(name, _)| name).collect();
        StateLoader { optimizer: self, missing }
    }
}

impl TensorSource for Optimizer {
    fn specs(&self) -> Vec<(String, Vec<usize>)> {
        let of = |(name, state): (&String, &State)| {
            let parts = state.parts(&self.specs[name].shape);
            let name = name.clone();
            parts
                .into_iter()
                .map(move |(moment, shape, _)| (format!("{name}/{moment}"), shape))
                .collect::<Vec<_>>()
        };
        self.states.iter().flat_map(of).collect()
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [f32]>, CheckpointError> {
        let found = name.split_once('/').and_then(|(parameter, wanted)| {
            let moments = self.states.get(parameter)?.parts(&self.specs.get(parameter)?.shape);
            moments.into_iter().find(|(moment, ..)| *moment == wanted)
        });
        match found {
            Some((_, _, values)) => Ok(Cow::Borrowed(values)),
            None => Err(CheckpointError::NoTensor { name: name.to_owned() }),
        }
    }
}

/// Takes the optimizer tensors of a checkpoint; [`Self::finish`] tells whether all came.
#[derive(Debug)]
pub struct StateLoader<'a> {
    optimizer: &'a mut Optimizer,
    missing: BTreeSet<String>,
}

impl StateLoader<'_> {
    /// Whether every tensor of the optimizer was replaced.
    ///
    /// # Errors
    /// [`StateError`] names the first that was not.
    pub fn finish(self) -> Result<(), StateError> {
        match self.missing.into_iter().next() {
            Some(name) => Err(StateError { name }),
            None => Ok(()),
        }
    }
}

impl TensorSink for StateLoader<'_> {
    fn write(&mut self, name: &str, values: Vec<f32>) -> Result<(), CheckpointError> {
        let refused = |reason: String| CheckpointError::Refused { name: name.to_owned(), reason };
        let parts = name.split_once('/');
        let state = parts.and_then(|(parameter, _)| self.optimizer.states.get_mut(parameter));
        let moment = parts.map_or("", |(_, moment)| moment);
        let slot = state.and_then(|state| state.parts_mut().into_iter().find(|(found, _)| *found == moment));
        let (_, slot) = slot.ok_or_else(|| {
            refused(
                "this optimizer keeps no such tensor; was it written with another optimizer.kind?".to_owned(),
            )
        })?;
        if slot.len() != values.len() {
            return Err(refused(format!("it has {} values, the model needs {}", values.len(), slot.len())));
        }
        *slot = values;
        self.missing.remove(name);
        Ok(())
    }
}

/// Name, shape and values of a moment.
type Moment<'a> = (&'static str, Vec<usize>, &'a Vec<f32>);

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
    fn parts(&self, shape: &[usize]) -> Vec<Moment<'_>> {
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
