//! Reads a Hugging Face directory: one file or shards, any float format.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use switchyard_config::ModelConfig;
use switchyard_config::partition::Part;
use switchyard_config::plan::RoutingConfig;

use super::config::HfConfig;
use super::names::{EMBEDDING, HEAD, REDUNDANT, Translation, table};
use super::transpose::transpose;
use super::{CONFIG, INDEX, SINGLE_FILE};
use crate::dtype::{READABLE, readable_size};
use crate::error::CheckpointError;
use crate::files::{is_plain_name, read_json};
use crate::shard::{ShardReader, Spec};
use crate::slices::is_within;
use crate::tensors::{Found, differences};

/// An opened Hugging Face directory, its tensors checked against its config.
#[derive(Debug)]
pub(crate) struct HuggingFaceModel {
    path: PathBuf,
    config: HfConfig,
    shards: Shards,
    /// By logical name.
    table: HashMap<String, Translation>,
}

impl HuggingFaceModel {
    /// Opens the directory at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let mut config = HfConfig::read(&path.join(CONFIG))?;
        let shards = Shards::open(path)?;
        config.decide_head(shards.head_is_separate(&config)?);
        let table = table(config.family, &config.model);
        let mut faults = shards.faults(&table, config.model.tie_word_embeddings);
        if faults.is_empty() {
            faults = shards.unequal_copies(&table)?;
        }
        if !faults.is_empty() {
            return Err(CheckpointError::Mismatch { path: path.to_owned(), faults });
        }
        let table = table.into_iter().map(|entry| (entry.logical.name.clone(), entry)).collect();
        Ok(Self { path: path.to_owned(), config, shards, table })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn model(&self) -> &ModelConfig {
        &self.config.model
    }

    pub(crate) fn routing(&self) -> &RoutingConfig {
        &self.config.routing
    }

    /// Values of one logical tensor: pieces turned and stacked.
    pub(crate) fn read(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        self.read_part(name, &Part::whole(&self.entry(name)?.logical.shape))
    }

    /// Values of a part of one logical tensor.
    pub(crate) fn read_part(&self, name: &str, part: &Part) -> Result<Vec<f32>, CheckpointError> {
        let entry = self.entry(name)?;
        if !is_within(part, &entry.logical.shape) {
            return Err(CheckpointError::outside(name, &entry.logical.shape, part));
        }
        if !entry.transposed {
            return self.shards.read_part(&entry.names[0], part);
        }
        let stacked = usize::from(entry.logical.kind.is_expert());
        let (mut start, mut shape) = (part.start[stacked..].to_vec(), part.shape[stacked..].to_vec());
        let (rows, columns) = (shape[0], shape[1]);
        start.reverse();
        shape.reverse();
        let turned = Part { start, shape };
        let pieces = if stacked == 1 { part.start[0]..part.start[0] + part.shape[0] } else { 0..1 };
        let mut values = vec![0.0; part.num_elements()];
        for (name, out) in entry.names[pieces].iter().zip(values.chunks_mut((rows * columns).max(1))) {
            transpose(&self.shards.read_part(name, &turned)?, columns, rows, out);
        }
        Ok(values)
    }

    fn entry(&self, name: &str) -> Result<&Translation, CheckpointError> {
        self.table.get(name).ok_or_else(|| CheckpointError::NoTensor { name: name.to_owned() })
    }
}

/// The safetensors files of a directory.
#[derive(Debug)]
struct Shards {
    readers: BTreeMap<String, ShardReader>,
    /// File of each tensor.
    places: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    fn open(directory: &Path) -> Result<Self, CheckpointError> {
        let index = directory.join(INDEX);
        if directory.join(SINGLE_FILE).exists() {
            let reader = ShardReader::open(&directory.join(SINGLE_FILE))?;
            let places = reader.tensors().keys().map(|name| (name.clone(), SINGLE_FILE.to_owned())).collect();
            Ok(Self { readers: BTreeMap::from([(SINGLE_FILE.to_owned(), reader)]), places })
        } else if index.exists() {
            Self::sharded(directory, &index)
        } else if directory.join("pytorch_model.bin").exists() {
            let problem = format!("has pickled weights only; save it with transformers to get {SINGLE_FILE}");
            Err(CheckpointError::bad(directory, problem))
        } else {
            Err(CheckpointError::bad(directory, format!("has neither {SINGLE_FILE} nor {INDEX}; fetch one")))
        }
    }

