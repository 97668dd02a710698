//! Checkpoints of several ranks: read by any number of them, refused when a part is not right.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::json;
use switchyard_config::ModelConfig;
use switchyard_config::mesh::MeshShape;
use switchyard_config::parameters::parameters;
use switchyard_config::partition::{OwnedMatrices, Part, held_part, owners};

use super::edit_manifest;
use crate::testing::{assert_same_bits, filled, routing, switch};
use crate::*;

const WI: &str = "encoder.block.1.moe.experts.wi";

fn model() -> ModelConfig {
    ModelConfig { num_experts: 8, ..switch(2) }
}

fn expert_parallel(ranks: usize) -> MeshShape {
    MeshShape { data: ranks, expert: ranks, tensor: 1 }
}

/// Moments of `model`: one of each parameter's shape, one a value for each row.
fn moments(model: &ModelConfig) -> TensorMap {
    let (source, mut map) = (filled(model), TensorMap::default());
    for (name, shape) in source.specs() {
        let values = source.read(&name).unwrap();
        let rows = &shape[..shape.len() - 1];
        let len = rows.iter().product();
        map.insert(&format!("{name}/row"), rows, values[..len].iter().map(|v| v * 3.0).collect());
        map.insert(&format!("{name}/m"), &shape, values.iter().map(|v| -v).collect());
    }
    map
}

/// What the ranks of `mesh` own of `source`, tensors of `model` or their moments.
fn owned(model: &ModelConfig, mesh: MeshShape, source: &TensorMap) -> Vec<Vec<TensorPart>> {
    let (specs, mut of_ranks) = (parameters(model), vec![Vec::new(); mesh.ranks()]);
    let owners = owners(&specs, mesh);
    for (name, shape) in source.specs() {
        let parameter = name.split('/').next().unwrap();
        let spec = specs.iter().find(|spec| spec.name == parameter).unwrap();
        for OwnedMatrices { owner, matrices } in &owners[parameter] {
            let mut part = Part::whole(&shape);
            if spec.kind.is_expert() {
                part.start[0] = matrices.start;
                part.shape[0] = matrices.len();
            }
            let values = source.read_part(&name, &part).unwrap().into();
            of_ranks[*owner].push(TensorPart { name: name.clone(), shape: shape.clone(), part, values });
        }
    }
    of_ranks
}

fn write_all(pending: &PendingCheckpoint, model: &ModelConfig, mesh: MeshShape) -> Vec<ShardReport> {
    let (tensors, moments) = (owned(model, mesh, &filled(model)), owned(model, mesh, &moments(model)));
    let ranks = tensors.iter().zip(&moments).enumerate();
    ranks
        .map(|(rank, (tensors, moments))| {
            write_shards(pending.path(), rank, tensors, moments, &Pace::unlimited()).unwrap()
        })
        .collect()
}

fn commit(
    pending: PendingCheckpoint,
    model: &ModelConfig,
    reports: Vec<ShardReport>,
) -> Result<PathBuf, CheckpointError> {
    pending.commit(Contents { model, routing: &routing(), trainer: json!({}), files: &[] }, reports)
}

