//! Rows of a table by their number, and the gradient of the table.

use crate::address::{Address, Arg, Format};
use crate::error::CudaError;
use crate::gpu::{Grid, Queue};
use crate::size::{count, lanes};
use crate::source::EMBEDDING;

/// A table `[rows, width]`; an id that is no number of a row gives 0 and gets nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table {
    /// Rows, up to 262,144.
    pub rows: usize,
    /// Values of a row, a multiple of 8 (bfloat16) or 4 (float32).
    pub width: usize,
    /// Format of the table, of what is looked up and of their gradients.
    pub format: Format,
}

/// A list of ids and the gradients of the rows that were looked up for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LookedUp {
    /// `i32` `[tokens]`
    pub ids: Address,
    /// `[tokens, width]`
    pub gradient: Address,
    /// How many; may be 0.
    pub tokens: usize,
}

impl LookedUp {
    /// No ids.
    pub const NONE: Self = Self { ids: Address::NONE, gradient: Address::NONE, tokens: 0 };
}

const OPERATION: &str = "embedding";

/// Rows of the kernels' blocks: tokens in a tile, buckets at most, tokens of a piece.
const TILE: usize = 2048;
const BUCKETS: usize = 256;
const PIECE: usize = 64;

/// Bits of a row's number that tell rows of a bucket apart.
const MIN_LOW_BITS: u32 = 7;
const MAX_LOW_BITS: u32 = 10;

impl Table {
    fn low_bits(&self) -> Result<u32, CudaError> {
        (MIN_LOW_BITS..=MAX_LOW_BITS).find(|&bits| self.rows <= BUCKETS << bits).ok_or_else(|| {
            let reason =
                format!("a table has {} rows; it must have {} at most", self.rows, BUCKETS << MAX_LOW_BITS);
            CudaError::Size { operation: OPERATION, reason }
        })
    }

    /// What `IDS_PARAMETERS` of the kernels stands for.
    fn args(&self, lists: [Address; 2], first_tokens: usize) -> Result<Vec<Arg>, CudaError> {
        Ok(vec![
            lists[0].into(),
            lists[1].into(),
            count(OPERATION, "tokens", first_tokens)?.into(),
            count(OPERATION, "rows", self.rows)?.into(),
        ])
    }
}

/// Where the parts of a workspace begin, bytes.
#[derive(Debug, Clone, Copy)]
struct Layout {
    of_tiles: usize,
    bucket_start: usize,
    by_bucket: usize,
    by_row: usize,
    row_start: usize,
    partial: usize,
    end: usize,
}

impl Layout {
    fn new(table: &Table, tokens: usize) -> Self {
        let mut end = 0;
        let mut part = |words: usize| {
            let start = end;
            end += (words * 4).next_multiple_of(16);
            start
        };
        let of_tiles = part(tiles(tokens) * BUCKETS);
        let bucket_start = part(BUCKETS + 1);
        let by_bucket = part(tokens);
        let by_row = part(tokens);
        let row_start = part(table.rows + 1);
        let partial = part(tokens.div_ceil(PIECE) * table.width);
        Self { of_tiles, bucket_start, by_bucket, by_row, row_start, partial, end }
    }
}

/// Tiles of the first step; one even without tokens, which then says so.
fn tiles(tokens: usize) -> usize {
    tokens.div_ceil(TILE).max(1)
}

/// Writes row `ids[i]` of `table` for every `i` to `out`. `i32` `[tokens]`, `[tokens, width]`
///
/// # Errors
/// [`CudaError::Size`] for widths that the kernels do not have.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn embedding(
    queue: Queue<'_>,
    [table, ids, out]: [Address; 3],
    tokens: usize,
    sizes: Table,
) -> Result<(), CudaError> {
    let lanes = lanes(OPERATION, "width", sizes.width, sizes.format)?;
    if tokens == 0 || sizes.width == 0 {
        return Ok(());
    }
    let mut args = vec![Arg::from(table)];
    args.extend(sizes.args([ids, Address::NONE], tokens)?);
    args.extend([Arg::from(out), count(OPERATION, "width", sizes.width)?.into()]);
    let parts = sizes.width.div_ceil(32 * 4 * lanes) as u32;
    let grid = Grid { blocks: [tokens.div_ceil(4) as u32, parts, 1], threads: 128, shared: 0 };
    let name = format!("embedding_{}", sizes.format.suffix());
    // SAFETY: the arguments are those of the kernels in `embedding.cu`; the addresses are promised by the
    // caller.
    unsafe { queue.gpu.launch(&EMBEDDING, &name, grid, queue.stream, &args) }
}

