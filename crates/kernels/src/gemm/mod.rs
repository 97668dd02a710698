//! Matrix products of float32 and bfloat16, summed in float32.
//!
//! One blocked algorithm serves all formats and CPUs: the inner dimension is walked in 32-bit words,
//! which are one float32 or a pair of bfloat16. Micro-kernels differ by CPU and are chosen at run time.
//! An element is the sum over blocks of the inner dimension, which its length and format fix, each summed
//! from one end to the other. So results depend neither on the number of threads nor on that of rows; only
//! a single row is summed otherwise, and what is too small for a normal number may be kept or not.
//!
//! A product of INT8 would be one more [`Element`] with four elements a word, and its micro-kernels.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod bench;
mod blocked;
mod few;
mod pack;
mod portable;
mod row;
mod tile;
mod view;

pub use tile::{CpuPath, Kernel, Multiply};
pub(crate) use view::{View, ViewMut};

use crate::element::{Element, round_all};
use blocked::pack_right;

/// What becomes of the product.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Write<'a, E> {
    /// `out = product`
    Overwrite,
    /// As `Overwrite`, for an output that nothing reads soon: past the caches where that is faster.
    PastCaches,
    /// `out += product`
    Add,
    /// `out = other + product`, rounded once.
    Onto(View<'a, E>),
    /// `out = max(product, 0)`, but NaN where the product is.
    Relu,
    /// `out = product` where `other > 0`, else 0.
    Mask(View<'a, E>),
}

impl<'a, E: Element> Write<'a, E> {
    /// Writes `sums`, which belong to row `row` from column `first` on, into `out`.
    fn row(self, row: usize, first: usize, sums: &[f32], out: &mut [E]) {
        let others = |view: View<'a, E>| view.row(row)[first..].iter();
        match self {
            Self::Overwrite | Self::PastCaches => round_all(sums, out),
            Self::Add => {
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out = E::round(out.widen() + sum));
            }
            Self::Onto(view) => {
                let values = out.iter_mut().zip(sums).zip(others(view));
                values.for_each(|((out, sum), other)| *out = E::round(other.widen() + sum));
            }
            Self::Relu => {
                let values = out.iter_mut().zip(sums);
                values.for_each(|(out, &sum)| *out = E::round(if sum < 0.0 { 0.0 } else { sum }));
            }
            Self::Mask(view) => {
                let values = out.iter_mut().zip(sums).zip(others(view));
                values.for_each(|((out, &sum), other)| {
                    *out = E::round(if other.widen() > 0.0 { sum } else { 0.0 });
                });
            }
        }
    }
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

/// Rows that do not pay for packing the right factor.
const FEW_ROWS: usize = 32;

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
        Self { words: pack_right(b.columns(), b.cols(), kernel.cols, true), inner: b.rows(), cols: b.cols() }
    }
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
    multiply(CpuPath::best(), out, a, Right::Plain(b), write, threads);
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
    /// As it came, to be packed or read where it is.
    Plain(View<'a, In>),
    /// Packed, panel by panel.
    Packed(&'a [u32]),
}

/// Computes [`matmul`] on `path`, which the CPU must have.
fn multiply<In: Multiply<Out> + Multiply<f32>, Out: Element>(
    path: CpuPath,
    out: ViewMut<'_, Out>,
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
    match right {
        Right::Plain(b) if rows == 1 => {
            row::multiply(out, a.lines(), b.columns(), write, threads == Threads::All);
        }
        Right::Plain(b) if few_transposed(rows, b) => few::multiply(path, out, a, b, write, threads),
        _ => blocked::multiply(path, out, a, right, write, threads),
    }
}

/// Whether a product of so many rows with a transposed matrix should be [`few::multiply`]'s.
fn few_transposed<In: Element>(rows: usize, b: View<'_, In>) -> bool {
    let transposed = !b.is_row_major() && b.rows() > 0 && b.rows().is_multiple_of(In::PER_WORD);
    transposed && rows <= FEW_ROWS && b.cols() > FEW_ROWS
}

#[cfg(test)]
mod tests;