fn saved(root: &Path, mesh: MeshShape) -> PathBuf {
    let pending = PendingCheckpoint::begin(root, 7).unwrap();
    let reports = write_all(&pending, &model(), mesh);
    commit(pending, &model(), reports).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn what_any_ranks_save_is_read_bitwise() {
    let meshes = [
        MeshShape::SOLO,
        expert_parallel(2),
        expert_parallel(4),
        MeshShape { data: 4, expert: 2, tensor: 2 },
    ];
    for mesh in meshes {
        let root = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(&saved(root.path(), mesh)).unwrap();
        assert_eq!(checkpoint.step(), 7);
        assert_same_bits(&checkpoint, &filled(&model()));
        let (moments, mut specs) = (moments(&model()), checkpoint.optimizer_specs());
        specs.sort();
        assert_eq!(specs, moments.specs());
        for (name, _) in specs {
            assert_eq!(bits(&checkpoint.read(&name).unwrap()), bits(&moments.read(&name).unwrap()), "{name}");
        }
        assert_same_bits(&open_model(root.path().join("step-000007").as_path()).unwrap(), &filled(&model()));
    }
}

#[test]
fn ranks_read_what_they_hold_whatever_mesh_saved_it() {
    let meshes = [
        MeshShape::SOLO,
        expert_parallel(2),
        expert_parallel(4),
        expert_parallel(8),
        MeshShape { data: 4, expert: 2, tensor: 1 },
        MeshShape { data: 2, expert: 2, tensor: 2 },
    ];
    for saving in [MeshShape::SOLO, expert_parallel(2), expert_parallel(4)] {
        let root = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(&saved(root.path(), saving)).unwrap();
        for mesh in meshes {
            for rank in 0..mesh.ranks() {
                for spec in parameters(&model()) {
                    let part = held_part(&spec, mesh, mesh.coordinates(rank));
                    let expected = filled(&model()).read_part(&spec.name, &part).unwrap();
                    let found = checkpoint.read_part(&spec.name, &part).unwrap();
                    assert!(
                        bits(&found) == bits(&expected),
                        "{} saved on {saving}, read on {mesh}",
                        spec.name
                    );
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn any_box_is_read(tensor in any::<prop::sample::Index>(), cuts in prop::array::uniform3(any::<(u16, u16)>())) {
        let root = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(&saved(root.path(), expert_parallel(4))).unwrap();
        let specs = checkpoint.specs();
        let (name, shape) = tensor.get(&specs);
        let mut part = Part::whole(shape);
        for (axis, (start, len)) in cuts.into_iter().enumerate().take(shape.len()) {
            part.start[axis] = start as usize % shape[axis];
            part.shape[axis] = len as usize % (shape[axis] - part.start[axis] + 1);
        }
        let expected = filled(&model()).read_part(name, &part).unwrap();
        prop_assert_eq!(bits(&checkpoint.read_part(name, &part).unwrap()), bits(&expected));
    }
}

#[test]
fn boxes_beyond_a_tensor_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&saved(root.path(), expert_parallel(2))).unwrap();
    for (start, shape) in
        [(vec![8, 0, 0], vec![1, 6, 10]), (vec![0, 0], vec![8, 6]), (vec![usize::MAX, 0, 0], vec![2, 1, 1])]
    {
        let message = checkpoint.read_part(WI, &Part { start, shape }).unwrap_err().to_string();
        assert!(message.contains(WI) && message.contains("not within its shape [8, 6, 10]"), "{message}");
    }
    assert!(matches!(checkpoint.read_part("x", &Part::whole(&[1])), Err(CheckpointError::NoTensor { .. })));
}

#[test]
fn damage_to_any_shard_is_named_by_the_rank_that_checks_it() {
    let root = tempfile::tempdir().unwrap();
    let path = saved(root.path(), expert_parallel(4));
    let manifest = Manifest::read(&path).unwrap();
    let shards: Vec<&FileEntry> =
        manifest.files.iter().filter(|file| file.name.ends_with(".safetensors")).collect();
    assert_eq!(shards.len(), 8);
    for FileEntry { name, .. } in shards {
        let file = path.join(name);
        let whole = fs::read(&file).unwrap();
        let finders = || -> Vec<String> {
            (0..4)
                .filter_map(|rank| Checkpoint::open_share(&path, rank, 4).err())
                .map(|e| e.to_string())
                .collect()
        };
        assert_eq!(finders(), Vec::<String>::new());
        let mut flipped = whole.clone();
        flipped[whole.len() - 9] ^= 4;
        fs::write(&file, &flipped).unwrap();
        let message = Checkpoint::open(&path).unwrap_err().to_string();
        assert!(message.contains(&format!("{name} is damaged: checksum is")), "{message}");
        assert_eq!(finders(), [message]);
        fs::write(&file, &whole[..whole.len() - 4]).unwrap();
        assert_eq!(finders().len(), 4);
        assert!(finders()[0].contains(&format!("{name} is damaged: size is")), "{}", finders()[0]);
        fs::remove_file(&file).unwrap();
        assert_eq!(finders().len(), 4);
        assert!(finders()[0].contains("cannot read") && finders()[0].contains(name), "{}", finders()[0]);
        fs::write(&file, &whole).unwrap();
    }
}

#[test]
fn manifests_whose_slices_do_not_fit_are_refused() {
    let faults = |edit: fn(&mut TensorEntry)| {
        let root = tempfile::tempdir().unwrap();
        let path = saved(root.path(), expert_parallel(4));
        edit_manifest(&path, |manifest| {
            edit(manifest.tensors.iter_mut().find(|entry| entry.name == WI).unwrap());
        });
        match Checkpoint::open(&path) {
            Err(CheckpointError::Mismatch { faults, .. }) => faults,
            other => panic!("{other:?}"),
        }
    };
    let missing = format!("`{WI}` is incomplete: no file holds 2..=3 of the 8 along its first axis");
    assert_eq!(faults(|wi| drop(wi.slices.remove(1))), [missing]);
    let twice = format!(
        "`{WI}` is there twice: [2..4, 0..6, 0..10] in model-00001.safetensors and [3..5, 0..6, 0..10] in model-00002.safetensors"
    );
    assert_eq!(faults(|wi| wi.slices[2].start[0] = 3), [twice]);
    assert_eq!(
        faults(|wi| wi.slices[1].file = wi.slices[0].file.clone()),
        [format!("`{WI}` has more than one slice in model-00000.safetensors")]
    );
    let beyond = format!(
        "`{WI}` has shape [8, 6, 10], which does not hold [7..9, 0..6, 0..10] in model-00003.safetensors"
    );
    assert_eq!(faults(|wi| wi.slices[3].start[0] = 7), [beyond]);
    let stored =
        format!("`{WI}` in model-00000.safetensors has shape [2, 6, 10]; manifest.json says [1, 6, 10]");
    assert!(faults(|wi| wi.slices[0].shape[0] = 1).contains(&stored));
}

#[test]
fn a_shard_that_the_manifest_does_not_list_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let path = saved(root.path(), expert_parallel(2));
    edit_manifest(&path, |manifest| manifest.files.retain(|file| file.name != "model-00001.safetensors"));
    let message = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(message.contains("has tensors in model-00001.safetensors without its checksum"), "{message}");
}

/// The faults for which a checkpoint with these reports is refused; nothing of it may stay.
fn refused(edit: impl FnOnce(&PendingCheckpoint, &mut Vec<ShardReport>)) -> Vec<String> {
    let root = tempfile::tempdir().unwrap();
    let pending = PendingCheckpoint::begin(root.path(), 7).unwrap();
    let mut reports = write_all(&pending, &model(), expert_parallel(4));
    edit(&pending, &mut reports);
    let error = commit(pending, &model(), reports).unwrap_err();
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    match error {
        CheckpointError::WrongParameters { faults } => faults,
        other => vec![other.to_string()],
    }
}

#[test]
fn reports_that_do_not_make_up_the_model_are_refused() {
    let incomplete = format!("`{WI}` is incomplete: no file holds 4..=5 of the 8 along its first axis");
    let faults = refused(|_, reports| drop(reports.remove(2)));
    assert!(faults.contains(&incomplete), "{faults:?}");
    assert!(faults.iter().any(|fault| fault.contains("is missing; expected shape")), "{faults:?}");

    let faults = refused(|_, reports| reports.push(reports[1].clone()));
    assert!(faults.contains(&"model-00001.safetensors is reported by more than one rank".to_owned()));
    assert!(faults.contains(&format!("`{WI}` has more than one slice in model-00001.safetensors")));

    let faults = refused(|_, reports| {
        let entry = reports[3].tensors.iter_mut().find(|entry| entry.name == WI).unwrap();
        entry.slices[0].start[0] = 5;
    });
    assert_eq!(faults.len(), 1);
    assert!(faults[0].starts_with(&format!("`{WI}` is there twice: [4..6")), "{faults:?}");

    let faults = refused(|pending, reports| {
        fs::remove_file(pending.path().join("optimizer-00002.safetensors")).unwrap();
        assert_eq!(reports.len(), 4);
    });
    assert!(faults[0].contains("cannot read") && faults[0].contains("optimizer-00002.safetensors"));
}

#[test]
fn reports_of_another_model_are_refused() {
    let wider = ModelConfig { d_ff: 12, ..model() };
    let faults = refused(|pending, reports| *reports = write_all(pending, &wider, expert_parallel(4)));
    assert!(
        faults.contains(&format!(
            "`{WI}` in model-00000.safetensors has shape [8, 6, 12]; expected [8, 6, 10]"
        ))
    );
    let faults =
        refused(|pending, reports| reports[1] = write_all(pending, &wider, expert_parallel(4)).remove(1));
    let told = format!(
        "`{WI}` is F32 [8, 6, 10] in model-00000.safetensors and F32 [8, 6, 12] in model-00001.safetensors"
    );
    assert!(faults.contains(&told), "{faults:?}");
    let faults = refused(|pending, reports| {
        let stray = [TensorPart::whole("decoder.last_norm/m", &[1], vec![0.0])];
        reports.push(write_shards(pending.path(), 4, &[], &stray, &Pace::unlimited()).unwrap());
        assert_eq!(reports[4].files.len(), 1, "no file for nothing");
    });
    assert_eq!(faults, ["`decoder.last_norm/m` belongs to no parameter of this model"]);
}

#[test]
fn a_report_travels_as_json() {
    let root = tempfile::tempdir().unwrap();
    let report = write_shards(
        root.path(),
        0,
        &owned(&model(), expert_parallel(4), &filled(&model()))[0],
        &[],
        &Pace::unlimited(),
    )
    .unwrap();
    let text = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<ShardReport>(&text).unwrap(), report);
    assert_eq!(report.tensors.iter().find(|entry| entry.name == WI).unwrap().slices[0].rank(), Some(0));
}

#[test]
fn parts_that_are_not_what_they_say_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let refused = |parts: &[TensorPart]| {
        write_shards(root.path(), 0, parts, &[], &Pace::unlimited()).unwrap_err().to_string()
    };
    let whole = TensorPart::whole("w", &[2, 3], vec![0.0; 6]);
    let mut short = whole.clone();
    short.values = vec![0.0; 5].into();
    assert_eq!(refused(&[short]), "tensor `w` was refused: it has 5 values; its part has shape [2, 3]");
    let mut beyond = whole.clone();
    beyond.part.start[0] = 1;
    assert!(refused(&[beyond]).contains("[2, 3] values from [1, 0] are not within its shape [2, 3]"));
    assert!(refused(&[whole.clone(), whole]).contains("it comes twice for model-00000.safetensors"));
}

