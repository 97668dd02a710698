//! Small models with distinct values, for the tests of this crate.

use switchyard_config::plan::{CapacityRounding, RouterKind, RoutingConfig, RoutingSemantics};
use switchyard_config::{Activation, Initialization, ModelConfig};

use crate::tensors::{TensorMap, TensorSource, parameter_specs};
use crate::write::TensorPart;

/// T5 v1.0: ReLU, tied, no experts.
pub(crate) fn dense() -> ModelConfig {
    ModelConfig {
        vocab_size: 11,
        d_model: 6,
        d_ff: 10,
        d_kv: 3,
        num_heads: 4,
        num_layers: 2,
        num_decoder_layers: 3,
        relative_attention_num_buckets: 8,
        relative_attention_max_distance: 20,
        activation: Activation::Relu,
        gated: false,
        tie_word_embeddings: true,
        scale_decoder_outputs: true,
        layer_norm_epsilon: 1e-6,
        num_experts: 0,
        encoder_expert_layer_every: 0,
        decoder_expert_layer_every: 0,
        router_bias: false,
        init: Initialization::Hf,
        init_scale: 1.0,
        pad_token_id: 0,
        eos_token_id: 1,
    }
}

/// T5 v1.1: gated GELU, untied.
pub(crate) fn gated() -> ModelConfig {
    ModelConfig {
        activation: Activation::GeluTanh,
        gated: true,
        tie_word_embeddings: false,
        scale_decoder_outputs: false,
        ..dense()
    }
}

/// Switch with experts in every `every`-th layer.
pub(crate) fn switch(every: usize) -> ModelConfig {
    ModelConfig {
        num_layers: 4,
        num_experts: 3,
        encoder_expert_layer_every: every,
        decoder_expert_layer_every: every,
        router_bias: true,
        ..dense()
    }
}

/// The routing of transformers.
pub(crate) fn routing() -> RoutingConfig {
    RoutingConfig {
        router: RouterKind::Top1,
        semantics: RoutingSemantics::Hf,
        capacity_factor: 1.25,
        eval_capacity_factor: 2.0,
        min_expert_capacity: 4,
        capacity_rounding: CapacityRounding::Ceil,
        expert_capacity: 7,
        router_jitter_noise: 0.01,
        load_balancing_loss_coef: 0.001,
        router_z_loss_coef: 0.002,
        group_rows: 0,
        force_balanced: false,
    }
}

/// Every parameter of `model`, no two values alike, no value exact in a shorter format.
pub(crate) fn filled(model: &ModelConfig) -> TensorMap {
    let mut map = TensorMap::default();
    let mut count = 0_u32;
    for (name, shape) in parameter_specs(model) {
        let values = (0..shape.iter().product()).map(|_| {
            count += 1;
            (count as f32).sin() + 1e-7
        });
        let values = values.collect();
        map.insert(&name, &shape, values);
    }
    map
}

/// The tensors of `source` for a rank that owns them all.
pub(crate) fn whole_parts(source: &dyn TensorSource) -> Vec<TensorPart> {
    let part = |(name, shape): (String, Vec<usize>)| {
        TensorPart::whole(&name, &shape, source.read(&name).unwrap().into_owned())
    };
    source.specs().into_iter().map(part).collect()
}

/// Panics unless the two hold the same bits under the same names.
pub(crate) fn assert_same_bits(a: &dyn TensorSource, b: &dyn TensorSource) {
    let sorted = |source: &dyn TensorSource| {
        let mut specs = source.specs();
        specs.sort();
        specs
    };
    assert_eq!(sorted(a), sorted(b));
    for (name, _) in a.specs() {
        let bits = |source: &dyn TensorSource| -> Vec<u32> {
            source.read(&name).unwrap().iter().map(|v| v.to_bits()).collect()
        };
        assert!(bits(a) == bits(b), "{name} differs");
    }
}
