//! The attention core: scores, relative bias, masks, softmax, dropout and the weighted sum of values.
//!
//! Owns everything between the projections. The relative bias depends on `key - query` only, so
//! it enters as one vector a head and no `[heads, s, t]` bias or probability tensor outlives a
//! row of the batch: the backward pass computes the probabilities again from the saved row sums.

use std::sync::Arc;

use burn::tensor::{Int, Tensor};
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::host;
use crate::math::{dot, exp, max, sum};
use crate::matmul::{Threads, View, ViewMut, Write, matmul};
use crate::noise::{Factor, NoiseKey};
use crate::operation::{Operand, Operation, apply};

/// Sizes and rules of one attention.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    /// Batch rows.
    pub batch: usize,
    /// Heads.
    pub num_heads: usize,
    /// Queries of a row.
    pub queries: usize,
    /// Keys of a row.
    pub keys: usize,
    /// A query sees no key after its own position.
    pub causal: bool,
    /// Position of the first query; above 0 when decoding with cached keys.
    pub query_offset: usize,
    /// Dropout of the probabilities.
    pub dropout: f64,
    /// Random numbers of the dropout.
    pub noise: NoiseKey,
    /// Number of the first batch row within the global batch.
    pub first_row: u32,
}

/// Documents packed into one row: a query sees the keys of its own segment.
#[derive(Debug, Clone)]
pub struct Segments {
    /// Segment of each query, `[batch, queries]`.
    pub queries: Tensor<2, Int>,
    /// Segment of each key, `[batch, keys]`.
    pub keys: Tensor<2, Int>,
}

/// Tensors of one attention.
#[derive(Debug)]
pub struct AttentionInputs {
    /// Queries, `[batch * queries, num_heads * d_kv]`.
    pub q: Tensor<2>,
    /// Keys, `[batch * keys, num_heads * d_kv]`.
    pub k: Tensor<2>,
    /// Values, `[batch * keys, num_heads * d_kv]`.
    pub v: Tensor<2>,
    /// Bias of relative position `key - query = i - (queries - 1) - query_offset` at column `i`.
    /// `[num_heads, queries + keys - 1]`
    pub relative_bias: Option<Tensor<2>>,
    /// 1 where a key may be seen, 0 where not, holes allowed; all may when absent. `[batch, keys]`
    pub key_mask: Option<Tensor<2, Int>>,
    /// Packed documents.
    pub segments: Option<Segments>,
}

/// Scaled by nothing, as in T5: `softmax(q k^T + bias + mask) v`. `[batch * queries, num_heads * d_kv]`
///
/// Masked scores get the most negative finite number, so a query that may see nothing yields the
/// mean of the values and not NaN.
pub fn attention(inputs: AttentionInputs, rules: Attention) -> Tensor<2> {
    let AttentionInputs { q, k, v, relative_bias, key_mask, segments } = inputs;
    let operation = Core {
        rules,
        key_mask: key_mask.map(|mask| Arc::new(host::integers(&mask))),
        segments: segments
            .map(|s| Arc::new((host::integers(&s.queries), host::integers(&s.keys)))),
    };
    let [q, k, v] = [q, k, v].map(Operand::from);
    let [out] = match relative_bias {
        Some(bias) => apply(operation, [q, k, v, Operand::from(bias)]),
        None => apply(operation, [q, k, v]),
    };
    out.into_tensor()
}

#[derive(Debug)]
struct Core {
    rules: Attention,
    key_mask: Option<Arc<Vec<i32>>>,
    segments: Option<Arc<(Vec<i32>, Vec<i32>)>>,
}

#[derive(Debug)]
struct Saved {
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    bias: Option<FlexTensor>,
    /// Largest score and sum of exponentials of each query, `[batch, num_heads, queries]`.
    rows: Vec<(f32, f32)>,
}

/// Slices of one batch row.
#[derive(Clone, Copy)]
struct Row<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    width: usize,
}

impl Saved {
    fn row(&self, b: usize, rules: &Attention) -> Row<'_> {
        let [_, width] = self.q.layout().shape().dims();
        let (s, t) = (rules.queries * width, rules.keys * width);
        Row {
            q: &host::values(&self.q)[b * s..][..s],
            k: &host::values(&self.k)[b * t..][..t],
            v: &host::values(&self.v)[b * t..][..t],
            width,
        }
    }
}

