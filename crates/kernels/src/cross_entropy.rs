//! Head and cross-entropy in one: the logits of a few rows at a time, never of all of them.
//!
//! The loss is a sum, so its gradients can be formed while the logits of a chunk are at hand; the
//! backward pass only scales them.

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

use burn::tensor::{Int, Tensor};
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::host;
use crate::math::{exp, max, sum};
use crate::matmul::{Threads, View, ViewMut, Write, matmul};
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
/// the denominator of the whole step.
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
    rules: CrossEntropy,
    shard: Option<VocabularyShard>,
) -> CrossEntropyOutput {
    let operation = Fused {
        rules,
        shard,
        targets: host::integers(&targets),
        weights: host::with_values(weights, <[f32]>::to_vec),
    };
    let [loss_sum, loss, correct] = apply(operation, [Operand::from(hidden), Operand::from(head)]);
    CrossEntropyOutput {
        loss_sum: loss_sum.into_tensor(),
        token_loss: loss.into_tensor::<1>().inner(),
        token_correct: correct.into_tensor::<1>().inner(),
    }
}

#[derive(Debug)]
struct Fused {
    rules: CrossEntropy,
    shard: Option<VocabularyShard>,
    targets: Vec<i32>,
    weights: Vec<f32>,
}

/// Gradients of the loss sum, if a backward pass may follow.
///
/// That pass takes them out, so that it can scale the head's, as large as the head, in place.
#[derive(Debug)]
struct Saved {
    gradients: Mutex<Option<[FlexTensor; 2]>>,
}

/// Logits held at once; a chunk of rows has about this many.
const CHUNK_LOGITS: usize = 1 << 22;

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

impl Operation<2, 3> for Fused {
    type Saved = Saved;

    fn forward(&self, [hidden, head]: &[FlexTensor; 2], tracked: bool) -> ([FlexTensor; 3], Saved) {
        let (hidden, head) = (host::contiguous(hidden), host::contiguous(head));
        let [tokens, d] = hidden.layout().shape().dims();
        let [rows, cols] = head.layout().shape().dims();
        let by_model = self.rules.layout == HeadLayout::ModelByVocabulary;
        let vocabulary = if by_model { cols } else { rows };
        let scale = self.rules.scale as f32;
        let scaled = scaled(host::values(&hidden), scale);
        let head_view = View::new(host::values(&head), rows, cols);
        let head_view = if by_model { head_view } else { head_view.t() };

        let mut positions = vec![Position::default(); tokens];
        let mut g_hidden = host::uninit(if tracked { tokens * d } else { 0 });
        let mut g_head = host::uninit(if tracked { rows * cols } else { 0 });
        if tokens == 0 {
            g_head.fill(0.0);
        }
        let chunk = (CHUNK_LOGITS / vocabulary).clamp(1, tokens.max(1));
        let mut logits = host::uninit(chunk * vocabulary);
        for start in (0..tokens).step_by(chunk) {
            let n = chunk.min(tokens - start);
            let logits = &mut logits[..n * vocabulary];
            let x = View::new(&scaled[start * d..], n, d);
            matmul(ViewMut::new(logits, n, vocabulary), x, head_view, Write::Overwrite, Threads::All);
            let positions = &mut positions[start..start + n];
            match &self.shard {
                None => self.losses(logits, start, positions, tracked),
                Some(shard) => self.losses_over_ranks(shard, logits, start, positions, tracked),
            }
            if tracked {
                let g = View::new(logits, n, vocabulary);
                let gx = ViewMut::new(&mut g_hidden[start * d..], n, d);
                matmul(gx, g, head_view.t(), Write::Overwrite, Threads::All);
                let out = ViewMut::new(&mut g_head, rows, cols);
                let write = if start == 0 { Write::Overwrite } else { Write::Add };
                if by_model {
                    matmul(out, x.t(), g, write, Threads::All);
                } else {
                    matmul(out, g.t(), x, write, Threads::All);
                }
            }
        }
        let gradients = tracked.then(|| {
            scale_in_place(&mut g_hidden, scale);
            [host::tensor(g_hidden, [tokens, d]), host::tensor(g_head, [rows, cols])]
        });
        (self.outputs(&positions), Saved { gradients: Mutex::new(gradients) })
    }

    fn backward(
        &self,
        saved: &Saved,
        output: usize,
        gradient: &FlexTensor,
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        if output != 0 {
            return [None, None];
        }
        let factor = host::values(gradient)[0];
        let gradients = saved.gradients.lock().unwrap_or_else(PoisonError::into_inner).take();
        gradients.expect("a graph that is tracked is walked once").map(|mut gradient| {
            scale_in_place(gradient.storage_mut::<f32>(), factor);
            Some(gradient)
        })
    }
}

