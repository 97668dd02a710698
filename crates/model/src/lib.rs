//! The mathematics of T5 and Switch Transformers as one device sees it.
//!
//! Owns the modules, their parameters and the forward pass. Knows nothing of ranks: whatever
//! crosses devices goes through [`TokenDispatcher`] and [`TensorParallel`], whose local forms
//! stand here.

mod context;
mod dispatcher;
pub mod generate;
mod init;
mod model;
pub mod moe;
mod named;
mod recompute;
pub mod t5;
mod tensor_parallel;

pub use context::{Capacity, ForwardContext, Site};
pub use dispatcher::{Dispatched, LocalDispatcher, SenderCounts, TokenDispatcher};
pub use init::fresh_parameter;
pub use model::{EncoderOutput, LossOutput, Seq2SeqBatch, SwitchTransformer};
pub use named::ParameterError;
pub use t5::block_number;
pub use tensor_parallel::{TensorParallel, WholeTensors};
