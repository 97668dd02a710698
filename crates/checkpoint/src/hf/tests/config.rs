use std::fs;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use switchyard_config::plan::RoutingConfig;
use switchyard_config::{Activation, Initialization, ModelConfig, StackKind};

use crate::hf::config::{HfConfig, representable, write};
use crate::hf::{Family, StoredDtype};
use crate::testing::{dense, gated, routing, switch};

fn read(fields: &Value) -> Result<HfConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    fs::write(&path, fields.to_string()).unwrap();
    HfConfig::read(&path).map_err(|error| error.to_string())
}

/// The config that comes back when `model` is written and read again with its own head.
fn again(model: &ModelConfig, routing: &RoutingConfig) -> HfConfig {
    let family = representable(model, routing).unwrap();
    let capacity = (family == Family::Switch).then_some(routing.expert_capacity);
    let fields = write(family, model, routing, capacity, StoredDtype::F32);
    let mut config = read(&json!(fields)).unwrap();
    assert_eq!(config.family, family);
    config.decide_head(!model.tie_word_embeddings);
    config
}

fn with(mut fields: Value, changes: Value) -> Value {
    let (fields_map, Value::Object(changes)) = (fields.as_object_mut().unwrap(), changes) else { panic!() };
    fields_map.extend(changes);
    fields
}

#[test]
fn missing_fields_have_the_defaults_of_their_class() {
    let sizes = |model_type: &str| {
        let config = read(&json!({"model_type": model_type})).unwrap();
        let m = config.model;
        (
            [m.vocab_size, m.d_model, m.d_kv, m.d_ff, m.num_layers, m.num_decoder_layers, m.num_heads],
            m.activation,
            m.gated,
        )
    };
    assert_eq!(sizes("t5"), ([32128, 512, 64, 2048, 6, 6, 8], Activation::Relu, false));
    assert_eq!(sizes("mt5"), ([250_112, 512, 64, 1024, 8, 8, 6], Activation::GeluTanh, true));
    assert_eq!(sizes("switch_transformers"), ([32128, 768, 64, 2048, 12, 12, 12], Activation::Relu, false));
    let HfConfig { model, routing, .. } = read(&json!({"model_type": "switch_transformers"})).unwrap();
    assert_eq!((model.num_experts, routing.expert_capacity, model.router_bias), (8, 64, false));
    assert_eq!((routing.load_balancing_loss_coef, routing.router_z_loss_coef), (0.001, 0.001));
    assert_eq!((routing.router_jitter_noise, model.layer_norm_epsilon), (0.01, 1e-6));
    // 12 layers, 3 of them sparse.
    assert_eq!(model.sparse_layers(StackKind::Encoder), [1, 5, 9]);
    assert_eq!((model.relative_attention_num_buckets, model.relative_attention_max_distance), (32, 128));
    assert_eq!(
        (model.pad_token_id, model.eos_token_id, model.init, model.init_scale),
        (0, 1, Initialization::Hf, 1.0)
    );
}

#[test]
fn the_decoder_of_switch_has_a_default_of_its_own() {
    let layers = |fields: Value| read(&fields).unwrap().model.num_decoder_layers;
    assert_eq!(layers(json!({"model_type": "t5", "num_layers": 3})), 3);
    assert_eq!(layers(json!({"model_type": "switch_transformers", "num_layers": 3})), 12);
    let null = json!({"model_type": "switch_transformers", "num_layers": 3, "num_decoder_layers": null});
    assert_eq!(layers(null), 3);
}

#[test]
fn sparse_layers_follow_the_step() {
    let sparse = |changes: Value| {
        let base = json!({"model_type": "switch_transformers", "num_layers": 4, "num_decoder_layers": 5});
        let model = read(&with(base, changes)).unwrap().model;
        (model.sparse_layers(StackKind::Encoder), model.sparse_layers(StackKind::Decoder), model.num_experts)
    };
    let counts = |encoder, decoder| json!({"num_sparse_encoder_layers": encoder, "num_sparse_decoder_layers": decoder});
    assert_eq!(sparse(counts(2, 2)), (vec![1, 3], vec![1, 3], 8));
    assert_eq!(sparse(counts(3, 5)), (vec![0, 1, 2, 3], vec![0, 1, 2, 3, 4], 8));
    // No sparse layer asked for still leaves one.
    assert_eq!(sparse(counts(0, 0)), (vec![1], vec![1], 8));
    assert_eq!(sparse(counts(9, 1)), (vec![], vec![1], 8));
    let steps = |encoder, decoder| json!({"encoder_sparse_step": encoder, "decoder_sparse_step": decoder});
    assert_eq!(sparse(with(counts(2, 2), steps(0, 3))), (vec![], vec![1, 4], 8));
    assert_eq!(sparse(with(counts(2, 2), steps(0, 0))), (vec![], vec![], 0));
}

