//! Cross-entropy of logits, which are replaced by their gradients.

use crate::address::{Address, Arg, Format};
use crate::error::CudaError;
use crate::gpu::{Grid, Queue};
use crate::size::count;
use crate::source::CROSS_ENTROPY;

/// Sizes and rules of a cross-entropy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrossEntropy {
    /// Rows: positions.
    pub rows: usize,
    /// Logits of a row. Rows of up to 65,536 (bfloat16) or 32,768 (float32) are read once, others twice;
    /// rows are best multiples of 8 (bfloat16) or 4 (float32) long.
    pub vocab_size: usize,
    /// Format of the logits and their gradients.
    pub format: Format,
    /// Weight of `logsumexp(logits)^2` in the loss.
    pub z_coefficient: f64,
    /// Whether the logits are replaced by their gradients; else they stay.
    pub gradients: bool,
}

/// Where a cross-entropy finds and leaves its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrossEntropyAt {
    /// Logits; takes their gradients. `[rows, vocab_size]`
    pub logits: Address,
    /// Ids; one outside the vocabulary has a loss that is not a number. `i32` `[rows]`
    pub targets: Address,
    /// 0 where a position does not count. float32 `[rows]`
    pub weights: Address,
    /// What gradients are multiplied by, besides the weight. float32 `[1]`
    pub loss_scale: Address,
    /// Takes the cross-entropy of each position in nats, unweighted. float32 `[rows]`
    pub loss: Address,
    /// Takes 1 where no logit is larger than the target's, else 0. float32 `[rows]`
    pub correct: Address,
    /// Takes the logarithm of the sum of the exponentials. float32 `[rows]`
    pub log_z: Address,
}

const OPERATION: &str = "cross_entropy";

/// Losses of all rows and, in place of the logits, the gradients of
/// `loss_scale * sum(weight * (cross_entropy + z_coefficient * logsumexp^2))`.
///
/// Apart from the logits, addresses need only be aligned to 4 bytes: rows may come chunk by chunk.
///
/// # Source
/// The z term follows T5X and Mesh TensorFlow: `1e-4 * logsumexp(logits)^2`.
///
/// # Errors
/// [`CudaError::Size`] when `vocab_size` is 0.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn cross_entropy(
    queue: Queue<'_>,
    at: CrossEntropyAt,
    rules: CrossEntropy,
) -> Result<(), CudaError> {
    let CrossEntropy { rows, vocab_size, format, z_coefficient, gradients } = rules;
    if vocab_size == 0 {
        let reason = "a row has no logits; it must have one at least".to_owned();
        return Err(CudaError::Size { operation: OPERATION, reason });
    }
    let vocab = count(OPERATION, "vocab_size", vocab_size)?;
    if rows == 0 {
        return Ok(());
    }
    let lanes = 16 / format.bytes();
    let aligned = vocab_size.is_multiple_of(lanes);
    let pieces = (vocab_size + if aligned { 0 } else { lanes - 1 }).div_ceil(lanes);
    let (share, threads) = match pieces {
        ..=1024 => ("512x2", 512),
        1025..=2048 => ("512x4", 512),
        2049..=4096 => ("512x8", 512),
        4097..=8192 => ("1024x8", 1024),
        _ => ("streamed", 1024),
    };
    let args: [Arg; 10] = [
        at.logits.into(),
        at.targets.into(),
        at.weights.into(),
        at.loss_scale.into(),
        (z_coefficient as f32).into(),
        u32::from(gradients).into(),
        at.loss.into(),
        at.correct.into(),
        at.log_z.into(),
        vocab.into(),
    ];
    let alignment = if aligned { "aligned" } else { "unaligned" };
    let name = format!("{OPERATION}_{alignment}_{share}_{}", format.suffix());
    let grid = Grid::new(count(OPERATION, "rows", rows)?, threads);
    // SAFETY: the arguments are those of the kernels in `cross_entropy.cu`; the addresses are promised by the
    // caller.
    unsafe { queue.gpu.launch(&CROSS_ENTROPY, &name, grid, queue.stream, &args) }
}

/// Sums over `rows` rows of what [`cross_entropy`] left, in float64 inside: writes four float32 to `sums`.
///
/// They are the loss with its z term, the cross-entropies, how many are correct, and the weights, each times
/// the weight of its row; rows of weight 0 do not count, whatever they hold.
///
/// # Errors
/// [`CudaError::Size`] for more rows than kernels count.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn cross_entropy_sums(
    queue: Queue<'_>,
    at: CrossEntropyAt,
    rows: usize,
    z_coefficient: f64,
    sums: Address,
) -> Result<(), CudaError> {
    let args: [Arg; 7] = [
        at.loss.into(),
        at.correct.into(),
        at.log_z.into(),
        at.weights.into(),
        count(OPERATION, "rows", rows)?.into(),
        z_coefficient.to_bits().into(),
        sums.into(),
    ];
    // SAFETY: as in `cross_entropy`.
    unsafe { queue.gpu.launch(&CROSS_ENTROPY, "cross_entropy_sums", Grid::new(1, 512), queue.stream, &args) }
}
