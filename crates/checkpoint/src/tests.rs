//! Checkpoints on disk: what is saved is read, what is damaged is named.

mod sharded;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use switchyard_config::ModelConfig;

use crate::testing::{assert_same_bits, dense, filled, gated, routing, switch, whole_parts};
use crate::*;

fn optimizer() -> TensorMap {
    let mut map = TensorMap::default();
    map.insert("shared.embedding/v_row", &[3], vec![1.0, -0.0, f32::MIN_POSITIVE]);
    map.insert("shared.embedding/v_column", &[2], vec![f32::NAN, f32::INFINITY]);
    map
}

/// Writes a checkpoint as a run of one rank does.
fn save(
    checkpoints: &Path,
    step: u64,
    parameters: &TensorMap,
    (model, trainer, files): (&ModelConfig, Value, &[PathBuf]),
) -> Result<PathBuf, CheckpointError> {
    let pending = PendingCheckpoint::begin(checkpoints, step)?;
    let report = write_shards(
        pending.path(),
        0,
        &whole_parts(parameters),
        &whole_parts(&optimizer()),
        &Pace::unlimited(),
    )?;
    pending.commit(Contents { model, routing: &routing(), trainer, files }, vec![report])
}

fn save_step(checkpoints: &Path, step: u64, model: &ModelConfig, trainer: Value) -> PathBuf {
    let tokenizer = checkpoints.with_file_name("tokenizer.json");
    fs::create_dir_all(checkpoints).unwrap();
    fs::write(&tokenizer, "{}").unwrap();
    save(checkpoints, step, &filled(model), (model, trainer, &[tokenizer])).unwrap()
}

/// A run with one checkpoint; the run's root and the checkpoint.
fn run() -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let path = save_step(&root.path().join("checkpoints"), 12, &dense(), json!({}));
    (root, path)
}

#[test]
fn what_is_saved_is_read_bitwise() {
    for model in [dense(), gated(), switch(2)] {
        let root = tempfile::tempdir().unwrap();
        let trainer = json!({"progress": {"step": 12}, "plan": {"data": {"inputs_length": 96}}});
        let path = save_step(&root.path().join("checkpoints"), 12, &model, trainer.clone());
        assert!(path.ends_with("checkpoints/step-000012"));

        let opened = open_model(root.path()).unwrap();
        assert_eq!((opened.kind(), opened.path()), (ModelKind::Checkpoint, path.as_path()));
        assert_eq!((opened.model(), opened.routing()), (&model, &routing()));
        assert_eq!(opened.inputs_length(), Some(96));
        assert_eq!(opened.tokenizer(), Some(path.join("tokenizer.json")));
        assert_eq!(opened.tokenizer_files(), [path.join("tokenizer.json")]);
        assert_same_bits(&opened, &filled(&model));
        let table: Vec<String> =
            switchyard_config::parameters::parameters(&model).into_iter().map(|spec| spec.name).collect();
        assert_eq!(opened.specs().into_iter().map(|(name, _)| name).collect::<Vec<_>>(), table);

        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!((Manifest::read(&path).unwrap().step, &checkpoint.trainer().unwrap()), (12, &trainer));
        assert_eq!(opened.trainer(), &trainer);
        assert_same_bits(&checkpoint, &filled(&model));
        let mut moments = TensorMap::default();
        for (name, shape) in checkpoint.optimizer_specs() {
            moments.insert(&name, &shape, checkpoint.read(&name).unwrap().into_owned());
        }
        assert_same_bits(&moments, &optimizer());
    }
}

#[test]
fn the_length_of_inputs_is_found_where_it_may_be() {
    let length = |trainer: Value| {
        let root = tempfile::tempdir().unwrap();
        let path = save_step(&root.path().join("checkpoints"), 1, &dense(), trainer);
        open_model(&path).unwrap().inputs_length()
    };
    let both = json!({"data": {"inputs_length": 64}, "plan": {"data": {"inputs_length": 96}}});
    assert_eq!(length(both), Some(64));
    assert_eq!(length(json!({"plan": {"data": {"inputs_length": "long"}}})), None);
    assert_eq!(length(json!([])), None);
}

