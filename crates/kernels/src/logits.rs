//! Logits of a few rows for decoding, where the head's matrix is read once and nothing is learned.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::cross_entropy::HeadLayout;
use crate::element::Element;
use crate::gemm::{Multiply, Threads, View, ViewMut, Write, matmul};
use crate::host::{self, by_format};
use crate::math::{LANES, dot, sum};
use crate::operation::Operand;

/// Rows up to which a general product, which packs the matrix first, takes longer than reading it once.
const FEW_ROWS: usize = 16;

/// Vocabulary rows that one task handles: few enough to stay in the nearest cache.
const TASK_ROWS: usize = 64;

/// `hidden`, `[n, d_model]`, times the head, in float32: `[n, vocab_size]`. Not differentiable.
pub fn logits(hidden: Tensor<2>, head: Tensor<2>, layout: HeadLayout) -> Tensor<2> {
    let [rows, _] = hidden.dims();
    #[cfg(feature = "libtorch")]
    if crate::torch::is_here(&hidden.device()) {
        return crate::torch::logits(hidden, head, layout);
    }
    let [hidden, head] = [hidden, head].map(host::on_host);
    let (hidden, head) = (host::contiguous(&hidden), host::contiguous(&head));
    let few = layout == HeadLayout::VocabularyByModel && rows <= FEW_ROWS;
    let out = by_format!(hidden, E => if few {
        few_rows::<E>(&hidden, &head)
    } else {
        many_rows::<E>(&hidden, &head, layout)
    });
    Operand::plain(out).into_tensor()
}

fn many_rows<E: Multiply<f32>>(hidden: &FlexTensor, head: &FlexTensor, layout: HeadLayout) -> FlexTensor {
    let ([n, d], [rows, cols]) = (hidden.layout().shape().dims(), head.layout().shape().dims());
    let head = View::new(host::values::<E>(head), rows, cols);
    let head = if layout == HeadLayout::VocabularyByModel { head.t() } else { head };
    let vocabulary = head.cols();
    let mut out = host::uninit(n * vocabulary);
    let hidden = View::new(host::values::<E>(hidden), n, d);
    matmul(ViewMut::new(&mut out, n, vocabulary), hidden, head, Write::Overwrite, Threads::All);
    host::tensor::<f32, 2>(out, [n, vocabulary])
}

fn few_rows<E: Element>(hidden: &FlexTensor, head: &FlexTensor) -> FlexTensor {
    let ([rows, width], [vocabulary, _]) = (hidden.layout().shape().dims(), head.layout().shape().dims());
    let mut by_vocabulary = host::uninit(rows * vocabulary);
    let hidden = host::values::<E>(hidden);
    by_vocabulary
        .par_chunks_mut(TASK_ROWS * rows)
        .zip(host::values::<E>(head).par_chunks(TASK_ROWS * width))
        .with_min_len(8)
        .for_each(|(out, head)| inner_products(hidden, head, width, out));
    let out = host::tensor::<f32, 2>(by_vocabulary, [vocabulary, rows]);
    if rows == 1 { out.reshape([1, vocabulary].into()) } else { out.transpose(0, 1) }
}

/// `out[v, n] = head[v] . hidden[n]`
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn inner_products<E: Element>(hidden: &[E], head: &[E], width: usize, out: &mut [f32]) {
    let rows = hidden.len() / width;
    let fours = rows / 4 * 4;
    for (out, head) in out.chunks_exact_mut(rows).zip(head.chunks_exact(width)) {
        for (out, hidden) in out.chunks_exact_mut(4).zip(hidden.chunks_exact(4 * width)) {
            out.copy_from_slice(&four_dots(hidden, head));
        }
        for (out, hidden) in out[fours..].iter_mut().zip(hidden[fours * width..].chunks_exact(width)) {
            *out = dot(hidden, head);
        }
    }
}

/// Inner products of four rows with `head`: four sums at once hide the delay of each addition.
#[inline(always)]
fn four_dots<E: Element>(rows: &[E], head: &[E]) -> [f32; 4] {
    let width = head.len();
    let (a, rest) = rows.split_at(width);
    let (b, rest) = rest.split_at(width);
    let (c, d) = rest.split_at(width);
    let mut sums = [[0.0_f32; LANES]; 4];
    let [sa, sb, sc, sd] = &mut sums;
    let lanes = |x| <[E]>::as_chunks::<LANES>(x).0;
    let pairs = lanes(a).iter().zip(lanes(b)).zip(lanes(c).iter().zip(lanes(d)));
    for (((a, b), (c, d)), head) in pairs.zip(lanes(head)) {
        for i in 0..LANES {
            sa[i] += a[i].widen() * head[i].widen();
        }
        for i in 0..LANES {
            sb[i] += b[i].widen() * head[i].widen();
        }
        for i in 0..LANES {
            sc[i] += c[i].widen() * head[i].widen();
        }
        for i in 0..LANES {
            sd[i] += d[i].widen() * head[i].widen();
        }
    }
    let tail = width / LANES * LANES;
    let total = |sums: &[f32; LANES], row: &[E]| sum(sums) + dot(&row[tail..], &head[tail..]);
    [total(sa, a), total(sb, b), total(sc, c), total(sd, d)]
}

#[cfg(test)]
mod tests {
    use burn::tensor::Distribution;

    use super::*;
    use crate::test_device;

    #[test]
    fn few_and_many_rows_agree() {
        let device = test_device();
        let hidden = Tensor::<2>::random([FEW_ROWS + 1, 24], Distribution::Default, &device);
        let head = Tensor::<2>::random([1100, 24], Distribution::Default, &device);
        let many = logits(hidden.clone(), head.clone(), HeadLayout::VocabularyByModel);
        let few = logits(hidden.slice(0..FEW_ROWS), head, HeadLayout::VocabularyByModel);
        let difference: f32 = (many.slice(0..FEW_ROWS) - few).abs().max().into_scalar();
        assert!(difference < 1e-5);
    }
}
