//! What an optimizer on a device is made of.

use super::{Adafactor, Adamw};
use crate::DeviceValues;

/// Which optimizer; what changes from step to step in its constants does not count here.
#[derive(Debug, Clone, Copy)]
pub enum OptimizerRules {
    /// Adafactor.
    Adafactor(Adafactor),
    /// AdamW.
    Adamw(Adamw),
}

/// Matrices of a parameter on a device, and their state in main memory.
#[derive(Debug)]
pub struct DeviceTensor<'a> {
    /// Its name.
    pub name: String,
    /// The last two dims are a matrix, the others a stack of those; one dim is a vector.
    pub shape: Vec<usize>,
    /// What the model computes with.
    pub parameter: DeviceValues,
    /// Where the matrices begin in it, so that updates write there; `None` if the model holds only a part of
    /// each.
    pub start: Option<usize>,
    /// Float32 values of matrices that the model holds in bfloat16, or only a part of.
    pub master: Option<&'a [f32]>,
    /// AdamW: first and second moments. Adafactor: row and column means, or the second moments of a vector.
    pub moments: [Option<&'a [f32]>; 2],
    /// Which part of an update has them.
    pub part: usize,
}

/// What an update on a GPU did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UpdateOutcome {
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Whether parameters were updated: norm and loss were finite.
    pub applied: bool,
}
