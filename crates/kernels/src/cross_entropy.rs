//! Head and cross-entropy in one: float32 logits of a few rows at a time, never of all of them.
//!
//! The loss is a sum, so its gradients can be formed while the logits of a chunk are at hand; the
//! backward pass only hands them out.

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

use burn::backend::Flex;
use burn::tensor::{DType, Int, Tensor};
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::element::{Element, round_all};
use crate::gemm::{Multiply, Packed, Threads, View, ViewMut, Write, matmul, matmul_packed};
use crate::host::{self, Held, by_format};
use crate::math::{exp, max, sum};
use crate::operation::{Operand, Operation, apply};
use crate::vocabulary::VocabularyShard;

/// How the head's matrix lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadLayout {
    /// `[d_model, vocab_size]`: a head of its own.
    ModelByVocabulary,
    /// `[vocab_size, d_model]`: the shared embedding.
    VocabularyByModel,
}

/// Constants of a cross-entropy.
#[derive(Debug, Clone, Copy)]
pub struct CrossEntropy {
    /// Layout of the head.
    pub layout: HeadLayout,
    /// Factor on the hidden states before the head.
    pub scale: f64,
    /// Weight of `logsumexp(logits)^2` in the loss.
    pub z_coefficient: f64,
}

/// Sums over all weighted positions, and the parts a caller may regroup.
#[derive(Debug)]
pub struct CrossEntropyOutput {
    /// `sum(weight * (cross_entropy + z_coefficient * logsumexp^2))`, differentiable. `[1]`
    pub loss_sum: Tensor<1>,
    /// Cross-entropy of each position in nats, unweighted. `[tokens]`
    pub token_loss: Tensor<1>,
    /// 1 where the target is the likeliest id, else 0. `[tokens]`
    pub token_correct: Tensor<1>,
}

/// Cross-entropy of `targets`, `[tokens]`, under the head's logits of `hidden`, `[tokens, d_model]`.
///
/// `weights` is 0 where a position does not count. Sums are returned, not means: the caller knows
/// the denominator of the whole step. `loss_scale`, `[1]` and not 0, is what the loss sum will be multiplied
/// by, as far as the caller knows: gradients are formed with it, and any other factor costs a pass over them.
///
/// With a `shard` the head holds a part of the vocabulary, the targets stay numbers of the whole. Every
/// rank gets the loss of the whole vocabulary and the gradient of its part of the head; of the gradient
/// of `hidden` it gets its part, which the caller sums over ranks.
///
/// # Collective
/// With a `shard` every rank of its group must call this with the same tokens.
///
/// # Source
/// The z term follows T5X and Mesh TensorFlow: `1e-4 * logsumexp(logits)^2`.
pub fn cross_entropy(
    hidden: Tensor<2>,
    head: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Tensor<1>,
    loss_scale: Tensor<1>,
    rules: CrossEntropy,
    shard: Option<VocabularyShard>,
) -> CrossEntropyOutput {
    let operation = Fused {
        rules,
        shard,
        targets: Held::integers(&targets),
        weights: Held::floats(weights),
        loss_scale: Held::floats(loss_scale),
    };
    let [loss_sum, loss, correct] = apply(operation, [Operand::from(hidden), Operand::from(head)]);
    CrossEntropyOutput {
        loss_sum: loss_sum.into_tensor(),
        token_loss: loss.into_tensor::<1>().inner(),
        token_correct: correct.into_tensor::<1>().inner(),
    }
}

#[derive(Debug)]
pub(crate) struct Fused {
    pub(crate) rules: CrossEntropy,
    pub(crate) shard: Option<VocabularyShard>,
    pub(crate) targets: Held<i32>,
    pub(crate) weights: Held<f32>,
    pub(crate) loss_scale: Held<f32>,
}

/// Gradients of the scaled loss sum, if a backward pass may follow, which takes them out.
#[derive(Debug)]
pub(crate) struct Saved {
    gradients: Mutex<Option<Gradients>>,
    format: DType,
}

#[derive(Debug)]
pub(crate) struct Gradients {
    /// Of the hidden states, but for [`CrossEntropy::scale`]. `[tokens, d_model]`
    hidden: Vec<f32>,
    head: FlexTensor,
}

