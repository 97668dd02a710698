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
/// # Source
/// The z term follows T5X and Mesh TensorFlow: `1e-4 * logsumexp(logits)^2`.
pub fn cross_entropy(
    hidden: Tensor<2>,
    head: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Tensor<1>,
    rules: CrossEntropy,
) -> CrossEntropyOutput {
    let operation = Fused {
        rules,
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
            logits.par_chunks_mut(vocabulary).zip(&mut positions[start..start + n]).enumerate().for_each(
                |(row, (logits, position))| {
                    let at = start + row;
                    let (target, weight) = (self.targets[at] as usize, self.weights[at]);
                    *position = position_loss(logits, target);
                    if tracked {
                        let z = self.rules.z_coefficient as f32;
                        logit_gradient(logits, target, weight, z, position.log_z);
                    }
                },
            );
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
    for logit in logits.iter_mut() {
        *logit = exp(*logit - largest);
    }
    let total = sum(logits);
    let inverse = 1.0 / total;
    for logit in logits.iter_mut() {
        *logit *= inverse;
    }
    let log_z = largest + total.ln();
    Position { loss: log_z - target_logit, correct: if target_logit >= largest { 1.0 } else { 0.0 }, log_z }
}

/// Turns probabilities into the gradient of `weight * (loss + z * log_z^2)`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn logit_gradient(probabilities: &mut [f32], target: usize, weight: f32, z: f32, log_z: f32) {
    let factor = weight * (1.0 + 2.0 * z * log_z);
    for p in probabilities.iter_mut() {
        *p *= factor;
    }
    probabilities[target] -= weight;
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution, activation};

    use super::*;

    struct Sizes {
        tokens: usize,
        d_model: usize,
        vocabulary: usize,
    }

    fn check(sizes: Sizes, rules: CrossEntropy) {
        let Sizes { tokens, d_model, vocabulary } = sizes;
        let CrossEntropy { layout, scale, z_coefficient } = rules;
        let device = Device::flex().autodiff();
        let random =
            |shape| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad();
        let by_model = layout == HeadLayout::ModelByVocabulary;
        let hidden = random([tokens, d_model]);
        let head = random(if by_model { [d_model, vocabulary] } else { [vocabulary, d_model] });
        let targets: Vec<i32> = (0..tokens).map(|i| (i * 5 % vocabulary) as i32).collect();
        let weights: Vec<f32> = (0..tokens).map(|i| [1.0, 0.5, 2.0, 0.0][i % 4]).collect();
        let weights = Tensor::<1>::from_data(weights.as_slice(), &device);
        let ids = host::int_tensor(targets, [tokens], &device);
        let fused = cross_entropy(hidden.clone(), head.clone(), ids.clone(), weights.clone(), rules);

        let matrix = if by_model { head.clone() } else { head.clone().transpose() };
        let logits = (hidden.clone() * scale).matmul(matrix);
        let log_p = activation::log_softmax(logits.clone(), 1);
        let losses = log_p.gather(1, ids.clone().unsqueeze_dim(1)).neg().squeeze_dim::<1>(1);
        let z = logits.clone().exp().sum_dim(1).log().square().squeeze_dim::<1>(1);
        let plain = ((losses.clone() + z.clone() * z_coefficient) * weights).sum();

        let value = |t: Tensor<1>| t.into_scalar::<f32>();
        let total = value(plain.clone());
        assert!((value(fused.loss_sum.clone()) - total).abs() < 2e-6 * total.abs().max(1.0));
        let largest = |a: Tensor<1>, b: Tensor<1>| (a - b.inner()).abs().max().into_scalar::<f32>();
        assert!(largest(fused.token_loss, losses) < 1e-5);
        let correct = logits.argmax(1).squeeze_dim::<1>(1).equal(ids).int();
        let correct: Vec<f32> = correct.into_data().iter::<f32>().collect();
        assert_eq!(host::with_values(fused.token_correct, <[f32]>::to_vec), correct);
        let a = (fused.loss_sum * 0.5).backward();
        let b = (plain * 0.5).backward();
        for leaf in [&hidden, &head] {
            let difference = leaf.grad(&a).expect("leaf") - leaf.grad(&b).expect("leaf");
            assert!(difference.abs().max().into_scalar::<f32>() < 1e-5);
        }
    }

    const LAYOUTS: [HeadLayout; 2] = [HeadLayout::ModelByVocabulary, HeadLayout::VocabularyByModel];

    #[test]
    fn equals_the_composed_reference() {
        for layout in LAYOUTS {
            for (scale, z_coefficient) in [(1.0, 0.0), (0.5, 1e-2)] {
                let sizes = Sizes { tokens: 11, d_model: 6, vocabulary: 37 };
                check(sizes, CrossEntropy { layout, scale, z_coefficient });
            }
        }
    }

    #[test]
    fn several_chunks_add_up() {
        let vocabulary = 50_000;
        let tokens = 2 * (CHUNK_LOGITS / vocabulary) + 3;
        for layout in LAYOUTS {
            let sizes = Sizes { tokens, d_model: 3, vocabulary };
            check(sizes, CrossEntropy { layout, scale: 0.5, z_coefficient: 1e-4 });
        }
    }

    #[test]
    fn positions_without_weight_touch_nothing() {
        let device = Device::flex().autodiff();
        let hidden = Tensor::<2>::ones([2, 3], &device).require_grad();
        let head = Tensor::<2>::ones([3, 5], &device).require_grad();
        let ids = host::int_tensor(vec![1, 2], [2], &device);
        let rules = CrossEntropy { layout: HeadLayout::ModelByVocabulary, scale: 1.0, z_coefficient: 1e-2 };
        let out = cross_entropy(hidden.clone(), head, ids, Tensor::zeros([2], &device.inner()), rules);
        assert_eq!(out.loss_sum.clone().into_scalar::<f32>(), 0.0);
        let gradients = out.loss_sum.backward();
        assert_eq!(hidden.grad(&gradients).expect("leaf").abs().max().into_scalar::<f32>(), 0.0);
    }
}
