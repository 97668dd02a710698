//! The seam between routing and experts: how tokens reach the device of their expert.

use std::sync::Arc;

use burn::tensor::Tensor;
use switchyard_kernels::{DispatchPlan, ExpertRows, SlotWay, TokenNoise, combine, dispatch};

/// Moves tokens into expert slots and expert outputs back.
///
/// # Collective
/// Ranks that share experts make the same calls in the same order, however few tokens they have.
pub trait TokenDispatcher: Send + Sync {
    /// Slots of each expert that plans must have before they are dispatched: those of `plan`, or where
    /// its capacity is not fixed the most that any rank needs.
    fn slots(&self, plan: &DispatchPlan) -> usize;

    /// Brings every token to its expert.
    ///
    /// # Shapes
    /// `tokens_nd`: `[n, d]`. `noise` places the tokens in the global batch; it is there when the
    /// experts drop activations, and the places must then travel with the tokens.
    fn dispatch(&self, tokens_nd: Tensor<2>, plan: &DispatchPlan, noise: Option<TokenNoise>) -> Dispatched;

    /// Brings expert outputs back, weighted by the gates.
    ///
    /// # Shapes
    /// `outputs_lcd`: shaped as what was dispatched with these `counts`; `gates`: one a slot of the plan. Returns
    /// `[n, d]`, added to `residual_nd` if given; a dropped token gets exactly 0.
    fn combine(
        &self,
        outputs_lcd: Tensor<3>,
        gates: Tensor<1>,
        plan: &DispatchPlan,
        counts: &SenderCounts,
        residual_nd: Option<Tensor<2>>,
    ) -> Tensor<2>;

    /// Whether any of the ranks that run their forward passes together says `here`: those that share
    /// experts or matrices with this one.
    fn any(&self, here: bool) -> bool;
}

/// Tokens at the experts of this device.
#[derive(Debug)]
pub struct Dispatched {
    /// `[l, c, d]`, where `l` experts live on this device and `c` counts the slots of all senders;
    /// unused slots are 0. Those that have a [`way`](Self::way) before them are still here: `[num_experts, c, d]`, where
    /// `c` counts the slots of this device alone.
    pub slots_lcd: Tensor<3>,
    /// Which of the slots hold a token: not what the plan says, which is the sender's.
    pub rows: ExpertRows,
    /// How they get to their experts and outputs back, where that goes on beside the experts' work.
    pub way: Option<SlotWay>,
    /// What the way back needs to know, where outputs do not come back by themselves.
    pub counts: SenderCounts,
}

/// Tokens that each sender has at each expert of this device. `[l * senders]`; empty where nobody else
/// sends.
pub type SenderCounts = Arc<Vec<usize>>;

/// All experts on this device: no communication.
#[derive(Debug, Clone, Copy, Default)]
pub struct LocalDispatcher;

impl TokenDispatcher for LocalDispatcher {
    fn slots(&self, plan: &DispatchPlan) -> usize {
        plan.slots_per_expert
    }

    fn dispatch(&self, tokens_nd: Tensor<2>, plan: &DispatchPlan, noise: Option<TokenNoise>) -> Dispatched {
        let (slots_lcd, rows) = (dispatch(tokens_nd, plan), ExpertRows::local(plan, noise));
        Dispatched { slots_lcd, rows, way: None, counts: SenderCounts::default() }
    }

    fn combine(
        &self,
        outputs_lcd: Tensor<3>,
        gates: Tensor<1>,
        plan: &DispatchPlan,
        _: &SenderCounts,
        residual_nd: Option<Tensor<2>>,
    ) -> Tensor<2> {
        combine(outputs_lcd, gates, plan, residual_nd)
    }

    fn any(&self, here: bool) -> bool {
        here
    }
}