/// Logits held at once in float32; a chunk of rows has about this many.
const CHUNK_LOGITS: usize = 1 << 22;

/// Bytes of their gradients that are held at once, in the format of the head.
const GROUP_BYTES: usize = 1 << 25;

/// Results of one position.
#[derive(Debug, Clone, Copy, Default)]
struct Position {
    loss: f32,
    correct: f32,
    log_z: f32,
}

impl Position {
    /// From the largest logit, the sum of `e^(logit - largest)` and the target's logit.
    #[inline(always)]
    fn new(largest: f32, total: f32, target_logit: f32) -> Self {
        let log_z = largest + total.ln();
        Self { loss: log_z - target_logit, correct: if target_logit >= largest { 1.0 } else { 0.0 }, log_z }
    }
}

impl Operation<Flex, 2, 3> for Fused {
    type Saved = Saved;

    fn forward(&self, [hidden, head]: &[FlexTensor; 2], tracked: bool) -> ([FlexTensor; 3], Saved) {
        let (hidden, head) = (host::contiguous(hidden), host::contiguous(head));
        let format = head.dtype();
        let (positions, gradients) = by_format!(head, E => self.compute::<E>(&hidden, &head, tracked));
        (self.outputs(&positions), Saved { gradients: Mutex::new(gradients), format })
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<FlexTensor>; 3],
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [Some(gradient), ..] = gradients else { return [None, None] };
        let factor = host::values::<f32>(&gradient)[0] / self.loss_scale.on_host()[0];
        let taken = saved.gradients.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Gradients { mut hidden, mut head } = taken.expect("a graph that is tracked is walked once");
        let [rows, cols]: [usize; 2] = head.layout().shape().dims();
        let width = if self.rules.layout == HeadLayout::ModelByVocabulary { rows } else { cols };
        scale_in_place(&mut hidden, factor * self.rules.scale as f32);
        by_format!(head, E => scale_in_place(host::writable::<E>(&mut head), factor));
        [Some(host::rounded(hidden, [self.targets.on_host().len(), width], saved.format)), Some(head)]
    }
}

/// What the rows of a chunk are computed from and into.
struct Chunk<'a, E> {
    /// Number of the first row.
    start: usize,
    logits: &'a mut [f32],
    positions: &'a mut [Position],
    /// Gradients of the logits; empty without a backward pass.
    gradients: &'a mut [E],
}

/// One row of a chunk.
struct ChunkRow<'a, E> {
    /// Its number.
    at: usize,
    logits: &'a mut [f32],
    position: &'a mut Position,
    gradients: &'a mut [E],
}

impl<E: Element> Chunk<'_, E> {
    fn rows(&mut self) -> impl IndexedParallelIterator<Item = ChunkRow<'_, E>> {
        let vocabulary = self.logits.len() / self.positions.len();
        let mut gradients: Vec<&mut [E]> = self.gradients.chunks_mut(vocabulary).collect();
        gradients.resize_with(self.positions.len(), Default::default);
        let start = self.start;
        let rows = self.logits.par_chunks_mut(vocabulary).zip(&mut *self.positions).zip(gradients);
        rows.enumerate().map(move |(i, ((logits, position), gradients))| ChunkRow {
            at: start + i,
            logits,
            position,
            gradients,
        })
    }
}

