//! Models that transformers made, and what it computed with them (`tests/fixtures/README.md`).

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use switchyard_checkpoint::{ModelDirectory, open_model};
use switchyard_config::plan::PrecisionMode;
use switchyard_model::SwitchTransformer;
use switchyard_parallel::Mesh;
use switchyard_train::load_model;
use switchyard_train::verify::{Array, Arrays};

pub(crate) struct Fixture {
    pub name: &'static str,
    pub directory: ModelDirectory,
    pub arrays: Arrays,
    /// `expected.json`.
    pub expected: Value,
}

pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/parity").join(name)
}

impl Fixture {
    pub(crate) fn open(name: &'static str) -> Self {
        let directory = open_model(&path(name)).expect("the fixture is a model of transformers");
        let text = std::fs::read_to_string(path(name).join("expected.json")).unwrap();
        let expected = serde_json::from_str(&text).unwrap();
        Self { name, directory, arrays: arrays(name), expected }
    }

    pub(crate) fn model(&self, device: &Device) -> SwitchTransformer {
        load_model(&self.directory, device, &Mesh::solo(), PrecisionMode::Fp32)
            .expect("every parameter is there")
    }

    /// An allowed difference that the fixture itself suggests.
    pub(crate) fn suggested(&self, what: &str) -> f64 {
        self.expected["suggested_atol"][what].as_f64().expect("a number")
    }
}

/// The arrays of a fixture.
pub(crate) fn arrays(name: &str) -> Arrays {
    let bytes = std::fs::read(path(name).join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let array = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let data = view.data();
        let (values, discrete) = match view.dtype() {
            Dtype::F32 => (
                data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect(),
                false,
            ),
            Dtype::I64 => {
                let values = data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64);
                (values.collect(), true)
            }
            Dtype::U8 => (data.iter().map(|&b| f64::from(b)).collect(), true),
            other => panic!("{name} has type {other:?}"),
        };
        (name, Array { shape: view.shape().to_vec(), values, discrete })
    };
    file.tensors().into_iter().map(array).collect()
}
