//! Logits of a few rows for decoding, where the head's matrix is read once and nothing is learned.

use burn::tensor::Tensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::cross_entropy::HeadLayout;
use crate::host;
use crate::math::dot;
use crate::operation::Operand;

/// Rows up to which reading the matrix is most of the cost, so that a blocked product gains nothing.
const FEW_ROWS: usize = 2;

/// Vocabulary rows that one task handles: few enough to stay in the nearest cache.
const TASK_ROWS: usize = 64;

/// `hidden`, `[n, d_model]`, times the head: `[n, vocab_size]`. Not differentiable.
pub fn logits(hidden: Tensor<2>, head: Tensor<2>, layout: HeadLayout) -> Tensor<2> {
    let (hidden, head) = (hidden.inner(), head.inner());
    let [rows, _] = hidden.dims();
    match layout {
        HeadLayout::ModelByVocabulary => hidden.matmul(head),
        HeadLayout::VocabularyByModel if rows > FEW_ROWS => hidden.matmul(head.transpose()),
        HeadLayout::VocabularyByModel => few_rows(hidden, head),
    }
}

fn few_rows(hidden: Tensor<2>, head: Tensor<2>) -> Tensor<2> {
    let ([rows, width], [vocabulary, _]) = (hidden.dims(), head.dims());
    let mut by_vocabulary = host::uninit(rows * vocabulary);
    host::with_values(hidden, |hidden| {
        host::with_values(head, |head| {
            by_vocabulary
                .par_chunks_mut(TASK_ROWS * rows)
                .zip(head.par_chunks(TASK_ROWS * width))
                .with_min_len(8)
                .for_each(|(out, head)| inner_products(hidden, head, width, out));
        });
    });
    let out = Operand::Plain(host::tensor(by_vocabulary, [vocabulary, rows])).into_tensor::<2>();
    if rows == 1 { out.reshape([1, vocabulary]) } else { out.transpose() }
}

/// `out[v, n] = head[v] . hidden[n]`
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn inner_products(hidden: &[f32], head: &[f32], width: usize, out: &mut [f32]) {
    let rows = hidden.len() / width;
    for (out, head) in out.chunks_exact_mut(rows).zip(head.chunks_exact(width)) {
        for (out, hidden) in out.iter_mut().zip(hidden.chunks_exact(width)) {
            *out = dot(hidden, head);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;

    #[test]
    fn few_and_many_rows_agree() {
        let device = Device::flex();
        let hidden = Tensor::<2>::random([FEW_ROWS + 1, 24], Distribution::Default, &device);
        let head = Tensor::<2>::random([1100, 24], Distribution::Default, &device);
        let many = logits(hidden.clone(), head.clone(), HeadLayout::VocabularyByModel);
        let few = logits(hidden.slice(0..FEW_ROWS), head, HeadLayout::VocabularyByModel);
        let difference: f32 = (many.slice(0..FEW_ROWS) - few).abs().max().into_scalar();
        assert!(difference < 1e-5);
    }
}
