//! Writing a checkpoint, a shard a rank, and removing old ones.
//!
//! Ranks write their shards each on its own; the first rank makes a checkpoint of them. What
//! travels between ranks is the caller's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use switchyard_config::ModelConfig;
use switchyard_config::partition::Part;
use switchyard_config::plan::RoutingConfig;

use crate::dtype::StoredDtype;
use crate::error::CheckpointError;
use crate::files::{self, PendingDirectory, TEMPORARY, write_json};
use crate::manifest::{FileEntry, Manifest, Slice, TensorEntry};
use crate::resume::complete_checkpoints;
use crate::shard::ShardWriter;
use crate::tensors::{Found, differences, parameter_specs};

/// A part of a logical tensor on its way to disk.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorPart {
    /// Parameter, or parameter and moment such as `lm_head/v`.
    pub name: String,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// Which part of it.
    pub part: Part,
    /// Values of the part, row-major.
    pub values: Vec<f32>,
}

/// What one rank has written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardReport {
    tensors: Vec<TensorEntry>,
    files: Vec<FileEntry>,
}

/// Everything of a checkpoint that is not in shards.
pub struct Contents<'a> {
    /// Architecture.
    pub model: &'a ModelConfig,
    /// Routing.
    pub routing: &'a RoutingConfig,
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

/// A checkpoint that is being written; removed unless it is committed.
#[derive(Debug)]
pub struct PendingCheckpoint {
    directory: PendingDirectory,
    target: PathBuf,
    step: u64,
}

impl PendingCheckpoint {
    /// Begins `checkpoints/step-NNNNNN`; until it is committed, nothing under that name changes.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn begin(checkpoints: &Path, step: u64) -> Result<Self, CheckpointError> {
        let target = checkpoints.join(format!("step-{step:06}"));
        Ok(Self { directory: PendingDirectory::new(&target)?, target, step })
    }

    /// Where the ranks write their shards.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Makes a checkpoint of the shards that the ranks report.
    ///
    /// # Errors
    /// [`CheckpointError::WrongParameters`] when the shards do not hold every parameter of the model
    /// exactly once; [`CheckpointError::Io`] names the file. What was begun is removed and earlier
    /// checkpoints stay.
    pub fn commit(
        self,
        contents: Contents<'_>,
        reports: Vec<ShardReport>,
    ) -> Result<PathBuf, CheckpointError> {
        let Self { directory, target, step } = self;
        let path = directory.path();
        let mut files: Vec<FileEntry> = reports.iter().flat_map(|report| report.files.clone()).collect();
        let tensors = joined(reports, contents.model)?;
        let model = ModelFile { model: contents.model, routing: contents.routing };
        write_json(&path.join("model.json"), &model)?;
        write_json(&path.join("trainer.json"), &contents.trainer)?;
        let mut names = vec!["model.json".to_owned(), "trainer.json".to_owned()];
        for file in contents.files {
            let name = file.file_name().ok_or_else(|| CheckpointError::bad(file, "is not a file"))?;
            files::copy_synced(file, &path.join(name))?;
            names.push(name.to_string_lossy().into_owned());
        }
        for name in names {
            let (size, xxh3) = files::fingerprint(&path.join(&name))?;
            files.push(FileEntry { name, size, xxh3 });
        }
        write_json(&path.join(Manifest::NAME), &Manifest::new(step, tensors, files))?;
        directory.commit()?;
        Ok(target)
    }
}

/// The tensors of all ranks, the slices of each together; refused unless they are those of `model`.
fn joined(reports: Vec<ShardReport>, model: &ModelConfig) -> Result<Vec<TensorEntry>, CheckpointError> {
    let mut faults = Vec::new();
    let mut tensors: BTreeMap<String, TensorEntry> = BTreeMap::new();
    for entry in reports.into_iter().flat_map(|report| report.tensors) {
        match tensors.get_mut(&entry.name) {
            Some(known) if known.shape == entry.shape => known.slices.extend(entry.slices),
            Some(known) => faults.push(format!(
                "`{}` has shape {:?} on one rank and {:?} on another",
                entry.name, known.shape, entry.shape
            )),
            None => drop(tensors.insert(entry.name.clone(), entry)),
        }
    }
    let order: BTreeMap<String, usize> =
        parameter_specs(model).into_iter().enumerate().map(|(at, (name, _))| (name, at)).collect();
    let mut tensors: Vec<TensorEntry> = tensors.into_values().collect();
    tensors.sort_by_key(|entry| order.get(&entry.name).copied().unwrap_or(usize::MAX));
    faults.extend(tensors.iter().filter_map(TensorEntry::fault_of_slices));
    let parameters = tensors.iter().filter(|entry| entry.is_parameter());
    let found: Vec<Found<'_>> =
        parameters.map(|entry| Found { name: &entry.name, shape: &entry.shape, file: None }).collect();
    faults.extend(differences(&parameter_specs(model), &found));
    if faults.is_empty() { Ok(tensors) } else { Err(CheckpointError::WrongParameters { faults }) }
}

/// Writes the parts that `rank` owns to `model-RRRRR.safetensors` and `optimizer-RRRRR.safetensors` in
/// `directory`; a file for which there are none is not made.
///
/// # Errors
/// [`CheckpointError::Io`] names the file.
pub fn write_shards(
    directory: &Path,
    rank: usize,
    parameters: &[TensorPart],
    optimizer: &[TensorPart],
) -> Result<ShardReport, CheckpointError> {
    let mut report = ShardReport { tensors: Vec::new(), files: Vec::new() };
    for (kind, parts) in [("model", parameters), ("optimizer", optimizer)] {
        if parts.is_empty() {
            continue;
        }
        let file = format!("{kind}-{rank:05}.safetensors");
        let specs: Vec<_> = parts.iter().map(|part| (part.name.clone(), part.part.shape.clone())).collect();
        let mut writer = ShardWriter::create(&directory.join(&file), &specs, StoredDtype::F32)?;
        for part in parts {
            writer.write(&part.name, &part.values)?;
        }
        let (size, xxh3) = writer.finish()?;
        report.files.push(FileEntry { name: file.clone(), size, xxh3 });
        report.tensors.extend(parts.iter().map(|TensorPart { name, shape, part, .. }| {
            let slice = Slice { file: file.clone(), start: part.start.clone(), shape: part.shape.clone() };
            let (dtype, slices) = (StoredDtype::F32.name().to_owned(), vec![slice]);
            TensorEntry { name: name.clone(), shape: shape.clone(), dtype, slices }
        }));
    }
    Ok(report)
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

/// Removes all but the newest `keep_last` complete checkpoints, 0 for none, and those of steps that
/// are a multiple of `keep_every`, 0 for no such.
///
/// # Errors
/// When the directory cannot be listed or a checkpoint cannot be removed.
pub fn prune(checkpoints: &Path, keep_last: usize, keep_every: u64) -> Result<(), CheckpointError> {
    if keep_last == 0 {
        return Ok(());
    }
    for old in complete_checkpoints(checkpoints)?.iter().rev().skip(keep_last) {
        if keep_every == 0 || !Manifest::read(old)?.step.is_multiple_of(keep_every) {
            files::retire(old)?;
        }
    }
    Ok(())
}
