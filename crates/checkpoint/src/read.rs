//! Reading a checkpoint: whole tensors or boxes of them, whichever ranks wrote their slices.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use switchyard_config::ModelConfig;
use switchyard_config::partition::Part;
use switchyard_config::plan::RoutingConfig;

use crate::dtype::{READABLE, readable_size};
use crate::error::CheckpointError;
use crate::files::read_json;
use crate::manifest::{Manifest, Slice, TensorEntry};
use crate::shard::ShardReader;
use crate::slices::{intersection, is_within, relative, tiling_faults};
use crate::tensors::{Found, TensorSource, differences, is_parameter, parameter_specs};

/// An opened checkpoint, every file of it that is needed checked.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    /// Place of each tensor in the manifest.
    places: HashMap<String, usize>,
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
    /// Names the file that is missing or differs, or all tensors whose slices do not make them up and
    /// all parameters that are missing, have another shape or are not of the model.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        Self::open_tensors(path, |_| true, (0, 1))
    }

    /// As [`Self::open`] by one of `of` ranks that open the checkpoint together: only the checksums of
    /// the files whose number in the manifest is `share` modulo `of` are compared, the sizes and
    /// headers of all.
    ///
    /// The checkpoint is whole if every rank from 0 to `of - 1` finds it so.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_share(path: &Path, share: usize, of: usize) -> Result<Self, CheckpointError> {
        Self::open_tensors(path, |_| true, (share, of.max(1)))
    }

    /// As [`Self::open`] for using the model: files of the optimizer are neither read nor missed.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_parameters(path: &Path) -> Result<Self, CheckpointError> {
        Self::open_tensors(path, is_parameter, (0, 1))
    }

    fn open_tensors(
        path: &Path,
        wanted: fn(&str) -> bool,
        share: (usize, usize),
    ) -> Result<Self, CheckpointError> {
        let mut manifest = Manifest::read(path)?;
        let files_of = |tensors: &[TensorEntry]| -> BTreeSet<String> {
            tensors.iter().flat_map(|entry| &entry.slices).map(|slice| slice.file.clone()).collect()
        };
        let all = files_of(&manifest.tensors);
        manifest.tensors.retain(|entry| wanted(&entry.name));
        let needed = files_of(&manifest.tensors);
        manifest.verify(path, |name| needed.contains(name) || !all.contains(name), share)?;
        let model = read_json(&path.join("model.json"))?;
        let mut shards = BTreeMap::new();
        for file in needed {
            let reader = ShardReader::open(&path.join(&file))?;
            shards.insert(file, reader);
        }
        let names = manifest.tensors.iter().enumerate();
        let places = names.map(|(place, entry)| (entry.name.clone(), place)).collect();
        let checkpoint = Self { path: path.to_owned(), manifest, places, model, shards };
        let faults = checkpoint.faults();
        if faults.is_empty() {
            Ok(checkpoint)
        } else {
            Err(CheckpointError::Mismatch { path: checkpoint.path, faults })
        }
    }

    /// Everything that is wrong with the tensors.
    fn faults(&self) -> Vec<String> {
        let entries = &self.manifest.tensors;
        let stored = entries.iter().flat_map(|entry| {
            let slices = entry.slices.iter();
            slices.filter_map(|slice| self.stored_otherwise(&entry.name, slice)).chain(tiling_faults(entry))
        });
        let repeated = entries.iter().enumerate().filter(|(place, entry)| self.places[&entry.name] != *place);
        let repeated = repeated.map(|(_, entry)| format!("`{}` is twice in {}", entry.name, Manifest::NAME));
        let parameters = entries.iter().filter(|entry| is_parameter(&entry.name));
        let found: Vec<Found<'_>> = parameters.map(TensorEntry::found).collect();
        stored.chain(repeated).chain(differences(&parameter_specs(self.model()), &found)).collect()
    }

    /// How a shard does not hold a slice as the manifest says.
    fn stored_otherwise(&self, name: &str, slice: &Slice) -> Option<String> {
        let Slice { file, shape, .. } = slice;
        match self.shards.get(file).and_then(|shard| shard.tensors().get(name)) {
            None => Some(format!("`{name}` is missing in {file}; {} says it is there", Manifest::NAME)),
            Some(stored) if stored.shape != *shape => Some(format!(
                "`{name}` in {file} has shape {:?}; {} says {shape:?}",
                stored.shape,
                Manifest::NAME
            )),
            Some(stored) if readable_size(stored.dtype).is_none() => {
                Some(format!("`{name}` in {file} has type {:?}; expected {READABLE}", stored.dtype))
            }
            Some(_) => None,
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Updates done.
    pub fn step(&self) -> u64 {
        self.manifest.step
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
        let state = self.manifest.tensors.iter().filter(|entry| !is_parameter(&entry.name));
        state.map(|entry| (entry.name.clone(), entry.shape.clone())).collect()
    }

    fn entry(&self, name: &str) -> Result<&TensorEntry, CheckpointError> {
        let place = self.places.get(name);
        let entry = place.and_then(|&place| self.manifest.tensors.get(place));
        entry.ok_or_else(|| CheckpointError::NoTensor { name: name.to_owned() })
    }
}

/// The parameters; reads tensors of the optimizer as well.
impl TensorSource for Checkpoint {
    fn specs(&self) -> Vec<(String, Vec<usize>)> {
        parameter_specs(self.model())
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [f32]>, CheckpointError> {
        self.read_part(name, &Part::whole(&self.entry(name)?.shape)).map(Cow::Owned)
    }

    /// Touches no more of the files than the part.
    fn read_part(&self, name: &str, part: &Part) -> Result<Vec<f32>, CheckpointError> {
        let TensorEntry { shape, slices, .. } = self.entry(name)?;
        if !is_within(part, shape) {
            return Err(CheckpointError::outside(name, shape, part));
        }
        let mut values = vec![0.0; part.num_elements()];
        for slice in slices {
            let (Some(common), Some(shard)) =
                (intersection(&slice.part(), part), self.shards.get(&slice.file))
            else {
                continue;
            };
            let (from, to) = (relative(&common, &slice.start), relative(&common, &part.start));
            shard.copy_part(name, &from, &to, &part.shape, &mut values)?;
        }
        Ok(values)
    }
}
