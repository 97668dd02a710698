//! Experiment files: TOML to a validated [`RunPlan`]. No tensors, no files but TOML.

pub mod model;
pub mod parameters;
pub mod plan;

pub use model::{Activation, Initialization, ModelConfig, StackKind};
pub use plan::RunPlan;
