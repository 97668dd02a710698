#![doc = include_str!("../README.md")]

mod collectives;
mod communicator;
mod config;
mod deadline;
mod error;
mod ffi;
mod group;
mod library;
mod memory;
mod registration;
mod types;
mod unique_id;
mod version;

pub use communicator::{Communicator, State};
pub use config::Config;
pub use deadline::Deadline;
pub use error::{Attempt, Code, Error, Failure, Mismatch, Who};
pub use group::Group;
pub use library::{ENVIRONMENT_VARIABLE, Library, Origin};
pub use memory::{DeviceSlice, DeviceSliceMut, Stream};
pub use registration::Registration;
pub use types::{DataType, ReduceOp};
pub use unique_id::UniqueId;
pub use version::{Feature, Version};