#[test]
fn unfinished_and_damaged_directories_are_passed_over() {
    let (root, old) = run();
    let checkpoints = root.path().join("checkpoints");
    let unfinished = checkpoints.join(".tmp-step-000014-1");
    fs::create_dir(&unfinished).unwrap();
    fs::copy(old.join("manifest.json"), unfinished.join("manifest.json")).unwrap();
    let without = save_step(&checkpoints, 13, &dense(), json!({}));
    fs::remove_file(without.join("manifest.json")).unwrap();
    let broken = save_step(&checkpoints, 15, &dense(), json!({}));
    fs::write(broken.join("manifest.json"), "{\"format\":1").unwrap();
    assert_eq!(complete_checkpoints(&checkpoints).unwrap(), std::slice::from_ref(&old));
    assert_eq!(open_model(root.path()).unwrap().path(), old);

    let newer = save_step(&checkpoints, 1_000_000, &dense(), json!({}));
    assert_eq!(latest_complete(&checkpoints).unwrap(), Some(newer.clone()));
    assert!(unfinished.exists());
    prune(&checkpoints, 0, 0).unwrap();
    assert!(unfinished.exists());
    clear_leftovers(&checkpoints).unwrap();
    assert!(!unfinished.exists() && old.exists());
    prune(&checkpoints, 1, 0).unwrap();
    assert_eq!(complete_checkpoints(&checkpoints).unwrap(), [newer]);
    assert!(!old.exists());
    assert_eq!(complete_checkpoints(&root.path().join("absent")).unwrap(), Vec::<PathBuf>::new());
}

#[test]
fn milestones_stay() {
    let root = tempfile::tempdir().unwrap();
    for step in [5, 10, 15, 20, 25] {
        save_step(root.path(), step, &dense(), json!({}));
    }
    let left = |keep_last, keep_every| {
        prune(root.path(), keep_last, keep_every).unwrap();
        let name = |path: PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        complete_checkpoints(root.path()).unwrap().into_iter().map(name).collect::<Vec<_>>()
    };
    assert_eq!(left(0, 10).len(), 5);
    assert_eq!(left(2, 10), ["step-000010", "step-000020", "step-000025"]);
    assert_eq!(left(1, 10), ["step-000010", "step-000020", "step-000025"]);
    assert_eq!(left(1, 20), ["step-000020", "step-000025"]);
    assert_eq!(left(1, 0), ["step-000025"]);
}

#[test]
fn a_failed_save_leaves_nothing_behind() {
    let (root, path) = run();
    let checkpoints = root.path().join("checkpoints");
    let before = fs::read(path.join("manifest.json")).unwrap();
    let absent = [root.path().join("no-tokenizer.json")];
    let message = save(&checkpoints, 12, &filled(&dense()), (&dense(), json!({}), &absent)).unwrap_err();
    assert!(message.to_string().contains("no-tokenizer.json"), "{message}");
    let error = save(&checkpoints, 12, &filled(&gated()), (&dense(), json!({}), &[])).unwrap_err();
    assert!(
        matches!(&error, CheckpointError::WrongParameters { faults } if faults.len() == 1 + 3 * 5),
        "{error}"
    );
    assert_eq!(fs::read_dir(&checkpoints).unwrap().count(), 1);
    assert_eq!(fs::read(path.join("manifest.json")).unwrap(), before);
}