impl<'a> Row<'a> {
    fn head(self, data: &'a [f32], head: usize, d_kv: usize) -> View<'a> {
        View::strided(&data[head * d_kv..], data.len() / self.width, d_kv, self.width)
    }
}

impl Core {
    fn head_width(&self, saved: &Saved) -> usize {
        let [_, width] = saved.q.layout().shape().dims();
        width / self.rules.num_heads
    }

    /// Scores of one head of one row with bias and masks, `[queries, keys]`.
    fn scores(&self, saved: &Saved, b: usize, head: usize, scores: &mut [f32]) {
        let (rules, d_kv) = (&self.rules, self.head_width(saved));
        let (s, t) = (rules.queries, rules.keys);
        let row = saved.row(b, rules);
        let (q, k) = (row.head(row.q, head, d_kv), row.head(row.k, head, d_kv));
        matmul(ViewMut::new(scores, s, t), q, k.t(), Write::Overwrite, Threads::One);
        if let Some(bias) = &saved.bias {
            let bias = &host::values(bias)[head * (s + t - 1)..][..s + t - 1];
            for (i, scores) in scores.chunks_exact_mut(t).enumerate() {
                add(scores, &bias[s - 1 - i..][..t]);
            }
        }
        if let Some(mask) = &self.key_mask {
            let mask = &mask[b * t..][..t];
            if mask.contains(&0) {
                for scores in scores.chunks_exact_mut(t) {
                    hide(scores, mask);
                }
            }
        }
        if let Some(segments) = &self.segments {
            let (queries, keys) = (&segments.0[b * s..][..s], &segments.1[b * t..][..t]);
            for (scores, &query) in scores.chunks_exact_mut(t).zip(queries) {
                for (score, &key) in scores.iter_mut().zip(keys) {
                    if key != query {
                        *score = f32::MIN;
                    }
                }
            }
        }
        if rules.causal {
            for (i, scores) in scores.chunks_exact_mut(t).enumerate() {
                let visible = (i + rules.query_offset + 1).min(t);
                scores[visible..].fill(f32::MIN);
            }
        }
    }

    /// Random words of the probabilities of one head of one row.
    fn noise_words(&self, b: usize, head: usize) -> Vec<u32> {
        let (s, t) = (self.rules.queries, self.rules.keys);
        let mut words = vec![0; s * t];
        self.rules.noise.fill(self.rules.first_row + b as u32, head * s * t, &mut words);
        words
    }

    fn drop(&self, probabilities: &mut [f32], words: &[u32]) {
        let factor = Factor::Dropout { rate: self.rules.dropout as f32 };
        for (p, &word) in probabilities.iter_mut().zip(words) {
            *p *= factor.of(word);
        }
    }

    fn compute(&self, q: &FlexTensor, k: &FlexTensor, v: &FlexTensor, bias: Option<&FlexTensor>) -> (FlexTensor, Saved) {
        let rules = &self.rules;
        let (s, t, h) = (rules.queries, rules.keys, rules.num_heads);
        let mut saved = Saved {
            q: host::contiguous(q),
            k: host::contiguous(k),
            v: host::contiguous(v),
            bias: bias.map(host::contiguous),
            rows: Vec::new(),
        };
        let [tokens, width] = saved.q.layout().shape().dims();
        let d_kv = self.head_width(&saved);
        let mut out = vec![0.0; tokens * width];
        let mut rows = vec![(0.0, 0.0); rules.batch * h * s];
        out.par_chunks_mut(s * width).zip(rows.par_chunks_mut(h * s)).enumerate().for_each_init(
            || vec![0.0; s * t],
            |probabilities, (b, (out, rows))| {
                let row = saved.row(b, rules);
                for head in 0..h {
                    self.scores(&saved, b, head, probabilities);
                    softmax(probabilities, t, &mut rows[head * s..][..s]);
                    if rules.dropout > 0.0 {
                        self.drop(probabilities, &self.noise_words(b, head));
                    }
                    let v = row.head(row.v, head, d_kv);
                    let out = ViewMut::strided(&mut out[head * d_kv..], s, d_kv, width);
                    matmul(out, View::new(probabilities, s, t), v, Write::Overwrite, Threads::One);
                }
            },
        );
        saved.rows = rows;
        (host::tensor(out, [tokens, width]), saved)
    }

