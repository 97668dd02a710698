//! Root-mean-square norm and its gradients.

use crate::address::{Address, Arg, Format};
use crate::error::CudaError;
use crate::gpu::{Grid, Queue};
use crate::size::{count, lanes};
use crate::source::NORM;

/// What is normalised: rows of `[rows, d_model]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmsNorm {
    /// Rows.
    pub rows: usize,
    /// Values of each, a multiple of 8, up to 16,384 (bfloat16), or of 4, up to 8192 (float32).
    pub d_model: usize,
    /// Added to the mean of the squares.
    pub epsilon: f64,
    /// Format of activations and their gradients.
    pub format: Format,
    /// Format of the weight and its gradient.
    pub weight_format: Format,
}

/// Where the backward pass of a norm finds and leaves its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RmsNormGradients {
    /// What was normalised. `[rows, d_model]`
    pub x: Address,
    /// `[d_model]`
    pub weight: Address,
    /// `1 / rms` of every row. float32 `[rows]`
    pub inverse_rms: Address,
    /// Gradient of the norm's output. `[rows, d_model]`
    pub gradient: Address,
    /// What else flows into `x`, as through a residual connection, or [`Address::NONE`]. `[rows, d_model]`
    pub beside: Address,
    /// Takes the gradient of `x`; may be `gradient` or `beside`. `[rows, d_model]`
    pub x_gradient: Address,
    /// Takes the gradient of the weight. `[d_model]`
    pub weight_gradient: Address,
    /// Room for [`rms_norm_workspace`] bytes.
    pub workspace: Address,
}

/// How threads share a row.
#[derive(Debug, Clone, Copy)]
struct Share {
    /// Threads of a row.
    threads: usize,
    /// 16-byte accesses of each.
    accesses: usize,
}

impl Share {
    fn of(rules: &RmsNorm) -> Result<Self, CudaError> {
        let accesses = rules.d_model / lanes("rms_norm", "d_model", rules.d_model, rules.format)?;
        match accesses {
            1..=128 => Ok(Self { threads: 32, accesses: accesses.div_ceil(32) }),
            129..=512 => Ok(Self { threads: 128, accesses: if accesses <= 256 { 2 } else { 4 } }),
            513..=2048 => Ok(Self { threads: 512, accesses: if accesses <= 1024 { 2 } else { 4 } }),
            _ => Err(CudaError::Size {
                operation: "rms_norm",
                reason: format!(
                    "d_model is {}; it must lie between 1 and {} in {}",
                    rules.d_model,
                    2048 * 16 / rules.format.bytes(),
                    rules.format.suffix()
                ),
            }),
        }
    }

    /// Rows that a block has at once.
    fn block_rows(self) -> usize {
        if self.threads == 32 { 4 } else { 1 }
    }

    fn block_threads(self) -> usize {
        self.threads * self.block_rows()
    }

    /// As many blocks as are at work at once on an H100; the order of sums does not depend on the device.
    fn backward_blocks(self, rows: usize) -> usize {
        let resident = if self.accesses == 4 { 512 } else { 640 } / self.block_threads();
        rows.div_ceil(self.block_rows()).min(132 * resident)
    }

    fn name(self, kind: &str, format: Format) -> String {
        format!("rms_norm_{kind}_{}x{}_{}", self.threads, self.accesses, format.suffix())
    }
}

/// Columns of the weight's gradient that one block adds up.
const SUMMED_COLUMNS: u32 = 8;

/// Writes `weight * x / sqrt(mean(x^2) + epsilon)` of every row to `out`, which may be `x`, and `1 / rms`,
/// float32 `[rows]`, to `inverse_rms`, unless that is [`Address::NONE`].
///
/// # Source
/// Zhang and Sennrich 2019 (arXiv:1910.07467), as in T5: no mean is subtracted and there is no bias.
///
/// # Errors
/// [`CudaError::Size`] for widths that the kernels do not have.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn rms_norm(
    queue: Queue<'_>,
    x: Address,
    weight: Address,
    out: Address,
    inverse_rms: Address,
    rules: RmsNorm,
) -> Result<(), CudaError> {
    let share = Share::of(&rules)?;
    if rules.rows == 0 {
        return Ok(());
    }
    let args: [Arg; 8] = [
        x.into(),
        weight.into(),
        u32::from(rules.weight_format == Format::F32).into(),
        out.into(),
        inverse_rms.into(),
        count("rms_norm", "rows", rules.rows)?.into(),
        count("rms_norm", "d_model", rules.d_model)?.into(),
        (rules.epsilon as f32).into(),
    ];
    let grid = Grid::new(rules.rows.div_ceil(share.block_rows()) as u32, share.block_threads() as u32);
    let name = share.name("forward", rules.format);
    // SAFETY: the arguments are those of the kernels in `norm.cu`; the addresses are promised by the caller.
    unsafe { queue.gpu.launch(&NORM, &name, grid, queue.stream, &args) }
}

/// Bytes of workspace that [`rms_norm_backward`] needs: a float32 row for each block.
///
/// # Errors
/// [`CudaError::Size`] for widths that the kernels do not have.
pub fn rms_norm_workspace(rules: &RmsNorm) -> Result<usize, CudaError> {
    Ok(Share::of(rules)?.backward_blocks(rules.rows) * rules.d_model * 4)
}

/// Gradients of `x` and of the weight.
///
/// # Errors
/// [`CudaError::Size`] for widths that the kernels do not have.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn rms_norm_backward(
    queue: Queue<'_>,
    at: RmsNormGradients,
    rules: RmsNorm,
) -> Result<(), CudaError> {
    let share = Share::of(&rules)?;
    let blocks = share.backward_blocks(rules.rows);
    let width = count("rms_norm", "d_model", rules.d_model)?;
    if blocks > 0 {
        let args: [Arg; 10] = [
            at.x.into(),
            at.weight.into(),
            u32::from(rules.weight_format == Format::F32).into(),
            at.inverse_rms.into(),
            at.gradient.into(),
            at.beside.into(),
            at.x_gradient.into(),
            at.workspace.into(),
            count("rms_norm", "rows", rules.rows)?.into(),
            width.into(),
        ];
        let grid = Grid::new(blocks as u32, share.block_threads() as u32);
        let name = share.name("backward", rules.format);
        // SAFETY: as in `rms_norm`; every block writes its row of the workspace.
        unsafe { queue.gpu.launch(&NORM, &name, grid, queue.stream, &args)? };
    }
    let args = [at.workspace.into(), at.weight_gradient.into(), (blocks as u32).into(), width.into()];
    let name = format!("rms_norm_weight_{}", rules.weight_format.suffix());
    // SAFETY: as above.
    unsafe {
        queue.gpu.launch(&NORM, &name, Grid::new(width.div_ceil(SUMMED_COLUMNS), 1024), queue.stream, &args)
    }
}
