//! `switchyard inspect`: what is inside a checkpoint.

use anyhow::Context;
use switchyard_checkpoint::Manifest;

use super::model_directory::checkpoint_of;
use super::output;
use crate::Outcome;
use crate::args::InspectCommand;

pub(crate) fn run(command: &InspectCommand) -> anyhow::Result<Outcome> {
    let InspectCommand::Checkpoint { path, json } = command;
    let checkpoint = checkpoint_of(path)?
        .with_context(|| format!("{} is neither a checkpoint nor a run with one", path.display()))?;
    let manifest = Manifest::read(&checkpoint)?;
    let damages: Vec<Option<String>> =
        manifest.files.iter().map(|file| file.verify(&checkpoint).err().map(|e| e.to_string())).collect();
    let whole = damages.iter().all(Option::is_none);
    if *json {
        output::json(&serde_json::json!({
            "path": checkpoint, "whole": whole, "manifest": manifest,
            "damages": damages.iter().flatten().collect::<Vec<_>>(),
        }))?;
    } else {
        output::line(format!("{}, step {}", checkpoint.display(), output::grouped(manifest.step)))?;
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
        for (file, damage) in manifest.files.iter().zip(&damages) {
            let state = damage.as_deref().unwrap_or("whole");
            output::line(format!("{:<52} {:>10}  {state}", file.name, output::bytes(file.size)))?;
        }
    }
    Ok(if whole { Outcome::Done } else { Outcome::Failed })
}
