//! From text to batches: plain integers, no tensors.

pub mod batch;
pub mod corpus;
mod durable;
pub mod error;
pub mod mixture;
pub mod permutation;
pub mod source;
pub mod span_corruption;
pub mod tokenizer;

#[cfg(test)]
mod test_vectors;

pub use batch::HostBatch;
pub use error::DataError;
pub use tokenizer::{Tokenizer, TokenizerError};
