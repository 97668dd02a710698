use std::collections::BTreeMap;
use std::fs;

use serde_json::json;
use switchyard_config::plan::{RouterKind, RoutingConfig, RoutingSemantics};
use switchyard_config::{Activation, ModelConfig};

use super::{Exported, options, refusal};
use crate::hf::{ExportOptions, StoredDtype, export};
use crate::shard::ShardReader;
use crate::testing::{assert_same_bits, dense, filled, gated, routing, switch};
use crate::{CheckpointError, ModelKind, TensorMap, TensorSource};

fn mt5() -> ModelConfig {
    ModelConfig { vocab_size: 250_112, d_model: 2, num_layers: 1, num_decoder_layers: 1, ..gated() }
}

#[test]
fn every_family_comes_back_bitwise() {
    let models = [
        ("t5", dense()),
        ("t5", gated()),
        ("mt5", mt5()),
        ("switch_transformers", switch(1)),
        ("switch_transformers", switch(2)),
        (
            "switch_transformers",
            ModelConfig { encoder_expert_layer_every: 0, router_bias: false, ..switch(3) },
        ),
    ];
    for (model_type, model) in models {
        for max_shard_bytes in [None, Some(3000)] {
            let exported = Exported::new(&model, &ExportOptions { max_shard_bytes, ..options() });
            assert_eq!(exported.summary.model_type, model_type);
            assert_eq!(exported.summary.num_parameters, model.num_parameters());
            assert_eq!(exported.summary.tensor_bytes, 4 * model.num_parameters());
            assert_eq!(exported.summary.shards.len() > 1, max_shard_bytes.is_some());
            let opened = exported.open().unwrap();
            assert_eq!(opened.kind(), ModelKind::HuggingFace);
            assert_eq!(opened.model(), &model);
            assert_eq!(opened.inputs_length(), None);
            assert_same_bits(&opened, &filled(&model));
        }
    }
}

#[test]
fn an_untied_switch_stores_the_embedding_of_each_stack() {
    let model = ModelConfig { tie_word_embeddings: false, scale_decoder_outputs: false, ..switch(2) };
    let exported = Exported::new(&model, &options());
    let embedding = (model.vocab_size * model.d_model) as u64;
    assert_eq!(exported.summary.num_parameters, model.num_parameters() + 2 * embedding);
    let file = ShardReader::open(&exported.path().join("model.safetensors")).unwrap();
    for stack in ["encoder", "decoder"] {
        let copy = file.read(&format!("{stack}.embed_tokens.weight")).unwrap();
        assert_eq!(copy, file.read("shared.weight").unwrap());
    }
    let opened = exported.open().unwrap();
    assert_eq!(opened.model(), &model);
    assert_same_bits(&opened, &filled(&model));
}

#[test]
fn matrices_are_turned_and_experts_unstacked() {
    let exported = Exported::new(&switch(2), &options());
    let file = ShardReader::open(&exported.path().join("model.safetensors")).unwrap();
    let ours = filled(&switch(2));
    // d_model 6, d_ff 10.
    let (here, there) = (
        ours.read("encoder.block.1.moe.experts.wo").unwrap(),
        "encoder.block.1.layer.1.mlp.experts.expert_2.wo.weight",
    );
    assert_eq!(file.tensors()[there].shape, [6, 10]);
    assert_eq!(file.read(there).unwrap()[4 * 10 + 7], here[2 * 60 + 7 * 6 + 4]);
    assert_eq!(file.tensors()["encoder.block.1.layer.1.mlp.router.classifier.weight"].shape, [3, 6]);
    assert_eq!(file.read("shared.weight").unwrap(), ours.read("shared.embedding").unwrap().as_ref());
    assert!(!file.tensors().contains_key("lm_head.weight"));
}

