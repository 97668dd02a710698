//! `switchyard inspect`: what is inside a checkpoint.

use std::path::{Path, PathBuf};

use anyhow::Context;
use switchyard_checkpoint::{Checkpoint, latest_complete};

use super::output;
use crate::Outcome;
use crate::args::InspectCommand;

pub(crate) fn run(command: &InspectCommand) -> anyhow::Result<Outcome> {
    let InspectCommand::Checkpoint { path, json } = command;
    let checkpoint = Checkpoint::open(&checkpoint_of(path)?)?;
    let manifest = checkpoint.manifest();
    if *json {
        output::json(&serde_json::json!({"path": checkpoint.path(), "manifest": manifest}))?;
        return Ok(Outcome::Done);
    }
    output::line(format!("{}, step {}", checkpoint.path().display(), output::grouped(manifest.step)))?;
    for entry in &manifest.tensors {
        let files: Vec<&str> = entry.slices.iter().map(|slice| slice.file.as_str()).collect();
        output::line(format!(
            "{:<52} {:<5} {:?}  {}",
            entry.name,
            entry.dtype,
            entry.shape,
            files.join(", ")
        ))?;
    }
    for file in &manifest.files {
        output::line(format!("{:<52} {:>10}  xxh3 {}", file.name, output::bytes(file.size), file.xxh3))?;
    }
    Ok(Outcome::Done)
}

/// The directory itself, or the newest checkpoint of the run in it.
fn checkpoint_of(path: &Path) -> anyhow::Result<PathBuf> {
    if path.join("manifest.json").exists() {
        return Ok(path.to_owned());
    }
    latest_complete(&path.join("checkpoints"))?
        .with_context(|| format!("{} is neither a checkpoint nor a run with one", path.display()))
}
