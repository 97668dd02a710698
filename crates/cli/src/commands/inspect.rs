//! `switchyard inspect`: what is inside a checkpoint.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use switchyard_checkpoint::{Manifest, Slice, TensorEntry};
use switchyard_config::{MeshShape, Resolved, rank_memory, resolve};

use super::model_directory::checkpoint_of;
use super::output;
use crate::Outcome;
use crate::args::InspectCommand;

pub(crate) fn run(command: &InspectCommand) -> anyhow::Result<Outcome> {
    match command {
        InspectCommand::Checkpoint { path, json } => checkpoint(path, *json),
        InspectCommand::Topology { config, set, ranks, json } => topology(config, set, *ranks, *json),
    }
}

/// Which rank would hold what.
fn topology(config: &Path, set: &[String], ranks: usize, json: bool) -> anyhow::Result<Outcome> {
    let Resolved { plan, provenance } = resolve(config, set)?;
    let mesh = MeshShape::of(&plan, ranks, &provenance)?;
    let experts = plan.model.num_experts / mesh.expert;
    let of_rank = |rank: usize| {
        let at = mesh.coordinates(rank);
        serde_json::json!({
            "rank": rank, "data": at.data, "expert": at.expert, "tensor": at.tensor,
            "first_expert": at.expert * experts, "experts": experts,
            "memory_bytes": rank_memory(&plan, mesh, rank).total_bytes(),
        })
    };
    if json {
        output::json(&(0..ranks).map(of_rank).collect::<Vec<_>>())?;
        return Ok(Outcome::Done);
    }
    mesh.describe(&plan.model).iter().try_for_each(output::line)?;
    output::line("rank  data  tensor  experts        memory without activations")?;
    for rank in 0..ranks {
        let at = mesh.coordinates(rank);
        let first = at.expert * experts;
        let held =
            if experts == 0 { "none".to_owned() } else { format!("{first}..={}", first + experts - 1) };
        let memory = output::bytes(rank_memory(&plan, mesh, rank).total_bytes());
        output::line(format!("{rank:>4}  {:>4}  {:>6}  {held:<13}  {memory}", at.data, at.tensor))?;
    }
    Ok(Outcome::Done)
}

fn checkpoint(path: &Path, json: bool) -> anyhow::Result<Outcome> {
    let checkpoint = checkpoint_of(path)?
        .with_context(|| format!("{} is neither a checkpoint nor a run with one", path.display()))?;
    let manifest = Manifest::read(&checkpoint)?;
    let damages: Vec<Option<String>> =
        manifest.files.iter().map(|file| file.verify(&checkpoint).err().map(|e| e.to_string())).collect();
    let whole = damages.iter().all(Option::is_none);
    if json {
        output::json(&serde_json::json!({
            "path": checkpoint, "whole": whole, "manifest": manifest,
            "damages": damages.iter().flatten().collect::<Vec<_>>(),
        }))?;
    } else {
        print(&checkpoint, &manifest, &damages)?;
    }
    Ok(if whole { Outcome::Done } else { Outcome::Failed })
}

fn print(path: &Path, manifest: &Manifest, damages: &[Option<String>]) -> anyhow::Result<()> {
    output::line(format!("{}, step {}", path.display(), output::grouped(manifest.step)))?;
    let mut moments: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (parameter, moment) in manifest.tensors.iter().filter_map(|entry| entry.name.split_once('/')) {
        moments.entry(parameter).or_default().push(moment);
    }
    for TensorEntry { name, dtype, shape, slices } in &manifest.tensors {
        if !name.contains('/') {
            let moments =
                moments.get(name.as_str()).map_or(String::new(), |m| format!(" + {}", m.join(", ")));
            output::line(format!("{name:<52} {dtype:<5} {shape:?}  {}{moments}", shards(slices)))?;
        }
    }
    for (ranges, stacks) in placements(&manifest.tensors) {
        let more = match stacks.len() {
            1 => String::new(),
            count => format!(" and {} tensors more", count - 1),
        };
        output::line(format!("{}{more}", stacks[0]))?;
        ranges.lines().try_for_each(|line| output::line(format!("  {line}")))?;
    }
    for (file, damage) in manifest.files.iter().zip(damages) {
        let state = damage.as_deref().unwrap_or("whole");
        output::line(format!("{:<52} {:>10}  {state}", file.name, output::bytes(file.size)))?;
    }
    Ok(())
}

/// The file that holds a tensor, or how many do.
fn shards(slices: &[Slice]) -> String {
    match slices {
        [slice] => slice.file.clone(),
        slices => format!("{} shards", slices.len()),
    }
}

/// Which experts lie with which rank, a line each, and the stacks of experts that lie so.
fn placements(tensors: &[TensorEntry]) -> Vec<(String, Vec<&str>)> {
    let mut found: Vec<(String, Vec<&str>)> = Vec::new();
    let mut places = BTreeMap::new();
    for entry in tensors.iter().filter(|entry| entry.name.contains(".experts.") && entry.shape.len() > 1) {
        let ranges = ranges(entry);
        let place = *places.entry(ranges.clone()).or_insert(found.len());
        match found.get_mut(place) {
            Some((_, stacks)) => stacks.push(&entry.name),
            None => found.push((ranges, vec![&entry.name])),
        }
    }
    found
}

fn ranges(entry: &TensorEntry) -> String {
    let mut lines = Vec::new();
    for slice in &entry.slices {
        let (Some(first), Some(count)) = (slice.start.first(), slice.shape.first()) else { continue };
        let place = slice.rank().map_or_else(|| slice.file.clone(), |rank| format!("rank {rank}"));
        let range = format!("experts {first}..={}", (first + count).saturating_sub(1));
        lines.push(format!("{range:<20} {place}"));
    }
    lines.join("\n")
}
