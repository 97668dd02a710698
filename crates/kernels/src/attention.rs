//! The attention core: scores, relative bias, masks, softmax, dropout and the weighted sum of values.
//!
//! Owns everything between the projections. The relative bias depends on `key - query` only, so
//! it enters as one vector a head and no `[heads, s, t]` bias or probability tensor outlives a
//! row of the batch: the backward pass computes the probabilities again from the saved row sums.

use burn::backend::Flex;
use burn::tensor::{DType, Int, Tensor};
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::element::{Element, round_all};
use crate::gemm::{Multiply, Threads, View, ViewMut, Write, matmul};
use crate::host::{self, Held, by_format};
use crate::math::{dot, exp, max, sum};
use crate::noise::{Factor, NoiseKey};
use crate::operation::{Operand, Operation, apply, given};

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
    /// Rows of `k` and `v` that a batch row has room for, of which the first `keys` are keys: as many
    /// unless they are cached.
    pub key_room: usize,
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
    /// Number of the first head, where heads are split over devices.
    pub first_head: usize,
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
    /// Keys, `[batch * key_room, num_heads * d_kv]`.
    pub k: Tensor<2>,
    /// Values, `[batch * key_room, num_heads * d_kv]`.
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
        key_mask: key_mask.map(|mask| Held::integers(&mask)),
        segments: segments.map(|s| [s.queries, s.keys].map(|segments| Held::integers(&segments))),
    };
    let [q, k, v] = [q, k, v].map(Operand::from);
    let [out] = match relative_bias {
        Some(bias) => apply(operation, [q, k, v, Operand::from(bias)]),
        None => apply(operation, [q, k, v]),
    };
    out.into_tensor()
}

#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) rules: Attention,
    pub(crate) key_mask: Option<Held<i32>>,
    /// Of queries and of keys.
    pub(crate) segments: Option<[Held<i32>; 2]>,
}

#[derive(Debug)]
pub(crate) struct Saved {
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    /// `[num_heads, queries + keys - 1]`, empty without one; and the format of its gradient.
    bias: Vec<f32>,
    bias_format: DType,
    /// Largest score and sum of exponentials of each query, `[batch, num_heads, queries]`.
    rows: Vec<(f32, f32)>,
}

/// Slices of one batch row.
#[derive(Clone, Copy)]
struct Row<'a, E> {
    q: &'a [E],
    k: &'a [E],
    v: &'a [E],
    width: usize,
}

impl Saved {
    fn row<E: Element>(&self, b: usize, rules: &Attention) -> Row<'_, E> {
        let [_, width] = self.q.layout().shape().dims();
        let (s, t) = (rules.queries * width, rules.keys * width);
        let room = rules.key_room * width;
        Row {
            q: &host::values(&self.q)[b * s..][..s],
            k: &host::values(&self.k)[b * room..][..t],
            v: &host::values(&self.v)[b * room..][..t],
            width,
        }
    }
}

impl<'a, E: Element> Row<'a, E> {
    fn head(self, data: &'a [E], head: usize, d_kv: usize) -> View<'a, E> {
        View::strided(&data[head * d_kv..], data.len() / self.width, d_kv, self.width)
    }
}

/// Room for one head of one row, `[queries, keys]` each.
struct Scratch<E> {
    /// Scores, then probabilities.
    scores: Vec<f32>,
    /// Gradients of probabilities, then of scores; empty in a forward pass.
    gradients: Vec<f32>,
    /// What a product reads: either of them in the format of the activations.
    factor: Vec<E>,
}

impl<E: Element> Scratch<E> {
    fn new(len: usize, backward: bool) -> Self {
        let gradients = host::uninit(if backward { len } else { 0 });
        Self { scores: host::uninit(len), gradients, factor: host::uninit(len) }
    }
}

/// Where the gradients of one batch row go.
struct RowGradients<'a, E> {
    q: &'a mut [E],
    k: &'a mut [E],
    v: &'a mut [E],
}

impl Core {
    fn head_width(&self, saved: &Saved) -> usize {
        let [_, width] = saved.q.layout().shape().dims();
        width / self.rules.num_heads
    }