#[test]
fn the_feed_forward_projection_names_activation_and_gate() {
    let activation = |fields: Value| {
        let model = read(&with(json!({"model_type": "t5"}), fields)).unwrap().model;
        (model.activation, model.gated)
    };
    let projection = |text: &str| activation(json!({"feed_forward_proj": text}));
    assert_eq!(projection("relu"), (Activation::Relu, false));
    assert_eq!(projection("gelu"), (Activation::Gelu, false));
    assert_eq!(projection("gelu_new"), (Activation::GeluTanh, false));
    assert_eq!(projection("gated-gelu"), (Activation::GeluTanh, true));
    assert_eq!(projection("gated-silu"), (Activation::Silu, true));
    assert_eq!(projection("gated-gelu_python"), (Activation::Gelu, true));
    // Written fields win in both versions of transformers.
    let written = json!({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "is_gated_act": true});
    assert_eq!(activation(written), (Activation::Gelu, true));
    assert_eq!(activation(json!({"is_gated_act": true})), (Activation::Relu, true));
    let switch = json!({"model_type": "switch_transformers", "dense_act_fn": "gelu_new"});
    assert_eq!(read(&switch).unwrap().model.activation, Activation::GeluTanh);
}

#[test]
fn tying_and_scaling_of_the_head() {
    // (model_type, tie_word_embeddings, scale_decoder_outputs, head in the file) -> scales
    let cases = [
        ("t5", None, None, false, true),
        ("t5", Some(false), None, true, false),
        ("t5", Some(false), Some(false), true, false),
        // As transformers 5 saves v1.1.
        ("t5", Some(true), Some(false), true, false),
        ("mt5", Some(true), None, true, false),
        ("mt5", Some(false), None, true, false),
        ("mt5", Some(true), None, false, true),
        ("switch_transformers", None, None, false, true),
        ("switch_transformers", Some(false), None, true, false),
    ];
    for (model_type, tie, scale, untied, scales) in cases {
        let fields =
            json!({"model_type": model_type, "tie_word_embeddings": tie, "scale_decoder_outputs": scale});
        let mut config = read(&fields).unwrap();
        config.decide_head(untied);
        let found = (config.model.tie_word_embeddings, config.model.scale_decoder_outputs);
        assert_eq!(found, (!untied, scales), "{fields}");
    }
}

#[test]
fn unusable_configs_name_field_and_value() {
    let t5 = |changes: Value| read(&with(json!({"model_type": "t5"}), changes)).unwrap_err();
    let switch =
        |changes: Value| read(&with(json!({"model_type": "switch_transformers"}), changes)).unwrap_err();
    let messages = [
        (
            read(&json!({"model_type": "bart"})).unwrap_err(),
            "`model_type` is \"bart\"; expected \"t5\", \"mt5\"",
        ),
        (read(&json!({})).unwrap_err(), "`model_type` is missing"),
        (read(&json!([])).unwrap_err(), "config.json: not as expected"),
        (t5(json!({"d_model": "big"})), "`d_model` is \"big\"; expected a whole number from 0 to"),
        (t5(json!({"d_ff": 0})), "`d_ff` is 0; expected at least 1"),
        (t5(json!({"num_layers": 100_000_000_000_u64})), "`num_layers` is 100000000000"),
        (t5(json!({"d_kv": -1})), "`d_kv` is -1"),
        (t5(json!({"layer_norm_epsilon": "x"})), "`layer_norm_epsilon` is \"x\""),
        (
            t5(json!({"feed_forward_proj": "gated-tanh"})),
            "`feed_forward_proj` is \"gated-tanh\"; expected the activation",
        ),
        (t5(json!({"dense_act_fn": "mish"})), "`dense_act_fn` is \"mish\""),
        (t5(json!({"decoder_start_token_id": 2})), "`decoder_start_token_id` is 2; expected pad_token_id 0"),
        (
            t5(json!({"eos_token_id": 32128})),
            "`eos_token_id` is 32128; expected an id below vocab_size 32128",
        ),
        (t5(json!({"relative_attention_num_buckets": 7})), "`relative_attention_num_buckets` is 7"),
        (t5(json!({"relative_attention_max_distance": 16})), "more than half of the 32"),
        (t5(json!({"tie_word_embeddings": 1})), "`tie_word_embeddings` is 1; expected true or false"),
        (t5(json!({"quantization_config": {"load_in_8bit": true}})), "only float tensors can be read"),
        (switch(json!({"num_experts": 0})), "`num_experts` is 0; expected at least 1"),
        (switch(json!({"num_layers": 4000, "num_experts": 16384})), "in all layers together"),
        (
            switch(json!({"router_jitter_noise": 1.5})),
            "`router_jitter_noise` is 1.5; expected a number below 1",
        ),
        (switch(json!({"router_z_loss_coef": -0.1})), "`router_z_loss_coef` is -0.1"),
    ];
    for (message, expected) in messages {
        assert!(message.contains(expected) && message.contains("config.json"), "{message}\n{expected}");
    }
}