impl Fused {
    fn compute<E: Multiply<E> + Multiply<f32>>(
        &self,
        hidden: &FlexTensor,
        head: &FlexTensor,
        tracked: bool,
    ) -> (Vec<Position>, Option<Gradients>) {
        let [tokens, d] = hidden.layout().shape().dims();
        let [rows, cols] = head.layout().shape().dims();
        let by_model = self.rules.layout == HeadLayout::ModelByVocabulary;
        let vocabulary = if by_model { cols } else { rows };
        let x = scaled(host::values::<E>(hidden), self.rules.scale as f32);
        let head_view = View::new(host::values::<E>(head), rows, cols);
        let head_view = if by_model { head_view } else { head_view.t() };
        let forward = Packed::new(head_view);
        let backward = tracked.then(|| Packed::new(head_view.t()));

        let mut positions = vec![Position::default(); tokens];
        let chunk = (CHUNK_LOGITS / vocabulary).clamp(1, tokens.max(1));
        let group = (GROUP_BYTES / size_of::<E>() / vocabulary / chunk).max(1) * chunk;
        let group = group.min(tokens.max(1));
        let mut logits = host::uninit(chunk * vocabulary);
        let mut gradients = host::uninit::<E>(if tracked { group * vocabulary } else { 0 });
        let mut g_hidden = host::uninit(if tracked { tokens * d } else { 0 });
        let mut g_head = HeadGradient::<E>::new(if tracked { rows * cols } else { 0 }, tokens, group);
        for first in (0..tokens).step_by(group) {
            let in_group = group.min(tokens - first);
            for start in (first..first + in_group).step_by(chunk) {
                let n = chunk.min(first + in_group - start);
                let logits = &mut logits[..n * vocabulary];
                let rows = View::new(&x[start * d..], n, d);
                let out = ViewMut::new(logits, n, vocabulary);
                matmul_packed(out, rows, &forward, Write::Overwrite, Threads::All);
                let gradients = match tracked {
                    true => &mut gradients[(start - first) * vocabulary..][..n * vocabulary],
                    false => &mut [],
                };
                let chunk = Chunk { start, logits, positions: &mut positions[start..start + n], gradients };
                match &self.shard {
                    None => self.losses(chunk),
                    Some(shard) => self.losses_over_ranks(shard, chunk),
                }
            }
            if let Some(backward) = &backward {
                let g = View::new(&gradients, in_group, vocabulary);
                let gx = ViewMut::new(&mut g_hidden[first * d..], in_group, d);
                let x = View::new(&x[first * d..], in_group, d);
                let (left, right) = if by_model { (x.t(), g) } else { (g.t(), x) };
                rayon::join(
                    || matmul_packed(gx, g, backward, Write::Overwrite, Threads::All),
                    || g_head.add(left, right),
                );
            }
        }
        let gradients = tracked.then(|| Gradients { hidden: g_hidden, head: g_head.finish([rows, cols]) });
        (positions, gradients)
    }

    /// Losses of the positions of a chunk, and the gradients of their logits.
    fn losses<E: Element>(&self, mut chunk: Chunk<'_, E>) {
        chunk.rows().for_each(|ChunkRow { at, logits, position, gradients }| {
            let target = self.targets.on_host()[at] as usize;
            let (largest, target_logit) = (row_max(logits), logits[target]);
            let total = row_exponentials(logits, largest);
            *position = Position::new(largest, total, target_logit);
            self.gradient(logits, at, Some(target), position.log_z, total, gradients);
        });
    }

    /// [`losses`](Self::losses) where the logits are those of a part of the vocabulary.
    fn losses_over_ranks<E: Element>(&self, shard: &VocabularyShard, mut chunk: Chunk<'_, E>) {
        let (start, n) = (chunk.start, chunk.positions.len());
        let vocabulary = chunk.logits.len() / n;
        let target = |at: usize| shard.local(self.targets.on_host()[at] as usize, vocabulary);
        let mut largest: Vec<f32> = chunk.logits.par_chunks(vocabulary).map(row_max).collect();
        shard.group.max(&mut largest);
        let mut sums = vec![0.0; 2 * n];
        let (totals, target_logits) = sums.split_at_mut(n);
        (chunk.rows().zip(&largest)).zip(totals.par_iter_mut().zip(target_logits)).for_each(
            |((ChunkRow { at, logits, .. }, &largest), (total, target_logit))| {
                // 0 on the other ranks: the sum over ranks is the logit itself.
                *target_logit = target(at).map_or(0.0, |target| logits[target]);
                *total = row_exponentials(logits, largest);
            },
        );
        shard.group.sum(&mut sums);
        let (totals, target_logits) = sums.split_at(n);
        chunk.rows().for_each(|ChunkRow { at, logits, position, gradients }| {
            let row = at - start;
            *position = Position::new(largest[row], totals[row], target_logits[row]);
            self.gradient(logits, at, target(at), position.log_z, totals[row], gradients);
        });
    }

