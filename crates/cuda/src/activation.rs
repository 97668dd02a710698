//! The pointwise half of feed-forward layers, dense and of experts, and its gradients.

use crate::address::{Address, Arg, Format};
use crate::error::CudaError;
use crate::gpu::{Grid, Queue};
use crate::noise::{Columns, NoiseKey, TokenNoise, dropout_args};
use crate::size::{count, lanes};
use crate::source::ACTIVATION;

/// Pointwise function of a feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)`, but NaN where `x` is.
    Relu,
    /// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `x * Phi(x)`.
    Gelu,
    /// `x * sigmoid(x)`.
    Silu,
}

impl Activation {
    fn name(self) -> &'static str {
        match self {
            Self::Relu => "relu",
            Self::GeluTanh => "gelu_tanh",
            Self::Gelu => "gelu",
            Self::Silu => "silu",
        }
    }
}

/// Random numbers of the hidden values of experts, `[experts, slots, d_ff]`: counted by token and expert,
/// so that they do not depend on where the expert lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertNoise {
    /// Place and step.
    pub key: NoiseKey,
    /// Batch row and position within it of the token in each slot, any where none is.
    /// `u32` `[experts * slots, 2]`, aligned to 8 bytes.
    pub places: Address,
    /// Slots of an expert.
    pub slots: usize,
    /// Number of the first expert within the whole layer.
    pub first_expert: u32,
    /// Columns of `d_ff` on this device, if it is split.
    pub columns: Option<Columns>,
}

/// Dropout of hidden values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum HiddenDropout {
    /// Of a dense layer, with this rate.
    Tokens(f64, TokenNoise),
    /// Of experts, with this rate.
    Experts(f64, ExpertNoise),
    /// Backward of a ReLU layer alone, with this rate: `x` is what dropout has left of the hidden values,
    /// and where it left nothing, no gradient flows, whatever the reason.
    Done(f64),
}

/// Which rows of the hidden values hold a token; the others come out as 0 and are not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsedRows {
    /// Rows in use of each segment, which come first in it. `i32` `[rows / segment_rows]`
    pub counts: Address,
    /// Rows of a segment.
    pub segment_rows: usize,
}

/// Hidden values `[rows, d_ff]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hidden {
    /// Rows: tokens, or slots of all experts.
    pub rows: usize,
    /// Values of each, a multiple of 8 (bfloat16) or 4 (float32).
    pub d_ff: usize,
    /// Format of all values.
    pub format: Format,
    /// Pointwise function.
    pub activation: Activation,
    /// Values from a row of `x` and `linear` to the next, and of their gradients: `d_ff`, or `2 d_ff` where
    /// both stand in one matrix; a multiple like `d_ff`.
    pub stride: usize,
    /// Rows that hold a token; all without.
    pub used: Option<UsedRows>,
    /// Dropout.
    pub dropout: Option<HiddenDropout>,
}

/// Where the backward pass of [`activate`] finds and leaves its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActivationGradients {
    /// Gradient of the hidden values. `[rows, d_ff]`
    pub gradient: Address,
    /// What was activated; for an ungated [`Activation::Relu`], its value does as well. `[rows, d_ff]`
    pub x: Address,
    /// The gate's linear factor, or [`Address::NONE`]. `[rows, d_ff]`
    pub linear: Address,
    /// Takes the gradient of `x`; may be `gradient` or `x`, if the strides are the same. `[rows, d_ff]`
    pub x_gradient: Address,
    /// Takes the gradient of `linear`; may be `linear`. `[rows, d_ff]`
    pub linear_gradient: Address,
}

const OPERATION: &str = "activation";

/// Rows that a block handles, a warp each.
const BLOCK_ROWS: usize = 4;

impl Hidden {
    /// What `HIDDEN_PARAMETERS` of the kernels stands for.
    fn args(&self) -> Result<Vec<Arg>, CudaError> {
        lanes(OPERATION, "d_ff", self.d_ff, self.format)?;
        lanes(OPERATION, "stride", self.stride, self.format)?;
        let mut args: Vec<Arg> =
            vec![count(OPERATION, "rows", self.rows)?.into(), count(OPERATION, "d_ff", self.d_ff)?.into()];
        args.extend(self.used_args()?);
        let (noise, (places, slots, first_expert), rate) = match self.dropout {
            Some(HiddenDropout::Tokens(rate, noise)) if rate > 0.0 => {
                (noise.args(OPERATION, self.d_ff)?, (Address::NONE, 1, 0), rate)
            }
            Some(HiddenDropout::Experts(rate, noise)) if rate > 0.0 => {
                let ExpertNoise { key, places, slots, first_expert, columns } = noise;
                let tokens = TokenNoise { key, first_row: 0, row_tokens: 1, columns };
                let slots = count(OPERATION, "slots of an expert", slots.max(1))?;
                (tokens.args(OPERATION, self.d_ff)?, (places, slots, first_expert), rate)
            }
            Some(HiddenDropout::Done(rate)) => (TokenNoise::no_args(), (Address::NONE, 1, 0), rate),
            _ => (TokenNoise::no_args(), (Address::NONE, 1, 0), 0.0),
        };
        args.extend(noise);
        args.extend([Arg::from(places), slots.into(), first_expert.into()]);
        args.extend(dropout_args(rate));
        Ok(args)
    }

