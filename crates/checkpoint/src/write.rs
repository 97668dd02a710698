//! What each rank writes into a checkpoint: the tensors that it owns, and a report of them.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use switchyard_config::partition::Part;

use crate::dtype::StoredDtype;
use crate::error::CheckpointError;
use crate::manifest::{FileEntry, Slice, TensorEntry};
use crate::pace::{Pace, cpu_time};
use crate::shard::{ShardWriter, Spec};
use crate::slices::is_within;

/// Values that are written between two rests.
const STRETCH: usize = 1 << 19;

/// A tensor, or the part of one that a rank owns.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorPart {
    /// Parameter, or parameter and moment such as `lm_head/v`.
    pub name: String,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// The part of it.
    pub part: Part,
    /// Values of the part, row-major.
    pub values: Arc<Vec<f32>>,
}

/// What one rank has written; the rank that commits the checkpoint needs those of all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardReport {
    /// Every tensor that it wrote, with its own slice only.
    pub tensors: Vec<TensorEntry>,
    /// Its files.
    pub files: Vec<FileEntry>,
}

impl TensorPart {
    /// All of a tensor.
    pub fn whole(name: &str, shape: &[usize], values: Vec<f32>) -> Self {
        Self {
            name: name.to_owned(),
            shape: shape.to_vec(),
            part: Part::whole(shape),
            values: Arc::new(values),
        }
    }

    fn check(&self) -> Result<(), CheckpointError> {
        let Self { name, shape, part, values } = self;
        if !is_within(part, shape) {
            Err(CheckpointError::outside(name, shape, part))
        } else if part.num_elements() != values.len() {
            let reason = format!("it has {} values; its part has shape {:?}", values.len(), part.shape);
            Err(CheckpointError::refused(name, reason))
        } else {
            Ok(())
        }
    }
}

/// Writes what `rank` owns into `directory`, that of a [`PendingCheckpoint`](crate::PendingCheckpoint):
/// `model-RRRRR.safetensors` and `optimizer-RRRRR.safetensors`, none where there is nothing.
///
/// Returns when the files are on the disk; one that cannot be written whole is removed. Their checksums
/// are taken on the way. `pace` limits what this takes from computations beside it.
///
/// # Errors
/// [`CheckpointError::Refused`] names a tensor that is not as it says or comes twice,
/// [`CheckpointError::Io`] the file that cannot be written.
pub fn write_shards(
    directory: &Path,
    rank: usize,
    parameters: &[TensorPart],
    optimizer: &[TensorPart],
    pace: &Pace,
) -> Result<ShardReport, CheckpointError> {
    let mut report = ShardReport::default();
    for (kind, parts) in [("model", parameters), ("optimizer", optimizer)] {
        let parts: Vec<&TensorPart> = parts.iter().filter(|part| !part.values.is_empty()).collect();
        if parts.is_empty() {
            continue;
        }
        let file = format!("{kind}-{rank:05}.safetensors");
        if let Err(error) = report.write(directory, &file, &parts, pace) {
            // On a full disk the run needs the room before the whole attempt is cleared away.
            drop(std::fs::remove_file(directory.join(file)));
            return Err(error);
        }
    }
    Ok(report)
}

impl ShardReport {
    fn write(
        &mut self,
        directory: &Path,
        file: &str,
        parts: &[&TensorPart],
        pace: &Pace,
    ) -> Result<(), CheckpointError> {
        let mut names = BTreeSet::new();
        for part in parts {
            part.check()?;
            if !names.insert(&part.name) {
                return Err(CheckpointError::refused(&part.name, format!("it comes twice for {file}")));
            }
        }
        let specs: Vec<Spec> =
            parts.iter().map(|part| (part.name.clone(), part.part.shape.clone())).collect();
        let mut writer = ShardWriter::create(&directory.join(file), &specs, StoredDtype::F32)?;
        let mut worked = cpu_time();
        for part in parts {
            for stretch in part.values.chunks(STRETCH) {
                writer.write(&part.name, stretch)?;
                pace.rest(&mut worked);
            }
        }
        self.files.push(FileEntry::new(file, writer.finish()?));
        self.tensors.extend(parts.iter().map(|part| {
            let Part { start, shape } = part.part.clone();
            TensorEntry {
                name: part.name.clone(),
                shape: part.shape.clone(),
                dtype: StoredDtype::F32.name().to_owned(),
                slices: vec![Slice { file: file.to_owned(), start, shape }],
            }
        }));
        Ok(())
    }
}
