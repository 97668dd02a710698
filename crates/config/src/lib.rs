//! Experiment files: TOML to a validated [`RunPlan`]. No tensors, no files but TOML.
//!
//! [`resolve`] is the way in; [`summarize`] tells what a plan needs and [`reference()`] documents
//! every key.

mod decide;
mod error;
mod flops;
mod keys;
mod layers;
pub mod mesh;
pub mod model;
mod nearest;
pub mod parameters;
pub mod partition;
pub mod plan;
mod precision;
pub mod presets;
mod provenance;
mod reference;
mod resolve;
pub mod schema;
mod summary;
mod validate;

pub use error::{ConfigError, ErrorKind};
pub use flops::step_flops;
pub use mesh::{Coordinates, MeshShape, ranks_of_each_machine};
pub use model::{Activation, Initialization, ModelConfig, StackKind};
pub use plan::{ExchangeOverlap, HierarchicalAllToAll, RunPlan};
pub use presets::{PresetError, preset, preset_names};
pub use provenance::{Origin, Place, Provenance, SourceFile};
pub use reference::reference;
pub use resolve::{
    Difference, Resolved, branch_conflicts, differences, entries, resolve, resolve_str, resume_conflicts,
};
pub use schema::RunConfig;
pub use summary::{MemorySummary, StackSummary, Summary, rank_memory, summarize};
