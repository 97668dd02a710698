//! Finding and reading checkpoints.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use switchyard_config::ModelConfig;
use switchyard_config::plan::RoutingConfig;

use crate::error::CheckpointError;
use crate::files::read_json;
use crate::manifest::{Manifest, Slice, TensorEntry};
use crate::shard::ShardReader;
use crate::tensors::{Found, TensorSink, TensorSource, differences, parameter_specs};

/// Complete checkpoints in a run's `checkpoints` directory, oldest first.
///
/// A directory without a readable manifest is left out and named in the log.
///
/// # Errors
/// When the directory cannot be listed; one that does not exist holds none.
pub fn complete_checkpoints(checkpoints: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let listing = match std::fs::read_dir(checkpoints) {
        Ok(listing) => listing,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(CheckpointError::io("list", checkpoints)(error)),
    };
    let mut found = Vec::new();
    for entry in listing {
        let path = entry.map_err(CheckpointError::io("list", checkpoints))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(step) = name.strip_prefix("step-").and_then(|step| step.parse::<u64>().ok()) else {
            continue;
        };
        match Manifest::read(&path) {
            Ok(_) => found.push((step, path)),
            Err(error) => tracing::warn!(checkpoint = %path.display(), %error, "not a complete checkpoint"),
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// The newest complete checkpoint, if there is one.
///
/// # Errors
/// As [`complete_checkpoints`].
pub fn latest_complete(checkpoints: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    Ok(complete_checkpoints(checkpoints)?.pop())
}

/// An opened checkpoint, every file of it that is needed checked.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    model: ModelFile,
    shards: BTreeMap<String, ShardReader>,
}

/// `model.json`: what is needed to use the parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelFile {
    model: ModelConfig,
    routing: RoutingConfig,
}

impl Checkpoint {
    /// Opens a checkpoint directory, compares every file with its checksum and the tensors with the model.
    ///
    /// # Errors
    /// Names the file that is missing or differs, or all parameters that are missing, have another
    /// shape or are not of the model.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Self::open_tensors(path, |_| true)
    }

    /// As [`Self::open`] for using the model: files of the optimizer are neither read nor missed.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_parameters(path: &Path) -> Result<Self, CheckpointError> {
        Self::open_tensors(path, is_parameter)
    }

    fn open_tensors(path: &Path, wanted: fn(&str) -> bool) -> Result<Self, CheckpointError> {
        let mut manifest = Manifest::read(path)?;
        let files_of = |tensors: &[TensorEntry]| -> BTreeSet<String> {
            tensors.iter().flat_map(|entry| &entry.slices).map(|slice| slice.file.clone()).collect()
        };
        let all = files_of(&manifest.tensors);
        manifest.tensors.retain(|entry| wanted(&entry.name));
        let needed = files_of(&manifest.tensors);
        manifest.verify(path, |name| needed.contains(name) || !all.contains(name))?;
        let model = read_json(&path.join("model.json"))?;
        let mut shards = BTreeMap::new();
        for file in needed {
            let reader = ShardReader::open(&path.join(&file))?;
            shards.insert(file, reader);
        }
        let checkpoint = Self { path: path.to_owned(), manifest, model, shards };
        let mut faults = checkpoint.stored_otherwise();
        faults.extend(checkpoint.unfit_parameters());
        if faults.is_empty() {
            Ok(checkpoint)
        } else {
            Err(CheckpointError::Mismatch { path: checkpoint.path, faults })
        }
    }

    /// Tensors that the shards do not hold as the manifest says.
    fn stored_otherwise(&self) -> Vec<String> {
        let fault_of = |entry: &TensorEntry| {
            let TensorEntry { name, shape, slices, .. } = entry;
            let [Slice { file, .. }] = &slices[..] else {
                let count = slices.len();
                return Some(format!("`{name}` has {count} slices; this version reads tensors of one slice"));
            };
            match self.shards.get(file).and_then(|shard| shard.tensors().get(name)) {
                None => Some(format!("`{name}` is missing in {file}; {} says it is there", Manifest::NAME)),
                Some(stored) if stored.shape != *shape => Some(format!(
                    "`{name}` in {file} has shape {:?}; {} says {shape:?}",
                    stored.shape,
                    Manifest::NAME
                )),
                Some(_) => None,
            }
        };
        self.manifest.tensors.iter().filter_map(fault_of).collect()
    }

    fn unfit_parameters(&self) -> Vec<String> {
        let entries = self.manifest.tensors.iter().filter(|entry| is_parameter(&entry.name));
        let found: Vec<Found<'_>> = entries
            .map(|entry| Found {
                name: &entry.name,
                shape: &entry.shape,
                file: entry.slices.first().map(|slice| slice.file.as_str()),
            })
            .collect();
        differences(&parameter_specs(self.model()), &found)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Architecture.
    pub fn model(&self) -> &ModelConfig {
        &self.model.model
    }

    /// Routing.
    pub fn routing(&self) -> &RoutingConfig {
        &self.model.routing
    }

    /// What the trainer kept.
    ///
    /// # Errors
    /// When `trainer.json` cannot be read.
    pub fn trainer(&self) -> Result<Value, CheckpointError> {
        read_json(&self.path.join("trainer.json"))
    }

    /// Gives every optimizer tensor to `sink`.
    ///
    /// # Errors
    /// When `sink` refuses one.
    pub fn load_optimizer(&self, sink: &mut dyn TensorSink) -> Result<(), CheckpointError> {
        for entry in self.manifest.tensors.iter().filter(|entry| !is_parameter(&entry.name)) {
            sink.write(&entry.name, self.values(&entry.name)?)?;
        }
        Ok(())
    }

    fn values(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let holder = self.shards.values().find(|shard| shard.tensors().contains_key(name));
        holder.ok_or_else(|| CheckpointError::NoTensor { name: name.to_owned() })?.read(name)
    }
}

/// The parameters.
impl TensorSource for Checkpoint {
    fn specs(&self) -> Vec<(String, Vec<usize>)> {
        parameter_specs(self.model())
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [f32]>, CheckpointError> {
        self.values(name).map(Cow::Owned)
    }
}

/// Optimizer tensors carry the moment after a slash.
fn is_parameter(name: &str) -> bool {
    !name.contains('/')
}
