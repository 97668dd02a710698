//! The seam of tensor parallelism: what happens where a split matrix product begins and ends.

use std::ops::Range;

use burn::tensor::Tensor;

/// Borders of attention, feed-forward layers, experts, embedding and cross-entropy.
pub trait TensorParallel: Send + Sync {
    /// Before column-split matrices: identity forward, a sum over devices backward. `[n, d]`
    fn copy_in(&self, x_nd: Tensor<2>) -> Tensor<2>;

    /// After row-split matrices: a sum over devices forward, identity backward. `[n, d]`
    fn reduce_out(&self, x_nd: Tensor<2>) -> Tensor<2>;

    /// Vocabulary rows that live on this device.
    fn vocabulary(&self, vocab_size: usize) -> Range<usize>;
}

/// Every matrix whole on this device.
#[derive(Debug, Clone, Copy, Default)]
pub struct WholeTensors;

impl TensorParallel for WholeTensors {
    fn copy_in(&self, x_nd: Tensor<2>) -> Tensor<2> {
        x_nd
    }

    fn reduce_out(&self, x_nd: Tensor<2>) -> Tensor<2> {
        x_nd
    }

    fn vocabulary(&self, vocab_size: usize) -> Range<usize> {
        0..vocab_size
    }
}
