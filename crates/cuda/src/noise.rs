//! Dropout and jitter from counters: the numbers that `crates/kernels` draws, on the device.

use crate::address::{Address, Arg, Format};
use crate::error::CudaError;
use crate::gpu::{Grid, Queue};
use crate::size::{count, lanes};
use crate::source::NOISE;

/// Names one place of one step: with a batch row and an element it fixes a random number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoiseKey {
    /// Seed of the run.
    pub seed: u64,
    /// Step of the run, a `u32` in device memory.
    pub step: Address,
    /// Place inside the model; no two places share one.
    pub site: u32,
}

/// Columns of a tensor that is split over devices: those that one of them holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// Number of the first.
    pub first: usize,
    /// Columns of the whole tensor.
    pub total: usize,
}

/// Random numbers of a `[tokens, width]` tensor whose tokens come from consecutive batch rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenNoise {
    /// Place and step.
    pub key: NoiseKey,
    /// Number of the first token's batch row within the global batch.
    pub first_row: u32,
    /// Tokens in a batch row.
    pub row_tokens: usize,
    /// Columns at hand of a tensor split over devices; absent when the tensor is whole.
    pub columns: Option<Columns>,
}

/// Dropout of a `[tokens, width]` tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability of a zero.
    pub rate: f64,
    /// Random numbers.
    pub noise: TokenNoise,
}

impl TokenNoise {
    /// What `TOKEN_NOISE_PARAMETERS` of the kernels stands for.
    pub(crate) fn args(&self, operation: &'static str, width: usize) -> Result<[Arg; 7], CudaError> {
        let Columns { first, total } = self.columns.unwrap_or(Columns { first: 0, total: width });
        if first + width > total || self.row_tokens == 0 {
            return Err(CudaError::Size {
                operation,
                reason: format!(
                    "columns {first}..{} of {total} and {} tokens in a batch row; columns must lie within the \
                     tensor and rows hold a token",
                    first + width,
                    self.row_tokens
                ),
            });
        }
        Ok([
            self.key.seed.into(),
            self.key.step.into(),
            self.key.site.into(),
            self.first_row.into(),
            count(operation, "tokens in a batch row", self.row_tokens)?.into(),
            count(operation, "first column", first)?.into(),
            count(operation, "columns", total)?.into(),
        ])
    }

    /// The arguments of a kernel that draws nothing.
    pub(crate) fn no_args() -> [Arg; 7] {
        [0_u32; 7].map(Arg::from)
    }
}

/// What `Dropout` of the kernels is made of: the first number of 24 bits that keeps, and the factor then.
pub(crate) fn dropout_args(rate: f64) -> [Arg; 2] {
    // Rounded first, as on the CPU.
    let rate = rate as f32;
    let first_kept = (f64::from(rate) * f64::from(1_u32 << 24)).ceil() as u32;
    [first_kept.into(), (1.0 / (1.0 - rate)).into()]
}

/// A `[tokens, width]` tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenTensor {
    /// Tokens.
    pub tokens: usize,
    /// Values of each, a multiple of 8 (bfloat16) or 4 (float32).
    pub width: usize,
    /// Format of the values.
    pub format: Format,
}

/// Dropout of `x`, `[tokens, width]`, into `out`, which may be `x`; also its own gradient.
///
/// # Errors
/// [`CudaError::Size`] for widths that the kernels do not have.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn dropout(
    queue: Queue<'_>,
    x: Address,
    out: Address,
    sizes: TokenTensor,
    dropout: Dropout,
) -> Result<(), CudaError> {
    let factor = dropout_args(dropout.rate);
    // SAFETY: passed on.
    unsafe { scale(queue, "dropout", x, out, sizes, dropout.noise, &factor) }
}

/// `x`, `[tokens, width]`, times noise uniform in `[1 - epsilon, 1 + epsilon)`, into `out`, which may be
/// `x`; also its own gradient.
///
/// # Source
/// Switch Transformer, section 2.4 (arXiv:2101.03961): applied to the router's input in training.
///
/// # Errors
/// [`CudaError::Size`] for widths that the kernels do not have.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn jitter(
    queue: Queue<'_>,
    x: Address,
    out: Address,
    sizes: TokenTensor,
    epsilon: f64,
    noise: TokenNoise,
) -> Result<(), CudaError> {
    let factor = [(epsilon as f32).into()];
    // SAFETY: passed on.
    unsafe { scale(queue, "jitter", x, out, sizes, noise, &factor) }
}

/// Rows that a block handles, a warp each, and 16-byte accesses of a lane.
const BLOCK_ROWS: usize = 4;
const ACCESSES: usize = 4;

unsafe fn scale(
    queue: Queue<'_>,
    operation: &'static str,
    x: Address,
    out: Address,
    sizes: TokenTensor,
    noise: TokenNoise,
    factor: &[Arg],
) -> Result<(), CudaError> {
    let TokenTensor { tokens, width, format } = sizes;
    let lanes = lanes(operation, "width", width, format)?;
    if tokens == 0 || width == 0 {
        return Ok(());
    }
    let mut args: Vec<Arg> = vec![
        x.into(),
        out.into(),
        count(operation, "tokens", tokens)?.into(),
        count(operation, "width", width)?.into(),
    ];
    args.extend(noise.args(operation, width)?);
    args.extend(factor);
    let parts = width.div_ceil(32 * ACCESSES * lanes);
    let grid =
        Grid { blocks: [tokens.div_ceil(BLOCK_ROWS) as u32, parts as u32, 1], threads: 128, shared: 0 };
    let name = format!("{operation}_{}", format.suffix());
    // SAFETY: the arguments are those of the kernels in `noise.cu`; the addresses are promised by the caller.
    unsafe { queue.gpu.launch(&NOISE, &name, grid, queue.stream, &args) }
}
