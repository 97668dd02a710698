//! Products of a single row, as in decoding one sequence: the right factor is read once, where it lies.
//!
//! Packing it first, as for many rows, would read it, write it and read it again.

use multiversion::multiversion;
use rayon::prelude::*;

use super::Write;
use super::pack::Lines;
use super::view::ViewMut;
use crate::element::Element;
use crate::math::dot;

/// Columns whose sums stay in registers.
const COLS: usize = 64;

/// Elements of the right factor that make it worth while to share.
const SHARED: usize = 1 << 18;

/// `a * b` into the single row of `out`.
pub(super) fn multiply<In: Element, Out: Element>(
    out: ViewMut<'_, Out>,
    a: Lines<'_, In>,
    b: Lines<'_, In>,
    write: Write<'_, Out>,
    parallel: bool,
) {
    let a: Vec<f32> = (0..a.inner).map(|i| a.data[i * a.inner_stride].widen()).collect();
    let Some(out) = out.into_rows().next() else { return };
    let cols = out.len();
    let block = |(block, out): (usize, &mut [Out])| {
        let first = block * COLS;
        let mut sums = [0.0; COLS];
        let sums = &mut sums[..COLS.min(cols - first)];
        // Without an inner dimension there is no data, and the sums stay 0.
        let data = b.data.get(first * b.line_stride..).unwrap_or_default();
        if b.line_stride == 1 {
            add_rows(&a, data, b.inner_stride, sums);
        } else {
            add_columns(&a, data, b.line_stride, sums);
        }
        write.row(0, first, sums, out);
    };
    if parallel && cols * a.len() >= SHARED {
        out.par_chunks_mut(COLS).enumerate().with_min_len(2).for_each(block);
    } else {
        out.chunks_mut(COLS).enumerate().for_each(block);
    }
}

/// Columns lie side by side: rows of the right factor are added up.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn add_rows<In: Element>(a: &[f32], b: &[In], stride: usize, sums: &mut [f32]) {
    if let Ok(sums) = <&mut [f32; COLS]>::try_from(&mut *sums) {
        let mut kept = [0.0; COLS];
        for (i, a) in a.iter().enumerate() {
            let row: &[In; COLS] = b[i * stride..].first_chunk().expect("a row of the factor");
            for (sum, b) in kept.iter_mut().zip(row) {
                *sum += a * b.widen();
            }
        }
        *sums = kept;
        return;
    }
    for (i, a) in a.iter().enumerate() {
        for (sum, b) in sums.iter_mut().zip(&b[i * stride..]) {
            *sum += a * b.widen();
        }
    }
}

/// The elements of a column lie side by side: each sum is an inner product.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn add_columns<In: Element>(a: &[f32], b: &[In], stride: usize, sums: &mut [f32]) {
    for (j, sum) in sums.iter_mut().enumerate() {
        *sum = dot(a, &b[j * stride..][..a.len()]);
    }
}
