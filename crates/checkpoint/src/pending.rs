//! A checkpoint on its way: begun by one rank, filled by all, committed when all of it is there.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;
use switchyard_config::ModelConfig;
use switchyard_config::plan::RoutingConfig;

use crate::error::CheckpointError;
use crate::files::{Fingerprint, PendingDirectory, json_bytes, write_json, write_synced};
use crate::manifest::{FileEntry, Manifest, TensorEntry};
use crate::slices::tiling_faults;
use crate::tensors::{Found, differences, is_parameter, parameter_of, parameter_specs};
use crate::write::ShardReport;

/// A checkpoint that is not complete yet; removed if dropped before [`Self::commit`].
#[derive(Debug)]
pub struct PendingCheckpoint {
    directory: PendingDirectory,
    target: PathBuf,
    step: u64,
}

/// What a checkpoint keeps beside tensors.
#[derive(Debug)]
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

impl PendingCheckpoint {
    /// Begins `checkpoints/step-NNNNNN`; until it is whole, nothing under that name changes.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn begin(checkpoints: &Path, step: u64) -> Result<Self, CheckpointError> {
        let target = checkpoints.join(format!("step-{step:06}"));
        Ok(Self { directory: PendingDirectory::new(&target)?, target, step })
    }

    /// The directory into which every rank writes its shards.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Completes the checkpoint of which every rank has reported its part; returns its path.
    ///
    /// # Errors
    /// [`CheckpointError::WrongParameters`] names every tensor that the reports do not cover exactly
    /// once or that is not the model's; [`CheckpointError::Damaged`] and [`CheckpointError::Io`] name
    /// the file. What was begun is removed and earlier checkpoints stay.
    pub fn commit(
        self,
        contents: Contents<'_>,
        reports: Vec<ShardReport>,
    ) -> Result<PathBuf, CheckpointError> {
        let (tensors, mut files) = merge(contents.model, reports)?;
        let directory = self.path();
        files.iter().try_for_each(|file| file.verify_size(directory))?;
        let mut store = |name: &str, bytes: &[u8]| {
            write_synced(&directory.join(name), bytes)?;
            files.push(FileEntry::new(name, Fingerprint::of(bytes)));
            Ok::<_, CheckpointError>(())
        };
        let model = ModelFile { model: contents.model, routing: contents.routing };
        store("model.json", &json_bytes(&directory.join("model.json"), &model)?)?;
        store("trainer.json", &json_bytes(&directory.join("trainer.json"), &contents.trainer)?)?;
        for file in contents.files {
            let name = file.file_name().ok_or_else(|| CheckpointError::bad(file, "is not a file"))?;
            let bytes = std::fs::read(file).map_err(CheckpointError::io("copy", file))?;
            store(&name.to_string_lossy(), &bytes)?;
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        write_json(&directory.join(Manifest::NAME), &Manifest::new(self.step, tensors, files))?;
        self.directory.commit()?;
        Ok(self.target)
    }
}

/// The tensors and files of all reports, if they are exactly a checkpoint of `model`.
fn merge(
    model: &ModelConfig,
    reports: Vec<ShardReport>,
) -> Result<(Vec<TensorEntry>, Vec<FileEntry>), CheckpointError> {
    let mut faults = Vec::new();
    let mut tensors: BTreeMap<String, TensorEntry> = BTreeMap::new();
    let mut files: BTreeMap<String, FileEntry> = BTreeMap::new();
    for report in reports {
        for entry in report.tensors {
            match tensors.entry(entry.name.clone()) {
                Entry::Vacant(place) => drop(place.insert(entry)),
                Entry::Occupied(mut place) => match unlike(place.get(), &entry) {
                    Some(fault) => faults.push(fault),
                    None => place.get_mut().slices.extend(entry.slices),
                },
            }
        }
        for file in report.files {
            if let Some(file) = files.insert(file.name.clone(), file) {
                faults.push(format!("{} is reported by more than one rank", file.name));
            }
        }
    }
    let specs = parameter_specs(model);
    let (parameters, state): (Vec<_>, Vec<_>) = tensors.values().partition(|entry| is_parameter(&entry.name));
    let found: Vec<Found<'_>> = parameters.into_iter().map(TensorEntry::found).collect();
    faults.extend(differences(&specs, &found));
    for entry in state {
        if !specs.iter().any(|(name, _)| name == parameter_of(&entry.name)) {
            faults.push(format!("`{}` belongs to no parameter of this model", entry.name));
        }
    }
    faults.extend(tensors.values().flat_map(tiling_faults));
    if !faults.is_empty() {
        return Err(CheckpointError::WrongParameters { faults });
    }
    let mut ordered: Vec<TensorEntry> = specs.iter().filter_map(|(name, _)| tensors.remove(name)).collect();
    ordered.extend(tensors.into_values());
    for entry in &mut ordered {
        entry.slices.sort_by(|a, b| a.start.cmp(&b.start));
    }
    Ok((ordered, files.into_values().collect()))
}

/// Why two reports cannot speak of one tensor.
fn unlike(a: &TensorEntry, b: &TensorEntry) -> Option<String> {
    let told = |entry: &TensorEntry| {
        let file = entry.slices.first().map_or("no file", |slice| slice.file.as_str());
        format!("{} {:?} in {file}", entry.dtype, entry.shape)
    };
    let same = a.shape == b.shape && a.dtype == b.dtype;
    (!same).then(|| format!("`{}` is {} and {}", a.name, told(a), told(b)))
}
