//! The seam between routing and experts: how tokens reach the device of their expert.

use burn::tensor::Tensor;
use switchyard_kernels::{DispatchPlan, combine, dispatch};

/// Moves tokens into expert slots and expert outputs back.
pub trait TokenDispatcher: Send + Sync {
    /// Experts that live on this device.
    fn num_local_experts(&self, num_experts: usize) -> usize;

    /// Brings every token to its expert.
    ///
    /// # Shapes
    /// `tokens_nd`: `[n, d]`. Returns `[l, slots, d]`; unused slots are 0.
    fn dispatch(&self, tokens_nd: Tensor<2>, plan: &DispatchPlan) -> Tensor<3>;

    /// Brings expert outputs back, weighted by the gates.
    ///
    /// # Shapes
    /// `outputs_lcd`: `[l, slots, d]`; `gates`: one a slot of the plan. Returns `[n, d]`; a dropped
    /// token gets exactly 0.
    fn combine(&self, outputs_lcd: Tensor<3>, gates: Tensor<1>, plan: &DispatchPlan) -> Tensor<2>;
}

/// All experts on this device: no communication.
#[derive(Debug, Clone, Copy, Default)]
pub struct LocalDispatcher;

impl TokenDispatcher for LocalDispatcher {
    fn num_local_experts(&self, num_experts: usize) -> usize {
        num_experts
    }

    fn dispatch(&self, tokens_nd: Tensor<2>, plan: &DispatchPlan) -> Tensor<3> {
        dispatch(tokens_nd, plan)
    }

    fn combine(&self, outputs_lcd: Tensor<3>, gates: Tensor<1>, plan: &DispatchPlan) -> Tensor<2> {
        combine(outputs_lcd, gates, plan)
    }
}
