//! From text to batches: plain integers, no tensors.

pub mod batch;

pub use batch::HostBatch;