    /// Gradients of q, k, v and the bias.
    fn gradients(&self, saved: &Saved, gradient: &FlexTensor) -> [FlexTensor; 4] {
        let rules = &self.rules;
        let (s, t, h) = (rules.queries, rules.keys, rules.num_heads);
        let [tokens, width] = saved.q.layout().shape().dims();
        let key_tokens = rules.batch * t;
        let mut gq = vec![0.0; tokens * width];
        let mut gk = vec![0.0; key_tokens * width];
        let mut gv = vec![0.0; key_tokens * width];
        let bias_width = h * (s + t - 1);
        let biases: Vec<Vec<f32>> = gq
            .par_chunks_mut(s * width)
            .zip(gk.par_chunks_mut(t * width))
            .zip(gv.par_chunks_mut(t * width))
            .enumerate()
            .map_init(
                || (vec![0.0; s * t], vec![0.0; s * t]),
                |(p, gp), (b, ((gq, gk), gv))| {
                    let g = &host::values(gradient)[b * s * width..][..s * width];
                    let mut gbias = vec![0.0; if saved.bias.is_some() { bias_width } else { 0 }];
                    for head in 0..h {
                        self.head_gradients(saved, b, head, g, p, gp, gq, gk, gv);
                        if saved.bias.is_some() {
                            let gbias = &mut gbias[head * (s + t - 1)..][..s + t - 1];
                            for (i, gp) in gp.chunks_exact(t).enumerate() {
                                add(&mut gbias[s - 1 - i..][..t], gp);
                            }
                        }
                    }
                    gbias
                },
            )
            .collect();
        let mut gbias = vec![0.0; bias_width];
        for part in biases.iter().filter(|part| !part.is_empty()) {
            add(&mut gbias, part);
        }
        [
            host::tensor(gq, [tokens, width]),
            host::tensor(gk, [key_tokens, width]),
            host::tensor(gv, [key_tokens, width]),
            host::tensor(gbias, [h, s + t - 1]),
        ]
    }

    /// Writes the gradients of one head of one row; leaves that of the scores in `gp`.
    #[allow(clippy::too_many_arguments)]
    fn head_gradients(
        &self,
        saved: &Saved,
        b: usize,
        head: usize,
        g: &[f32],
        p: &mut [f32],
        gp: &mut [f32],
        gq: &mut [f32],
        gk: &mut [f32],
        gv: &mut [f32],
    ) {
        let rules = &self.rules;
        let (s, t, h) = (rules.queries, rules.keys, rules.num_heads);
        let d_kv = self.head_width(saved);
        let row = saved.row(b, rules);
        let width = row.width;
        self.scores(saved, b, head, p);
        softmax_again(p, t, &saved.rows[(b * h + head) * s..][..s]);
        let g = row.head(g, head, d_kv);
        matmul(ViewMut::new(gp, s, t), g, row.head(row.v, head, d_kv).t(), Write::Overwrite, Threads::One);
        let into = |out, rows| ViewMut::strided(out, rows, d_kv, width);
        if rules.dropout > 0.0 {
            let words = self.noise_words(b, head);
            self.drop(gp, &words);
            let mut dropped = p.to_vec();
            self.drop(&mut dropped, &words);
            let dropped = View::new(&dropped, s, t).t();
            matmul(into(&mut gv[head * d_kv..], t), dropped, g, Write::Overwrite, Threads::One);
        } else {
            let p = View::new(p, s, t).t();
            matmul(into(&mut gv[head * d_kv..], t), p, g, Write::Overwrite, Threads::One);
        }
        softmax_backward(p, gp, t);
        let (gs, k, q) = (View::new(gp, s, t), row.head(row.k, head, d_kv), row.head(row.q, head, d_kv));
        matmul(into(&mut gq[head * d_kv..], s), gs, k, Write::Overwrite, Threads::One);
        matmul(into(&mut gk[head * d_kv..], t), gs.t(), q, Write::Overwrite, Threads::One);
    }
}

impl Operation<4, 1> for Core {
    type Saved = Saved;

    fn forward(&self, [q, k, v, bias]: &[FlexTensor; 4], _: bool) -> ([FlexTensor; 1], Saved) {
        let (out, saved) = self.compute(q, k, v, Some(bias));
        ([out], saved)
    }

    fn backward(
        &self,
        saved: &Saved,
        _: usize,
        gradient: &FlexTensor,
        _: [bool; 4],
    ) -> [Option<FlexTensor>; 4] {
        self.gradients(saved, gradient).map(Some)
    }
}

impl Operation<3, 1> for Core {
    type Saved = Saved;

