//! Gradients of attention: what the backward pass needs, and its two ways.

use super::{Attention, AttentionInputs, AttentionOutput, HeadRows, PADDING, PLAIN_SCORES};
use crate::address::{Address, Arg, Format};
use crate::error::CudaError;
use crate::gpu::{Gpu, Grid, Queue};
use crate::source::{ATTENTION, ATTENTION_BACKWARD_HOPPER};

/// Where the backward pass finds and leaves gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionGradients {
    /// Gradient of the output. `[batch * queries, num_heads * d_kv]`
    pub out: HeadRows,
    /// Takes the gradient of `q`. `[batch * queries, num_heads * d_kv]`
    pub q: HeadRows,
    /// Takes the gradient of `k`. `[batch * keys, num_heads * d_kv]`
    pub k: HeadRows,
    /// Takes the gradient of `v`. `[batch * keys, num_heads * d_kv]`
    pub v: HeadRows,
    /// Takes the gradient of the relative bias, unless it is [`Address::NONE`].
    /// float32 `[num_heads, queries + keys - 1]`
    pub relative_bias: Address,
    /// Room for [`attention_workspace`] bytes.
    pub workspace: Address,
}

/// Bytes of workspace of [`attention_backward`].
pub fn attention_workspace(rules: &Attention) -> usize {
    let padded = rules.queries.next_multiple_of(PADDING);
    let with_bias = |of_queries: usize, one_pass| {
        let (blocks, values) = rules.diagonals(one_pass);
        of_queries + blocks * values
    };
    // Which it is to be is known on the device only.
    let most = with_bias(padded * rules.d_kv, true).max(with_bias(2 * padded, false));
    let of_head = match (rules.format, rules.d_kv) {
        (Format::Bf16, 64) => most,
        _ => with_bias(2 * padded, false),
    };
    rules.batch * rules.num_heads * of_head * 4
}

/// Gradients of queries, keys, values and the relative bias, from the same `inputs` as the forward pass and
/// what that wrote.
///
/// # Errors
/// [`CudaError::Size`] for sizes that the kernels do not have, or cached keys, which carry no gradient.
///
/// # Safety
/// As the crate's documentation demands.
///
/// # Source
/// As [`attention`](super::attention); sums over keys and over queries are two passes, or those of a head one block's, so that their
/// order is fixed.
pub unsafe fn attention_backward(
    queue: Queue<'_>,
    inputs: AttentionInputs,
    from: AttentionOutput,
    to: AttentionGradients,
    rules: Attention,
) -> Result<(), CudaError> {
    rules.check()?;
    if rules.key_room != rules.keys {
        let reason =
            format!("{} keys in room for {}; cached keys carry no gradient", rules.keys, rules.key_room);
        return Err(CudaError::Size { operation: "attention_backward", reason });
    }
    // SAFETY: passed on.
    let diagonals = unsafe {
        match rules.goes_back_in_one_pass(queue.gpu) {
            true => rules.back_in_one_pass(queue, &inputs, &from, &to)?,
            false => rules.back_in_two_passes(queue, &inputs, &from, &to)?,
        }
    };
    let blocks = [rules.bias_count().div_ceil(32) as u32, rules.num_heads as u32, 1];
    if to.relative_bias == Address::NONE || blocks.contains(&0) {
        return Ok(());
    }
    let (tiles, pitch) = rules.diagonals(diagonals.of_keys);
    let args: [Arg; 9] = [
        diagonals.at.into(),
        to.relative_bias.into(),
        (rules.batch as u32).into(),
        (rules.queries as u32).into(),
        (rules.keys as u32).into(),
        (rules.block_queries() as u32).into(),
        (tiles as u32).into(),
        (pitch as u32).into(),
        u32::from(diagonals.of_keys).into(),
    ];
    let grid = Grid { blocks, threads: 256, shared: 0 };
    // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
    unsafe { queue.gpu.launch(&ATTENTION, "attention_bias_gradient", grid, queue.stream, &args) }
}

/// Sums along diagonals, of which the gradient of the bias is made: none, if that is not wanted.
struct Diagonals {
    at: Address,
    /// Left by blocks of keys, not of queries.
    of_keys: bool,
}

impl Attention {
    /// Blocks of the backward pass that leave sums of the gradient of the bias, and the room of each for them.
    fn diagonals(&self, one_pass: bool) -> (usize, usize) {
        let (rows, columns, block) = match one_pass {
            true => (self.keys, self.queries, self.block_keys()),
            false => (self.queries, self.keys, self.block_queries()),
        };
        (rows.div_ceil(block), (columns + block - 1).next_multiple_of(4))
    }

    /// Values of the relative bias of a head.
    fn bias_count(&self) -> usize {
        self.queries + self.keys - 1
    }

    /// `QueriesRoom` of the kernels.
    pub(super) fn queries_shared(&self, gpu: &Gpu) -> usize {
        match self.format {
            Format::F32 => 4 * self.plain_tile() + PLAIN_SCORES,
            Format::Bf16 => {
                let before_ring = if self.d_kv == 64 { 0 } else { 2 * 128 * self.d_kv * 2 };
                let ring = 32 * (256 + 8) * 4;
                let stages = self.stages(gpu);
                let of_queries = stages * 128 * 8 + 2 * 128 * 4;
                before_ring + ring + self.tiles_and_windows(stages, 128) + of_queries + self.key_tiles()
            }
        }
    }

