//! Models that transformers itself wrote.

use std::path::{Path, PathBuf};

use half::bf16;
use serde_json::Value;
use switchyard_config::{Activation, StackKind};

use super::{options, read_json};
use crate::hf::{ExportOptions, export};
use crate::shard::ShardReader;
use crate::testing::assert_same_bits;
use crate::{ModelDirectory, TensorSource, open_model};

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/parity")).join(name)
}

fn open(name: &str) -> ModelDirectory {
    open_model(&fixture(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn architectures_are_understood() {
    for name in [
        "t5_v10_relu_tied",
        "t5_v11_gated_gelu_untied",
        "mt5_like",
        "switch_step1_nodrop",
        "switch_step2_drop",
    ] {
        let opened = open(name);
        let expected = read_json(&fixture(name).join("expected.json"));
        assert_eq!(opened.model().num_parameters(), expected["num_parameters"].as_u64().unwrap(), "{name}");
        for (key, stack) in
            [("encoder_sparse_layers", StackKind::Encoder), ("decoder_sparse_layers", StackKind::Decoder)]
        {
            let layers: Vec<Value> =
                opened.model().sparse_layers(stack).into_iter().map(Value::from).collect();
            assert_eq!(
                Value::from(layers),
                expected.get(key).cloned().unwrap_or(Value::Array(Vec::new())),
                "{name}"
            );
        }
        let untied = name.starts_with("t5_v11") || name.starts_with("mt5");
        assert_eq!(
            (opened.model().tie_word_embeddings, opened.model().scale_decoder_outputs),
            (!untied, !untied)
        );
        assert_eq!(
            (opened.model().activation == Activation::GeluTanh, opened.model().gated),
            (untied, untied)
        );
    }
    assert_eq!(open("switch_step2_drop").routing().expert_capacity, 3);
}

#[test]
fn layouts_of_the_same_weights_agree() {
    let plain = open("t5_v10_relu_tied");
    for name in ["t5_v10_sharded", "t5_v10_hubstyle"] {
        let other = open(name);
        assert_eq!(other.model(), plain.model());
        assert_same_bits(&other, &plain);
    }
    let (exact, rounded) = (open("t5_v11_gated_gelu_untied"), open("t5_v11_bf16"));
    assert_eq!(exact.model(), rounded.model());
    for (name, _) in exact.specs() {
        let expected: Vec<f32> =
            exact.read(&name).unwrap().iter().map(|&v| bf16::from_f32(v).to_f32()).collect();
        assert_eq!(rounded.read(&name).unwrap(), expected, "{name}");
    }
}

#[test]
fn elements_stand_where_the_model_wants_them() {
    let opened = open("switch_step2_drop");
    let file = ShardReader::open(&fixture("switch_step2_drop").join("model.safetensors")).unwrap();
    let (d, f) = (opened.model().d_model, opened.model().d_ff);
    let theirs = file.read("decoder.block.3.layer.2.mlp.experts.expert_2.wi.weight").unwrap();
    let ours = opened.read("decoder.block.3.moe.experts.wi").unwrap();
    for (from, to) in [(0, 0), (5, 17), (d - 1, f - 1)] {
        assert_eq!(ours[2 * d * f + from * f + to], theirs[to * d + from]);
    }
    let (ours, theirs) = (
        opened.read("encoder.relative_bias").unwrap(),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    );
    assert_eq!(ours, file.read(theirs).unwrap());
}

#[test]
fn exports_of_imports_hold_the_same_tensors() {
    for name in [
        "t5_v10_hubstyle",
        "t5_v11_gated_gelu_untied",
        "mt5_like",
        "switch_step1_nodrop",
        "switch_step2_drop",
    ] {
        let opened = open(name);
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        let options = ExportOptions { max_shard_bytes: Some(100_000), ..options() };
        let summary = export(&opened, opened.model(), opened.routing(), &options, &out).unwrap();
        assert!(summary.shards.len() > 1);
        let again = open_model(&out).unwrap();
        assert_eq!((again.model(), again.routing()), (opened.model(), opened.routing()));
        assert_same_bits(&again, &opened);
    }
}
