//! `manifest.json`: what a checkpoint holds, written last; without it there is no checkpoint.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use switchyard_config::partition::Part;

use crate::error::CheckpointError;
use crate::files::{self, Fingerprint};

/// Version of the layout.
const FORMAT: u32 = 1;

/// Contents of a checkpoint directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the layout.
    pub format: u32,
    /// Updates done.
    pub step: u64,
    /// Every logical tensor.
    pub tensors: Vec<TensorEntry>,
    /// Every other file.
    pub files: Vec<FileEntry>,
}

/// One logical tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Parameter, or parameter and moment such as `lm_head/v`.
    pub name: String,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// Type of its values.
    pub dtype: String,
    /// The parts that make it up.
    pub slices: Vec<Slice>,
}

/// One part of a logical tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slice {
    /// File that holds it, under the tensor's name.
    pub file: String,
    /// First index along each axis.
    pub start: Vec<usize>,
    /// Length along each axis.
    pub shape: Vec<usize>,
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Name within the directory.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// xxh3 of its bytes, hexadecimal.
    pub xxh3: String,
}

impl Manifest {
    pub(crate) const NAME: &'static str = "manifest.json";

    pub(crate) fn new(step: u64, tensors: Vec<TensorEntry>, files: Vec<FileEntry>) -> Self {
        Self { format: FORMAT, step, tensors, files }
    }

    /// Reads the manifest of `directory`.
    ///
    /// # Errors
    /// When there is none, or one of another format.
    pub fn read(directory: &Path) -> Result<Self, CheckpointError> {
        let path = directory.join(Self::NAME);
        let text = std::fs::read_to_string(&path).map_err(CheckpointError::io("read", &path))?;
        let manifest: Self = serde_json::from_str(&text).map_err(|e| {
            CheckpointError::bad(&path, format!("not a manifest ({e}); use another checkpoint"))
        })?;
        if manifest.format != FORMAT {
            let problem = format!(
                "has format {}, this version reads {FORMAT}; use the version that wrote it",
                manifest.format
            );
            return Err(CheckpointError::bad(&path, problem));
        }
        manifest
            .check_names()
            .map_err(|problem| CheckpointError::bad(&path, format!("{problem}; use another checkpoint")))?;
        Ok(manifest)
    }

    fn check_names(&self) -> Result<(), String> {
        let listed: BTreeSet<&str> = self.files.iter().map(|file| file.name.as_str()).collect();
        let slices =
            || self.tensors.iter().flat_map(|tensor| &tensor.slices).map(|slice| slice.file.as_str());
        if let Some(name) = listed.iter().copied().chain(slices()).find(|name| !files::is_plain_name(name)) {
            return Err(format!("names {name:?}, which is no file of this directory"));
        }
        match slices().find(|name| !listed.contains(name)) {
            Some(name) => Err(format!("has tensors in {name} without its checksum")),
            None => Ok(()),
        }
    }

    /// Compares the files whose names `wanted` accepts with their sizes, and those of them whose number
    /// in the list is `share` modulo `of` with their checksums.
    pub(crate) fn verify(
        &self,
        directory: &Path,
        wanted: impl Fn(&str) -> bool + Sync,
        (share, of): (usize, usize),
    ) -> Result<(), CheckpointError> {
        let entries = self.files.par_iter().enumerate().filter(|(_, entry)| wanted(&entry.name));
        let checks: Vec<_> =
            entries
                .map(|(number, entry)| {
                    if number % of == share { entry.verify(directory) } else { entry.verify_size(directory) }
                })
                .collect();
        checks.into_iter().collect()
    }
}

impl Slice {
    /// The box that it is.
    pub fn part(&self) -> Part {
        Part { start: self.start.clone(), shape: self.shape.clone() }
    }

    /// The rank that wrote it; `None` for a file that is not named as a rank's.
    pub fn rank(&self) -> Option<usize> {
        self.file.strip_suffix(".safetensors")?.rsplit_once('-')?.1.parse().ok()
    }
}

impl FileEntry {
    pub(crate) fn new(name: &str, Fingerprint { size, xxh3 }: Fingerprint) -> Self {
        Self { name: name.to_owned(), size, xxh3: format!("{xxh3:016x}") }
    }

    /// Compares the file in `directory` with its size and checksum.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] tells what differs.
    pub fn verify(&self, directory: &Path) -> Result<(), CheckpointError> {
        self.verify_size(directory)?;
        let path = directory.join(&self.name);
        let found = Self::new(&self.name, files::fingerprint(&path)?);
        compare(path, "checksum", self.xxh3.clone(), found.xxh3)
    }

    /// Compares the size only.
    pub(crate) fn verify_size(&self, directory: &Path) -> Result<(), CheckpointError> {
        let path = directory.join(&self.name);
        let size = std::fs::metadata(&path).map_err(CheckpointError::io("read", &path))?.len();
        compare(path, "size", format!("{} bytes", self.size), format!("{size} bytes"))
    }
}

fn compare(
    path: PathBuf,
    what: &'static str,
    expected: String,
    found: String,
) -> Result<(), CheckpointError> {
    if expected == found { Ok(()) } else { Err(CheckpointError::Damaged { path, what, expected, found }) }
}
