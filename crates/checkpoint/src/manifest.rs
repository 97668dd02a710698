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

    /// The manifest of these tensors and files.
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
        let slices = manifest.tensors.iter().flat_map(|tensor| &tensor.slices).map(|slice| &slice.file);
        let mut names = manifest.files.iter().map(|file| &file.name).chain(slices);
        if let Some(name) = names.find(|name| !files::is_plain_name(name)) {
            let problem =
                format!("names {name:?}, which is no file of this directory; use another checkpoint");
            return Err(CheckpointError::bad(&path, problem));
        }
        Ok(manifest)
    }

    /// Compares every `of`-th file, from number `share` on, with its size and checksum.
    pub(crate) fn verify(&self, directory: &Path, share: usize, of: usize) -> Result<(), CheckpointError> {
        let entries = self.files.par_iter().skip(share).step_by(of);
        let checks: Vec<_> = entries.map(|entry| entry.verify(directory)).collect();
        checks.into_iter().collect()
    }
}

impl TensorEntry {
    /// Optimizer tensors carry the moment after a slash.
    pub(crate) fn is_parameter(&self) -> bool {
        !self.name.contains('/')
    }

    /// Why the slices do not make up the tensor, each element once; `None` when they do.
    pub(crate) fn fault_of_slices(&self) -> Option<String> {
        let Self { name, shape, slices, .. } = self;
        let inside = |slice: &Slice| {
            let axes = slice.start.iter().zip(&slice.shape).zip(shape);
            slice.start.len() == shape.len()
                && slice.shape.len() == shape.len()
                && axes.into_iter().all(|((start, length), whole)| {
                    start.checked_add(*length).is_some_and(|end| end <= *whole)
                })
        };
        if let Some(slice) = slices.iter().find(|slice| !inside(slice)) {
            let Slice { file, start, shape: of } = slice;
            return Some(format!("the slice of `{name}` in {file} ({start:?} + {of:?}) exceeds {shape:?}"));
        }
        for (number, a) in slices.iter().enumerate() {
            if let Some(b) = slices[..number].iter().find(|b| a.overlaps(b)) {
                return Some(format!("the slices of `{name}` in {} and {} overlap", b.file, a.file));
            }
        }
        let count = |shape: &[usize]| shape.iter().map(|&length| length as u128).product::<u128>();
        let (held, whole) = (slices.iter().map(|slice| count(&slice.shape)).sum::<u128>(), count(shape));
        (held != whole).then(|| format!("the slices of `{name}` hold {held} of its {whole} values"))
    }
}

impl Slice {
    fn overlaps(&self, other: &Self) -> bool {
        let ends = |slice: &Self, axis: usize| slice.start[axis] + slice.shape[axis];
        (0..self.start.len())
            .all(|axis| self.start[axis] < ends(other, axis) && other.start[axis] < ends(self, axis))
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
