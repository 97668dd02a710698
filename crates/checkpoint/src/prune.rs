//! Removing checkpoints that are no longer kept, and what interrupted saves left.

use std::path::Path;

use crate::error::CheckpointError;
use crate::files::{self, TEMPORARY};
use crate::resume::complete_by_step;

/// Removes what interrupted saves left; only for a process that has the run to itself.
///
/// # Errors
/// When the directory cannot be listed or something cannot be removed.
pub fn clear_leftovers(checkpoints: &Path) -> Result<(), CheckpointError> {
    let listing = match std::fs::read_dir(checkpoints) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        listing => listing.map_err(CheckpointError::io("list", checkpoints))?,
    };
    for entry in listing {
        let entry = entry.map_err(CheckpointError::io("list", checkpoints))?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            files::remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes complete checkpoints but the newest `keep_last`, 0 for all, and those whose step is a
/// multiple of `keep_every`, 0 for none.
///
/// # Errors
/// When the directory cannot be listed or a checkpoint cannot be removed.
pub fn prune(checkpoints: &Path, keep_last: usize, keep_every: u64) -> Result<(), CheckpointError> {
    if keep_last > 0 {
        let complete = complete_by_step(checkpoints)?;
        let old = complete.iter().rev().skip(keep_last);
        for (_, path) in old.filter(|(step, _)| keep_every == 0 || !step.is_multiple_of(keep_every)) {
            files::retire(path)?;
        }
    }
    Ok(())
}
