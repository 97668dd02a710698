//! Models on their way to and from disk, one tensor at a time.

use std::borrow::Cow;

use burn::tensor::Device;
use switchyard_checkpoint::{CheckpointError, ModelDirectory, TensorSource};
use switchyard_config::ModelConfig;
use switchyard_config::parameters::parameters;
use switchyard_model::SwitchTransformer;

/// Builds the model of a directory on `device`.
///
/// # Errors
/// When a file cannot be read.
pub fn load_model(directory: &ModelDirectory, device: &Device) -> Result<SwitchTransformer, CheckpointError> {
    filled(SwitchTransformer::new(directory.model(), 0, device), directory)
}

/// `model` with the values of `source`.
pub(crate) fn filled(
    model: SwitchTransformer,
    source: &dyn TensorSource,
) -> Result<SwitchTransformer, CheckpointError> {
    model.with_parameters(|name, len| {
        let values = source.read(name)?.into_owned();
        if values.len() == len {
            return Ok(values);
        }
        let reason = format!("it has {} values, the model needs {len}", values.len());
        Err(CheckpointError::Refused { name: name.to_owned(), reason })
    })
}

/// The parameters of a model, to be written.
pub(crate) struct ParameterSource<'a> {
    pub model: &'a SwitchTransformer,
    pub config: &'a ModelConfig,
}

impl TensorSource for ParameterSource<'_> {
    fn specs(&self) -> Vec<(String, Vec<usize>)> {
        parameters(self.config).into_iter().map(|spec| (spec.name, spec.shape)).collect()
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [f32]>, CheckpointError> {
        let values = self.model.parameter(name);
        values.map(Cow::Owned).map_err(|_| CheckpointError::NoTensor { name: name.to_owned() })
    }
}