#[test]
fn shards_are_filled_and_indexed() {
    let most = 2000;
    let exported = Exported::new(&switch(2), &ExportOptions { max_shard_bytes: Some(most), ..options() });
    let count = exported.summary.shards.len();
    let index = exported.json("model.safetensors.index.json");
    let places: BTreeMap<String, String> = serde_json::from_value(index["weight_map"].clone()).unwrap();
    let mut held = BTreeMap::new();
    let mut total = 0;
    for (i, file) in exported.summary.shards.iter().enumerate() {
        assert_eq!(*file, format!("model-{:05}-of-{count:05}.safetensors", i + 1));
        let bytes = fs::read(exported.path().join(file)).unwrap();
        assert!(String::from_utf8_lossy(&bytes[8..60]).starts_with("{\"__metadata__\":{\"format\":\"pt\"}"));
        let reader = ShardReader::open(&exported.path().join(file)).unwrap();
        let size: usize = reader.tensors().values().map(|t| t.data_offsets.1 - t.data_offsets.0).sum();
        assert!(size as u64 <= most);
        total += size;
        held.extend(reader.tensors().keys().map(|name| (name.clone(), file.clone())));
    }
    assert_eq!(places, held);
    assert_eq!(places.len(), exported.summary.num_tensors);
    assert_eq!(index["metadata"]["total_size"], total);
    assert!(count > 3 && !exported.path().join("model.safetensors").exists());
}

#[test]
fn short_formats_round_and_overflow_is_refused() {
    for dtype in [StoredDtype::Bf16, StoredDtype::F16] {
        let exported = Exported::new(&dense(), &ExportOptions { dtype, ..options() });
        assert_eq!(exported.summary.tensor_bytes, 2 * dense().num_parameters());
        let opened = exported.open().unwrap();
        let (ours, theirs) = (filled(&dense()), opened.read("decoder.block.2.feed_forward.wo").unwrap());
        for (a, b) in ours.read("decoder.block.2.feed_forward.wo").unwrap().iter().zip(theirs.iter()) {
            assert!(a != b && (a - b).abs() < 4e-3 * a.abs().max(1e-2), "{a} {b}");
        }
    }
    let mut large = filled(&dense());
    large.insert("encoder.final_norm", &[6], vec![1e5; 6]);
    let root = tempfile::tempdir().unwrap();
    let options = ExportOptions { dtype: StoredDtype::F16, ..options() };
    let error = export(&large, &dense(), &routing(), &options, &root.path().join("out")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `encoder.final_layer_norm.weight` was refused: 1e5 is infinite in F16; store F32 instead"
    );
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

#[test]
fn the_files_beside_the_tensors() {
    let root = tempfile::tempdir().unwrap();
    let tokenizer_files = vec![root.path().join("tokenizer.json"), root.path().join("tokenizer_config.json")];
    fs::write(&tokenizer_files[0], "{\"version\":\"1.0\"}").unwrap();
    fs::write(&tokenizer_files[1], "{}").unwrap();
    let exported = Exported::new(&gated(), &ExportOptions { tokenizer_files, ..options() });
    let opened = exported.open().unwrap();
    assert_eq!(opened.tokenizer_files().len(), 2);
    assert_eq!(fs::read_to_string(opened.tokenizer().unwrap()).unwrap(), "{\"version\":\"1.0\"}");
    assert_eq!(
        exported.json("generation_config.json"),
        json!({
            "_from_model_config": true, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
            "transformers_version": "4.57.6",
        })
    );
    let card = fs::read_to_string(exported.path().join("README.md")).unwrap();
    assert!(card.starts_with("---\nlibrary_name: transformers\n"));
    assert!(card.contains("# T5, 3,490 parameters") && card.contains("AutoTokenizer"), "{card}");
    assert!(card.contains("use_cache=False"), "the decoder is the deeper stack");
}

#[test]
fn the_fixed_capacity_is_that_of_evaluation() {
    let paper = RoutingConfig { semantics: RoutingSemantics::Paper, expert_capacity: 0, ..routing() };
    let exported = |routing: &RoutingConfig, row_tokens: usize| {
        let root = tempfile::tempdir().unwrap();
        let options = ExportOptions { row_tokens, ..options() };
        let summary = export(&filled(&switch(2)), &switch(2), routing, &options, &root.path().join("out"))?;
        let config = super::read_json(&root.path().join("out/config.json"));
        assert_eq!(config["expert_capacity"], json!(summary.expert_capacity));
        let card = fs::read_to_string(root.path().join("out/README.md")).unwrap();
        assert_eq!(card.contains("the capacity of a row of"), routing.semantics == RoutingSemantics::Paper);
        Ok::<_, CheckpointError>(summary.expert_capacity)
    };
    // ceil(32 * 2.0 / 3)
    assert_eq!(exported(&paper, 32).unwrap(), Some(22));
    assert!(matches!(exported(&paper, 0), Err(CheckpointError::NoRowTokens)));
    assert_eq!(exported(&routing(), 0).unwrap(), Some(7));
}

#[test]
fn what_transformers_cannot_do_is_refused_by_name() {
    let sparse = switch(2);
    let with = |router| RoutingConfig { router, ..routing() };
    let refused = |model: &ModelConfig, routing: &RoutingConfig, what: &str| {
        let message = refusal(model, routing);
        assert!(message.starts_with(&format!("transformers cannot represent {what}; ")), "{message}");
    };
    refused(&sparse, &with(RouterKind::Top2), "the top2 router");
    refused(&sparse, &with(RouterKind::ExpertChoice), "the expert_choice router");
    refused(&sparse, &RoutingConfig { force_balanced: true, ..routing() }, "round-robin routing");
    refused(&ModelConfig { gated: true, ..sparse }, &routing(), "gated experts");
    let unscaled = ModelConfig { scale_decoder_outputs: false, ..dense() };
    refused(&unscaled, &routing(), "a tied head that does not scale its input");
    let scaled = ModelConfig { scale_decoder_outputs: true, ..gated() };
    refused(&scaled, &routing(), "an untied head that scales its input");
    // A dense model has no router that could stand in the way.
    export(
        &filled(&dense()),
        &dense(),
        &with(RouterKind::Top2),
        &options(),
        &tempfile::tempdir().unwrap().path().join("x"),
    )
    .unwrap();
}

#[test]
fn every_tensor_given_must_be_used() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let mut tensors = filled(&switch(2));
    tensors.insert("encoder.block.9.feed_forward.wi", &[1], vec![0.0]);
    tensors.insert("encoder.block.1.moe.router", &[3, 6], vec![0.0; 18]);
    tensors.take("decoder.final_norm");
    let error = export(&tensors, &switch(2), &routing(), &options(), &out).unwrap_err();
    let CheckpointError::WrongParameters { faults } = error else { panic!("{error}") };
    assert_eq!(
        faults,
        [
            "`encoder.block.1.moe.router` has shape [3, 6]; expected [6, 3]",
            "`decoder.final_norm` is missing; expected shape [6]",
            "`encoder.block.9.feed_forward.wi` is not of this model",
        ]
    );
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

/// Says less than it holds.
struct Short(TensorMap);

impl TensorSource for Short {
    fn specs(&self) -> Vec<(String, Vec<usize>)> {
        self.0.specs()
    }

    fn read(&self, name: &str) -> Result<std::borrow::Cow<'_, [f32]>, CheckpointError> {
        let values = self.0.read(name)?.into_owned();
        Ok(if name == "encoder.block.1.moe.experts.wi" { values[6..].to_vec() } else { values }.into())
    }
}