#[test]
fn every_field_of_the_class_is_written() {
    let keys = |model: &ModelConfig, capacity: Option<usize>| {
        let family = representable(model, &routing()).unwrap();
        let fields = write(family, model, &routing(), capacity, StoredDtype::Bf16);
        fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<Map<_, _>>()
    };
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/parity/");
    for (fixture, model, capacity) in [
        ("t5_v11_gated_gelu_untied", gated(), None),
        ("t5_v10_relu_tied", dense(), None),
        ("switch_step2_drop", switch(2), Some(7)),
    ] {
        let theirs = super::read_json(&std::path::Path::new(fixtures).join(fixture).join("config.json"));
        let ours = keys(&model, capacity);
        for key in theirs.as_object().unwrap().keys() {
            assert!(ours.contains_key(key), "{fixture}: {key}");
        }
        assert_eq!(ours["dtype"], "bfloat16");
        assert_eq!(ours["tie_word_embeddings"], model.tie_word_embeddings);
        assert_eq!(ours.get("scale_decoder_outputs").is_some(), !model.tie_word_embeddings);
    }
    let mt5 = ModelConfig { vocab_size: 250_112, ..gated() };
    assert_eq!(keys(&mt5, None)["tokenizer_class"], "T5Tokenizer");
}

fn models() -> impl Strategy<Value = ModelConfig> {
    let activation = prop_oneof![
        Just(Activation::Relu),
        Just(Activation::GeluTanh),
        Just(Activation::Gelu),
        Just(Activation::Silu)
    ];
    let sizes = (8_usize..300_000, 1_usize..5000, 1_usize..5000, 1_usize..300, 1_usize..130);
    let layers = (1_usize..50, 1_usize..50, 2_usize..50, 0_usize..300);
    let experts = (0_usize..200, 0_usize..9, 0_usize..9, any::<bool>());
    let rest = (activation, any::<bool>(), any::<bool>(), 1e-9..1e-3, 0.01..10.0);
    (sizes, layers, experts, rest).prop_map(|(sizes, layers, experts, rest)| {
        let mut model = ModelConfig {
            vocab_size: sizes.0,
            d_model: sizes.1,
            d_ff: sizes.2,
            d_kv: sizes.3,
            num_heads: sizes.4,
            num_layers: layers.0,
            num_decoder_layers: layers.1,
            relative_attention_num_buckets: 2 * layers.2,
            relative_attention_max_distance: layers.2 + 1 + layers.3,
            activation: rest.0,
            gated: rest.1,
            tie_word_embeddings: rest.2,
            scale_decoder_outputs: rest.2,
            layer_norm_epsilon: rest.3,
            num_experts: experts.0,
            encoder_expert_layer_every: experts.1,
            decoder_expert_layer_every: experts.2,
            router_bias: experts.3,
            init: Initialization::Hf,
            init_scale: rest.4,
            pad_token_id: sizes.0 as u32 - 1,
            eos_token_id: 3,
        };
        let sparse = |stack| !model.sparse_layers(stack).is_empty();
        if sparse(StackKind::Encoder) || sparse(StackKind::Decoder) {
            model.gated = false;
        } else {
            (model.num_experts, model.router_bias) = (0, false);
            (model.encoder_expert_layer_every, model.decoder_expert_layer_every) = (0, 0);
        }
        model
    })
}

proptest! {
    #[test]
    fn any_config_comes_back(
        model in models(), capacity in 0_usize..5000, jitter in 0.0..0.99, z in 0.0..1.0, balance in 0.0..1.0
    ) {
        let routing = RoutingConfig {
            expert_capacity: capacity,
            router_jitter_noise: jitter,
            router_z_loss_coef: z,
            load_balancing_loss_coef: balance,
            ..routing()
        };
        let config = again(&model, &routing);
        prop_assert_eq!(&config.model, &model);
        if config.family == Family::Switch {
            prop_assert_eq!(&config.routing, &routing);
        }
    }
}