    fn forward(&self, [q, k, v]: &[FlexTensor; 3], _: bool) -> ([FlexTensor; 1], Saved) {
        let (out, saved) = self.compute(q, k, v, None);
        ([out], saved)
    }

    fn backward(
        &self,
        saved: &Saved,
        _: usize,
        gradient: &FlexTensor,
        _: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [gq, gk, gv, _] = self.gradients(saved, gradient);
        [Some(gq), Some(gk), Some(gv)]
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn add(out: &mut [f32], values: &[f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out += value;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn hide(scores: &mut [f32], mask: &[i32]) {
    for (score, &visible) in scores.iter_mut().zip(mask) {
        if visible == 0 {
            *score = f32::MIN;
        }
    }
}

/// Softmax of every row of `t` scores; returns each row's largest score and sum of exponentials.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn softmax(scores: &mut [f32], t: usize, rows: &mut [(f32, f32)]) {
    for (scores, row) in scores.chunks_exact_mut(t).zip(rows) {
        let largest = max(scores);
        for score in scores.iter_mut() {
            *score = exp(*score - largest);
        }
        let total = sum(scores);
        let inverse = 1.0 / total;
        for score in scores.iter_mut() {
            *score *= inverse;
        }
        *row = (largest, total);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn softmax_again(scores: &mut [f32], t: usize, rows: &[(f32, f32)]) {
    for (scores, &(largest, total)) in scores.chunks_exact_mut(t).zip(rows) {
        let inverse = 1.0 / total;
        for score in scores.iter_mut() {
            *score = exp(*score - largest) * inverse;
        }
    }
}

/// `g = p * (g - sum(p * g))` for every row.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn softmax_backward(p: &[f32], g: &mut [f32], t: usize) {
    for (p, g) in p.chunks_exact(t).zip(g.chunks_exact_mut(t)) {
        let total = dot(p, g);
        for (g, p) in g.iter_mut().zip(p) {
            *g = p * (*g - total);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, activation};

    use super::*;

    const RULES: Attention = Attention {
        batch: 2,
        num_heads: 3,
        queries: 5,
        keys: 7,
        causal: false,
        query_offset: 0,
        dropout: 0.0,
        noise: NoiseKey { seed: 3, step: 0, site: 0 },
        first_row: 0,
    };
    const D_KV: usize = 4;

    struct Case {
        q: Tensor<2>,
        k: Tensor<2>,
        v: Tensor<2>,
        bias: Tensor<2>,
    }

    impl Case {
        fn new(rules: &Attention) -> Self {
            let device = Device::flex().autodiff();
            let random = |shape: [usize; 2]| {
                Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad()
            };
            let width = rules.num_heads * D_KV;
            Self {
                q: random([rules.batch * rules.queries, width]),
                k: random([rules.batch * rules.keys, width]),
                v: random([rules.batch * rules.keys, width]),
                bias: random([rules.num_heads, rules.queries + rules.keys - 1]),
            }
        }

        fn inputs(&self, key_mask: Option<Tensor<2, Int>>, segments: Option<Segments>) -> AttentionInputs {
            AttentionInputs {
                q: self.q.clone(),
                k: self.k.clone(),
                v: self.v.clone(),
                relative_bias: Some(self.bias.clone()),
                key_mask,
                segments,
            }
        }
    }

    /// The same from tensor operations, with an additive mask `[batch, queries, keys]`.
    fn reference(case: &Case, rules: &Attention, mask: Tensor<3>) -> Tensor<2> {
        let (b, h, s, t) = (rules.batch, rules.num_heads, rules.queries, rules.keys);
        let split = |x: Tensor<2>, n: usize| x.reshape([b, n, h, D_KV]).swap_dims(1, 2);
        let rows: Vec<Tensor<3>> = (0..s)
            .map(|i| case.bias.clone().slice([0..h, s - 1 - i..s - 1 - i + t]).unsqueeze_dim(1))
            .collect();
        let bias = Tensor::cat(rows, 1).unsqueeze::<4>();
        let scores = split(case.q.clone(), s).matmul(split(case.k.clone(), t).swap_dims(2, 3));
        let p = activation::softmax(scores + bias + mask.unsqueeze_dim(1), 3);
        p.matmul(split(case.v.clone(), t)).swap_dims(1, 2).reshape([b * s, h * D_KV])
    }

    fn check(rules: Attention, key_mask: Option<Vec<i32>>, segments: Option<(Vec<i32>, Vec<i32>)>) {
        let case = Case::new(&rules);
        let device = case.q.device();
        let (b, s, t) = (rules.batch, rules.queries, rules.keys);
        let mut mask = vec![0.0_f32; b * s * t];
        for (at, mask) in mask.iter_mut().enumerate() {
            let (row, i, j) = (at / (s * t), at / t % s, at % t);
            let hidden = key_mask.as_ref().is_some_and(|m| m[row * t + j] == 0)
                || segments.as_ref().is_some_and(|(q, k)| q[row * s + i] != k[row * t + j])
                || (rules.causal && j > i + rules.query_offset);
            if hidden {
                *mask = -1e30;
            }
        }
        let mask = Tensor::<1>::from_data(mask.as_slice(), &device).reshape([b, s, t]);
        let plain = reference(&case, &rules, mask);
        let key_mask = key_mask.map(|m| host::int_tensor(m, [b, t], &device));
        let segments = segments.map(|(q, k)| Segments {
            queries: host::int_tensor(q, [b, s], &device),
            keys: host::int_tensor(k, [b, t], &device),
        });
        let fused = attention(case.inputs(key_mask, segments), rules);
        let difference = |a: Tensor<2>, b: Tensor<2>| (a - b).abs().max().into_scalar::<f32>();
        assert!(difference(fused.clone(), plain.clone()) < 1e-5);
        let (a, b) = (fused.square().sum().backward(), plain.square().sum().backward());
        for leaf in [&case.q, &case.k, &case.v, &case.bias] {
            let (a, b) = (leaf.grad(&a).expect("leaf"), leaf.grad(&b).expect("leaf"));
            assert!(difference(a, b) < 1e-4);
        }
    }

    #[test]
    fn equals_the_composed_reference() {
        check(RULES, None, None);
    }

    #[test]
    fn masks_may_have_holes_and_segments_keep_apart() {
        check(RULES, Some(vec![1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1]), None);
        let segments = (vec![1, 1, 2, 2, 2, 1, 1, 1, 1, 2], vec![1, 1, 1, 2, 2, 2, 2, 1, 1, 2, 2, 2, 2, 2]);
        check(RULES, None, Some(segments));
    }

    #[test]
    fn causal_with_and_without_offset() {
        check(Attention { causal: true, keys: 5, ..RULES }, None, None);
        check(Attention { causal: true, query_offset: 2, ..RULES }, None, None);
    }

    #[test]
    fn a_row_that_sees_nothing_gives_the_mean_of_the_values() {
        let case = Case::new(&RULES);
        let mask = host::int_tensor(vec![0; 14], [2, 7], &case.q.device());
        let out = attention(case.inputs(Some(mask), None), RULES).inner();
        let mean = case.v.clone().inner().slice([0..7]).mean_dim(0);
        let difference: f32 = (out.slice([0..1]) - mean).abs().max().into_scalar();
        assert!(difference < 1e-5);
    }

    #[test]
    fn dropout_gradients_equal_finite_differences() {
        let rules = Attention { dropout: 0.3, ..RULES };
        let case = Case::new(&rules);
        let loss = |case: &Case| attention(case.inputs(None, None), rules).square().sum();
        let gradients = loss(&case).backward();
        let h = 1e-2;
        for (name, leaf) in [("q", &case.q), ("k", &case.k), ("v", &case.v)] {
            let gradient = leaf.grad(&gradients).expect("leaf").into_data().try_to_vec::<f32>().unwrap();
            let shifted = |delta: f32| {
                let mut values = leaf.clone().inner().into_data().try_to_vec::<f32>().unwrap();
                values[9] += delta;
                let moved = Tensor::<1>::from_data(values.as_slice(), &leaf.device()).reshape(leaf.dims());
                let mut other = Case { ..Case::new(&rules) };
                (other.q, other.k, other.v, other.bias) =
                    (case.q.clone(), case.k.clone(), case.v.clone(), case.bias.clone());
                match name {
                    "q" => other.q = moved,
                    "k" => other.k = moved,
                    _ => other.v = moved,
                }
                loss(&other).into_scalar::<f32>()
            };
            let difference = (shifted(h) - shifted(-h)) / (2.0 * h);
            assert!((difference - gradient[9]).abs() < 2e-2 * difference.abs().max(1.0), "{name}");
        }
    }
}