#[test]
fn damage_is_named() {
    let (_root, path) = run();
    let shard = path.join("model-00000.safetensors");
    let whole = fs::read(&shard).unwrap();
    let message = || Checkpoint::open(&path).unwrap_err().to_string();

    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&shard, &flipped).unwrap();
    assert!(message().contains("model-00000.safetensors is damaged: checksum is"), "{}", message());
    fs::write(&shard, &whole[..whole.len() - 3]).unwrap();
    let size = format!("size is {} bytes, its manifest says {} bytes", whole.len() - 3, whole.len());
    assert!(message().contains(&size), "{}", message());
    fs::remove_file(&shard).unwrap();
    assert!(message().contains("cannot read") && message().contains("model-00000.safetensors"));
    fs::write(&shard, &whole).unwrap();
    Checkpoint::open(&path).unwrap();
    let moments = path.join("optimizer-00000.safetensors");
    let whole = fs::read(&moments).unwrap();
    fs::write(&moments, &whole[1..]).unwrap();
    assert!(message().contains("optimizer-00000.safetensors is damaged"), "{}", message());
    open_model(&path).expect("the model itself is whole");
    fs::write(&moments, &whole).unwrap();
    fs::write(path.join("trainer.json"), "{}  ").unwrap();
    assert!(message().contains("trainer.json is damaged"));
}

/// Changes the manifest, keeping it valid for the files that are there.
fn edit_manifest(path: &Path, edit: impl FnOnce(&mut Manifest)) {
    let file = path.join("manifest.json");
    let mut manifest: Manifest = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    edit(&mut manifest);
    fs::write(file, serde_json::to_vec(&manifest).unwrap()).unwrap();
}

#[test]
fn all_tensors_that_do_not_fit_are_listed() {
    let (_root, path) = run();
    edit_manifest(&path, |manifest| {
        manifest.tensors.retain(|entry| entry.name != "encoder.final_norm");
        for entry in &mut manifest.tensors {
            match entry.name.as_str() {
                "decoder.final_norm" => entry.name = "decoder.last_norm".to_owned(),
                "encoder.relative_bias" => entry.shape = vec![4, 8],
                "decoder.relative_bias" => entry.slices.clear(),
                _ => {}
            }
        }
    });
    let CheckpointError::Mismatch { faults, .. } = Checkpoint::open(&path).unwrap_err() else {
        panic!("another error");
    };
    let expected = [
        "`decoder.last_norm` is missing in model-00000.safetensors; manifest.json says it is there",
        "`decoder.relative_bias` is incomplete: no file holds any of it",
        "`encoder.relative_bias` has shape [4, 8], which does not hold [0..8, 0..4] in model-00000.safetensors",
        "`decoder.final_norm` is missing; expected shape [6]",
        "`decoder.last_norm` in model-00000.safetensors is not of this model",
        "`encoder.final_norm` is missing; expected shape [6]",
        "`encoder.relative_bias` in model-00000.safetensors has shape [4, 8]; expected [8, 4]",
    ];
    let mut sorted = faults.clone();
    sorted[3..].sort();
    sorted[..3].sort();
    assert_eq!(sorted, expected);
}

#[test]
fn manifests_of_other_versions_and_absurd_names_are_refused() {
    let (root, path) = run();
    edit_manifest(&path, |manifest| manifest.format = 9);
    let message = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(message.contains("manifest.json: has format 9, this version reads 1"), "{message}");
    assert!(matches!(open_model(root.path()), Err(CheckpointError::NoCheckpoint { .. })));
    edit_manifest(&path, |manifest| {
        manifest.format = 1;
        manifest.tensors[0].slices[0].file = "../step-000001/model-00000.safetensors".to_owned();
    });
    let message = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(message.contains("which is no file of this directory"), "{message}");
}

#[test]
fn directories_without_a_model_say_what_was_expected() {
    let root = tempfile::tempdir().unwrap();
    let message = |path: &Path| open_model(path).unwrap_err().to_string();
    assert!(
        message(root.path()).contains("expected manifest.json (a checkpoint), checkpoints/step-* (a run)")
    );
    assert!(message(&root.path().join("absent")).contains("cannot open"));
    fs::create_dir(root.path().join("checkpoints")).unwrap();
    assert!(message(root.path()).contains("holds no complete checkpoint"));
}
