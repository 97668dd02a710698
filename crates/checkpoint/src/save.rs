//! Writing a checkpoint, and removing old ones.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;
use switchyard_config::ModelConfig;
use switchyard_config::plan::RoutingConfig;

use crate::dtype::StoredDtype;
use crate::error::CheckpointError;
use crate::files::{self, PendingDirectory, TEMPORARY, write_json};
use crate::manifest::{Manifest, Slice, TensorEntry};
use crate::resume::complete_checkpoints;
use crate::shard::ShardWriter;
use crate::tensors::{TensorSource, check_parameters};

/// Everything that a checkpoint keeps.
pub struct Snapshot<'a> {
    /// Updates done.
    pub step: u64,
    /// Architecture.
    pub model: &'a ModelConfig,
    /// Routing.
    pub routing: &'a RoutingConfig,
    /// Parameters.
    pub parameters: &'a dyn TensorSource,
    /// Moments of the optimizer, each named after its parameter and the moment, such as `lm_head/v`.
    pub optimizer: &'a dyn TensorSource,
    /// Counters, data position and config of the run.
    pub trainer: Value,
    /// Files that are copied in: the tokenizer's.
    pub files: &'a [PathBuf],
}

/// `model.json`: what is needed to use the parameters.
#[derive(Debug, Serialize)]
struct ModelFile<'a> {
    model: &'a ModelConfig,
    routing: &'a RoutingConfig,
}

/// Writes `checkpoints/step-NNNNNN`; until it is whole, nothing under that name changes.
///
/// # Errors
/// [`CheckpointError::WrongParameters`] when the parameters are not those of the model;
/// [`CheckpointError::Io`] names the file. What was begun is removed and earlier checkpoints stay.
pub fn save(checkpoints: &Path, snapshot: &Snapshot<'_>) -> Result<PathBuf, CheckpointError> {
    check_parameters(snapshot.parameters, snapshot.model)?;
    let target = checkpoints.join(format!("step-{:06}", snapshot.step));
    let pending = PendingDirectory::new(&target)?;
    let directory = pending.path();
    let mut tensors = write_shard(directory, "model-00000.safetensors", snapshot.parameters)?;
    tensors.extend(write_shard(directory, "optimizer-00000.safetensors", snapshot.optimizer)?);
    let model = ModelFile { model: snapshot.model, routing: snapshot.routing };
    write_json(&directory.join("model.json"), &model)?;
    write_json(&directory.join("trainer.json"), &snapshot.trainer)?;
    for file in snapshot.files {
        let name = file.file_name().ok_or_else(|| CheckpointError::bad(file, "is not a file"))?;
        files::copy_synced(file, &directory.join(name))?;
    }
    let manifest = Manifest::of(directory, snapshot.step, tensors)?;
    write_json(&directory.join(Manifest::NAME), &manifest)?;
    pending.commit()?;
    Ok(target)
}

fn write_shard(
    directory: &Path,
    file: &str,
    source: &dyn TensorSource,
) -> Result<Vec<TensorEntry>, CheckpointError> {
    let specs = source.specs();
    let mut writer = ShardWriter::create(&directory.join(file), &specs, StoredDtype::F32)?;
    for (name, _) in &specs {
        writer.write(name, &source.read(name)?)?;
    }
    writer.finish()?;
    let entry = |(name, shape): (String, Vec<usize>)| {
        let whole = Slice { file: file.to_owned(), start: vec![0; shape.len()], shape: shape.clone() };
        TensorEntry { name, shape, dtype: StoredDtype::F32.name().to_owned(), slices: vec![whole] }
    };
    Ok(specs.into_iter().map(entry).collect())
}

/// Removes what interrupted saves left; only for a process that has the run to itself.
///
/// # Errors
/// When the directory cannot be listed or something cannot be removed.
pub fn clear_leftovers(checkpoints: &Path) -> Result<(), CheckpointError> {
    let listing = match std::fs::read_dir(checkpoints) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        listing => listing.map_err(CheckpointError::io("list", checkpoints))?,
    };
    for entry in listing {
        let entry = entry.map_err(CheckpointError::io("list", checkpoints))?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            files::remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes all but the newest `keep_last` complete checkpoints; 0 keeps all.
///
/// # Errors
/// When the directory cannot be listed or a checkpoint cannot be removed.
pub fn prune(checkpoints: &Path, keep_last: usize) -> Result<(), CheckpointError> {
    if keep_last > 0 {
        let complete = complete_checkpoints(checkpoints)?;
        for old in complete.iter().rev().skip(keep_last) {
            files::retire(old)?;
        }
    }
    Ok(())
}
