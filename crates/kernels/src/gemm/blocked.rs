//! The blocked algorithm: a product cut into tasks, tasks into panels and blocks, and those into tiles.

use std::ops::Range;

use rayon::prelude::*;

use super::pack::Lines;
use super::tile::{self, CpuPath, Finish, MicroKernel, Multiply, Other, Tile};
use super::view::{View, ViewMut};
use super::{FEW_ROWS, Right, TASK_WORK, Threads, Write};
use crate::element::Element;
use crate::host;
use crate::memory::CACHE_LINE;

/// Tasks for each thread, so that one that is held up does not hold up the others.
const TASKS_PER_THREAD: usize = 4;

/// Words of the inner dimension whose sum is one chain of additions; longer ones are sums of such sums, as
/// rounding errors grow with the chain.
pub(super) const BLOCK_WORDS: usize = 512;

/// Bytes of a right factor in place that are read while the next ones are on their way.
const PART_BYTES: usize = 1 << 15;

/// Bytes of a row of a right factor in place of which all panels take their part in turn; the sums of more
/// would not stay in the first-level cache.
const GROUP_BYTES: usize = 1 << 11;

/// Words of packed columns that stay in the second-level cache while they are used.
const CACHED_WORDS: usize = 1 << 17;

/// Words of the inner dimension below which writing the output is most of the work.
const SHORT_WORDS: usize = 32;

/// Bytes of an output of which little would be left in the second-level cache when it is read.
pub(super) const PAST_CACHES_BYTES: usize = 1 << 18;

/// Rows whose sums are kept aside while blocks of the inner dimension are added up.
const ASIDE_ROWS: usize = 448;

/// Where the words of the right factor are.
#[derive(Clone, Copy)]
enum Columns<'a, In> {
    /// In the matrix itself, row by row in whole panels.
    InPlace(Lines<'a, In>),
    /// Packed, panel by panel.
    Packed(&'a [u32]),
    /// To be packed by each task that reads them.
    Later(Lines<'a, In>),
}

/// Where the words of the left factor are.
enum Left<'a, In> {
    /// In the matrix itself.
    InPlace { data: Address, row_bytes: usize },
    /// Packed, tile by tile.
    Packed(Vec<u32>),
    /// To be packed by the one task that reads them.
    Later(Lines<'a, In>),
}

/// An address that tasks share, each for a part of its own.
#[derive(Debug, Clone, Copy)]
struct Address(*mut u8);

// SAFETY: tasks read and write disjoint parts of what the address leads to, as `Product::task` states.
unsafe impl Send for Address {}
// SAFETY: as above.
unsafe impl Sync for Address {}

impl Address {
    /// The address `bytes` further on.
    ///
    /// # Safety
    /// It must lie within the same allocation.
    unsafe fn after(self, bytes: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(bytes) }
    }
}

/// A product as its tasks see it.
struct Product<'a, In, Out> {
    kernel: MicroKernel,
    /// The same from `In` to float32, for sums that are taken in blocks.
    aside: MicroKernel,
    rows: usize,
    cols: usize,
    words: usize,
    left: Left<'a, In>,
    right: Columns<'a, In>,
    out: Address,
    out_row: usize,
    write: Write<'a, Out>,
    /// Whether the output goes to memory past the caches.
    past_caches: bool,
}