    /// Where the counts of used rows are, and the rows of a segment.
    fn used_args(&self) -> Result<[Arg; 2], CudaError> {
        let (used, segment_rows) = match self.used {
            Some(used) => (used.counts, used.segment_rows),
            None => (Address::NONE, 1),
        };
        if segment_rows == 0 || !self.rows.is_multiple_of(segment_rows) {
            let reason = format!("{} rows cannot be cut into segments of {segment_rows}", self.rows);
            return Err(CudaError::Size { operation: OPERATION, reason });
        }
        Ok([used.into(), count(OPERATION, "rows of a segment", segment_rows)?.into()])
    }

    /// Blocks of a kernel whose threads have `accesses` times 16 bytes of a row.
    fn grid(&self, accesses: usize) -> Grid {
        let part = 32 * accesses * (16 / self.format.bytes());
        let blocks = [self.rows.div_ceil(BLOCK_ROWS) as u32, self.d_ff.div_ceil(part) as u32, 1];
        Grid { blocks, threads: 128, shared: 0 }
    }

    fn is_empty(&self) -> bool {
        self.rows == 0 || self.d_ff == 0
    }
}

/// Writes `dropout(act(x))`, or `dropout(act(x) * linear)` unless `linear` is [`Address::NONE`], to `out`,
/// `[rows, d_ff]` without gaps, which may be `x` or `linear` if these have none.
///
/// # Errors
/// [`CudaError::Size`] for widths that the kernels do not have, and for [`HiddenDropout::Done`].
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn activate(
    queue: Queue<'_>,
    x: Address,
    linear: Address,
    out: Address,
    hidden: Hidden,
) -> Result<(), CudaError> {
    if matches!(hidden.dropout, Some(HiddenDropout::Done(_))) {
        let reason = "a forward pass needs the random numbers of its dropout".to_owned();
        return Err(CudaError::Size { operation: OPERATION, reason });
    }
    let mut args: Vec<Arg> = vec![x.into(), linear.into(), (hidden.stride as u64).into(), out.into()];
    args.extend(hidden.args()?);
    if hidden.is_empty() {
        return Ok(());
    }
    let name = format!("{}_{}", hidden.activation.name(), hidden.format.suffix());
    // SAFETY: the arguments are those of the kernels in `activation.cu`; the addresses are promised by the
    // caller.
    unsafe { queue.gpu.launch(&ACTIVATION, &name, hidden.grid(4), queue.stream, &args) }
}

/// Gradients of `x` and, if there was one, of `linear`, with the strides of the forward pass.
///
/// # Errors
/// [`CudaError::Size`] for widths that the kernels do not have, and for [`HiddenDropout::Done`] where the
/// layer is not an ungated [`Activation::Relu`].
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn activate_backward(
    queue: Queue<'_>,
    at: ActivationGradients,
    hidden: Hidden,
) -> Result<(), CudaError> {
    let masks = hidden.activation == Activation::Relu && at.linear == Address::NONE;
    if matches!(hidden.dropout, Some(HiddenDropout::Done(_))) && !masks {
        let reason = "what dropout has left stands for the mask in ungated ReLU layers alone".to_owned();
        return Err(CudaError::Size { operation: OPERATION, reason });
    }
    let stride = hidden.stride as u64;
    let mut args: Vec<Arg> = vec![
        at.gradient.into(),
        at.x.into(),
        at.linear.into(),
        stride.into(),
        at.x_gradient.into(),
        at.linear_gradient.into(),
        stride.into(),
    ];
    args.extend(hidden.args()?);
    if hidden.is_empty() {
        return Ok(());
    }
    let name = format!("{}_backward_{}", hidden.activation.name(), hidden.format.suffix());
    // SAFETY: as in `activate`.
    unsafe { queue.gpu.launch(&ACTIVATION, &name, hidden.grid(2), queue.stream, &args) }
}

/// Makes the rows of `values`, `[rows, d_ff]` without gaps, 0 that hold no token, and touches no others: for
/// hidden values that a product with ReLU has made.
///
/// # Errors
/// [`CudaError::Size`] for widths that the kernels do not have.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn clear_empty_rows(queue: Queue<'_>, values: Address, hidden: Hidden) -> Result<(), CudaError> {
    let vectors = hidden.d_ff / lanes(OPERATION, "d_ff", hidden.d_ff, hidden.format)?;
    let mut args: Vec<Arg> = vec![
        values.into(),
        count(OPERATION, "rows", hidden.rows)?.into(),
        count(OPERATION, "d_ff", vectors)?.into(),
    ];
    args.extend(hidden.used_args()?);
    if hidden.is_empty() || hidden.used.is_none() {
        return Ok(());
    }
    let grid = Grid::new(hidden.rows.div_ceil(BLOCK_ROWS) as u32, 128);
    // SAFETY: as in `activate`.
    unsafe { queue.gpu.launch(&ACTIVATION, "clear_empty", grid, queue.stream, &args) }
}