    /// `KeysRoom` of the kernels.
    pub(super) fn keys_shared(&self, gpu: &Gpu) -> usize {
        match self.format {
            Format::F32 => 4 * self.plain_tile() + 2 * PLAIN_SCORES,
            Format::Bf16 => {
                let (rows, tile) = (self.block_keys(), self.tile());
                let stages = self.stages(gpu);
                let of_queries = stages * (tile * 8 + tile * 16);
                let tiles = 64 + self.queries.div_ceil(tile) * 4;
                2 * rows * self.d_kv * 2 + self.tiles_and_windows(stages, rows) + of_queries + tiles
            }
        }
    }

    /// `Room` of the kernel that goes backward in one pass.
    fn one_pass_shared(&self) -> usize {
        let (tile, padded) = (128 * self.d_kv * 2, self.queries.next_multiple_of(PADDING));
        let tiles = (2 + 2 * 2 + 2 * 2) * tile;
        let (turned, windows, kept) = (8 * 8 * 72 * 4, 2 * 2 * (128 + 128 + 16) * 4, 2 * 128 * 16);
        let of_queries = 3 * padded * 4 + 8 * (padded + 16) * 4 + padded / 128 * 8;
        tiles + turned + windows + kept + 128 + of_queries
    }

    /// Whether to go backward in one pass, a block for a whole head: that is half the work of two passes, but uses
    /// no more multiprocessors than there are heads, and leaves idle those for which the last heads do not suffice.
    /// Where all work it takes 0.87 of the time of two passes on an H100.
    fn goes_back_in_one_pass(&self, gpu: &Gpu) -> bool {
        let (heads, at_once) = (self.batch * self.num_heads, gpu.multiprocessors() as usize);
        let fill_them = 8 * heads >= 7 * heads.div_ceil(at_once) * at_once;
        self.multiplies_by_warpgroups(gpu)
            && self.one_pass_shared() <= gpu.shared_per_block()
            && heads * self.queries > 0
            && gpu.one_pass_attention().unwrap_or(fill_them)
    }

    /// What the kernels that make gradients of queries are told first.
    fn up_to_queries(
        &self,
        inputs: &AttentionInputs,
        from: &AttentionOutput,
        to: &AttentionGradients,
    ) -> Result<Vec<Arg>, CudaError> {
        let mut args = self.given(inputs)?;
        args.extend(self.rows("out", from.out)?);
        args.extend(self.rows("the output's gradient", to.out)?);
        args.push(from.log_sums.into());
        args.extend(self.rows("the gradient of q", to.q)?);
        Ok(args)
    }

    /// All gradients but that of the bias by one kernel.
    unsafe fn back_in_one_pass(
        &self,
        queue: Queue<'_>,
        inputs: &AttentionInputs,
        from: &AttentionOutput,
        to: &AttentionGradients,
    ) -> Result<Diagonals, CudaError> {
        let heads = self.batch * self.num_heads;
        let sums_of_q = to.workspace;
        let diagonals = match to.relative_bias {
            Address::NONE => Address::NONE,
            _ => sums_of_q.plus(heads * self.queries.next_multiple_of(PADDING) * self.d_kv * 4),
        };
        let mut args = self.up_to_queries(inputs, from, to)?;
        args.extend(self.rows("the gradient of k", to.k)?);
        args.extend(self.rows("the gradient of v", to.v)?);
        args.extend([sums_of_q.into(), diagonals.into(), Arg::from(self.diagonals(true).1 as u32)]);
        let blocks = [1, self.num_heads as u32, self.batch as u32];
        let grid = Grid { blocks, threads: 256, shared: self.one_pass_shared() };
        // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
        unsafe {
            queue.gpu.launch(
                &ATTENTION_BACKWARD_HOPPER,
                &self.kernel("backward"),
                grid,
                queue.stream,
                &args,
            )?;
        }
        Ok(Diagonals { at: diagonals, of_keys: true })
    }

    /// Gradients of queries, then those of keys and values.
    unsafe fn back_in_two_passes(
        &self,
        queue: Queue<'_>,
        inputs: &AttentionInputs,
        from: &AttentionOutput,
        to: &AttentionGradients,
    ) -> Result<Diagonals, CudaError> {
        let plain = self.format == Format::F32;
        let heads = self.batch * self.num_heads;
        let padded = self.queries.next_multiple_of(PADDING);
        let minus_sums = to.workspace;
        let minus_dots = minus_sums.plus(heads * padded * 4);
        let diagonals = match to.relative_bias {
            Address::NONE => Address::NONE,
            _ => minus_dots.plus(heads * padded * 4),
        };
        let (tiles, pitch) = self.diagonals(false);

        let of_queries: [Arg; 2] = if plain {
            [minus_dots.into(), (padded as u32).into()]
        } else {
            [minus_sums.into(), minus_dots.into()]
        };

        let mut args = self.up_to_queries(inputs, from, to)?;
        args.extend(of_queries);
        args.extend([diagonals.into(), Arg::from(pitch as u32)]);
        if plain {
            args.push((self.d_kv as u32).into());
        }
        // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
        unsafe { self.launch(queue, "backward_queries", tiles, self.queries_shared(queue.gpu), &args)? };

        let mut args = self.given(inputs)?;
        args.extend(self.rows("the output's gradient", to.out)?);
        args.push(from.log_sums.into());
        args.extend(of_queries);
        args.extend(self.rows("the gradient of k", to.k)?);
        args.extend(self.rows("the gradient of v", to.v)?);
        if plain {
            args.push((self.d_kv as u32).into());
        }
        let blocks = self.keys.div_ceil(self.block_keys());
        // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
        unsafe { self.launch(queue, "backward_keys", blocks, self.keys_shared(queue.gpu), &args)? };
        Ok(Diagonals { at: diagonals, of_keys: false })
    }
}
