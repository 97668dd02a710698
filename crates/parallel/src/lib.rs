//! A model spread over ranks: the groups of a job's mesh, and what travels between them.
//!
//! Tokens travel to their experts ([`AllToAllDispatcher`]), partial products are summed over the
//! ranks that split a matrix ([`SplitTensors`]), gradients travel to the owner of each matrix and
//! its new values back ([`OwnerExchange`]). An axis of size 1 costs no communication.

mod all_to_all;
mod bench;
mod dispatcher;
mod exchange;
mod failure;
mod mesh;
mod on_devices;
mod split_tensors;
mod sums;

pub use bench::{device_time, measure_collectives};
pub use dispatcher::{AllToAllDispatcher, TokenTravel};
pub use exchange::{Overlap, Owned, OwnerExchange, Unit};
pub use failure::Failure;
pub use mesh::{Agreement, Mesh, agree, gather_text};
pub use on_devices::{WorldError, devices_of, world_on};
pub use split_tensors::SplitTensors;
pub use sums::{Gradients, SumFormats};