/// [`super::multiply`] by tiles of packed factors, or of those that can be read where they are.
pub(super) fn multiply<In: Multiply<Out> + Multiply<f32>, Out: Element>(
    path: CpuPath,
    mut out: ViewMut<'_, Out>,
    a: View<'_, In>,
    right: Right<'_, In>,
    write: Write<'_, Out>,
    threads: Threads,
) {
    let (rows, cols) = (out.rows(), out.cols());
    let kernel = <In as Multiply<Out>>::micro_kernel(path).0;
    let aside = <In as Multiply<f32>>::micro_kernel(path).0;
    let lines = a.lines();
    let words = lines.words();
    let threads = match threads {
        Threads::All => rayon::current_num_threads(),
        Threads::One => 1,
    };
    let tasks =
        (rows * cols * words / TASK_WORK).clamp(1, if threads == 1 { 1 } else { threads * TASKS_PER_THREAD });
    let panels = cols.div_ceil(kernel.cols);
    let direct = lines.inner_stride == 1 && lines.inner.is_multiple_of(In::PER_WORD);
    let Grid { across, down } = Grid::new(tasks, rows, panels, words, &kernel, direct);
    let left = if direct {
        let data = Address(lines.data.as_ptr().cast_mut().cast());
        Left::InPlace { data, row_bytes: lines.line_stride * size_of::<In>() }
    } else if across == 1 {
        Left::Later(lines)
    } else {
        Left::Packed(pack_left(lines, rows, kernel.rows, tasks > 1))
    };
    let packed;
    let right = match right {
        Right::Packed(words) => Columns::Packed(words),
        Right::Plain(b) => {
            let columns = b.columns();
            let whole = cols.is_multiple_of(kernel.cols) && columns.line_stride == 1;
            if kernel.reads_rows && direct && whole && words > 0 && rows <= FEW_ROWS {
                Columns::InPlace(columns)
            } else if down > 1 {
                packed = pack_right(columns, cols, kernel.cols, true);
                Columns::Packed(&packed)
            } else {
                Columns::Later(columns)
            }
        }
    };
    let out_row = out.row_stride() * size_of::<Out>();
    let out = Address(out.as_mut_ptr().cast());
    // A large output of short sums takes longer to write than to compute, and the caches would first read
    // the lines that it overwrites.
    let large = words <= SHORT_WORDS && rows * cols * size_of::<Out>() >= PAST_CACHES_BYTES;
    let lines = out.0.addr().is_multiple_of(CACHE_LINE) && out_row.is_multiple_of(CACHE_LINE);
    let past_caches = matches!(write, Write::PastCaches) && large && lines;
    let product = Product { kernel, aside, rows, cols, words, left, right, out, out_row, write, past_caches };
    let tiles = rows.div_ceil(kernel.rows);
    let task =
        |i: usize| product.task(share(0..tiles, i / across, down), share(0..panels, i % across, across));
    if across * down == 1 {
        task(0);
    } else {
        (0..across * down).into_par_iter().with_max_len(1).for_each(task);
    }
}

/// How a product is cut into tasks.
struct Grid {
    /// Parts of the columns.
    across: usize,
    /// Parts of the rows.
    down: usize,
}

impl Grid {
    /// The cut that moves the least memory: a part of the columns reads the whole left factor, once for
    /// each group of panels that the cache holds, and a part of the rows the whole right one.
    fn new(
        tasks: usize,
        rows: usize,
        panels: usize,
        words: usize,
        kernel: &MicroKernel,
        in_place: bool,
    ) -> Self {
        let tiles = rows.div_ceil(kernel.rows);
        let groups = panels.div_ceil(group_panels(words, kernel.cols));
        let cost = |grid: &Self| {
            let (left, right) = (rows, panels * kernel.cols);
            // What several tasks read is packed for all of them first: written and read once more.
            let left_packed = if in_place || grid.across == 1 { 0 } else { 2 * left };
            let right_packed = if grid.down == 1 { 0 } else { 2 * right };
            left * grid.across.max(groups) + left_packed + right * grid.down + right_packed
        };
        let powers = std::iter::successors(Some(1), |across| Some(2 * across));
        let grids = powers
            .take_while(|&across| across <= tasks.min(panels))
            .map(|across| Self { across, down: (tasks / across).clamp(1, tiles) });
        // Fewer tasks than there could be only where no cut gives more.
        grids
            .min_by_key(|grid| (tasks.saturating_sub(grid.across * grid.down).min(tasks / 2), cost(grid)))
            .unwrap_or(Self { across: 1, down: 1 })
    }
}

/// Panels over one block of the inner dimension that the cache holds.
fn group_panels(words: usize, cols: usize) -> usize {
    let block_words = words.div_ceil(words.div_ceil(BLOCK_WORDS).max(1));
    (CACHED_WORDS / (block_words * cols).max(1)).max(1)
}

