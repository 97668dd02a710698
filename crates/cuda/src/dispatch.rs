//! Tokens into the slots of experts and back: the permutation around the experts.

use crate::address::{Address, Arg, Format};
use crate::error::CudaError;
use crate::gpu::{Grid, Queue};
use crate::size::{count, lanes};
use crate::source::DISPATCH;

/// Who sits where, and how wide a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slots {
    /// Tokens.
    pub tokens: usize,
    /// Slots that a token may have: 1 or 2.
    pub choices: usize,
    /// Slots of all experts.
    pub slots: usize,
    /// Values of a token, a multiple of 8 (bfloat16) or 4 (float32).
    pub d_model: usize,
    /// Of tokens, expert outputs and their gradients.
    pub format: Format,
    /// The token of each slot, -1 for none. int32 `[slots]`
    pub token_of_slot: Address,
    /// The slots of each token, -1 for none; `[slots]` and this must agree. int32 `[tokens, choices]`
    pub slot_of_token: Address,
}

/// Where the backward pass of [`combine`] finds and leaves its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CombineGradients {
    /// Gradient of what was combined. `[tokens, d_model]`
    pub gradient: Address,
    /// `[slots, d_model]`
    pub expert_outputs: Address,
    /// float32 `[slots]`
    pub gates: Address,
    /// Takes the gradient of the expert outputs; may be them. `[slots, d_model]`
    pub expert_outputs_gradient: Address,
    /// Takes the gradient of the gates. float32 `[slots]`
    pub gates_gradient: Address,
}

/// Rows that a block moves.
const ROWS: u32 = 8;

impl Slots {
    /// 16-byte accesses of a row.
    fn vectors(&self, operation: &'static str) -> Result<u32, CudaError> {
        let lanes = lanes(operation, "d_model", self.d_model, self.format)?;
        count(operation, "d_model", self.d_model / lanes)
    }

    fn grid(rows: u32) -> Grid {
        Grid::new(rows.div_ceil(ROWS), 32 * ROWS)
    }

    unsafe fn gather(
        &self,
        operation: &'static str,
        queue: Queue<'_>,
        [rows, gates, onto, out]: [Address; 4],
    ) -> Result<(), CudaError> {
        let (tokens, vectors) = (count(operation, "tokens", self.tokens)?, self.vectors(operation)?);
        if !(1..=2).contains(&self.choices) {
            let reason = format!("a token has {} choices; 1 or 2 will do", self.choices);
            return Err(CudaError::Size { operation, reason });
        }
        if tokens == 0 {
            return Ok(());
        }
        let args: [Arg; 7] = [
            rows.into(),
            gates.into(),
            onto.into(),
            self.slot_of_token.into(),
            tokens.into(),
            vectors.into(),
            out.into(),
        ];
        let name = format!("gather_{}_{}", self.choices, self.format.suffix());
        // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
        unsafe { queue.gpu.launch(&DISPATCH, &name, Self::grid(tokens), queue.stream, &args) }
    }
}

/// Copies `tokens`, `[tokens, d_model]`, into their slots, `out` `[slots, d_model]`; empty ones become 0.
///
/// # Errors
/// [`CudaError::Size`] for a `d_model` that is not a multiple of 16 bytes.
///
/// # Safety
/// As the crate's documentation demands.
///
/// # Source
/// Switch Transformer, section 2.2 and appendix F (arXiv:2101.03961), as a gather instead of an einsum.
pub unsafe fn dispatch(queue: Queue<'_>, tokens: Address, out: Address, to: Slots) -> Result<(), CudaError> {
    let (slots, vectors) = (count("dispatch", "slots", to.slots)?, to.vectors("dispatch")?);
    if slots == 0 {
        return Ok(());
    }
    let args: [Arg; 5] = [tokens.into(), to.token_of_slot.into(), slots.into(), vectors.into(), out.into()];
    // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
    unsafe { queue.gpu.launch(&DISPATCH, "dispatch", Slots::grid(slots), queue.stream, &args) }
}

/// Writes to `out`, `[tokens, d_model]`, the sums of the rows of `gradient`, `[slots, d_model]`, of each token's
/// slots.
///
/// # Errors
/// [`CudaError::Size`] for a `d_model` that is not a multiple of 16 bytes, or more than two choices.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn dispatch_backward(
    queue: Queue<'_>,
    gradient: Address,
    out: Address,
    to: Slots,
) -> Result<(), CudaError> {
    // SAFETY: passed on.
    unsafe { to.gather("dispatch", queue, [gradient, Address::NONE, Address::NONE, out]) }
}

/// Writes `residual + sum(gates * expert_outputs)` over each token's slots to `out`, rounded once.
///
/// `expert_outputs` is `[slots, d_model]`, `gates` float32 `[slots]`, `residual` and `out`, which may be one,
/// are `[tokens, d_model]`. A token without a slot gets its residual; no residual, [`Address::NONE`], is 0.
///
/// # Errors
/// [`CudaError::Size`] for a `d_model` that is not a multiple of 16 bytes, or more than two choices.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn combine(
    queue: Queue<'_>,
    expert_outputs: Address,
    gates: Address,
    residual: Address,
    out: Address,
    from: Slots,
) -> Result<(), CudaError> {
    // SAFETY: passed on.
    unsafe { from.gather("combine", queue, [expert_outputs, gates, residual, out]) }
}

/// Gradients of expert outputs, `gates * gradient` and 0 for empty slots, and of gates, inner products, in
/// one launch. That of the residual is `gradient` itself.
///
/// # Errors
/// [`CudaError::Size`] for a `d_model` that is not a multiple of 16 bytes.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn combine_backward(queue: Queue<'_>, at: CombineGradients, from: Slots) -> Result<(), CudaError> {
    let (slots, vectors) = (count("combine", "slots", from.slots)?, from.vectors("combine")?);
    if slots == 0 {
        return Ok(());
    }
    let args: [Arg; 8] = [
        at.gradient.into(),
        at.expert_outputs.into(),
        at.gates.into(),
        from.token_of_slot.into(),
        slots.into(),
        vectors.into(),
        at.expert_outputs_gradient.into(),
        at.gates_gradient.into(),
    ];
    let name = format!("combine_backward_{}", from.format.suffix());
    // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
    unsafe { queue.gpu.launch(&DISPATCH, &name, Slots::grid(slots), queue.stream, &args) }
}
