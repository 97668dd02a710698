//! Finding and reading checkpoints.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use switchyard_config::ModelConfig;
use switchyard_config::partition::Part;
use switchyard_config::plan::RoutingConfig;

use crate::error::CheckpointError;
use crate::files::read_json;
use crate::manifest::{Manifest, Slice, TensorEntry};
use crate::shard::ShardReader;
use crate::tensors::{Found, TensorSource, differences, parameter_specs};

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
        Self::open_tensors(path, |_| true, 0, 1)
    }

    /// As [`Self::open`], for one of `of` processes that open it together: the checksums of a part of
    /// the files are left to the others.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_share(path: &Path, share: usize, of: usize) -> Result<Self, CheckpointError> {
        Self::open_tensors(path, |_| true, share, of)
    }

    /// As [`Self::open`] for using the model: files of the optimizer are neither read nor missed.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_parameters(path: &Path) -> Result<Self, CheckpointError> {
        Self::open_tensors(path, TensorEntry::is_parameter, 0, 1)
    }

    fn open_tensors(
        path: &Path,
        wanted: fn(&TensorEntry) -> bool,
        share: usize,
        of: usize,
    ) -> Result<Self, CheckpointError> {
        let mut manifest = Manifest::read(path)?;
        let files_of = |tensors: &[TensorEntry]| -> BTreeSet<String> {
            tensors.iter().flat_map(|entry| &entry.slices).map(|slice| slice.file.clone()).collect()
        };
        let all = files_of(&manifest.tensors);
        manifest.tensors.retain(wanted);
        let needed = files_of(&manifest.tensors);
        manifest.files.retain(|file| needed.contains(&file.name) || !all.contains(&file.name));
        manifest.verify(path, share, of)?;
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
            let TensorEntry { name, slices, .. } = entry;
            let misplaced = slices.iter().find_map(|Slice { file, shape, .. }| {
                match self.shards.get(file).and_then(|shard| shard.tensors().get(name)) {
                    None => {
                        Some(format!("`{name}` is missing in {file}; {} says it is there", Manifest::NAME))
                    }
                    Some(stored) if stored.shape != *shape => Some(format!(
                        "`{name}` in {file} has shape {:?}; {} says {shape:?}",
                        stored.shape,
                        Manifest::NAME
                    )),
                    Some(_) => None,
                }
            });
            misplaced.or_else(|| entry.fault_of_slices())
        };
        self.manifest.tensors.iter().filter_map(fault_of).collect()
    }

    fn unfit_parameters(&self) -> Vec<String> {
        let entries = self.manifest.tensors.iter().filter(|entry| entry.is_parameter());
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

    /// Name and whole shape of every tensor of the optimizer.
    pub fn optimizer_specs(&self) -> Vec<(String, Vec<usize>)> {
        let moments = self.manifest.tensors.iter().filter(|entry| !entry.is_parameter());
        moments.map(|entry| (entry.name.clone(), entry.shape.clone())).collect()
    }

    /// Values of `part` of a parameter or moment, row-major, whichever shards hold it.
    ///
    /// # Errors
    /// When there is no such tensor, `part` does not lie within it, or a shard cannot be read.
    pub fn read_part(&self, name: &str, part: &Part) -> Result<Vec<f32>, CheckpointError> {
        let entry = self.entry(name)?;
        let ends = part.start.iter().zip(&part.shape).zip(&entry.shape);
        if part.shape.len() != entry.shape.len() || ends.into_iter().any(|((s, l), whole)| s + l > *whole) {
            let reason = format!("it has shape {:?}, {part:?} was asked for", entry.shape);
            return Err(CheckpointError::refused(name, reason));
        }
        let mut values = vec![0.0; part.num_elements()];
        for slice in &entry.slices {
            let Some(common) = common_part(part, slice) else { continue };
            let shard = self.shards.get(&slice.file);
            let shard = shard.ok_or_else(|| CheckpointError::NoTensor { name: name.to_owned() })?;
            let within = |start: &[usize]| Part {
                start: common.start.iter().zip(start).map(|(common, start)| common - start).collect(),
                shape: common.shape.clone(),
            };
            let stored = shard.values(name)?;
            let to: Vec<Range<usize>> = within(&part.start).runs(&part.shape).collect();
            let from: Vec<Range<usize>> = within(&slice.start).runs(&slice.shape).collect();
            for (to, from) in equal_runs(&to, &from) {
                stored.copy(from, &mut values[to]);
            }
        }
        Ok(values)
    }

    fn entry(&self, name: &str) -> Result<&TensorEntry, CheckpointError> {
        let found = self.manifest.tensors.iter().find(|entry| entry.name == name);
        found.ok_or_else(|| CheckpointError::NoTensor { name: name.to_owned() })
    }
}

/// What a part and a slice of one tensor have in common; `None` when nothing.
fn common_part(part: &Part, slice: &Slice) -> Option<Part> {
    let axes = part.start.iter().zip(&part.shape).zip(slice.start.iter().zip(&slice.shape));
    let (mut start, mut shape) = (Vec::new(), Vec::new());
    for ((a, a_len), (b, b_len)) in axes {
        let (first, end) = (*a.max(b), (a + a_len).min(b + b_len));
        start.push(first);
        shape.push(end.checked_sub(first).filter(|&length| length > 0)?);
    }
    Some(Part { start, shape })
}

/// Two lists of runs over the same elements, cut to the length of the shorter ones.
fn equal_runs<'a>(
    a: &'a [Range<usize>],
    b: &'a [Range<usize>],
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + 'a {
    let length = |runs: &[Range<usize>]| runs.first().map_or(1, |run| run.len().max(1));
    // Runs are products of trailing axes, so the shorter length divides the longer.
    let common = length(a).min(length(b));
    let pieces = move |runs: &'a [Range<usize>]| {
        runs.iter().flat_map(move |run| run.clone().step_by(common).map(move |at| at..at + common))
    };
    pieces(a).zip(pieces(b))
}

/// The parameters.
impl TensorSource for Checkpoint {
    fn specs(&self) -> Vec<(String, Vec<usize>)> {
        parameter_specs(self.model())
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [f32]>, CheckpointError> {
        let whole = Part::whole(&self.entry(name)?.shape);
        self.read_part(name, &whole).map(Cow::Owned)
    }
}
