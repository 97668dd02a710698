use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use switchyard_config::ModelConfig;

use super::{Exported, options, read_json};
use crate::hf::{ExportOptions, StoredDtype};
use crate::shard::{ShardReader, ShardWriter};
use crate::testing::{assert_same_bits, dense, filled, gated, switch};
use crate::{CheckpointError, TensorSource, open_model};

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Changes the tensors of a safetensors file.
fn edit_tensors(path: &Path, edit: impl FnOnce(&mut Tensors)) {
    let reader = ShardReader::open(path).unwrap();
    let tensor = |name: &String| (reader.tensors()[name].shape.clone(), reader.read(name).unwrap());
    let mut tensors: Tensors = reader.tensors().keys().map(|name| (name.clone(), tensor(name))).collect();
    drop(reader);
    edit(&mut tensors);
    let specs: Vec<_> = tensors.iter().map(|(name, (shape, _))| (name.clone(), shape.clone())).collect();
    let mut writer = ShardWriter::create(path, &specs, StoredDtype::F32).unwrap();
    for (name, (_, values)) in &tensors {
        writer.write(name, values).unwrap();
    }
    writer.finish().unwrap();
}

/// Changes fields of `config.json`.
fn edit_config(path: &Path, changes: &Value) {
    let file = path.join("config.json");
    let mut fields = read_json(&file);
    for (key, value) in changes.as_object().unwrap() {
        fields[key] = value.clone();
    }
    fs::write(file, fields.to_string()).unwrap();
}

fn faults(path: &Path) -> Vec<String> {
    match open_model(path).unwrap_err() {
        CheckpointError::Mismatch { faults, .. } | CheckpointError::IncompleteIndex { faults, .. } => faults,
        other => panic!("{other}"),
    }
}

#[test]
fn redundant_keys_of_old_files_are_passed_over() {
    let exported = Exported::new(&dense(), &options());
    edit_tensors(&exported.path().join("model.safetensors"), |tensors| {
        let shared = tensors["shared.weight"].clone();
        for name in ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"] {
            tensors.insert(name.to_owned(), shared.clone());
        }
        let dead = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight";
        tensors.insert(dead.to_owned(), (vec![8, 4], vec![0.5; 32]));
    });
    let opened = exported.open().unwrap();
    assert_eq!(opened.model(), &dense());
    assert_same_bits(&opened, &filled(&dense()));
}

#[test]
fn a_head_of_its_own_unties_whatever_the_config_says() {
    for model in
        [gated(), ModelConfig { tie_word_embeddings: false, scale_decoder_outputs: false, ..switch(2) }]
    {
        let exported = Exported::new(&model, &options());
        // As transformers 5 saves T5 v1.1.
        edit_config(&exported.path(), &json!({"tie_word_embeddings": true}));
        let opened = exported.open().unwrap();
        assert_eq!(opened.model(), &model);
        assert_same_bits(&opened, &filled(&model));
    }
    let exported = Exported::new(&gated(), &options());
    let file = exported.path().join("model.safetensors");
    edit_tensors(&file, |tensors| drop(tensors.remove("lm_head.weight")));
    assert_eq!(faults(&exported.path()), ["`lm_head.weight` is missing; expected shape [11, 6]"]);
    edit_config(&exported.path(), &json!({"tie_word_embeddings": true}));
    let opened = exported.open().unwrap();
    assert!(opened.model().tie_word_embeddings && !opened.model().scale_decoder_outputs);
}

#[test]
fn embeddings_of_a_stack_of_its_own_are_refused() {
    let model = ModelConfig { tie_word_embeddings: false, scale_decoder_outputs: false, ..switch(2) };
    let exported = Exported::new(&model, &options());
    let file = exported.path().join("model.safetensors");
    edit_tensors(&file, |tensors| tensors.get_mut("decoder.embed_tokens.weight").unwrap().1[7] += 1.0);
    let fault = "`decoder.embed_tokens.weight` is not equal to `shared.weight`; expected one embedding";
    assert_eq!(faults(&exported.path()), [fault]);
    edit_tensors(&file, |tensors| drop(tensors.remove("decoder.embed_tokens.weight")));
    assert_eq!(
        faults(&exported.path()),
        ["`decoder.embed_tokens.weight` is missing; expected shape [11, 6]"]
    );
}