    /// Scores of one head of one row with bias and masks, `[queries, keys]`.
    fn scores<E: Multiply<f32>>(&self, saved: &Saved, b: usize, head: usize, scores: &mut [f32]) {
        let (rules, d_kv) = (&self.rules, self.head_width(saved));
        let (s, t) = (rules.queries, rules.keys);
        let row = saved.row::<E>(b, rules);
        let (q, k) = (row.head(row.q, head, d_kv), row.head(row.k, head, d_kv));
        matmul(ViewMut::new(scores, s, t), q, k.t(), Write::Overwrite, Threads::One);
        if !saved.bias.is_empty() {
            let bias = &saved.bias[head * (s + t - 1)..][..s + t - 1];
            for (i, scores) in scores.chunks_exact_mut(t).enumerate() {
                add(scores, &bias[s - 1 - i..][..t]);
            }
        }
        if let Some(mask) = &self.key_mask {
            let mask = &mask.on_host()[b * t..][..t];
            if mask.contains(&0) {
                for scores in scores.chunks_exact_mut(t) {
                    hide(scores, mask);
                }
            }
        }
        if let Some([queries, keys]) = &self.segments {
            let (queries, keys) = (&queries.on_host()[b * s..][..s], &keys.on_host()[b * t..][..t]);
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
    pub(crate) fn noise_words(&self, b: usize, head: usize) -> Vec<u32> {
        let (s, t) = (self.rules.queries, self.rules.keys);
        let mut words = vec![0; s * t];
        let head = self.rules.first_head + head;
        self.rules.noise.fill(self.rules.first_row + b as u32, 0, head * s * t, &mut words);
        words
    }

    fn drop(&self, probabilities: &mut [f32], words: &[u32]) {
        let factor = Factor::Dropout { rate: self.rules.dropout as f32 };
        for (p, &word) in probabilities.iter_mut().zip(words) {
            *p *= factor.of(word);
        }
    }

    fn compute(&self, [q, k, v]: [&FlexTensor; 3], bias: Option<&FlexTensor>) -> (FlexTensor, Saved) {
        let mut saved = Saved {
            q: host::contiguous(q),
            k: host::contiguous(k),
            v: host::contiguous(v),
            bias: bias.map(|bias| host::widened(&host::contiguous(bias)).into_owned()).unwrap_or_default(),
            bias_format: bias.map_or(DType::F32, FlexTensor::dtype),
            rows: Vec::new(),
        };
        let out = by_format!(q, E => self.outputs::<E>(&mut saved));
        (out, saved)
    }

    fn outputs<E: Multiply<E> + Multiply<f32>>(&self, saved: &mut Saved) -> FlexTensor {
        let rules = &self.rules;
        let (s, t, h) = (rules.queries, rules.keys, rules.num_heads);
        let [tokens, width] = saved.q.layout().shape().dims();
        let d_kv = self.head_width(saved);
        let [key_rows, _] = saved.k.layout().shape().dims();
        assert!(t <= rules.key_room && key_rows == rules.batch * rules.key_room, "keys lie in their room");
        assert!(d_kv * h == width && tokens == rules.batch * s, "heads and batch rows cover the queries");
        let mut out = host::uninit::<E>(tokens * width);
        let mut rows = vec![(0.0, 0.0); rules.batch * h * s];
        out.par_chunks_mut(s * width).zip(rows.par_chunks_mut(h * s)).enumerate().for_each_init(
            || Scratch::<E>::new(s * t, false),
            |Scratch { scores, factor, .. }, (b, (out, rows))| {
                let row = saved.row::<E>(b, rules);
                for head in 0..h {
                    self.scores::<E>(saved, b, head, scores);
                    softmax(scores, t, &mut rows[head * s..][..s]);
                    if rules.dropout > 0.0 {
                        self.drop(scores, &self.noise_words(b, head));
                    }
                    round_all(scores, factor);
                    let v = row.head(row.v, head, d_kv);
                    let out = ViewMut::strided(&mut out[head * d_kv..], s, d_kv, width);
                    matmul(out, View::new(factor, s, t), v, Write::Overwrite, Threads::One);
                }
            },
        );
        saved.rows = rows;
        host::tensor(out, [tokens, width])
    }

    /// Gradients of q, k, v and the bias.
    fn gradients<E: Multiply<E> + Multiply<f32>>(
        &self,
        saved: &Saved,
        gradient: &FlexTensor,
    ) -> [FlexTensor; 4] {
        let rules = &self.rules;
        let (s, t, h) = (rules.queries, rules.keys, rules.num_heads);
        let [tokens, width] = saved.q.layout().shape().dims();
        assert!(rules.key_room == t, "cached keys carry no gradient");
        let key_tokens = rules.batch * t;
        let mut gq = host::uninit::<E>(tokens * width);
        let mut gk = host::uninit::<E>(key_tokens * width);
        let mut gv = host::uninit::<E>(key_tokens * width);
        let bias_width = h * (s + t - 1);
        let biases: Vec<Vec<f32>> = gq
            .par_chunks_mut(s * width)
            .zip(gk.par_chunks_mut(t * width))
            .zip(gv.par_chunks_mut(t * width))
            .enumerate()
            .map_init(
                || Scratch::<E>::new(s * t, true),
                |scratch, (b, ((q, k), v))| {
                    let g = &host::values::<E>(gradient)[b * s * width..][..s * width];
                    let mut gbias = vec![0.0; if saved.bias.is_empty() { 0 } else { bias_width }];
                    let mut row = RowGradients { q, k, v };
                    for head in 0..h {
                        self.head_gradients(saved, b, head, g, scratch, &mut row);
                        if !saved.bias.is_empty() {
                            let gbias = &mut gbias[head * (s + t - 1)..][..s + t - 1];
                            for (i, gs) in scratch.gradients.chunks_exact(t).enumerate() {
                                add(&mut gbias[s - 1 - i..][..t], gs);
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
            host::rounded(gbias, [h, s + t - 1], saved.bias_format),
        ]
    }

    /// Writes the gradients of one head of one row; leaves that of the scores in `scratch`.
    fn head_gradients<E: Multiply<E> + Multiply<f32>>(
        &self,
        saved: &Saved,
        b: usize,
        head: usize,
        g: &[E],
        scratch: &mut Scratch<E>,
        out: &mut RowGradients<'_, E>,
    ) {
        let rules = &self.rules;
        let (s, t, h) = (rules.queries, rules.keys, rules.num_heads);
        let d_kv = self.head_width(saved);
        let row = saved.row::<E>(b, rules);
        let width = row.width;
        let Scratch { scores: p, gradients: gp, factor } = scratch;
        self.scores::<E>(saved, b, head, p);
        softmax_again(p, t, &saved.rows[(b * h + head) * s..][..s]);
        let g = row.head(g, head, d_kv);
        matmul(ViewMut::new(gp, s, t), g, row.head(row.v, head, d_kv).t(), Write::Overwrite, Threads::One);
        if rules.dropout > 0.0 {
            let words = self.noise_words(b, head);
            self.drop(gp, &words);
            let mut dropped = p.clone();
            self.drop(&mut dropped, &words);
            round_all(&dropped, factor);
        } else {
            round_all(p, factor);
        }
        let into = |out, rows| ViewMut::strided(out, rows, d_kv, width);
        let probabilities = View::new(factor, s, t);
        matmul(into(&mut out.v[head * d_kv..], t), probabilities.t(), g, Write::Overwrite, Threads::One);
        softmax_backward(p, gp, t);
        round_all(gp, factor);
        let (gs, k, q) = (View::new(factor, s, t), row.head(row.k, head, d_kv), row.head(row.q, head, d_kv));
        matmul(into(&mut out.q[head * d_kv..], s), gs, k, Write::Overwrite, Threads::One);
        matmul(into(&mut out.k[head * d_kv..], t), gs.t(), q, Write::Overwrite, Threads::One);
    }
}

impl Operation<Flex, 4, 1> for Core {
    type Saved = Saved;

    fn forward(&self, [q, k, v, bias]: &[FlexTensor; 4], _: bool) -> ([FlexTensor; 1], Saved) {
        let (out, saved) = self.compute([q, k, v], Some(bias));
        ([out], saved)
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<FlexTensor>; 1],
        _: [bool; 4],
    ) -> [Option<FlexTensor>; 4] {
        let [gradient] = given(gradients);
        by_format!(gradient, E => self.gradients::<E>(saved, &gradient)).map(Some)
    }
}

impl Operation<Flex, 3, 1> for Core {
    type Saved = Saved;

    fn forward(&self, [q, k, v]: &[FlexTensor; 3], _: bool) -> ([FlexTensor; 1], Saved) {
        let (out, saved) = self.compute([q, k, v], None);
        ([out], saved)
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<FlexTensor>; 1],
        _: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [gradient] = given(gradients);
        let [gq, gk, gv, _] = by_format!(gradient, E => self.gradients::<E>(saved, &gradient));
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
mod tests;
