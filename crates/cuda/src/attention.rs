//! The attention core: scores, relative bias, masks, softmax, dropout, the weighted sum of values; its gradients
//! are in `backward`.
//!
//! No `[queries, keys]` tensor is written but for dropout, one bit a probability. Everything is read and
//! written in the layout of projections, so that queries, keys and values may be parts of one packed row.

mod backward;

pub use backward::{AttentionGradients, attention_backward, attention_workspace};

use crate::address::{Address, Arg, Format};
use crate::error::CudaError;
use crate::gpu::{Gpu, Grid, Queue};
use crate::noise::{NoiseKey, dropout_args};
use crate::size::{count, lanes};
use crate::source::{ATTENTION, ATTENTION_HOPPER, Source};

/// Sizes and rules of one attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Batch rows.
    pub batch: usize,
    /// Heads.
    pub num_heads: usize,
    /// Values of a head: 64 or 128 in bfloat16, up to 128 in float32.
    pub d_kv: usize,
    /// Queries of a batch row.
    pub queries: usize,
    /// Keys of a batch row, one at least.
    pub keys: usize,
    /// Rows of `k` and `v` that a batch row has room for, of which the first `keys` are keys: as many
    /// unless they are cached.
    pub key_room: usize,
    /// A query sees no key after its own position.
    pub causal: bool,
    /// Position of the first query; above 0 when decoding with cached keys.
    pub query_offset: usize,
    /// Dropout of the probabilities.
    pub dropout: f64,
    /// Of queries, keys, values, the output and their gradients.
    pub format: Format,
}

/// Rows of `num_heads * d_kv` values, which may be parts of longer ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadRows {
    /// The first value of the first row.
    pub at: Address,
    /// Values from row to row; in bfloat16 a multiple of 8.
    pub stride: usize,
}

/// Documents packed into one batch row: a query sees the keys of its own segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segments {
    /// Segment of each query. int32 `[batch, queries]`
    pub queries: Address,
    /// Segment of each key. int32 `[batch, keys]`
    pub keys: Address,
}

/// What attention reads, forward and backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionInputs {
    /// `[batch * queries, num_heads * d_kv]`
    pub q: HeadRows,
    /// `[batch * key_room, num_heads * d_kv]`
    pub k: HeadRows,
    /// `[batch * key_room, num_heads * d_kv]`
    pub v: HeadRows,
    /// Bias of relative position `key - query = i - (queries - 1) - query_offset` at column `i`, or
    /// [`Address::NONE`]. float32 `[num_heads, queries + keys - 1]`
    pub relative_bias: Address,
    /// 1 where a key may be seen, 0 where not, holes allowed; all may with [`Address::NONE`].
    /// int32 `[batch, keys]`
    pub key_mask: Address,
    /// Packed documents.
    pub segments: Option<Segments>,
    /// What [`attention_dropout`] drew; not read without dropout.
    pub kept: Address,
}

/// What the forward pass writes and the backward pass reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionOutput {
    /// `[batch * queries, num_heads * d_kv]`
    pub out: HeadRows,
    /// Logarithm of each query's sum of exponentials; minus infinity where it sees nothing.
    /// float32 `[batch, num_heads, queries]`
    pub log_sums: Address,
}

/// Random numbers of the dropout of the probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionNoise {
    /// Place and step.
    pub key: NoiseKey,
    /// Number of the first batch row within the global batch.
    pub first_row: u32,
    /// Number of the first head, where heads are split over devices.
    pub first_head: usize,
}

/// Queries and keys of a batch row at most; the kernels' lists of tiles lie in shared memory.
const LONGEST: usize = 1 << 16;

/// Queries to whose multiple what is kept of every query is padded.
const PADDING: usize = 128;

/// Tiles that the kernels for Hopper keep in shared memory at a time.
const HOPPER_STAGES: usize = 3;

/// Rows of a block in float32, and their tiles of columns.
const PLAIN_ROWS: usize = 32;

impl Attention {
    /// Queries of a block.
    fn block_queries(&self) -> usize {
        match self.format {
            Format::F32 => PLAIN_ROWS,
            Format::Bf16 => 128,
        }
    }

    /// Keys of a block of the backward pass over keys.
    fn block_keys(&self) -> usize {
        match self.format {
            Format::F32 => PLAIN_ROWS,
            Format::Bf16 if self.d_kv == 64 => 128,
            Format::Bf16 => 64,
        }
    }

    /// Rows of the tiles in shared memory, bfloat16.
    fn tile(&self) -> usize {
        if self.d_kv == 64 { 64 } else { 32 }
    }

    /// Words of one query's bits of dropout.
    fn kept_words(&self) -> usize {
        self.keys.div_ceil(128) * 4
    }

    /// Bytes in shared memory of `stages` tiles of two tensors, and of as many windows of the bias of `rows`
    /// rows.
    fn tiles_and_windows(&self, stages: usize, rows: usize) -> usize {
        stages * (2 * self.tile() * self.d_kv * 2 + 2 * (rows + self.tile() + 16) * 4)
    }

