//! Every mesh writes what every mesh reads, bit for bit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use burn::tensor::Device;
use serde_json::json;
use switchyard_checkpoint::{Checkpoint, Contents, Pace, PendingCheckpoint, TensorPart, write_shards};
use switchyard_config::{MeshShape, RunPlan, resolve_str};
use switchyard_parallel::{Mesh, TokenTravel};

use super::{Snapshot, load_parts};
use crate::step::Learner;

/// Bits of every tensor, whole.
type Tensors = BTreeMap<String, Vec<u32>>;

fn plan(optimizer: &str) -> RunPlan {
    let text = format!(
        "name = \"reshard\"\noptimizer.kind = \"{optimizer}\"\ndata.batch_rows = 8\ndata.micro_batch_rows = 1\n\
         [model]\nvocab_size = 12\nd_model = 8\nd_ff = 12\nd_kv = 2\nnum_heads = 4\nnum_layers = 2\n\
         num_experts = 4\nexpert_layer_every = 2\ngated = true\ntie_word_embeddings = false\n"
    );
    resolve_str(&text, &[]).expect("the plan is valid").plan
}

/// All meshes with axes of 1, 2 and 4.
fn meshes() -> Vec<MeshShape> {
    let sizes = [1, 2, 4];
    let all = sizes.into_iter().flat_map(|data| {
        let of_expert = move |expert| sizes.into_iter().map(move |tensor| MeshShape { data, expert, tensor });
        sizes.into_iter().flat_map(of_expert)
    });
    all.filter(|mesh| mesh.data % mesh.expert == 0).collect()
}

/// Runs `work` on every rank of `shape`.
fn on_ranks<T: Send + 'static>(
    shape: MeshShape,
    plan: &RunPlan,
    work: impl Fn(Learner, usize) -> T + Send + Sync + Clone + 'static,
) -> Vec<T> {
    let ranks = switchyard_comm::threads(shape.ranks(), Duration::from_secs(60)).into_iter().enumerate();
    let ranks = ranks.map(|(rank, world)| {
        let (plan, work) = (plan.clone(), work.clone());
        thread::spawn(move || {
            let mesh = Arc::new(Mesh::new(world, shape, TokenTravel::default()).expect("ranks that talk"));
            work(Learner::new(&plan, &Device::flex().autodiff(), mesh), rank)
        })
    });
    ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().expect("no panic")).collect()
}

/// Every value of the run drawn by its place in the whole tensor.
fn drawn(name: &str, at: usize) -> f32 {
    let seed = name.bytes().fold(at as f32 + 1.0, |sum, byte| sum + f32::from(byte));
    seed.sin() + 1e-7
}

/// Saves a run of `shape` whose every parameter and moment is [`drawn`].
fn save(directory: &Path, shape: MeshShape, plan: &RunPlan) -> PathBuf {
    let pending = PendingCheckpoint::begin(directory, 7).expect("a directory");
    let temporary = pending.path().to_owned();
    let reports = on_ranks(shape, plan, move |mut learner, rank| {
        let Snapshot { parameters, moments } = Snapshot::take(&mut learner, Snapshot::default());
        let fill = |parts: Vec<TensorPart>| -> Vec<TensorPart> {
            let filled = |mut part: TensorPart| {
                let places = part.part.runs(&part.shape).flatten();
                part.values = Arc::new(places.map(|at| drawn(&part.name, at)).collect());
                part
            };
            parts.into_iter().map(filled).collect()
        };
        write_shards(&temporary, rank, &fill(parameters), &fill(moments), &Pace::unlimited())
            .expect("a writable disk")
    });
    let contents = Contents { model: &plan.model, routing: &plan.routing, trainer: json!({}), files: &[] };
    pending.commit(contents, reports).expect("every tensor once")
}

/// What the ranks of `shape` own after they loaded the checkpoint at `path`, put together.
fn loaded(path: &Path, shape: MeshShape, plan: &RunPlan) -> Tensors {
    let (path, config) = (path.to_owned(), plan.clone());
    let parts = on_ranks(shape, plan, move |mut learner, rank| {
        let checkpoint = Checkpoint::open_share(&path, rank, shape.ranks()).expect("whole");
        load_parts(&checkpoint, &mut learner, &config, 7).expect("it fits");
        let Snapshot { parameters, moments } = Snapshot::take(&mut learner, Snapshot::default());
        parameters.into_iter().chain(moments).collect::<Vec<_>>()
    });
    let mut tensors = Tensors::new();
    for TensorPart { name, shape, part, values } in parts.into_iter().flatten() {
        let whole = tensors.entry(name).or_insert_with(|| vec![u32::MAX; shape.iter().product()]);
        let bits: Vec<u32> = values.iter().map(|value| value.to_bits()).collect();
        part.paste(&shape, whole, &bits);
    }
    tensors
}

#[test]
fn every_mesh_reads_what_every_mesh_writes() {
    for optimizer in ["adamw", "adafactor"] {
        let plan = plan(optimizer);
        let root = tempfile::tempdir().expect("a directory");
        let meshes = meshes();
        assert_eq!(meshes.len(), 18);
        for (number, &writer) in meshes.iter().enumerate() {
            let path = save(&root.path().join(number.to_string()), writer, &plan);
            for &reader in &meshes {
                for (name, bits) in loaded(&path, reader, &plan) {
                    let right = bits.iter().enumerate().all(|(at, &bits)| bits == drawn(&name, at).to_bits());
                    assert!(right, "{name}: written at {writer}, read at {reader}");
                }
            }
        }
    }
}
