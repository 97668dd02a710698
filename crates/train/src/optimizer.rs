//! The optimizer of a run: moments of the matrices that this rank owns, and one update of them.

use std::collections::{BTreeMap, HashSet};

use switchyard_config::RunPlan;
use switchyard_config::parameters::parameters;
use switchyard_config::partition::Part;
use switchyard_config::plan::{OptimizerKind, OptimizerPlan};
use switchyard_kernels::optimizer::{
    Adafactor, AdafactorState, Adamw, AdamwState, DeviceTensor, OptimizerRules, adafactor, adamw,
};
use switchyard_kernels::{DeviceOptimizer, Element, Values, ValuesMut, bf16};
use switchyard_model::{SwitchTransformer, fresh_parameter};
use switchyard_parallel::{Gradients, Owned, Unit};

/// Moments of every owned matrix and the rules of their update.
#[derive(Debug)]
pub(crate) struct Optimizer {
    plan: OptimizerPlan,
    units: BTreeMap<String, Unit>,
    states: BTreeMap<String, State>,
    /// Values of owned matrices that the model holds only a part of, or holds in fewer bits.
    masters: Owned,
    /// Updates done; steps that were skipped do not count.
    updates: u64,
    /// Masters and moments on the device of the model, once it has updated there; then those here are as old
    /// as the last [`settle`](Self::settle).
    on_device: Option<DeviceOptimizer>,
}

#[derive(Debug, Clone, PartialEq)]
enum State {
    Adamw(AdamwState),
    Adafactor(AdafactorState),
}

/// One moment of a parameter: a part of a logical tensor.
#[derive(Debug)]
pub(crate) struct Moment<'a> {
    /// Parameter and moment, such as `lm_head/v`.
    pub(crate) name: String,
    /// Shape of the whole moment.
    pub(crate) whole: Vec<usize>,
    /// What this rank has of it.
    pub(crate) part: Part,
    /// Its values.
    pub(crate) values: &'a mut Vec<f32>,
}

impl Optimizer {
    /// Fresh state for the owned matrices.
    pub(crate) fn new(plan: &RunPlan, units: &BTreeMap<String, Unit>) -> Self {
        let kind = plan.optimizer.kind;
        let narrow: HashSet<String> = parameters(&plan.model)
            .into_iter()
            .filter(|spec| !plan.precision.keeps_fp32(spec.kind))
            .map(|spec| spec.name)
            .collect();
        let fresh = |(name, unit): (&String, &Unit)| {
            let beside = unit.in_held.is_none() || narrow.contains(name);
            beside.then(|| (name.clone(), fresh_parameter(&plan.model, plan.seed, name, &unit.part)))
        };
        Self {
            plan: plan.optimizer.clone(),
            states: units.iter().map(|(name, unit)| (name.clone(), State::new(kind, unit))).collect(),
            masters: units.iter().filter_map(fresh).collect(),
            units: units.clone(),
            updates: 0,
            on_device: None,
        }
    }

    /// Masters and moments on the GPU where `model` is, which are moved there if need be.
    pub(crate) fn on_device_of(&mut self, model: &SwitchTransformer) -> Option<&mut DeviceOptimizer> {
        if self.on_device.is_none() {
            self.on_device = self.move_to_device(model);
        }
        self.on_device.as_mut()
    }

    /// Counts an update that was made on the device.
    pub(crate) fn count_update(&mut self) {
        self.updates += 1;
    }