    /// Gradient of the logits of position `at`, of which `exponentials` sum to `total`.
    fn gradient<E: Element>(
        &self,
        exponentials: &[f32],
        at: usize,
        target: Option<usize>,
        log_z: f32,
        total: f32,
        out: &mut [E],
    ) {
        if out.is_empty() {
            return;
        }
        let weight = self.weights.on_host()[at] * self.loss_scale.on_host()[0];
        let factor = weight * (1.0 + 2.0 * self.rules.z_coefficient as f32 * log_z) / total;
        multiply(exponentials, factor, out);
        if let Some(target) = target {
            out[target] = E::round(exponentials[target] * factor - weight);
        }
    }

    fn outputs(&self, positions: &[Position]) -> [FlexTensor; 3] {
        let n = positions.len();
        let z = self.rules.z_coefficient;
        let total: f64 = positions
            .iter()
            .zip(self.weights.on_host().iter())
            .filter(|(_, weight)| **weight != 0.0)
            .map(|(p, &weight)| f64::from(weight) * (f64::from(p.loss) + z * f64::from(p.log_z).powi(2)))
            .sum();
        let column = |pick: fn(&Position) -> f32| host::tensor(positions.iter().map(pick).collect(), [n]);
        [host::tensor(vec![total as f32], [1]), column(|p| p.loss), column(|p| p.correct)]
    }
}

/// The gradient of the head, summed in float32 where it is the sum of several products.
enum HeadGradient<E> {
    Single(Vec<E>),
    Summed { sums: Vec<f32>, begun: bool },
}

impl<E: Multiply<E> + Multiply<f32>> HeadGradient<E> {
    fn new(len: usize, tokens: usize, group: usize) -> Self {
        match tokens {
            0 => Self::Single(vec![E::default(); len]),
            _ if tokens <= group => Self::Single(host::uninit(len)),
            _ => Self::Summed { sums: host::uninit(len), begun: false },
        }
    }

    fn add(&mut self, a: View<'_, E>, b: View<'_, E>) {
        let (rows, cols) = (a.rows(), b.cols());
        match self {
            Self::Single(values) => {
                matmul(ViewMut::new(values, rows, cols), a, b, Write::Overwrite, Threads::All);
            }
            Self::Summed { sums, begun } => {
                let write = if *begun { Write::Add } else { Write::Overwrite };
                matmul(ViewMut::new(sums, rows, cols), a, b, write, Threads::All);
                *begun = true;
            }
        }
    }

    fn finish(self, shape: [usize; 2]) -> FlexTensor {
        match self {
            Self::Single(values) => host::tensor(values, shape),
            Self::Summed { sums, .. } if E::PER_WORD == 1 => host::tensor(sums, shape),
            Self::Summed { sums, .. } => {
                let mut values = host::uninit::<E>(sums.len());
                let tasks = values.par_chunks_mut(TASK_VALUES).zip(sums.par_chunks(TASK_VALUES));
                tasks.for_each(|(values, sums)| round_all(sums, values));
                host::tensor(values, shape)
            }
        }
    }
}

/// Values that one task scales.
const TASK_VALUES: usize = 1 << 16;

fn scale_in_place<E: Element>(values: &mut [E], factor: f32) {
    if factor != 1.0 {
        let scale = |value: &mut E| *value = E::round(value.widen() * factor);
        values.par_chunks_mut(TASK_VALUES).for_each(|task| task.iter_mut().for_each(scale));
    }
}

fn scaled<E: Element>(values: &[E], factor: f32) -> Cow<'_, [E]> {
    if factor == 1.0 {
        return Cow::Borrowed(values);
    }
    let mut scaled = values.to_vec();
    scale_in_place(&mut scaled, factor);
    Cow::Owned(scaled)
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn row_max(logits: &[f32]) -> f32 {
    max(logits)
}

/// Turns logits into `e^(logit - largest)` and returns the sum.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn row_exponentials(logits: &mut [f32], largest: f32) -> f32 {
    for logit in logits.iter_mut() {
        *logit = exp(*logit - largest);
    }
    sum(logits)
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn multiply<E: Element>(values: &[f32], factor: f32, out: &mut [E]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = E::round(value * factor);
    }
}

#[cfg(test)]
mod tests;
