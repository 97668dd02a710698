//! Models on disk: checkpoints of a run, and Hugging Face directories in and out.
//!
//! Knows no tensor library: values move as float32 under the logical names of
//! `switchyard_config::parameters`, one tensor at a time.

mod directory;
mod dtype;
mod error;
mod files;
pub mod hf;
mod manifest;
mod resume;
mod save;
mod shard;
mod tensors;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use directory::{ModelDirectory, ModelKind, open_model};
pub use error::CheckpointError;
pub use manifest::{FileEntry, Manifest, Slice, TensorEntry};
pub use resume::{Checkpoint, complete_checkpoints, latest_complete};
pub use save::{Contents, PendingCheckpoint, ShardReport, TensorPart, clear_leftovers, prune, write_shards};
pub use tensors::{TensorMap, TensorSource};
