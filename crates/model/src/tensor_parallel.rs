//! The seam of tensor parallelism: what happens where a split matrix product begins and ends.

use std::ops::Range;

use burn::tensor::Tensor;
use switchyard_kernels::{Columns, VocabularyShard};

/// Borders of attention, feed-forward layers, experts, embedding and cross-entropy.
///
/// The devices of one group hold equal parts of heads, of `d_ff` and of the vocabulary, in order.
/// They compute the same routing, and draw parts of the same noise.
pub trait TensorParallel: Send + Sync {
    /// Whether any matrix is split, so that products of this device are parts of sums.
    fn splits(&self) -> bool;

    /// Before column-split matrices: identity forward, a sum over devices backward. `[n, d]`
    fn copy_in(&self, x_nd: Tensor<2>) -> Tensor<2>;

    /// [`copy_in`](Self::copy_in) of the gates, which meet expert outputs that are still to be summed
    /// over devices. One a slot.
    fn copy_in_gates(&self, gates: Tensor<1>) -> Tensor<1>;

    /// After row-split matrices and the embedding: a sum over devices forward, identity backward. `[n, d]`
    fn reduce_out(&self, x_nd: Tensor<2>) -> Tensor<2>;

    /// Vocabulary rows that live on this device.
    fn vocabulary(&self, vocab_size: usize) -> Range<usize>;

    /// The same rows and the devices that hold the others, for the loss; `None` when all live here.
    fn vocabulary_shard(&self, vocab_size: usize) -> Option<VocabularyShard>;

    /// Logits of the whole vocabulary from those of every device's rows, without gradient.
    /// `[n, local] -> [n, vocab_size]`
    fn gather_vocabulary(&self, logits_nv: Tensor<2>) -> Tensor<2>;

    /// Which columns, or heads, of a split tensor the `local` ones of this device are.
    fn columns(&self, local: usize) -> Columns;
}

/// Every matrix whole on this device.
#[derive(Debug, Clone, Copy, Default)]
pub struct WholeTensors;

impl TensorParallel for WholeTensors {
    fn splits(&self) -> bool {
        false
    }

    fn copy_in(&self, x_nd: Tensor<2>) -> Tensor<2> {
        x_nd
    }

    fn copy_in_gates(&self, gates: Tensor<1>) -> Tensor<1> {
        gates
    }

    fn reduce_out(&self, x_nd: Tensor<2>) -> Tensor<2> {
        x_nd
    }

    fn vocabulary(&self, vocab_size: usize) -> Range<usize> {
        0..vocab_size
    }

    fn vocabulary_shard(&self, _: usize) -> Option<VocabularyShard> {
        None
    }

    fn gather_vocabulary(&self, logits_nv: Tensor<2>) -> Tensor<2> {
        logits_nv
    }

    fn columns(&self, local: usize) -> Columns {
        Columns { first: 0, total: local }
    }
}
