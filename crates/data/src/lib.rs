//! From text to batches: plain integers, no tensors.

pub mod batch;
pub mod cache;
pub mod corpus;
mod durable;
pub mod error;
pub mod loader;
pub mod mixture;
pub mod permutation;
pub mod progress;
pub mod source;
pub mod span_corruption;
pub mod tokenizer;

#[cfg(test)]
mod test_vectors;

pub use batch::{HostBatch, Share};
pub use error::DataError;
pub use loader::{DataSet, DataState, LoadError, Prefetcher};
pub use progress::{Progress, ProgressFn};
pub use tokenizer::{Tokenizer, TokenizerError};