    fn sharded(directory: &Path, index: &Path) -> Result<Self, CheckpointError> {
        let Index { weight_map: places } = read_json(index)?;
        if let Some(name) = places.values().find(|name| !is_plain_name(name)) {
            return Err(CheckpointError::bad(index, format!("names {name:?}, which is no file beside it")));
        }
        let mut faults = Vec::new();
        let mut readers = BTreeMap::new();
        for file in places.values() {
            if readers.contains_key(file) {
                continue;
            }
            let path = directory.join(file);
            let reader = if path.exists() { Some(ShardReader::open(&path)?) } else { None };
            if reader.is_none() {
                let count = places.values().filter(|place| *place == file).count();
                faults.push(format!("{file} is missing; {count} tensors should be in it"));
            }
            readers.insert(file.clone(), reader);
        }
        for (name, file) in &places {
            if let Some(Some(reader)) = readers.get(file)
                && !reader.tensors().contains_key(name)
            {
                faults.push(format!("`{name}` should be in {file}, which does not hold it"));
            }
        }
        for (file, reader) in &readers {
            let held = reader.iter().flat_map(|reader| reader.tensors().keys());
            let stray = held.filter(|name| places.get(*name) != Some(file));
            faults.extend(stray.map(|name| format!("`{name}` is in {file}, but not by {INDEX}")));
        }
        if !faults.is_empty() {
            return Err(CheckpointError::IncompleteIndex { path: index.to_owned(), faults });
        }
        let readers = readers.into_iter().filter_map(|(file, reader)| Some((file, reader?))).collect();
        Ok(Self { readers, places })
    }

    /// The file that holds tensor `name`.
    fn holder(&self, name: &str) -> Result<&ShardReader, CheckpointError> {
        let reader = self.places.get(name).and_then(|file| self.readers.get(file));
        reader.ok_or_else(|| CheckpointError::NoTensor { name: name.to_owned() })
    }

    fn read(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        self.holder(name)?.read(name)
    }

    fn read_part(&self, name: &str, part: &Part) -> Result<Vec<f32>, CheckpointError> {
        self.holder(name)?.read_part(name, part)
    }

    /// Whether the head is a tensor of its own: stored, and not a copy of the embedding.
    fn head_is_separate(&self, config: &HfConfig) -> Result<bool, CheckpointError> {
        if !self.places.contains_key(HEAD) || !self.places.contains_key(EMBEDDING) {
            // Said to be untied without a head, a file is incomplete: better to miss the head than
            // to tie what was not tied.
            return Ok(config.tie == Some(false));
        }
        Ok(!self.same_values(HEAD, EMBEDDING)?)
    }

    fn same_values(&self, a: &str, b: &str) -> Result<bool, CheckpointError> {
        let (stored_a, stored_b) = (self.holder(a)?.bytes(a)?, self.holder(b)?.bytes(b)?);
        if stored_a.0 == stored_b.0 {
            return Ok(stored_a.1 == stored_b.1);
        }
        Ok(self.read(a)? == self.read(b)?)
    }

    /// Embeddings of a stack that are not the shared one.
    fn unequal_copies(&self, table: &[Translation]) -> Result<Vec<String>, CheckpointError> {
        let mut faults = Vec::new();
        for entry in table {
            for copy in entry.copies() {
                if !self.same_values(copy, &entry.names[0])? {
                    faults.push(format!(
                        "`{copy}` is not equal to `{}`; expected one embedding",
                        entry.names[0]
                    ));
                }
            }
        }
        Ok(faults)
    }

    /// Every difference between the files and `table`.
    fn faults(&self, table: &[Translation], tied: bool) -> Vec<String> {
        let expected: Vec<Spec> = table
            .iter()
            .flat_map(|entry| entry.names.iter().map(|name| (name.clone(), entry.foreign_shape())))
            .collect();
        let copies: Vec<&String> = table.iter().flat_map(Translation::copies).collect();
        let redundant = |name: &String| {
            (REDUNDANT.contains(&name.as_str()) && !copies.contains(&name)) || (tied && name == HEAD)
        };
        let mut found = Vec::new();
        let mut faults = Vec::new();
        for (file, reader) in &self.readers {
            for (name, info) in reader.tensors().iter().filter(|(name, _)| !redundant(name)) {
                found.push(Found { name, shape: &info.shape, file: Some(file) });
                if readable_size(info.dtype).is_none() {
                    faults.push(format!("`{name}` in {file} has type {:?}; expected {READABLE}", info.dtype));
                }
            }
        }
        faults.extend(differences(&expected, &found));
        faults
    }
}