    /// Bytes in shared memory of what is known of each tile of keys.
    fn key_tiles(&self) -> usize {
        64 + self.keys.div_ceil(self.tile()) * 12
    }

    /// Tiles of each tensor that are in shared memory at a time, bfloat16.
    fn stages(&self, gpu: &Gpu) -> usize {
        if self.multiplies_by_warpgroups(gpu) { HOPPER_STAGES } else { 2 }
    }

    /// `ForwardRoom` of the kernels.
    fn forward_shared(&self, gpu: &Gpu) -> usize {
        match self.format {
            Format::F32 => 3 * self.plain_tile() + PLAIN_SCORES,
            Format::Bf16 => {
                let stages = self.stages(gpu);
                let of_queries = 128 * self.d_kv * 2 + stages * 128 * 8;
                of_queries + self.tiles_and_windows(stages, 128) + self.key_tiles()
            }
        }
    }

    /// Bytes of a tile in float32.
    fn plain_tile(&self) -> usize {
        PLAIN_ROWS * (self.d_kv + 1) * 4
    }

    fn kernel(&self, pass: &str) -> String {
        match self.format {
            Format::F32 => format!("attention_{pass}_f32"),
            Format::Bf16 => {
                let dropout = if self.dropout > 0.0 { "_dropout" } else { "" };
                format!("attention_{pass}_{}{dropout}_bf16", self.d_kv)
            }
        }
    }

    /// A grid of `blocks` for each head of each batch row.
    fn grid(&self, blocks: usize, shared: usize) -> Grid {
        let threads = match self.format {
            Format::F32 => 256,
            Format::Bf16 => 128,
        };
        Grid { blocks: [blocks as u32, self.num_heads as u32, self.batch as u32], threads, shared }
    }

    fn check(&self) -> Result<(), CudaError> {
        let wrong = |reason| Err(CudaError::Size { operation: "attention", reason });
        match (self.format, self.d_kv) {
            (Format::Bf16, 64 | 128) | (Format::F32, 1..=128) => {}
            (Format::Bf16, d_kv) => return wrong(format!("d_kv is {d_kv}; 64 or 128 will do in bf16")),
            (Format::F32, d_kv) => return wrong(format!("d_kv is {d_kv}; 1 to 128 will do in f32")),
        }
        if self.keys == 0 || self.keys > self.key_room {
            return wrong(format!(
                "{} keys in room for {}; there must be one at least, and they must lie in their room",
                self.keys, self.key_room
            ));
        }
        for (what, size) in [("queries", self.queries), ("keys", self.keys)] {
            if size > LONGEST {
                return wrong(format!("a batch row has {size} {what}; up to {LONGEST} will do"));
            }
        }
        // The second and third direction of a grid have 16 bits.
        for (what, size) in [("batch rows", self.batch), ("heads", self.num_heads)] {
            if size > usize::from(u16::MAX) {
                return wrong(format!("there are {size} {what}; up to {} will do", u16::MAX));
            }
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return wrong(format!("dropout is {}; it must lie in [0, 1)", self.dropout));
        }
        count("attention", "the last query's position", self.query_offset + self.queries)?;
        Ok(())
    }

    /// The address and the stride of `rows`.
    fn rows(&self, what: &str, rows: HeadRows) -> Result<[Arg; 2], CudaError> {
        if self.format == Format::Bf16 {
            lanes("attention", &format!("stride of {what}"), rows.stride, self.format)?;
        }
        let width = self.num_heads * self.d_kv;
        // Tiles of up to 128 rows must stay within 32 bits of bytes.
        if rows.stride < width || rows.stride > 1 << 23 {
            return Err(CudaError::Size {
                operation: "attention",
                reason: format!("stride of {what} is {}; it must lie in {width}..=2^23", rows.stride),
            });
        }
        Ok([rows.at.into(), (rows.stride as u32).into()])
    }

    /// What `GIVEN` of the kernels stands for.
    fn given(&self, inputs: &AttentionInputs) -> Result<Vec<Arg>, CudaError> {
        let [q, q_stride] = self.rows("q", inputs.q)?;
        let [k, k_stride] = self.rows("k", inputs.k)?;
        let [v, v_stride] = self.rows("v", inputs.v)?;
        let none = Segments { queries: Address::NONE, keys: Address::NONE };
        let segments = inputs.segments.unwrap_or(none);
        let [_, kept_scale] = dropout_args(self.dropout);
        let kept = if self.dropout > 0.0 { inputs.kept } else { Address::NONE };
        if self.dropout > 0.0 && kept == Address::NONE {
            return Err(CudaError::Size {
                operation: "attention",
                reason: "dropout without bits; `attention_dropout` draws them".to_owned(),
            });
        }
        Ok(vec![
            q,
            k,
            v,
            inputs.relative_bias.into(),
            inputs.key_mask.into(),
            segments.queries.into(),
            segments.keys.into(),
            kept.into(),
            kept_scale,
            q_stride,
            k_stride,
            v_stride,
            (self.queries as u32).into(),
            (self.keys as u32).into(),
            count("attention", "room for keys", self.key_room)?.into(),
            u32::from(self.causal).into(),
            (self.query_offset as u32).into(),
        ])
    }

