//! Fresh parameters: shapes from the table of names, values from counters.
//!
//! A value depends on the seed, the tensor's name and the element's place in the whole tensor, so
//! any device can draw any slice.

use std::collections::HashMap;
use std::sync::Arc;

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Device, Shape, Tensor, TensorData};
use rayon::prelude::*;
use switchyard_config::parameters::{ParameterKind, ParameterSpec, parameters};
use switchyard_config::partition::{Part, held_part};
use switchyard_config::plan::PrecisionMode;
use switchyard_config::{Coordinates, Initialization, MeshShape, ModelConfig};
use switchyard_kernels::{Element, bf16};
use switchyard_random::{Philox, fnv1a64, normal_pair};

/// Makes the parameters of one rank's model.
pub(crate) struct ParameterFactory {
    seed: u64,
    device: Device,
    mesh: MeshShape,
    at: Coordinates,
    precision: PrecisionMode,
    distributions: HashMap<String, (ParameterSpec, Distribution)>,
}

impl ParameterFactory {
    pub(crate) fn new(
        config: &ModelConfig,
        seed: u64,
        device: &Device,
        mesh: MeshShape,
        at: Coordinates,
        precision: PrecisionMode,
    ) -> Self {
        let distributions = parameters(config)
            .into_iter()
            .map(|spec| (spec.name.clone(), (spec.clone(), Distribution::of(&spec, config))))
            .collect();
        Self { seed, device: device.clone(), mesh, at, precision, distributions }
    }

    /// Format of every parameter.
    pub(crate) fn formats(&self) -> Arc<HashMap<String, DType>> {
        let specs = self.distributions.iter();
        Arc::new(specs.map(|(name, (spec, _))| (name.clone(), format(self.precision, spec))).collect())
    }

    /// This rank's part of the parameter called `name`; its values are drawn when first needed, so
    /// loading skips it.
    pub(crate) fn parameter<const D: usize>(&self, name: &str) -> Param<Tensor<D>> {
        let (spec, distribution) =
            self.distributions.get(name).expect("modules ask for names of the parameter table").clone();
        let (seed, format) = (self.seed, format(self.precision, &spec));
        let part = held_part(&spec, self.mesh, self.at);
        let shape = Shape::from(part.shape.clone());
        let init_shape = shape.clone();
        let init = move |device: &Device, _: bool| {
            let values = distribution.draw(seed, &spec, &part);
            of_values(values, init_shape, format, device)
        };
        Param::uninitialized(ParamId::new(), init, self.device.clone(), true, shape)
    }
}

/// Fresh values of `part` of the parameter called `name`, as a model drawn from `seed` has there.
///
/// # Panics
/// When the model of `config` has no such parameter.
pub fn fresh_parameter(config: &ModelConfig, seed: u64, name: &str, part: &Part) -> Vec<f32> {
    let spec = parameters(config).into_iter().find(|spec| spec.name == name);
    let spec = spec.expect("names come from the parameter table");
    Distribution::of(&spec, config).draw(seed, &spec, part)
}

/// A trainable tensor where the device differentiates, a constant elsewhere.
pub(crate) fn leaf<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    if tensor.is_autodiff() { tensor.require_grad() } else { tensor }
}

/// A trainable tensor of `values`, rounded to `format`.
pub(crate) fn of_values<const D: usize>(
    values: Vec<f32>,
    shape: Shape,
    format: DType,
    device: &Device,
) -> Tensor<D> {
    let data = match format {
        DType::BF16 => TensorData::new(values.into_iter().map(bf16::round).collect::<Vec<bf16>>(), shape),
        _ => TensorData::new(values, shape),
    };
    leaf(Tensor::from_data(data, (device, format)))
}

/// Format of a parameter in a model of that precision.
fn format(precision: PrecisionMode, spec: &ParameterSpec) -> DType {
    if precision.keeps_fp32(spec.kind) { DType::F32 } else { DType::BF16 }
}

/// How the values of one parameter are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Distribution {
    Constant(f32),
    Normal { std: f64 },
    TruncatedNormal { std: f64 },
}

impl Distribution {
    fn of(spec: &ParameterSpec, config: &ModelConfig) -> Self {
        match config.init {
            Initialization::Paper => Self::paper(spec, config),
            Initialization::Hf => Self::hugging_face(spec, config),
        }
    }

