//! Operations that have kernels for some tensors, and for all others a form composed of LibTorch's operations.

use std::fmt::Debug;

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use tch::{Tensor, no_grad};

use crate::operation::{Operation, given};
use crate::torch::composed::{Graph, composed};

/// `N` tensors in, `M` tensors out. The gradients of several outputs come together.
pub(crate) trait WithKernels<const N: usize, const M: usize>: Debug + Send + Sync + 'static {
    /// What the kernels of the backward pass need.
    type Kept: Debug + Send + Sync + 'static;

    /// The outputs, by LibTorch's operations.
    fn compose(&self, inputs: [&Tensor; N]) -> [Tensor; M];

    /// The outputs, by kernels; `None` where there are none for these inputs.
    fn launch(&self, inputs: &[TchTensor; N]) -> Option<([TchTensor; M], Self::Kept)>;

    /// Gradients of the wanted inputs, by kernels, given those of all outputs, row by row.
    fn launch_backward(
        &self,
        kept: &Self::Kept,
        gradients: [TchTensor; M],
        wanted: [bool; N],
    ) -> [Option<TchTensor>; N];
}

/// What the backward pass needs.
#[derive(Debug)]
pub(crate) enum Saved<K> {
    Composed(Graph),
    Launched(K),
}

impl<O: WithKernels<N, M>, const N: usize, const M: usize> Operation<LibTorch, N, M> for O {
    type Saved = Saved<O::Kept>;

    const TOGETHER: bool = M > 1;

    fn forward(&self, inputs: &[TchTensor; N], tracked: bool) -> ([TchTensor; M], Self::Saved) {
        if let Some((outputs, kept)) = no_grad(|| self.launch(inputs)) {
            return (outputs, Saved::Launched(kept));
        }
        let (outputs, graph) = composed(inputs, tracked, |inputs| self.compose(inputs));
        (outputs, Saved::Composed(graph))
    }

    fn backward(
        &self,
        saved: &Self::Saved,
        gradients: [Option<TchTensor>; M],
        wanted: [bool; N],
    ) -> [Option<TchTensor>; N] {
        match saved {
            Saved::Composed(graph) => graph.gradients(gradients, wanted),
            Saved::Launched(kept) => no_grad(|| self.launch_backward(kept, given(gradients), wanted)),
        }
    }
}
