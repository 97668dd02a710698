//! Products of a few rows with a transposed right factor, as in the gradient of an expert's input.
//!
//! The columns of such a factor lie in memory as the rows of a left one do, so `out^T = b^T a^T` reads it
//! where it is. Packed for `a b` it would be read, written and read again, for a few rows that use it.

use std::ops::Range;

use rayon::prelude::*;

use super::blocked::{self, pack_right};
use super::pack::Lines;
use super::view::{View, ViewMut};
use super::{CpuPath, Multiply, Right, TASK_WORK, Threads, Write};
use crate::element::Element;
use crate::host;

/// Most columns of the output at once, whose sums stay in the first-level cache until they are written.
const CHUNK: usize = 224;

/// Columns that keep a task busy.
const LEAST: usize = 56;

/// Sums are kept for a multiple of so many rows: what is transposed at once.
const VECTOR: usize = 16;

/// `a * b` into `out`, where `b` is the transpose of a row-major matrix.
pub(super) fn multiply<In: Multiply<Out> + Multiply<f32>, Out: Element>(
    path: CpuPath,
    out: ViewMut<'_, Out>,
    a: View<'_, In>,
    b: View<'_, In>,
    write: Write<'_, Out>,
    threads: Threads,
) {
    let (rows, cols, inner) = (out.rows(), out.cols(), a.cols());
    let width = rows.next_multiple_of(VECTOR);
    let shared = threads == Threads::All && rows * cols * inner / In::PER_WORD >= 2 * TASK_WORK;
    let most = if shared { cols.div_ceil(2 * rayon::current_num_threads()).max(LEAST) } else { cols };
    let len = cols.div_ceil(cols.div_ceil(most.min(CHUNK)));
    let packed = pack_right(a.lines(), rows, <In as Multiply<f32>>::micro_kernel(path).0.cols, shared);
    let chunk = |chunk: usize, out: Vec<&mut [Out]>| {
        let columns = chunk * len..cols.min((chunk + 1) * len);
        let mut sums: Vec<f32> = host::uninit(columns.len() * width);
        let view = ViewMut::new(&mut sums, columns.len(), width);
        let left = b.t().part(columns.clone());
        blocked::multiply(path, view, left, Right::Packed(&packed), Write::Overwrite, Threads::One);
        let sums = transposed(&sums, width, &columns);
        for (i, out) in out.into_iter().enumerate() {
            write.row(i, columns.start, &sums[i * columns.len()..][..columns.len()], out);
        }
    };
    let mut chunks: Vec<Vec<&mut [Out]>> = Vec::new();
    chunks.resize_with(cols.div_ceil(len), || Vec::with_capacity(rows));
    for row in out.into_rows() {
        for (chunk, part) in chunks.iter_mut().zip(row.chunks_mut(len)) {
            chunk.push(part);
        }
    }
    if shared {
        chunks.into_par_iter().enumerate().for_each(|(i, out)| chunk(i, out));
    } else {
        chunks.into_iter().enumerate().for_each(|(i, out)| chunk(i, out));
    }
}

/// Sums of `columns`, `width` for each, as one row of columns after the other.
fn transposed(sums: &[f32], width: usize, columns: &Range<usize>) -> Vec<f32> {
    let lines = Lines { data: sums, inner: width, inner_stride: 1, line_stride: width };
    let mut rows = host::uninit(sums.len());
    lines.pack(0..columns.len(), columns.len(), bytemuck::cast_slice_mut(&mut rows));
    rows
}