#[test]
fn tensors_that_do_not_fit_are_all_listed() {
    let exported = Exported::new(&switch(2), &options());
    edit_tensors(&exported.path().join("model.safetensors"), |tensors| {
        tensors.remove("encoder.block.1.layer.1.mlp.experts.expert_1.wi.weight");
        tensors.remove("decoder.final_layer_norm.weight");
        tensors.get_mut("encoder.block.0.layer.0.SelfAttention.q.weight").unwrap().0 = vec![6, 12];
        tensors.insert("encoder.block.0.layer.0.SelfAttention.q.bias".to_owned(), (vec![1], vec![0.0]));
    });
    assert_eq!(
        faults(&exported.path()),
        [
            "`encoder.block.0.layer.0.SelfAttention.q.weight` in model.safetensors has shape [6, 12]; expected [12, 6]",
            "`encoder.block.1.layer.1.mlp.experts.expert_1.wi.weight` is missing; expected shape [10, 6]",
            "`decoder.final_layer_norm.weight` is missing; expected shape [6]",
            "`encoder.block.0.layer.0.SelfAttention.q.bias` in model.safetensors is not of this model",
        ]
    );
}

#[test]
fn files_of_mixed_formats_are_read() {
    let exported = Exported::new(&dense(), &options());
    let path = exported.path().join("model.safetensors");
    let reader = ShardReader::open(&path).unwrap();
    let names: Vec<String> = reader.tensors().keys().cloned().collect();
    // Every other tensor in double precision.
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for (i, name) in names.iter().enumerate() {
        let (start, values) = (data.len(), reader.read(name).unwrap());
        let double = i % 2 == 0;
        if double {
            data.extend(values.iter().flat_map(|&v| f64::from(v).to_le_bytes()));
        } else {
            data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        }
        let dtype = if double { "F64" } else { "F32" };
        let shape = &reader.tensors()[name].shape;
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    drop(reader);
    let write = |header: &serde_json::Map<String, Value>| {
        let text = Value::Object(header.clone()).to_string();
        fs::write(&path, [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &data].concat()).unwrap();
    };
    write(&header);
    assert_same_bits(&exported.open().unwrap(), &filled(&dense()));
    for entry in header.values_mut().filter(|entry| entry["dtype"] == "F64").take(2) {
        entry["dtype"] = json!("I64");
    }
    write(&header);
    let faults = faults(&exported.path());
    assert_eq!(faults.len(), 2);
    assert!(
        faults[0].ends_with("in model.safetensors has type I64; expected F32, BF16, F16 or F64"),
        "{faults:?}"
    );
}

#[test]
fn an_index_must_agree_with_its_files() {
    let exported = Exported::new(&switch(2), &ExportOptions { max_shard_bytes: Some(8000), ..options() });
    let [first, second, last] = &exported.summary.shards[..] else { panic!("{:?}", exported.summary) };
    let index = exported.path().join("model.safetensors.index.json");
    let original = read_json(&index);
    let edit = |edit: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let mut changed = original.clone();
        edit(changed["weight_map"].as_object_mut().unwrap());
        fs::write(&index, changed.to_string()).unwrap();
    };
    edit(&|map| {
        map["shared.weight"] = json!(last);
        map.insert("extra.weight".to_owned(), json!(second));
    });
    assert_eq!(
        faults(&exported.path()),
        [
            format!("`extra.weight` should be in {second}, which does not hold it"),
            format!("`shared.weight` should be in {last}, which does not hold it"),
            format!("`shared.weight` is in {first}, but not by model.safetensors.index.json"),
        ]
    );
    edit(&|map| map["shared.weight"] = json!("../elsewhere.safetensors"));
    let message = exported.open().unwrap_err().to_string();
    assert!(message.contains("names \"../elsewhere.safetensors\", which is no file beside it"), "{message}");
    fs::write(&index, "{\"metadata\": {}}").unwrap();
    assert!(exported.open().unwrap_err().to_string().contains("missing field `weight_map`"));
    edit(&|_| {});
    fs::remove_file(exported.path().join(second)).unwrap();
    let faults = faults(&exported.path());
    assert!(faults.len() == 1 && faults[0].starts_with(&format!("{second} is missing; ")), "{faults:?}");
    fs::write(exported.path().join(second), [0xff; 64]).unwrap();
    let message = exported.open().unwrap_err().to_string();
    assert!(
        message.contains(second.as_str()) && message.contains("not a whole safetensors file"),
        "{message}"
    );
}

#[test]
fn directories_without_tensors_say_so() {
    let exported = Exported::new(&dense(), &options());
    fs::remove_file(exported.path().join("model.safetensors")).unwrap();
    let message = || exported.open().unwrap_err().to_string();
    assert!(message().contains("has neither model.safetensors nor model.safetensors.index.json"));
    fs::write(exported.path().join("pytorch_model.bin"), "").unwrap();
    assert!(message().contains("pickled weights only"));
}

#[test]
fn a_name_that_is_not_there_is_an_error() {
    let opened = Exported::new(&dense(), &options()).open().unwrap();
    assert!(matches!(opened.read("lm_head"), Err(CheckpointError::NoTensor { name }) if name == "lm_head"));
}