    fn move_to_device(&self, model: &SwitchTransformer) -> Option<DeviceOptimizer> {
        let rules = Rules { plan: &self.plan, learning_rate: 0.0, gradient_scale: 1.0, update: 0 };
        let tensors = model.device_parameters().into_iter().filter_map(|(name, parameter)| {
            let (unit, state) = (self.units.get(&name)?, self.states.get(&name)?);
            let master = self.masters.get(&name).map(Vec::as_slice);
            let moments = match state {
                State::Adamw(AdamwState { m, v }) => [Some(m.as_slice()), Some(v.as_slice())],
                State::Adafactor(AdafactorState::Full(v)) => [Some(v.as_slice()), None],
                State::Adafactor(AdafactorState::Factored { row, col }) => {
                    [Some(row.as_slice()), Some(col.as_slice())]
                }
            };
            Some(DeviceTensor {
                name,
                shape: unit.part.shape.clone(),
                parameter,
                start: unit.in_held,
                master,
                moments,
                part: unit.bucket,
            })
        });
        DeviceOptimizer::new(rules.of(self.plan.kind), tensors.collect(), self.updates)
    }

    /// Brings masters and moments back from the device, if they are there, for whoever reads them here.
    pub(crate) fn settle(&mut self) {
        let Some(optimizer) = &self.on_device else { return };
        let (masters, states) = (&mut self.masters, &mut self.states);
        optimizer.read(|name, master, moments| {
            if let (Some(values), Some(master)) = (master, masters.get_mut(name)) {
                *master = values;
            }
            match (states.get_mut(name), moments) {
                (Some(State::Adamw(state)), [Some(m), Some(v)]) => *state = AdamwState { m, v },
                (Some(State::Adafactor(state)), [Some(row), Some(col)]) => {
                    *state = AdafactorState::Factored { row, col };
                }
                (Some(State::Adafactor(state)), [Some(v), None]) => *state = AdafactorState::Full(v),
                _ => {}
            }
        });
    }

    /// Lets go of what is on the device: parameters or state are about to be replaced here.
    pub(crate) fn leave_device(&mut self) {
        self.settle();
        self.on_device = None;
    }

    /// Updates every owned matrix that has a gradient.
    ///
    /// `gradient_scale` multiplies all gradients (clipping).
    #[must_use]
    pub(crate) fn step(
        &mut self,
        model: SwitchTransformer,
        gradients: &Gradients,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> SwitchTransformer {
        self.updates += 1;
        let Self { plan, units, states, masters, updates, .. } = self;
        let rules = Rules { plan, learning_rate, gradient_scale: gradient_scale as f32, update: *updates };
        let elsewhere = masters.iter_mut().filter(|(name, _)| units[*name].in_held.is_none());
        for (name, values) in elsewhere {
            if let (Some(gradient), Some(state)) = (gradients.get(name), states.get_mut(name)) {
                state.update(values, gradient, &units[name], rules, &mut []);
            }
        }
        model.update_parameters(|name, _, mut held| {
            let Some(unit @ Unit { in_held: Some(start), .. }) = units.get(name) else { return };
            let (Some(gradient), Some(state)) = (gradients.get(name), states.get_mut(name)) else { return };
            let owned = held.part(*start..start + gradient.len());
            match (masters.get_mut(name), owned) {
                (None, ValuesMut::F32(values)) => state.update(values, gradient, unit, rules, &mut []),
                (Some(master), ValuesMut::Bf16(rounded)) => {
                    state.update(master, gradient, unit, rules, rounded);
                }
                _ => unreachable!("bfloat16 weights have masters, complete float32 ones have none"),
            }
        })
    }

    /// Values of owned matrices that the model holds only a part of, or holds in fewer bits.
    pub(crate) fn masters(&self) -> &Owned {
        &self.masters
    }

    /// The same, for loading.
    pub(crate) fn masters_mut(&mut self) -> &mut Owned {
        &mut self.masters
    }

    /// What this rank owns, by parameter.
    pub(crate) fn units(&self) -> &BTreeMap<String, Unit> {
        &self.units
    }

    /// All moments, for saving and loading.
    pub(crate) fn moments(&mut self) -> impl Iterator<Item = Moment<'_>> {
        let units = &self.units;
        self.states.iter_mut().flat_map(move |(name, state)| state.moments(name, &units[name]))
    }

    /// Values of one moment that this rank owns, such as `lm_head/v`.
    pub(crate) fn moment(&mut self, name: &str) -> Option<&[f32]> {
        self.moments().find(|moment| moment.name == name).map(|moment| moment.values.as_slice())
    }

