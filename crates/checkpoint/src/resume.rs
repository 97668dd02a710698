//! Finding the checkpoints of a run.

use std::path::{Path, PathBuf};

use crate::error::CheckpointError;
use crate::manifest::Manifest;

/// Complete checkpoints in a run's `checkpoints` directory, oldest first.
///
/// A directory without a readable manifest is left out and named in the log.
///
/// # Errors
/// When the directory cannot be listed; one that does not exist holds none.
pub fn complete_checkpoints(checkpoints: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    Ok(complete_by_step(checkpoints)?.into_iter().map(|(_, path)| path).collect())
}

/// As [`complete_checkpoints`], each with its step.
pub(crate) fn complete_by_step(checkpoints: &Path) -> Result<Vec<(u64, PathBuf)>, CheckpointError> {
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
    Ok(found)
}

/// The newest complete checkpoint, if there is one.
///
/// # Errors
/// As [`complete_checkpoints`].
pub fn latest_complete(checkpoints: &Path) -> Result<Option<PathBuf>, CheckpointError> {
    Ok(complete_checkpoints(checkpoints)?.pop())
}