impl Fused {
    /// Losses of the positions from `start` on, whose logits become their gradients when `tracked`.
    fn losses(&self, logits: &mut [f32], start: usize, positions: &mut [Position], tracked: bool) {
        let vocabulary = logits.len() / positions.len();
        logits.par_chunks_mut(vocabulary).zip(positions).enumerate().for_each(|(row, (logits, position))| {
            let at = start + row;
            let target = self.targets[at] as usize;
            *position = position_loss(logits, target);
            if tracked {
                self.turn_into_gradient(logits, at, Some(target), position.log_z);
            }
        });
    }

    /// [`losses`](Self::losses) where the logits are those of a part of the vocabulary.
    fn losses_over_ranks(
        &self,
        shard: &VocabularyShard,
        logits: &mut [f32],
        start: usize,
        positions: &mut [Position],
        tracked: bool,
    ) {
        let n = positions.len();
        let vocabulary = logits.len() / n;
        let target = |row: usize| shard.local(self.targets[start + row] as usize, vocabulary);
        let mut largest: Vec<f32> = logits.par_chunks(vocabulary).map(row_max).collect();
        shard.group.max(&mut largest);
        let mut sums = vec![0.0; 2 * n];
        let (totals, target_logits) = sums.split_at_mut(n);
        (logits.par_chunks_mut(vocabulary).zip(&largest))
            .zip(totals.par_iter_mut().zip(target_logits))
            .enumerate()
            .for_each(|(row, ((logits, &largest), (total, target_logit)))| {
                // 0 on the other ranks: the sum over ranks is the logit itself.
                *target_logit = target(row).map_or(0.0, |target| logits[target]);
                *total = row_exponentials(logits, largest);
            });
        shard.group.sum(&mut sums);
        let (totals, target_logits) = sums.split_at(n);
        logits.par_chunks_mut(vocabulary).zip(positions).enumerate().for_each(|(row, (logits, position))| {
            *position = Position::new(largest[row], totals[row], target_logits[row]);
            if tracked {
                multiply(logits, 1.0 / totals[row]);
                self.turn_into_gradient(logits, start + row, target(row), position.log_z);
            }
        });
    }

    /// Turns the probabilities of position `at` into the gradient of its loss.
    fn turn_into_gradient(&self, probabilities: &mut [f32], at: usize, target: Option<usize>, log_z: f32) {
        let (weight, z) = (self.weights[at], self.rules.z_coefficient as f32);
        multiply(probabilities, weight * (1.0 + 2.0 * z * log_z));
        if let Some(target) = target {
            probabilities[target] -= weight;
        }
    }

    fn outputs(&self, positions: &[Position]) -> [FlexTensor; 3] {
        let n = positions.len();
        let z = self.rules.z_coefficient;
        let total: f64 = positions
            .iter()
            .zip(&self.weights)
            .filter(|(_, weight)| **weight != 0.0)
            .map(|(p, &weight)| f64::from(weight) * (f64::from(p.loss) + z * f64::from(p.log_z).powi(2)))
            .sum();
        let column = |pick: fn(&Position) -> f32| host::tensor(positions.iter().map(pick).collect(), [n]);
        [host::tensor(vec![total as f32], [1]), column(|p| p.loss), column(|p| p.correct)]
    }
}

/// Values that one task scales.
const TASK_VALUES: usize = 1 << 16;

fn scale_in_place(values: &mut [f32], factor: f32) {
    if factor != 1.0 {
        values.par_chunks_mut(TASK_VALUES).for_each(|task| task.iter_mut().for_each(|v| *v *= factor));
    }
}

fn scaled(values: &[f32], factor: f32) -> Cow<'_, [f32]> {
    if factor == 1.0 {
        return Cow::Borrowed(values);
    }
    let mut out = host::uninit(values.len());
    out.par_chunks_mut(TASK_VALUES).zip(values.par_chunks(TASK_VALUES)).for_each(|(out, values)| {
        for (out, value) in out.iter_mut().zip(values) {
            *out = value * factor;
        }
    });
    Cow::Owned(out)
}

/// Loss of one position; leaves softmax probabilities in `logits`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn position_loss(logits: &mut [f32], target: usize) -> Position {
    let largest = max(logits);
    let target_logit = logits[target];
    let total = exponentials(logits, largest);
    let inverse = 1.0 / total;
    for logit in logits.iter_mut() {
        *logit *= inverse;
    }
    Position::new(largest, total, target_logit)
}

/// Turns logits into `e^(logit - largest)` and returns the sum.
#[inline(always)]
fn exponentials(logits: &mut [f32], largest: f32) -> f32 {
    for logit in logits.iter_mut() {
        *logit = exp(*logit - largest);
    }
    sum(logits)
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn row_max(logits: &[f32]) -> f32 {
    max(logits)
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn row_exponentials(logits: &mut [f32], largest: f32) -> f32 {
    exponentials(logits, largest)
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn multiply(values: &mut [f32], factor: f32) {
    for value in values {
        *value *= factor;
    }
}

#[cfg(test)]
mod tests;