    /// Sets the number of updates that the moments have seen.
    pub(crate) fn set_updates(&mut self, updates: u64) {
        self.updates = updates;
    }
}

/// What the updates of one step share.
#[derive(Debug, Clone, Copy)]
struct Rules<'a> {
    plan: &'a OptimizerPlan,
    learning_rate: f64,
    gradient_scale: f32,
    update: u64,
}

impl Rules<'_> {
    fn of(self, kind: OptimizerKind) -> OptimizerRules {
        let Rules { plan, learning_rate, gradient_scale, update } = self;
        let parameter_scale = plan.parameter_scale.then_some(plan.eps2);
        match kind {
            OptimizerKind::Adamw => OptimizerRules::Adamw(Adamw {
                learning_rate,
                gradient_scale,
                beta1: plan.beta1,
                beta2: plan.beta2,
                eps: plan.eps,
                weight_decay: plan.weight_decay,
                parameter_scale,
                update,
            }),
            OptimizerKind::Adafactor => OptimizerRules::Adafactor(Adafactor {
                learning_rate,
                gradient_scale,
                decay_exponent: plan.decay_exponent,
                eps: plan.eps,
                update_clip: plan.update_clip,
                weight_decay: plan.weight_decay,
                parameter_scale,
                update,
            }),
        }
    }
}

impl State {
    fn new(kind: OptimizerKind, unit: &Unit) -> Self {
        match kind {
            OptimizerKind::Adamw => Self::Adamw(AdamwState::new(unit.part.num_elements())),
            OptimizerKind::Adafactor => Self::Adafactor(AdafactorState::new(&unit.part.shape)),
        }
    }

    /// Updates whole matrices: scales and clips are those of each alone.
    ///
    /// `rounded`, if not empty, gets the new values as bfloat16.
    fn update(
        &mut self,
        values: &mut [f32],
        gradient: &Values,
        unit: &Unit,
        rules: Rules<'_>,
        rounded: &mut [bf16],
    ) {
        match gradient {
            Values::Device(_) => unreachable!("the optimizer on the device meets them there"),
            Values::F32(gradient) => self.update_by(values, gradient, unit, rules, rounded),
            Values::Bf16(gradient) => self.update_by(values, gradient, unit, rules, rounded),
        }
    }

    fn update_by<G: Element>(
        &mut self,
        values: &mut [f32],
        gradient: &[G],
        unit: &Unit,
        rules: Rules<'_>,
        rounded: &mut [bf16],
    ) {
        match (self, rules.of(rules.plan.kind)) {
            (Self::Adamw(state), OptimizerRules::Adamw(rules)) => {
                adamw(values, gradient, state, unit.matrix_len(), rules, rounded);
            }
            (Self::Adafactor(state), OptimizerRules::Adafactor(rules)) => {
                adafactor(values, gradient, &unit.part.shape, state, rules, rounded);
            }
            _ => unreachable!("states are made for the plan's optimizer"),
        }
    }

    fn moments<'a>(&'a mut self, parameter: &str, unit: &Unit) -> Vec<Moment<'a>> {
        let moment = |kind: &str, dropped: Option<usize>, values: &'a mut Vec<f32>| {
            let without = |dims: &[usize]| {
                let mut dims = dims.to_vec();
                dropped.map(|from_end| dims.remove(dims.len() - from_end));
                dims
            };
            let part = Part { start: without(&unit.part.start), shape: without(&unit.part.shape) };
            Moment { name: format!("{parameter}/{kind}"), whole: without(&unit.whole), part, values }
        };
        match self {
            Self::Adamw(AdamwState { m, v }) => vec![moment("m", None, m), moment("v", None, v)],
            Self::Adafactor(AdafactorState::Full(v)) => vec![moment("v", None, v)],
            Self::Adafactor(AdafactorState::Factored { row, col }) => {
                vec![moment("row", Some(1), row), moment("col", Some(2), col)]
            }
        }
    }
}