    /// Switch Transformer, section 2.4: truncated normal of variance `init_scale / fan_in`.
    ///
    /// Queries carry the missing `1 / sqrt(d_kv)` of the scores in their weights, as in T5.
    fn paper(spec: &ParameterSpec, config: &ModelConfig) -> Self {
        let inverse_fan_in = |fan_in: usize| config.init_scale / fan_in as f64;
        let variance = match spec.kind {
            ParameterKind::Norm => return Self::Constant(1.0),
            ParameterKind::RouterBias => return Self::Constant(0.0),
            ParameterKind::Embedding | ParameterKind::Head => return Self::Normal { std: 1.0 },
            ParameterKind::RelativeBias => {
                return Self::Normal { std: (config.d_model as f64).powf(-0.5) };
            }
            ParameterKind::Query => inverse_fan_in(config.d_model) / config.d_kv as f64,
            ParameterKind::AttentionOutput => inverse_fan_in(config.d_attention()),
            ParameterKind::FeedForwardOut | ParameterKind::ExpertOut => inverse_fan_in(config.d_ff),
            ParameterKind::KeyValue
            | ParameterKind::FeedForwardIn
            | ParameterKind::Router
            | ParameterKind::ExpertIn => inverse_fan_in(config.d_model),
        };
        Self::TruncatedNormal { std: variance.sqrt() }
    }

    /// The rule of transformers' `_init_weights`, its factor in `init_scale`.
    fn hugging_face(spec: &ParameterSpec, config: &ModelConfig) -> Self {
        let factor = config.init_scale;
        let inverse_root = |n: usize| factor / (n as f64).sqrt();
        let std = match spec.kind {
            ParameterKind::Norm => return Self::Constant(factor as f32),
            ParameterKind::RouterBias => return Self::Constant(0.0),
            ParameterKind::Embedding | ParameterKind::Head | ParameterKind::Router => factor,
            ParameterKind::Query => inverse_root(config.d_model * config.d_kv),
            ParameterKind::AttentionOutput => inverse_root(config.d_attention()),
            ParameterKind::FeedForwardOut => inverse_root(config.d_ff),
            ParameterKind::RelativeBias
            | ParameterKind::KeyValue
            | ParameterKind::FeedForwardIn
            | ParameterKind::ExpertIn
            | ParameterKind::ExpertOut => inverse_root(config.d_model),
        };
        Self::Normal { std }
    }

    /// The values of `part` of a parameter.
    fn draw(self, seed: u64, spec: &ParameterSpec, part: &Part) -> Vec<f32> {
        let len = part.num_elements();
        let philox = Philox::new(seed).derive(fnv1a64(&spec.name));
        let (std, limit) = match self {
            Self::Constant(value) => return vec![value; len],
            Self::Normal { std } => (std, f64::INFINITY),
            Self::TruncatedNormal { std } => (std, 2.0),
        };
        // Runs are of one length, so that any thread finds any element's place in the whole tensor.
        let runs: Vec<usize> = part.runs(&spec.shape).map(|run| run.start).collect();
        let run = (len / runs.len().max(1)).max(1);
        let mut values = vec![0.0; len];
        values.par_iter_mut().enumerate().with_min_len(4096).for_each(|(i, value)| {
            let element = runs[i / run] + i % run;
            *value = (std * bounded_normal(philox, element as u64, limit)) as f32;
        });
        values
    }
}

/// The first of an element's standard normal values that lies within `limit`.
fn bounded_normal(philox: Philox, element: u64, limit: f64) -> f64 {
    let mut attempt = 0;
    loop {
        let words = philox.block([element as u32, (element >> 32) as u32, attempt, 0]);
        for pair in words.chunks_exact(2) {
            let (a, b) = normal_pair(pair[0], pair[1]);
            for value in [a, b] {
                if value.abs() <= limit {
                    return value;
                }
            }
        }
        attempt += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncated_values_stay_within_two_deviations() {
        let spec = ParameterSpec { name: "x".into(), shape: vec![100, 200], kind: ParameterKind::Router };
        let whole = Part::whole(&spec.shape);
        let values = Distribution::TruncatedNormal { std: 0.5 }.draw(1, &spec, &whole);
        assert!(values.iter().all(|v| v.abs() <= 1.0));
        let variance = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64;
        // A standard normal cut at two deviations has variance 0.7737.
        assert!((variance / 0.25 - 0.7737).abs() < 0.02, "{variance}");
        assert_ne!(values[..50], Distribution::TruncatedNormal { std: 0.5 }.draw(2, &spec, &whole)[..50]);
    }
}
