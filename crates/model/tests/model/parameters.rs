//! The modules hold exactly the parameters of the table, counted without drawing a value.

use std::collections::BTreeMap;
use switchyard_kernels::test_device;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use switchyard_config::parameters::parameters;
use switchyard_config::partition::held_part;
use switchyard_config::plan::PrecisionMode;
use switchyard_config::{Initialization, MeshShape, ModelConfig, preset, preset_names};
use switchyard_model::{ParameterError, SwitchTransformer};

use super::small_model;

/// Shapes by field path; reads no value, so that a model of any size fits.
#[derive(Default)]
struct Shapes {
    path: Vec<String>,
    found: BTreeMap<String, Vec<usize>>,
}

impl ModuleVisitor for Shapes {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        assert!(!param.is_initialized(), "{} was drawn", self.path.join("."));
        self.found.insert(self.path.join("."), param.lazy_shape().dims::<D>().to_vec());
    }
}

fn assert_equals_table(config: &ModelConfig, name: &str) {
    let mut shapes = Shapes::default();
    SwitchTransformer::new(config, 0, &test_device()).visit(&mut shapes);
    let table: BTreeMap<_, _> = parameters(config).into_iter().map(|spec| (spec.name, spec.shape)).collect();
    assert_eq!(shapes.found, table, "{name}");
    let count: u64 =
        shapes.found.values().map(|shape| shape.iter().map(|&n| n as u64).product::<u64>()).sum();
    assert_eq!(count, config.num_parameters(), "{name}");
}

#[test]
fn the_modules_of_every_preset_hold_the_parameters_of_the_table() {
    let variants =
        ["tiny-nl32", "base-el4", "small-dl12", "base-ff12000", "base-kv128", "base-nh24", "small-dm2000"];
    let variants = variants.map(|variant| format!("t5-efficient-{variant}"));
    for name in preset_names().into_iter().chain(variants) {
        assert_equals_table(&preset(&name).unwrap(), &name);
    }
}

#[test]
fn the_model_of_a_rank_is_its_part_of_the_whole_model() {
    let device = test_device();
    let sparse = ModelConfig { num_heads: 4, init: Initialization::Paper, ..small_model() };
    let gated = ModelConfig { gated: true, tie_word_embeddings: false, router_bias: true, ..sparse.clone() };
    for config in [sparse, gated] {
        let whole = SwitchTransformer::new(&config, 7, &device);
        for (data, expert, tensor) in [(2, 2, 1), (4, 4, 1), (4, 2, 1), (1, 1, 2), (1, 1, 4), (2, 2, 2)] {
            let mesh = MeshShape { data, expert, tensor };
            for at in (0..mesh.ranks()).map(|rank| mesh.coordinates(rank)) {
                let model = SwitchTransformer::part(&config, 7, &device, mesh, at, PrecisionMode::Fp32);
                let mut shapes = Shapes::default();
                model.visit(&mut shapes);
                for spec in parameters(&config) {
                    let part = held_part(&spec, mesh, at);
                    assert_eq!(shapes.found[&spec.name], part.shape, "{} of {at:?} on {mesh}", spec.name);
                    let expected = part.cut(&spec.shape, &whole.parameter(&spec.name).unwrap());
                    assert!(
                        model.parameter(&spec.name).unwrap() == expected,
                        "{} of {at:?} on {mesh}",
                        spec.name
                    );
                }
            }
        }
    }
}

#[test]
fn known_counts() {
    let count = |name: &str| {
        let config = preset(name).unwrap();
        SwitchTransformer::new(&config, 0, &test_device()).num_params()
    };
    assert_eq!(count("t5-small"), 60_506_624);
    assert_eq!(count("mt5-small"), 300_176_768);
    assert_eq!(count("switch-base-8"), 619_339_008);
    assert_eq!(count("switch-xxl-128"), 394_543_476_736);
    assert_eq!(count("switch-c-2048"), 1_571_308_972_448);
}

#[test]
fn structure_switches_add_and_remove_parameters() {
    for (gated, tied, router_bias) in [(true, false, true), (false, false, false), (true, true, true)] {
        let config = ModelConfig { gated, tie_word_embeddings: tied, router_bias, ..small_model() };
        assert_equals_table(&config, "small");
    }
    for every in 0..4 {
        let config = ModelConfig {
            num_layers: 5,
            encoder_expert_layer_every: every,
            decoder_expert_layer_every: 3 - every,
            ..small_model()
        };
        assert_equals_table(&config, "small");
    }
}

#[test]
fn parameters_are_replaced_by_name() {
    let mut model = SwitchTransformer::new(&small_model(), 3, &test_device());
    let name = "encoder.block.1.moe.router";
    let values: Vec<f32> = (0..64).map(|i| i as f32).collect();
    model.set_parameter(name, values.clone()).unwrap();
    assert_eq!(model.parameter(name).unwrap(), values);
    assert_eq!(
        model.set_parameter(name, vec![0.0; 5]),
        Err(ParameterError::WrongSize { name: name.to_owned(), expected: 64, found: 5 })
    );
    let unknown = "encoder.block.0.moe.router";
    assert_eq!(model.parameter(unknown), Err(ParameterError::Unknown { name: unknown.to_owned() }));
    assert_eq!(
        model.set_parameter(unknown, vec![0.0; 64]),
        Err(ParameterError::Unknown { name: unknown.to_owned() })
    );
}

#[test]
fn fresh_values_follow_seed_and_name_only() {
    let draw = |seed, config: &ModelConfig| SwitchTransformer::new(config, seed, &test_device());
    let deeper = ModelConfig { num_layers: 4, ..small_model() };
    let name = "encoder.block.1.moe.experts.wi";
    let first = draw(3, &small_model()).parameter(name).unwrap();
    assert_eq!(draw(3, &deeper).parameter(name).unwrap(), first);
    assert_ne!(draw(4, &small_model()).parameter(name).unwrap(), first);
    let (expert_0, expert_1) = first.split_at(first.len() / 4);
    assert_ne!(expert_0, &expert_1[..expert_0.len()], "every expert is drawn on its own");
}
