//! Parameter updates in place, one tensor at a time.

mod adafactor;
mod adamw;
mod device;
mod parallel;

pub use adafactor::{Adafactor, AdafactorState, adafactor};
pub use adamw::{Adamw, AdamwState, adamw};
pub use device::{DeviceTensor, OptimizerRules, UpdateOutcome};
pub use parallel::{add_assign, root_mean_square, sum_of_squares};
