//! Training, evaluation and comparison of models.

pub mod evaluate;
mod gradients;
mod optimizer;
pub mod schedule;
mod step;
pub mod verify;

pub use gradients::GradientSums;
pub use optimizer::{Optimizer, StateError, StateTensor};
pub use step::{Learner, NonFinite, StepOutcome};
