//! `manifest.json`: what a checkpoint holds, written last; without it there is no checkpoint.

use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::CheckpointError;
use crate::files;

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

    /// Describes the files that `directory` holds now.
    pub(crate) fn of(
        directory: &Path,
        step: u64,
        tensors: Vec<TensorEntry>,
    ) -> Result<Self, CheckpointError> {
        let listing = std::fs::read_dir(directory).map_err(CheckpointError::io("list", directory))?;
        let mut names = Vec::new();
        for entry in listing {
            let entry = entry.map_err(CheckpointError::io("list", directory))?;
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        let mut entries = Vec::new();
        for name in names {
            let (size, xxh3) = files::fingerprint(&directory.join(&name))?;
            entries.push(FileEntry { name, size, xxh3 });
        }
        Ok(Self { format: FORMAT, step, tensors, files: entries })
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
        let slices = manifest.tensors.iter().flat_map(|tensor| &tensor.slices).map(|slice| &slice.file);
        let mut names = manifest.files.iter().map(|file| &file.name).chain(slices);
        if let Some(name) = names.find(|name| !files::is_plain_name(name)) {
            let problem =
                format!("names {name:?}, which is no file of this directory; use another checkpoint");
            return Err(CheckpointError::bad(&path, problem));
        }
        Ok(manifest)
    }

    /// Compares the files whose names `wanted` accepts with their sizes and checksums.
    pub(crate) fn verify(
        &self,
        directory: &Path,
        wanted: impl Fn(&str) -> bool + Sync,
    ) -> Result<(), CheckpointError> {
        let entries = self.files.par_iter().filter(|entry| wanted(&entry.name));
        let checks: Vec<_> = entries.map(|entry| entry.verify(directory)).collect();
        checks.into_iter().collect()
    }
}

impl FileEntry {
    /// Compares the file in `directory` with its size and checksum.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] tells what differs.
    pub fn verify(&self, directory: &Path) -> Result<(), CheckpointError> {
        let path = directory.join(&self.name);
        let damaged = |what, expected: String, found: String| {
            Err(CheckpointError::Damaged { path: path.clone(), what, expected, found })
        };
        let size = std::fs::metadata(&path).map_err(CheckpointError::io("read", &path))?.len();
        if size != self.size {
            return damaged("size", format!("{} bytes", self.size), format!("{size} bytes"));
        }
        let (_, xxh3) = files::fingerprint(&path)?;
        if xxh3 != self.xxh3 {
            return damaged("checksum", self.xxh3.clone(), xxh3);
        }
        Ok(())
    }
}
