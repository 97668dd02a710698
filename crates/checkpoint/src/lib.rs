//! Models on disk: checkpoints of a run, and Hugging Face directories in and out.
//!
//! Knows no tensor library: values move as float32 under the logical names of
//! `switchyard_config::parameters`, one tensor or a part of one at a time. Ranks write and read their
//! parts each by itself: nothing here communicates.

mod block_file;
mod directory;
mod dtype;
mod error;
mod files;
pub mod hf;
mod manifest;
mod pace;
mod pending;
mod prune;
mod read;
mod resume;
mod shard;
mod slices;
mod tensors;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod write;

pub use directory::{ModelDirectory, ModelKind, open_model};
pub use error::CheckpointError;
pub use manifest::{FileEntry, Manifest, Slice, TensorEntry};
pub use pace::Pace;
pub use pending::{Contents, PendingCheckpoint};
pub use prune::{clear_leftovers, prune};
pub use read::Checkpoint;
pub use resume::{complete_checkpoints, latest_complete};
pub use tensors::{TensorMap, TensorSource};
pub use write::{ShardReport, TensorPart, write_shards};
