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

/// Where the sums lie that rows come to: over one shard of a vocabulary, or over all.
///
/// All have the largest of the largest logits, the sum of `total * e^(largest of the shard - largest of all)`,
/// and the sum of the target's logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardSums {
    /// The largest logit. float32 `[rows]`
    pub largest: Address,
    /// The sum of `e^(logit - largest)`. float32 `[rows]`
    pub total: Address,
    /// The target's logit; 0 of a shard that does not have it. float32 `[rows]`
    pub target_logit: Address,
}

const OPERATION: &str = "cross_entropy";

/// Threads of a block that reads a row of a shard: its loads of one round cover 16,384 values of bfloat16.
const SHARD_THREADS: u32 = 512;

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
    let lanes = 16 / rules.format.bytes();
    let shared = if rules.is_aligned() { 0 } else { lanes - 1 };
    let (share, threads) = match (rules.vocab_size + shared).div_ceil(lanes) {
        ..=1024 => ("512x2", 512),
        1025..=2048 => ("512x4", 512),
        2049..=4096 => ("512x8", 512),
        4097..=8192 => ("1024x8", 1024),
        _ => ("streamed", 1024),
    };
    // SAFETY: the arguments are those of these kernels; the addresses are promised by the caller.
    unsafe { launch(queue, rules, share, threads, &loss_args(at, rules)?) }
}

/// What every row comes to over a shard of the vocabulary, whose ids begin with `first_id`. Of `at` the logits
/// and the targets, numbers of the whole vocabulary, are read; nothing there is written.
///
/// # Errors
/// As [`cross_entropy`].
///
/// # Safety
/// As [`cross_entropy`].
pub unsafe fn cross_entropy_shard(
    queue: Queue<'_>,
    at: CrossEntropyAt,
    sums: ShardSums,
    first_id: usize,
    rules: CrossEntropy,
) -> Result<(), CudaError> {
    let mut args = vec![at.logits.into(), at.targets.into(), rules.vocab()?.into()];
    args.extend(shard_args(sums, first_id)?);
    // SAFETY: as in `cross_entropy`.
    unsafe { launch(queue, rules, "shard", SHARD_THREADS, &args) }
}

/// [`cross_entropy`] with the logits of a shard, whose ids begin with `first_id`, and the `sums` over all of them:
/// the losses are those of the whole vocabulary, the gradients those of the logits that are here.
///
/// # Errors
/// As [`cross_entropy`].
///
/// # Safety
/// As [`cross_entropy`].
pub unsafe fn cross_entropy_joined(
    queue: Queue<'_>,
    at: CrossEntropyAt,
    sums: ShardSums,
    first_id: usize,
    rules: CrossEntropy,
) -> Result<(), CudaError> {
    let mut args = loss_args(at, rules)?.to_vec();
    args.extend(shard_args(sums, first_id)?);
    // SAFETY: as in `cross_entropy`.
    unsafe { launch(queue, rules, "joined", SHARD_THREADS, &args) }
}

impl CrossEntropy {
    fn vocab(&self) -> Result<u32, CudaError> {
        if self.vocab_size == 0 {
            let reason = "a row has no logits; it must have one at least".to_owned();
            return Err(CudaError::Size { operation: OPERATION, reason });
        }
        count(OPERATION, "vocab_size", self.vocab_size)
    }

    /// Whether every row begins with a whole piece of 16 bytes.
    fn is_aligned(&self) -> bool {
        self.vocab_size.is_multiple_of(16 / self.format.bytes())
    }
}

/// `LOSS_PARAMETERS` of `cross_entropy.cu`.
fn loss_args(at: CrossEntropyAt, rules: CrossEntropy) -> Result<[Arg; 10], CudaError> {
    Ok([
        at.logits.into(),
        at.targets.into(),
        at.weights.into(),
        at.loss_scale.into(),
        (rules.z_coefficient as f32).into(),
        u32::from(rules.gradients).into(),
        at.loss.into(),
        at.correct.into(),
        at.log_z.into(),
        rules.vocab()?.into(),
    ])
}

/// `SHARD_PARAMETERS` of `cross_entropy.cu`.
fn shard_args(sums: ShardSums, first_id: usize) -> Result<[Arg; 4], CudaError> {
    let ShardSums { largest, total, target_logit } = sums;
    let first_id = count(OPERATION, "first_id", first_id)?;
    Ok([first_id.into(), largest.into(), total.into(), target_logit.into()])
}

/// Launches a kernel for all rows, a block each.
///
/// # Safety
/// `args` are those of the kernel, whose addresses have the values of `rules`.
unsafe fn launch(
    queue: Queue<'_>,
    rules: CrossEntropy,
    kernel: &str,
    threads: u32,
    args: &[Arg],
) -> Result<(), CudaError> {
    if rules.rows == 0 {
        return Ok(());
    }
    let alignment = if rules.is_aligned() { "aligned" } else { "unaligned" };
    let name = format!("{OPERATION}_{alignment}_{kernel}_{}", rules.format.suffix());
    let grid = Grid::new(count(OPERATION, "rows", rules.rows)?, threads);
    // SAFETY: promised by the caller.
    unsafe { queue.gpu.launch(&CROSS_ENTROPY, &name, grid, queue.stream, args) }
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