#[test]
fn a_full_disk_leaves_the_older_checkpoint_only() {
    let root = tempfile::tempdir().unwrap();
    let older = saved(root.path(), expert_parallel(2));
    let pending = PendingCheckpoint::begin(root.path(), 8).unwrap();
    std::os::unix::fs::symlink("/dev/full", pending.path().join("optimizer-00001.safetensors")).unwrap();
    let mesh = expert_parallel(2);
    let (tensors, moments) =
        (owned(&model(), mesh, &filled(&model())), owned(&model(), mesh, &moments(&model())));
    write_shards(pending.path(), 0, &tensors[0], &moments[0], &Pace::unlimited()).unwrap();
    let message = write_shards(pending.path(), 1, &tensors[1], &moments[1], &Pace::unlimited())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("optimizer-00001.safetensors") && message.contains("free some space"),
        "{message}"
    );
    assert!(
        !pending.path().join("optimizer-00001.safetensors").is_symlink(),
        "its room is given back at once"
    );
    drop(pending);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    Checkpoint::open(&older).unwrap();
}

#[test]
fn a_sharded_checkpoint_is_exported() {
    let root = tempfile::tempdir().unwrap();
    let opened = open_model(&saved(root.path(), expert_parallel(4))).unwrap();
    let options = hf::ExportOptions {
        dtype: hf::StoredDtype::F32,
        max_shard_bytes: None,
        row_tokens: 32,
        tokenizer_files: Vec::new(),
    };
    let (out, whole) = (root.path().join("out"), root.path().join("whole"));
    hf::export(&opened, opened.model(), opened.routing(), &options, &out).unwrap();
    hf::export(&filled(&model()), &model(), &routing(), &options, &whole).unwrap();
    assert_eq!(
        fs::read(out.join("model.safetensors")).unwrap(),
        fs::read(whole.join("model.safetensors")).unwrap()
    );
    assert_same_bits(&open_model(&out).unwrap(), &filled(&model()));
}