/// Packs all panels of a right factor, on all threads if `parallel`.
pub(super) fn pack_right<In: Element>(
    lines: Lines<'_, In>,
    cols: usize,
    width: usize,
    parallel: bool,
) -> Vec<u32> {
    let panel = lines.words() * width;
    let mut words = host::uninit(panel * cols.div_ceil(width));
    let pack = |(i, out): (usize, &mut [u32])| {
        lines.pack(i * width..cols.min((i + 1) * width), width, out);
    };
    if parallel {
        words.par_chunks_mut(panel.max(1)).enumerate().for_each(pack);
    } else {
        words.chunks_mut(panel.max(1)).enumerate().for_each(pack);
    }
    words
}

/// Packs all tiles of a left factor, one after the other.
fn pack_left<In: Element>(lines: Lines<'_, In>, rows: usize, most: usize, parallel: bool) -> Vec<u32> {
    let (words, tiles) = (lines.words(), rows.div_ceil(most));
    let mut packed = host::uninit(words * rows);
    let mut rest = packed.as_mut_slice();
    let mut strips = Vec::with_capacity(tiles);
    for tile in 0..tiles {
        let range = share(0..rows, tile, tiles);
        let (strip, after) = rest.split_at_mut(range.len() * words);
        strips.push((range, strip));
        rest = after;
    }
    let pack = |(range, strip): (Range<usize>, &mut [u32])| lines.pack(range.clone(), range.len(), strip);
    if parallel {
        strips.into_par_iter().with_min_len(4).for_each(pack);
    } else {
        strips.into_iter().for_each(pack);
    }
    packed
}

/// Number `i` of `parts` parts of a range, which are as equal as can be.
fn share(range: Range<usize>, i: usize, parts: usize) -> Range<usize> {
    range.start + range.len() * i / parts..range.start + range.len() * (i + 1) / parts
}

/// Some panels over a block of the inner dimension.
#[derive(Clone, Copy)]
struct Group<'a> {
    /// The panel with which `data` begins.
    first: usize,
    /// Bytes, beginning with the block.
    data: &'a [u8],
    /// Bytes from one panel to the next.
    panel_bytes: usize,
    /// Bytes from row to row of a factor in place, 0 of a packed one.
    row_bytes: usize,
}

/// Some tiles of some panels over a block of the inner dimension.
struct Block<'a> {
    tiles: Range<usize>,
    panels: Range<usize>,
    words: Range<usize>,
    /// Whether sums begin here, or go on where those of the words before ended.
    begins: bool,
    /// Whether sums end here.
    ends: bool,
    /// Whether sums of earlier words have ended.
    later: bool,
    group: Group<'a>,
}

/// Sums of some tiles, panel after panel: rows as far apart as those of the output may be share their place
/// in the cache.
struct Aside {
    /// Rows of a panel.
    rows: usize,
    /// Sums that have not ended.
    parts: Vec<f32>,
    /// Those that have, added up.
    blocks: Vec<f32>,
}