    /// Whether kernels multiply by warpgroups; those for heads of 128 would need more registers than there are.
    fn multiplies_by_warpgroups(&self, gpu: &Gpu) -> bool {
        gpu.has_warpgroup_products() && self.format == Format::Bf16 && self.d_kv == 64
    }

    /// The source of the kernels, forward and backward in two passes.
    fn source(&self, gpu: &Gpu) -> &'static Source {
        if self.multiplies_by_warpgroups(gpu) { &ATTENTION_HOPPER } else { &ATTENTION }
    }

    /// Whether a block of every pass has room on `gpu`: heads of 128 go backward on an A100 or an H100 only.
    pub fn fits(&self, gpu: &Gpu) -> bool {
        let most = self.forward_shared(gpu).max(self.queries_shared(gpu)).max(self.keys_shared(gpu));
        most <= gpu.shared_per_block()
    }

    /// Starts a kernel of so many blocks a head, if that is any.
    unsafe fn launch(
        &self,
        queue: Queue<'_>,
        pass: &str,
        blocks: usize,
        shared: usize,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        if !self.fits(queue.gpu) {
            let reason = format!(
                "{} queries and {} keys in heads of {} need more shared memory than {} has",
                self.queries,
                self.keys,
                self.d_kv,
                queue.gpu.name()
            );
            return Err(CudaError::Size { operation: "attention", reason });
        }
        let grid = self.grid(blocks, shared);
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        // SAFETY: passed on.
        unsafe { queue.gpu.launch(self.source(queue.gpu), &self.kernel(pass), grid, queue.stream, args) }
    }
}

/// Bytes in shared memory of a tile of scores in float32.
const PLAIN_SCORES: usize = PLAIN_ROWS * (PLAIN_ROWS + 1) * 4;

/// Bytes that [`attention_dropout`] writes: a bit for each probability.
pub fn attention_dropout_bytes(rules: &Attention) -> usize {
    rules.batch * rules.num_heads * rules.queries * rules.kept_words() * 4
}

/// Draws which probabilities dropout keeps, for the forward and the backward pass of one step, to `kept`,
/// [`attention_dropout_bytes`] bytes. Writes nothing without dropout.
///
/// # Errors
/// [`CudaError::Size`] for sizes that the kernels do not have.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn attention_dropout(
    queue: Queue<'_>,
    kept: Address,
    noise: AttentionNoise,
    rules: Attention,
) -> Result<(), CudaError> {
    rules.check()?;
    let words = count("attention", "bits of dropout of a head", rules.queries * rules.kept_words())?;
    let blocks = [words.div_ceil(256), rules.num_heads as u32, rules.batch as u32];
    if rules.dropout == 0.0 || blocks.contains(&0) {
        return Ok(());
    }
    let [first_kept, _] = dropout_args(rules.dropout);
    let args: [Arg; 9] = [
        kept.into(),
        noise.key.seed.into(),
        noise.key.site.into(),
        noise.key.step.into(),
        noise.first_row.into(),
        count("attention", "the first head", noise.first_head)?.into(),
        (rules.queries as u32).into(),
        (rules.keys as u32).into(),
        first_kept,
    ];
    let grid = Grid { blocks, threads: 256, shared: 0 };
    // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
    unsafe { queue.gpu.launch(&ATTENTION, "attention_dropout", grid, queue.stream, &args) }
}

/// `softmax(q k^T + bias + mask) v`, scaled by nothing, as in T5. A query that may see nothing yields the
/// mean of the values.
///
/// # Errors
/// [`CudaError::Size`] for sizes that the kernels do not have.
///
/// # Safety
/// As the crate's documentation demands.
///
/// # Source
/// Dao 2023 (arXiv:2307.08691), with the relative bias of T5 (arXiv:1910.10683, section 2.1) as one vector
/// a head.
pub unsafe fn attention(
    queue: Queue<'_>,
    inputs: AttentionInputs,
    to: AttentionOutput,
    rules: Attention,
) -> Result<(), CudaError> {
    rules.check()?;
    let mut args = rules.given(&inputs)?;
    args.extend(rules.rows("out", to.out)?);
    args.push(to.log_sums.into());
    if rules.format == Format::F32 {
        args.push((rules.d_kv as u32).into());
    }
    let blocks = rules.queries.div_ceil(rules.block_queries());
    // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
    unsafe { rules.launch(queue, "forward", blocks, rules.forward_shared(queue.gpu), &args) }
}
