//! Matrix products of float32 and bfloat16, summed in float32.
//!
//! One blocked algorithm serves all formats and CPUs: the inner dimension is walked in 32-bit words,
//! which are one float32 or a pair of bfloat16. Micro-kernels differ by CPU and are chosen at run time.
//! An element's sum runs over the inner dimension in an order that its length, the formats and the way
//! to write fix, so results do not depend on the number of threads.
//!
//! A product of INT8 would be one more [`Element`] with four elements a word, and its micro-kernels.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod bench;
mod pack;
mod portable;
mod row;
mod tile;
mod view;

use std::ops::Range;

use rayon::prelude::*;

pub use tile::{CpuPath, Kernel, Multiply};
pub(crate) use view::{View, ViewMut};

use crate::element::Element;
use crate::host;
use pack::Lines;
use tile::{Finish, MicroKernel, Other, Tile};

/// What becomes of the product.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Write<'a, E> {
    /// `out = product`
    Overwrite,
    /// `out += product`
    Add,
    /// `out = other + product`, rounded once.
    Onto(View<'a, E>),
    /// `out = max(product, 0)`, but NaN where the product is.
    Relu,
    /// `out = product` where `other > 0`, else 0.
    Mask(View<'a, E>),
}

/// Who shares the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread alone: the caller already runs on many.
    One,
    /// All threads, when the product is large enough to pay for it.
    All,
}

/// Multiplications that one task should have at least.
const TASK_WORK: usize = 1 << 20;

/// Tasks for each thread, so that one that is held up does not hold up the others.
const TASKS_PER_THREAD: usize = 4;

/// Words of the inner dimension that are summed at once; longer sums are taken in blocks.
const BLOCK_WORDS: usize = 512;

/// Words of packed columns that stay in the second-level cache while they are used.
const CACHED_WORDS: usize = 1 << 17;

/// Rows whose sums are kept aside while blocks of the inner dimension are added up.
const ASIDE_ROWS: usize = 448;

/// A right factor packed once for several products.
#[derive(Debug)]
pub(crate) struct Packed {
    words: Vec<u32>,
    inner: usize,
    cols: usize,
}

impl Packed {
    /// Packs `b` by all threads.
    pub(crate) fn new<In: Multiply<f32>>(b: View<'_, In>) -> Self {
        let kernel = In::micro_kernel(CpuPath::best()).0;
        Self { words: pack_right(b.columns(), b.cols(), kernel.cols), inner: b.rows(), cols: b.cols() }
    }
}

/// Packs all panels of a right factor by all threads.
fn pack_right<In: Element>(lines: Lines<'_, In>, cols: usize, width: usize) -> Vec<u32> {
    let panel = lines.words() * width;
    let mut words = host::uninit(panel * cols.div_ceil(width));
    words.par_chunks_mut(panel.max(1)).enumerate().for_each(|(i, out)| {
        lines.pack(i * width..cols.min((i + 1) * width), width, out);
    });
    words
}

/// `a * b` into `out`, as `write` says.
pub(crate) fn matmul<In: Multiply<Out> + Multiply<f32>, Out: Element>(
    out: ViewMut<'_, Out>,
    a: View<'_, In>,
    b: View<'_, In>,
    write: Write<'_, Out>,
    threads: Threads,
) {
    assert!(a.cols() == b.rows() && out.cols() == b.cols(), "matrix shapes do not fit");
    multiply(CpuPath::best(), out, a, Right::Plain(b.columns()), write, threads);
}

/// [`matmul`] with a packed right factor.
pub(crate) fn matmul_packed<In: Multiply<Out> + Multiply<f32>, Out: Element>(
    out: ViewMut<'_, Out>,
    a: View<'_, In>,
    b: &Packed,
    write: Write<'_, Out>,
    threads: Threads,
) {
    assert!(a.cols() == b.inner && out.cols() == b.cols, "matrix shapes do not fit");
    multiply(CpuPath::best(), out, a, Right::Packed(&b.words), write, threads);
}

