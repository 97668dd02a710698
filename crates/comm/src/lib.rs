//! Collective operations between the ranks of a job, behind one trait with several backends.
//!
//! Knows nothing of models: typed buffers in, typed buffers out. Every call returns a `Result` and
//! ends within a deadline. Sums are taken in rank order, so that every backend gives the same bits.

mod buffer;
mod call;
mod communicator;
mod error;
mod reduce;
mod solo;
mod threads;

pub use buffer::{Buffer, BufferMut, Element, ElementType};
pub use communicator::{Communicator, ReduceOp};
pub use error::CommError;
pub use solo::Solo;
pub use threads::threads;