impl<In: Element, Out: Element> Product<'_, In, Out> {
    /// Computes some tiles of some panels; no two tasks share a tile of the output.
    fn task(&self, tiles: Range<usize>, panels: Range<usize>) {
        let blocks = self.words.div_ceil(BLOCK_WORDS).max(1);
        let block_words = self.words.div_ceil(blocks);
        let panel_bytes = self.kernel.cols * size_of::<In>();
        let group = match self.right {
            Columns::InPlace(_) => GROUP_BYTES / panel_bytes,
            Columns::Packed(_) | Columns::Later(_) => group_panels(self.words, self.kernel.cols),
        };
        let group = group.clamp(1, panels.len().max(1));
        let (parts, room) = match self.right {
            Columns::InPlace(_) => {
                let part_words = PART_BYTES / (group * panel_bytes * In::PER_WORD);
                (block_words.div_ceil(part_words.max(1)), 0)
            }
            Columns::Packed(_) => (1, 0),
            Columns::Later(_) => (1, group * block_words * self.kernel.cols),
        };
        let mut scratch: Vec<u32> = host::uninit(room);
        let most = match self.right {
            // What one tile has read is in the second-level cache for the next.
            Columns::InPlace(_) => 1,
            _ if blocks == 1 => tiles.len(),
            _ => (ASIDE_ROWS / self.kernel.rows).min(tiles.len()),
        };
        let rows = most.max(1) * self.kernel.rows;
        let room = rows * group * self.kernel.cols;
        let mut aside = Aside {
            rows,
            parts: host::uninit(if parts == 1 { 0 } else { room }),
            blocks: host::uninit(if blocks == 1 { 0 } else { room }),
        };
        for first in panels.clone().step_by(group) {
            let panels = first..panels.end.min(first + group);
            for tile in tiles.clone().step_by(most.max(1)) {
                let tiles = tile..tiles.end.min(tile + most.max(1));
                for i in 0..blocks * parts {
                    let block = share(0..self.words, i / parts, blocks);
                    let words = share(block.clone(), i % parts, parts);
                    let group = self.right_group(panels.clone(), words.clone(), &mut scratch);
                    let (begins, ends) = (words.start == block.start, words.end == block.end);
                    let (tiles, panels) = (tiles.clone(), panels.clone());
                    let block = Block { tiles, panels, words, begins, ends, later: i >= parts, group };
                    self.add_block(&block, &mut aside);
                }
            }
        }
        if self.past_caches {
            tile::publish();
        }
    }

    /// Panels over a block of words, packed into `scratch` where they are to be packed.
    fn right_group<'a>(
        &'a self,
        panels: Range<usize>,
        words: Range<usize>,
        scratch: &'a mut [u32],
    ) -> Group<'a> {
        let cols = self.kernel.cols;
        match self.right {
            Columns::InPlace(lines) => {
                let data = bytemuck::cast_slice(lines.block(words).data);
                let row_bytes = lines.inner_stride * size_of::<In>();
                Group { first: 0, data, panel_bytes: cols * size_of::<In>(), row_bytes }
            }
            Columns::Packed(packed) => {
                let panel_words = self.words * cols;
                let data = bytemuck::cast_slice(&packed[panels.start * panel_words + words.start * cols..]);
                Group { first: panels.start, data, panel_bytes: 4 * panel_words, row_bytes: 0 }
            }
            Columns::Later(lines) => {
                let (block, panel_words) = (lines.block(words.clone()), words.len() * cols);
                for (i, out) in panels.clone().zip(scratch.chunks_exact_mut(panel_words.max(1))) {
                    block.pack(i * cols..self.cols.min((i + 1) * cols), cols, out);
                }
                let data = bytemuck::cast_slice(scratch);
                Group { first: panels.start, data, panel_bytes: 4 * panel_words, row_bytes: 0 }
            }
        }
    }

    /// Adds a block of the inner dimension to some tiles, in the output or in sums kept aside.
    fn add_block(&self, block: &Block<'_>, aside: &mut Aside) {
        let mut strip: Vec<u32> = match self.left {
            Left::Later(_) => host::uninit(self.kernel.rows * block.words.len()),
            _ => Vec::new(),
        };
        for tile in block.tiles.clone() {
            let rows = self.tile_rows(tile);
            if let Left::Later(lines) = self.left {
                let strip = &mut strip[..rows.len() * block.words.len()];
                lines.block(block.words.clone()).pack(rows.clone(), rows.len(), strip);
            }
            for panel in block.panels.clone() {
                let mut tile = self.tile(&rows, panel, block);
                if let Columns::InPlace(_) = self.right {
                    (tile.ahead, tile.ahead_row) = self.ahead(panel, block);
                }
                if let Left::Later(_) = self.left {
                    (tile.a, tile.a_row, tile.a_word) = (strip.as_ptr().cast(), 4, 4 * rows.len());
                }
                self.run(tile, &rows, panel, block, aside);
            }
        }
    }

    /// Runs a tile whose addresses are those of its place in the output.
    fn run(&self, mut tile: Tile, rows: &Range<usize>, panel: usize, block: &Block<'_>, aside: &mut Aside) {
        let cols = self.kernel.cols;
        let first_row = self.tile_rows(block.tiles.start).start;
        let row = (panel - block.panels.start) * aside.rows + rows.start - first_row;
        let here = |sums: &mut [f32]| sums[row * cols..(row + rows.len()) * cols].as_mut_ptr();
        let mut part = std::ptr::null_mut();
        if !(block.begins && block.ends) {
            part = here(&mut aside.parts);
        }
        if !block.begins {
            tile.start = part;
        }
        let last = block.words.end == self.words;
        let mut sums = part;
        if block.ends && (block.later || !last) {
            sums = here(&mut aside.blocks);
        }
        if block.ends && block.later {
            tile.earlier = sums;
        }
        if last {
            tile.finish = self.finish(rows, panel);
            // SAFETY: see `tile`; sums are there, as the slices above show, and this task alone writes here.
            unsafe { (self.kernel.run)(&tile) };
            return;
        }
        (tile.out, tile.out_row) = (sums.cast(), cols * size_of::<f32>());
        tile.cols = cols;
        // SAFETY: see `tile`; the sums have room for a whole panel, as the slice above shows.
        unsafe { (self.aside.run)(&tile) };
    }

    /// The rows of a tile.
    fn tile_rows(&self, tile: usize) -> Range<usize> {
        share(0..self.rows, tile, self.rows.div_ceil(self.kernel.rows))
    }

    /// What a panel in place should have read while it is multiplied, and the bytes from what is fetched
    /// beside one row to what is beside the next.
    fn ahead(&self, panel: usize, block: &Block<'_>) -> (*const u8, usize) {
        let Group { data, panel_bytes, row_bytes, .. } = block.group;
        let rows = block.words.len() * In::PER_WORD;
        let next_rows = data.as_ptr().wrapping_add(rows * row_bytes);
        if block.panels.len() * panel_bytes == row_bytes {
            // Its share of the rows after these, which lie in one piece: memory likes that best.
            (next_rows.wrapping_add(panel * rows * panel_bytes), panel_bytes)
        } else {
            (next_rows.wrapping_add(panel * panel_bytes), row_bytes)
        }
    }

    /// Addresses of a tile over some words of the inner dimension.
    ///
    /// They are valid: views were checked against their slices when made, and shapes against each other.
    /// A left factor that is packed later has no address yet.
    fn tile(&self, rows: &Range<usize>, panel: usize, block: &Block<'_>) -> Tile {
        let (words, group) = (&block.words, block.group);
        let start = panel * self.kernel.cols;
        let cols = (self.cols - start).min(self.kernel.cols);
        // SAFETY: row and word lie within the left factor, row and column within the output.
        let (a, out) = unsafe {
            let a = match &self.left {
                Left::InPlace { data, row_bytes } => data.after(rows.start * row_bytes + words.start * 4),
                Left::Packed(packed) => {
                    let first = rows.start * self.words + words.start * rows.len();
                    packed.as_ptr().add(first).cast_mut().cast()
                }
                Left::Later(_) => std::ptr::null_mut(),
            };
            (a, self.out.after(rows.start * self.out_row + start * size_of::<Out>()))
        };
        let (a_row, a_word) = match self.left {
            Left::InPlace { row_bytes, .. } => (row_bytes, 4),
            Left::Packed(_) | Left::Later(_) => (4, 4 * rows.len()),
        };
        // With one panel the left factor is read once, tile after tile, in one piece if its rows are whole.
        let once = self.cols <= self.kernel.cols && a_word == 4 && a_row == 4 * words.len();
        let ahead = if once { a.wrapping_add(rows.len() * a_row).cast_const() } else { std::ptr::null() };
        Tile {
            words: words.len(),
            a,
            a_row,
            a_word,
            b: group.data[(panel - group.first) * group.panel_bytes..].as_ptr(),
            b_row: group.row_bytes,
            ahead,
            ahead_row: 0,
            rows: rows.len(),
            cols,
            out,
            out_row: self.out_row,
            finish: Finish::Store,
            start: std::ptr::null(),
            earlier: std::ptr::null(),
        }
    }

    fn finish(&self, rows: &Range<usize>, panel: usize) -> Finish {
        let other = |view: View<'_, Out>| Other {
            data: view.row(rows.start)[panel * self.kernel.cols..].as_ptr().cast(),
            row_bytes: view.row_stride() * size_of::<Out>(),
        };
        match self.write {
            Write::PastCaches if self.past_caches => Finish::StorePastCaches,
            Write::Overwrite | Write::PastCaches => Finish::Store,
            Write::Add => Finish::Add,
            Write::Onto(view) => Finish::Onto(other(view)),
            Write::Relu => Finish::Relu,
            Write::Mask(view) => Finish::Mask(other(view)),
        }
    }
}
