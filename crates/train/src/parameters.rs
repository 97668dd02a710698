//! Models on their way to and from disk, one tensor at a time.

use std::borrow::Cow;

use burn::tensor::Device;
use switchyard_checkpoint::{CheckpointError, ModelDirectory, TensorSink, TensorSource};
use switchyard_config::ModelConfig;
use switchyard_config::parameters::parameters;
use switchyard_model::SwitchTransformer;

/// Builds the model of a directory on `device`.
///
/// # Errors
/// When a file cannot be read.
pub fn load_model(directory: &ModelDirectory, device: &Device) -> Result<SwitchTransformer, CheckpointError> {
    let mut model = SwitchTransformer::new(directory.model(), 0, device);
    let mut sink = ParameterSink(&mut model);
    for (name, _) in directory.specs() {
        sink.write(&name, directory.read(&name)?.into_owned())?;
    }
    Ok(model)
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

/// The parameters of a model, to be replaced.
pub(crate) struct ParameterSink<'a>(pub &'a mut SwitchTransformer);

impl TensorSink for ParameterSink<'_> {
    fn write(&mut self, name: &str, values: Vec<f32>) -> Result<(), CheckpointError> {
        let refused = |error: switchyard_model::ParameterError| CheckpointError::Refused {
            name: name.to_owned(),
            reason: error.to_string(),
        };
        self.0.set_parameter(name, values).map_err(refused)
    }
}