/// Bytes of workspace that [`embedding_backward`] needs for `tokens` tokens in both lists.
pub fn embedding_workspace(table: &Table, tokens: usize) -> usize {
    Layout::new(table, tokens).end
}

/// Writes to `table_gradient`, `[rows, width]`, for each row the sum of the gradients of its occurrences in
/// both lists, rounded once; with `onto` adds it to what stands there.
///
/// Occurrences are summed in their order, 64 at a time: a row's sum depends on nothing else.
///
/// # Errors
/// [`CudaError::Size`] for sizes that the kernels do not have.
///
/// # Safety
/// As the crate's documentation demands; `workspace` must have room for [`embedding_workspace`] bytes.
pub unsafe fn embedding_backward(
    queue: Queue<'_>,
    lists: [LookedUp; 2],
    table_gradient: Address,
    workspace: Address,
    sizes: Table,
    onto: bool,
) -> Result<(), CudaError> {
    let Table { rows, width, format, .. } = sizes;
    let lanes = lanes(OPERATION, "width", width, format)?;
    let low_bits = sizes.low_bits()?;
    let tokens = lists[0].tokens + lists[1].tokens;
    let total = count(OPERATION, "tokens", tokens)?;
    if rows == 0 || width == 0 || (onto && tokens == 0) {
        return Ok(());
    }
    let layout = Layout::new(&sizes, tokens);
    let place = |bytes| Arg::from(workspace.plus(bytes));
    let [by_bucket, by_row, row_start, partial] =
        [layout.by_bucket, layout.by_row, layout.row_start, layout.partial].map(place);
    let [of_tiles, bucket_start] = [layout.of_tiles, layout.bucket_start].map(place);
    let ids = sizes.args(lists.map(|list| list.ids), lists[0].tokens)?;
    let launch = |name: &str, grid: Grid, more: &[Arg]| {
        let args: Vec<Arg> = ids.iter().chain(more).copied().collect();
        // SAFETY: as in `embedding`; what is kept in the workspace lies within the layout.
        unsafe { queue.gpu.launch(&EMBEDDING, name, grid, queue.stream, &args) }
    };
    let by_tile = Grid::new(tiles(tokens) as u32, BUCKETS as u32);
    launch("embedding_count", by_tile, &[total.into(), low_bits.into(), of_tiles])?;
    let args = [total.into(), low_bits.into(), of_tiles, by_bucket, bucket_start];
    launch("embedding_bucket", by_tile, &args)?;
    let buckets = rows.div_ceil(1 << low_bits) as u32;
    let args = [low_bits.into(), by_bucket, bucket_start, by_row, row_start];
    launch("embedding_sort", Grid::new(buckets, BUCKETS as u32), &args)?;
    let mut args = lists.map(|list| Arg::from(list.gradient)).to_vec();
    args.extend([Arg::from(count(OPERATION, "width", width)?), by_row, row_start, partial]);
    let grid = |rows: usize| {
        let blocks = [rows.div_ceil(8) as u32, width.div_ceil(32 * lanes) as u32, 1];
        Grid { blocks, threads: 256, shared: 0 }
    };
    if tokens >= PIECE {
        let name = format!("embedding_pieces_{}", format.suffix());
        launch(&name, grid(tokens.div_ceil(PIECE)), &args)?;
    }
    args.extend([Arg::from(table_gradient), u32::from(onto).into()]);
    launch(&format!("embedding_rows_{}", format.suffix()), grid(rows), &args)
}
