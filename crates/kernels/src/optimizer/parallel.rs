//! Sums and element-wise updates over long slices, the same for any number of threads.

use multiversion::multiversion;
use rayon::prelude::*;

use crate::element::{Element, bf16};
use crate::math;

/// Values one task handles; fixed, so that sums do not depend on the number of threads.
pub(super) const CHUNK: usize = 1 << 15;

/// Sum of squares in double precision.
pub fn sum_of_squares<E: Element>(x: &[E]) -> f64 {
    let parts: Vec<f64> = x.par_chunks(CHUNK).map(|chunk| f64::from(chunk_squares(chunk))).collect();
    parts.iter().sum()
}

/// The chunks of `values`, or as many empty ones.
pub(super) fn optional_chunks(values: &mut [bf16], chunks: usize) -> Vec<&mut [bf16]> {
    let mut parts: Vec<&mut [bf16]> = values.chunks_mut(CHUNK).collect();
    parts.resize_with(chunks, Default::default);
    parts
}

/// `sqrt(mean(x^2))`.
pub fn root_mean_square(x: &[f32]) -> f32 {
    (sum_of_squares(x) / x.len().max(1) as f64).sqrt() as f32
}

/// `out += x`, rounded to the format of `out`.
pub fn add_assign<Out: Element, E: Element>(out: &mut [Out], x: &[E]) {
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| add_chunk(out, x));
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn chunk_squares<E: Element>(x: &[E]) -> f32 {
    math::sum_of_squares(x)
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn add_chunk<Out: Element, E: Element>(out: &mut [Out], x: &[E]) {
    for (out, x) in out.iter_mut().zip(x) {
        *out = Out::round(out.widen() + x.widen());
    }
}
