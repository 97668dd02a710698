//! Models on their way to and from disk, one tensor at a time.

use std::sync::Arc;

use burn::tensor::Device;
use switchyard_checkpoint::{Checkpoint, CheckpointError, ModelDirectory, TensorPart, TensorSource};
use switchyard_config::RunPlan;
use switchyard_config::parameters::{ParameterSpec, parameters};
use switchyard_config::partition::held_part;
use switchyard_config::plan::PrecisionMode;
use switchyard_kernels::copy_into;
use switchyard_model::SwitchTransformer;
use switchyard_parallel::{Mesh, Unit};

use crate::error::TrainError;
use crate::step::Learner;

/// Builds the model of a directory on `device`, or this rank's part of it, rounded to `precision`.
///
/// # Errors
/// When a file cannot be read.
pub fn load_model(
    directory: &ModelDirectory,
    device: &Device,
    mesh: &Mesh,
    precision: PrecisionMode,
) -> Result<SwitchTransformer, CheckpointError> {
    let config = directory.model();
    let specs = parameters(config);
    let model = SwitchTransformer::part(config, 0, device, mesh.shape(), mesh.at(), precision);
    model.with_parameters(|name, len| {
        let spec = spec_of(&specs, name)?;
        fitting(name, directory.read_part(name, &held_part(spec, mesh.shape(), mesh.at()))?, len)
    })
}

/// Puts a checkpoint's parameters and optimizer state into `learner`, cut for its mesh.
pub(crate) fn load_parts(
    checkpoint: &Checkpoint,
    learner: &mut Learner,
    plan: &RunPlan,
    updates: u64,
) -> Result<(), TrainError> {
    let specs = parameters(&plan.model);
    let (shape, at) = (learner.mesh().shape(), learner.mesh().at());
    learner.replace_model(|model| {
        model.with_parameters(|name, len| {
            let spec = spec_of(&specs, name)?;
            fitting(name, checkpoint.read_part(name, &held_part(spec, shape, at))?, len)
        })
    })?;
    let optimizer = learner.optimizer_mut();
    optimizer.set_updates(updates);
    let units = optimizer.units().clone();
    for (name, values) in optimizer.masters_mut() {
        *values = checkpoint.read_part(name, &units[name].part)?;
    }
    for moment in optimizer.moments() {
        let missing = |error| match error {
            CheckpointError::NoTensor { name } => TrainError::OtherOptimizer { name },
            error => error.into(),
        };
        let values = checkpoint.read_part(&moment.name, &moment.part).map_err(missing)?;
        *moment.values = fitting(&moment.name, values, moment.values.len())?;
    }
    Ok(())
}

/// Copies of the parameters and moments that this rank owns.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    pub(crate) parameters: Vec<TensorPart>,
    pub(crate) moments: Vec<TensorPart>,
}

impl Snapshot {
    /// Bytes of all values.
    pub(crate) fn bytes(&self) -> usize {
        let values = |part: &TensorPart| size_of::<f32>() * part.values.len();
        self.parameters.iter().chain(&self.moments).map(values).sum()
    }

    /// Copies what `learner` has now into the memory of an earlier snapshot of it: pages that the system
    /// has given back take longer to get than to fill.
    pub(crate) fn take(learner: &mut Learner, earlier: Self) -> Self {
        let mut memory = earlier.parameters.into_iter().chain(earlier.moments).map(|part| part.values);
        let mut copy_of = |values: &[f32]| {
            let mut copy = memory.next().unwrap_or_default();
            copy_into(Arc::make_mut(&mut copy), values);
            copy
        };
        let part_of = |name: &str, unit: &Unit, values| TensorPart {
            name: name.to_owned(),
            shape: unit.whole.clone(),
            part: unit.part.clone(),
            values,
        };
        learner.optimizer_mut().settle();
        let (units, masters) = (learner.optimizer().units(), learner.optimizer().masters());
        let beside = masters.iter().map(|(name, values)| part_of(name, &units[name], copy_of(values)));
        let mut parameters: Vec<TensorPart> = beside.collect();
        learner.model().visit_parameters(
            |name| !masters.contains_key(name),
            |name, held| {
                if let Some(unit @ Unit { in_held: Some(start), part, .. }) = units.get(name) {
                    let owned = &held[*start..start + part.num_elements()];
                    parameters.push(part_of(name, unit, copy_of(owned)));
                }
            },
        );
        let moments = learner.optimizer_mut().moments().map(|moment| TensorPart {
            name: moment.name,
            shape: moment.whole,
            part: moment.part,
            values: copy_of(moment.values),
        });
        Self { parameters, moments: moments.collect() }
    }
}

fn spec_of<'a>(specs: &'a [ParameterSpec], name: &str) -> Result<&'a ParameterSpec, CheckpointError> {
    let found = specs.iter().find(|spec| spec.name == name);
    found.ok_or_else(|| CheckpointError::NoTensor { name: name.to_owned() })
}

fn fitting(name: &str, values: Vec<f32>, len: usize) -> Result<Vec<f32>, CheckpointError> {
    if values.len() == len {
        return Ok(values);
    }
    let reason = format!("it has {} values, the model needs {len}", values.len());
    Err(CheckpointError::Refused { name: name.to_owned(), reason })
}

#[cfg(test)]
mod tests;
