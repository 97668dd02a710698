//! Training, evaluation and comparison of models.
//!
//! [`train`] is a whole run, [`Learner::step`] one update, [`evaluate::evaluate`] a pass over
//! held-out text. Prints nothing: an [`Observer`] sees what happens.

mod agreement;
mod checkpointing;
mod diagnose;
mod error;
pub mod evaluate;
mod gpu_step;
#[cfg(test)]
mod memory_tests;
mod metrics;
mod optimizer;
mod parameters;
mod report;
mod run_directory;
pub mod schedule;
mod step;
mod train_loop;
pub mod verify;

pub use agreement::refuse_different_runs;
pub use error::TrainError;
pub use metrics::{EvalRecord, LastRecords, MetricsError, MetricsFile, StepRecord};
pub use parameters::load_model;
pub use run_directory::{Resume, RunDirectory, RunDirectoryError};
pub use step::{BegunStep, Learner, NonFinite, StepOutcome};
pub use train_loop::{Observer, Progress, TrainOptions, TrainOutcome, train};
