//! Writes a checkpoint as four ranks do, each the matrices that it owns; here the ranks are threads.
//!
//! `cargo run --release --example sharded -- checkpoints 64`

use std::path::PathBuf;

use serde_json::Value;
use switchyard_checkpoint::{
    CheckpointError, Contents, Pace, PendingCheckpoint, ShardReport, TensorPart, write_shards,
};
use switchyard_config::parameters::parameters;
use switchyard_config::partition::{OwnedMatrices, Part, owners};
use switchyard_config::{MeshShape, ModelConfig, resolve_str};

const MESH: MeshShape = MeshShape { data: 4, expert: 4, tensor: 1 };

fn main() -> Result<(), CheckpointError> {
    let mut arguments = std::env::args_os().skip(1);
    let checkpoints = PathBuf::from(arguments.next().expect("a directory for the checkpoint"));
    let num_experts = arguments.next().map_or("8".to_owned(), |n| n.to_string_lossy().into_owned());
    let experiment = format!(
        "name = \"x\"\n[model]\npreset = \"tiny\"\nnum_experts = {num_experts}\n\
         [data]\nsources = [{{ path = \"x\" }}]\n"
    );
    let plan = resolve_str(&experiment, &[]).expect("a number of experts").plan;

    let pending = PendingCheckpoint::begin(&checkpoints, 100)?;
    let reports: Result<Vec<ShardReport>, CheckpointError> = std::thread::scope(|scope| {
        let write = |rank| {
            let directory = pending.path();
            let model = &plan.model;
            scope.spawn(move || write_shards(directory, rank, &owned(model, rank), &[], &Pace::unlimited()))
        };
        let ranks: Vec<_> = (0..MESH.ranks()).map(write).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank that returns")).collect()
    });
    let contents = Contents { model: &plan.model, routing: &plan.routing, trainer: Value::Null, files: &[] };
    pending.commit(contents, reports?)?;
    Ok(())
}

/// What `rank` owns, each value made up.
fn owned(model: &ModelConfig, rank: usize) -> Vec<TensorPart> {
    let specs = parameters(model);
    let owners = owners(&specs, MESH);
    let mut parts = Vec::new();
    for spec in specs {
        for OwnedMatrices { matrices, .. } in owners[&spec.name].iter().filter(|range| range.owner == rank) {
            let mut part = Part::whole(&spec.shape);
            if spec.kind.is_expert() {
                part.start[0] = matrices.start;
                part.shape[0] = matrices.len();
            }
            let values: Vec<f32> = (0..part.num_elements()).map(|i| (i as f32).sin()).collect();
            parts.push(TensorPart {
                name: spec.name.clone(),
                shape: spec.shape.clone(),
                part,
                values: values.into(),
            });
        }
    }
    parts
}