#[derive(Clone, Copy)]
enum Right<'a, In> {
    Plain(Lines<'a, In>),
    Packed(&'a [u32]),
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
    right: Right<'a, In>,
    out: Address,
    out_row: usize,
    write: Write<'a, Out>,
}

/// Computes [`matmul`] on `path`, which the CPU must have.
fn multiply<In: Multiply<Out> + Multiply<f32>, Out: Element>(
    path: CpuPath,
    mut out: ViewMut<'_, Out>,
    a: View<'_, In>,
    right: Right<'_, In>,
    write: Write<'_, Out>,
    threads: Threads,
) {
    let (rows, cols) = (out.rows(), out.cols());
    assert!(rows == a.rows(), "matrix shapes do not fit");
    if let Write::Onto(other) | Write::Mask(other) = write {
        assert!(other.rows() == rows && other.cols() == cols, "matrix shapes do not fit");
        assert!(other.is_row_major(), "what is added or masks lies as the output does");
    }
    if rows == 0 || cols == 0 {
        return;
    }
    if let (1, Right::Plain(columns)) = (rows, right) {
        row::multiply(out, a.lines(), columns, write, threads == Threads::All);
        return;
    }
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
        Right::Plain(lines) if down > 1 => {
            packed = pack_right(lines, cols, kernel.cols);
            Right::Packed(&packed)
        }
        right => right,
    };
    let out_row = out.row_stride() * size_of::<Out>();
    let out = Address(out.as_mut_ptr().cast());
    let product = Product { kernel, aside, rows, cols, words, left, right, out, out_row, write };
    let tiles = rows.div_ceil(kernel.rows);
    let part = |count: usize, of: usize, i: usize| count * i / of..count * (i + 1) / of;
    let task = |i: usize| product.task(part(tiles, down, i / across), part(panels, across, i % across));
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

/// Packs all tiles of a left factor, one after the other.
fn pack_left<In: Element>(lines: Lines<'_, In>, rows: usize, most: usize, parallel: bool) -> Vec<u32> {
    let (words, tiles) = (lines.words(), rows.div_ceil(most));
    let mut packed = host::uninit(words * rows);
    let mut rest = packed.as_mut_slice();
    let mut strips = Vec::with_capacity(tiles);
    for tile in 0..tiles {
        let range = tile_rows(rows, tiles, tile);
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

/// The rows of tile number `tile` of `tiles`, which are as equal as can be.
fn tile_rows(rows: usize, tiles: usize, tile: usize) -> Range<usize> {
    rows * tile / tiles..rows * (tile + 1) / tiles
}

/// Some panels over some words of the inner dimension, packed.
#[derive(Clone, Copy)]
struct Group<'a> {
    /// The first panel.
    first: usize,
    /// Packed words, beginning with the block.
    packed: &'a [u32],
    /// Words from one panel to the next.
    panel_words: usize,
}

impl<In: Element, Out: Element> Product<'_, In, Out> {
    /// Computes some tiles of some panels; no two tasks share a tile of the output.
    fn task(&self, tiles: Range<usize>, panels: Range<usize>) {
        let blocks = self.words.div_ceil(BLOCK_WORDS).max(1);
        let block_words = self.words.div_ceil(blocks);
        let group = group_panels(self.words, self.kernel.cols).min(panels.len().max(1));
        let room = match self.right {
            Right::Packed(_) => 0,
            Right::Plain(_) => group * block_words * self.kernel.cols,
        };
        let mut scratch: Vec<u32> = host::uninit(room);
        // Sums go straight to the output where later blocks can be added to it without a rounding.
        let plain =
            Out::PER_WORD == 1 && matches!(self.write, Write::Overwrite | Write::Add | Write::Onto(_));
        let direct = blocks == 1 || plain;
        let most = if direct { tiles.len() } else { (ASIDE_ROWS / self.kernel.rows).min(tiles.len()) }.max(1);
        let width = group * self.kernel.cols;
        let mut sums: Vec<f32> = host::uninit(if direct { 0 } else { most * self.kernel.rows * width });
        for first in panels.clone().step_by(group) {
            let panels = first..panels.end.min(first + group);
            for tile in tiles.clone().step_by(most) {
                let tiles = tile..tiles.end.min(tile + most);
                for block in 0..blocks {
                    let words = self.words * block / blocks..self.words * (block + 1) / blocks;
                    let group = self.right_group(panels.clone(), words.clone(), &mut scratch);
                    let aside = (!direct).then_some(sums.as_mut_slice());
                    self.add_block(tiles.clone(), panels.clone(), words, group, aside, width);
                }
            }
        }
    }

    /// Panels over a block of words, packed into `scratch` unless they are already.
    fn right_group<'a>(
        &'a self,
        panels: Range<usize>,
        words: Range<usize>,
        scratch: &'a mut [u32],
    ) -> Group<'a> {
        let cols = self.kernel.cols;
        match self.right {
            Right::Packed(packed) => {
                let panel_words = self.words * cols;
                let packed = &packed[panels.start * panel_words + words.start * cols..];
                Group { first: panels.start, packed, panel_words }
            }
            Right::Plain(lines) => {
                let (block, panel_words) = (lines.block(words.clone()), words.len() * cols);
                for (i, out) in panels.clone().zip(scratch.chunks_exact_mut(panel_words.max(1))) {
                    block.pack(i * cols..self.cols.min((i + 1) * cols), cols, out);
                }
                Group { first: panels.start, packed: scratch, panel_words }
            }
        }
    }

    /// Adds a block of the inner dimension to some tiles, in the output or in sums kept `aside`.
    fn add_block(
        &self,
        tiles: Range<usize>,
        panels: Range<usize>,
        words: Range<usize>,
        group: Group<'_>,
        mut aside: Option<&mut [f32]>,
        width: usize,
    ) {
        let all_tiles = self.rows.div_ceil(self.kernel.rows);
        let first_row = tile_rows(self.rows, all_tiles, tiles.start).start;
        let mut strip: Vec<u32> = match self.left {
            Left::Later(_) => host::uninit(self.kernel.rows * words.len()),
            _ => Vec::new(),
        };
        for tile in tiles {
            let rows = tile_rows(self.rows, all_tiles, tile);
            if let Left::Later(lines) = self.left {
                let strip = &mut strip[..rows.len() * words.len()];
                lines.block(words.clone()).pack(rows.clone(), rows.len(), strip);
            }
            for panel in panels.clone() {
                let b = &group.packed[(panel - group.first) * group.panel_words..];
                let first = words.start == 0;
                let mut tile = self.tile(&rows, panel, words.clone(), b);
                if let Left::Later(_) = self.left {
                    (tile.a, tile.a_row, tile.a_word) = (strip.as_ptr().cast(), 4, 4 * rows.len());
                }
                let Some(sums) = &mut aside else {
                    tile.finish = if first { self.finish(&rows, panel) } else { Finish::Add };
                    // SAFETY: see `tile`; this task alone writes here.
                    unsafe { (self.kernel.run)(&tile) };
                    continue;
                };
                let at = (rows.start - first_row) * width + (panel - group.first) * self.kernel.cols;
                let sums = sums[at..][..(rows.len() - 1) * width + self.kernel.cols].as_mut_ptr();
                if !first {
                    (tile.start, tile.start_row) = (sums, width);
                }
                if words.end == self.words {
                    tile.finish = self.finish(&rows, panel);
                    // SAFETY: see `tile`; the earlier sums are there, as the slice above shows.
                    unsafe { (self.kernel.run)(&tile) };
                } else {
                    (tile.out, tile.out_row) = (sums.cast(), width * size_of::<f32>());
                    tile.cols = self.kernel.cols;
                    // SAFETY: see `tile`; the sums have room for a whole panel, as the slice above shows.
                    unsafe { (self.aside.run)(&tile) };
                }
            }
        }
    }

    /// Addresses of a tile over some words of the inner dimension.
    ///
    /// They are valid: views were checked against their slices when made, and shapes against each other.
    /// A left factor that is packed later has no address yet.
    fn tile(&self, rows: &Range<usize>, panel: usize, words: Range<usize>, b: &[u32]) -> Tile {
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
        Tile {
            words: words.len(),
            a,
            a_row,
            a_word,
            b: b.as_ptr(),
            rows: rows.len(),
            cols,
            out,
            out_row: self.out_row,
            finish: Finish::Store,
            start: std::ptr::null(),
            start_row: 0,
        }
    }

    fn finish(&self, rows: &Range<usize>, panel: usize) -> Finish {
        let other = |view: View<'_, Out>| Other {
            data: view.row(rows.start)[panel * self.kernel.cols..].as_ptr().cast(),
            row_bytes: view.row_stride() * size_of::<Out>(),
        };
        match self.write {
            Write::Overwrite => Finish::Store,
            Write::Add => Finish::Add,
            Write::Onto(view) => Finish::Onto(other(view)),
            Write::Relu => Finish::Relu,
            Write::Mask(view) => Finish::Mask(other(view)),
        }
    }
}

#[cfg(test)]
mod tests;