#[test]
fn sources_that_lie_and_directories_in_use_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let write = |source: &dyn TensorSource| export(source, &switch(2), &routing(), &options(), &out);
    let message = write(&Short(filled(&switch(2)))).unwrap_err().to_string();
    assert!(message.contains("`encoder.block.1.moe.experts.wi` was refused: it has 174 values"), "{message}");
    assert!(!out.exists());
    fs::create_dir(&out).unwrap();
    write(&filled(&switch(2))).unwrap();
    let again = write(&filled(&switch(2))).unwrap_err();
    assert!(matches!(again, CheckpointError::Exists { path } if path == out));
    fs::remove_dir_all(&out).unwrap();
    fs::write(&out, "a file").unwrap();
    assert!(matches!(write(&filled(&switch(2))), Err(CheckpointError::Exists { .. })));
    assert_eq!(fs::read_to_string(&out).unwrap(), "a file");
}

#[test]
fn a_model_that_was_imported_can_be_exported() {
    let exact = ModelConfig { activation: Activation::Gelu, ..gated() };
    let first = Exported::new(&exact, &options());
    let opened = first.open().unwrap();
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("again");
    export(&opened, opened.model(), opened.routing(), &options(), &out).unwrap();
    for file in ["config.json", "model.safetensors", "generation_config.json", "README.md"] {
        assert_eq!(fs::read(first.path().join(file)).unwrap(), fs::read(out.join(file)).unwrap(), "{file}");
    }
}
