//! [`crate::cross_entropy`].

use std::sync::{Mutex, PoisonError};

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use switchyard_cuda::{CrossEntropy, CrossEntropyAt, Queue, cross_entropy_sums};
use tch::{Kind, Tensor, no_grad};

use crate::cross_entropy::{Fused, HeadLayout};
use crate::operation::Operation;
use crate::torch::gpu::{at, format, narrow, queue, room, started};
use crate::torch::products::{add_product, product, product_into};
use crate::torch::{exchanged, uploaded, wide};
use crate::vocabulary::VocabularyShard;

/// Gradients of the scaled loss sum, if a backward pass may follow, which takes them out.
#[derive(Debug)]
pub(crate) struct Saved {
    gradients: Mutex<Option<Gradients>>,
}

#[derive(Debug)]
struct Gradients {
    /// Of the hidden states, but for their scale before the head.
    hidden: TchTensor,
    head: TchTensor,
}

/// Bytes of logits that are held at once: products of so many rows run at full speed, and few partial sums of
/// the head's gradient are rounded.
const CHUNK_BYTES: usize = 1 << 27;

/// Values of a row that depend on the whole vocabulary, `[tokens, 1]` each.
struct Rows {
    largest: Tensor,
    total: Tensor,
    target_logit: Tensor,
}

impl Fused {
    fn rows(&self, logits: &Tensor, target: &Tensor, here: &Tensor) -> Rows {
        let last = [-1_i64].as_slice();
        let largest = logits.amax(last, true);
        let target_logit = logits.gather(1, target, false) * here;
        let Some(VocabularyShard { group, .. }) = &self.shard else {
            let total = (logits - &largest).exp().sum_dim_intlist(last, true, Kind::Float);
            return Rows { largest, total, target_logit };
        };
        let mut values = on_host(&largest);
        group.max(&mut values);
        let largest = uploaded(&values, &[-1, 1], logits);
        let total = (logits - &largest).exp().sum_dim_intlist(last, true, Kind::Float);
        let mut sums = on_host(&Tensor::cat(&[&total, &target_logit], 0));
        group.sum(&mut sums);
        let (total, target_logit) = sums.split_at(sums.len() / 2);
        Rows {
            largest,
            total: uploaded(total, &[-1, 1], logits),
            target_logit: uploaded(target_logit, &[-1, 1], logits),
        }
    }

    fn composed(&self, hidden: &Tensor, head: &Tensor, tracked: bool) -> ([Tensor; 3], Option<Gradients>) {
        let rules = &self.rules;
        let by_vocabulary = rules.layout == HeadLayout::VocabularyByModel;
        let x = wide(&(hidden * rules.scale));
        let by_model = wide(&if by_vocabulary { head.tr() } else { head.shallow_clone() });
        let logits = x.matmul(&by_model);
        let first = self.shard.as_ref().map_or(0, |shard| shard.first as i64);
        let target = (self.targets.in_torch() - first).to_kind(Kind::Int64).unsqueeze(1);
        let here = target.ge(0).logical_and(&target.lt(logits.size()[1]));
        let (target, here) = (target.clamp(0, logits.size()[1] - 1), here.to_kind(Kind::Float));
        let Rows { largest, total, target_logit } = self.rows(&logits, &target, &here);
        let log_z = &largest + total.log();
        let loss = &log_z - &target_logit;
        let correct = target_logit.ge_tensor(&largest).to_kind(Kind::Float);
        let weights = self.weights.in_torch().view([-1, 1]);
        // What does not count stays out, also where it is not a number.
        let terms = &weights * (&loss + log_z.square() * rules.z_coefficient);
        let sum = terms.masked_fill(&weights.eq(0.0), 0.0).sum(Kind::Double);
        let gradients = tracked.then(|| {
            let loss_scale = self.loss_scale.in_torch();
            let through = (log_z.shallow_clone() * (2.0 * rules.z_coefficient) + 1.0) * &weights * loss_scale;
            let g = (logits - &log_z).exp() * through;
            let g = g.scatter_add(1, &target, &(weights * here * loss_scale.neg()));
            let g = wide(&g.to_kind(hidden.kind()));
            let of_hidden = g.matmul(&by_model.tr());
            let of_head = if by_vocabulary { g.tr().matmul(&x) } else { x.tr().matmul(&g) };
            Gradients {
                hidden: TchTensor::new(of_hidden.to_kind(hidden.kind())),
                head: TchTensor::new(of_head.to_kind(head.kind())),
            }
        });
        let flat = |x: Tensor| x.view([-1]);
        ([sum.to_kind(Kind::Float).view([1]), flat(loss), flat(correct)], gradients)
    }

    /// Where kernels run on these tensors; `None` where the form is composed.
    fn kernels(&self, hidden: &Tensor, head: &Tensor) -> Option<Queue<'static>> {
        queue(hidden).filter(|_| self.shard.is_none() && hidden.kind() == head.kind())
    }

    /// Products, and between them the kernel that makes gradients of logits where they lie.
    fn launch(
        &self,
        queue: Queue<'_>,
        hidden: &Tensor,
        head: &Tensor,
        tracked: bool,
    ) -> ([Tensor; 3], Option<Gradients>) {
        let rules = &self.rules;
        let by_vocabulary = rules.layout == HeadLayout::VocabularyByModel;
        let x = if rules.scale == 1.0 { hidden.shallow_clone() } else { hidden * rules.scale };
        let by_model = if by_vocabulary { head.tr() } else { head.shallow_clone() };
        let (tokens, vocab_size) = (x.size()[0] as usize, by_model.size()[1] as usize);
        let rows = rows_at_once(tokens, vocab_size * format(&x).bytes());
        let positions = Positions::new(self, tokens, hidden);
        let logits = room(&[rows, vocab_size], x.kind(), &x);
        let of_hidden = tracked.then(|| x.empty_like());
        let mut of_head: Option<Tensor> = None;
        for start in (0..tokens).step_by(rows.max(1)) {
            let rows = rows.min(tokens - start);
            let chunk = |tensor: &Tensor| tensor.narrow(0, start as i64, rows as i64);
            let (x, logits) = (chunk(&x), logits.narrow(0, 0, rows as i64));
            product_into(&logits, &x, &by_model);
            let sizes = CrossEntropy {
                rows,
                vocab_size,
                format: format(&logits),
                z_coefficient: rules.z_coefficient,
                gradients: tracked,
            };
            // SAFETY: the tensors have room for these rows from there on.
            started(unsafe { switchyard_cuda::cross_entropy(queue, positions.at(&logits, start), sizes) });
            let Some(of_hidden) = &of_hidden else { continue };
            product_into(&chunk(of_hidden), &logits, &by_model.tr());
            let (left, right) = if by_vocabulary { (logits.tr(), &x) } else { (x.tr(), &logits) };
            match &mut of_head {
                Some(sum) => add_product(sum, &left, right),
                None => of_head = Some(product(&left, right)),
            }
        }
        let gradients = of_hidden.map(|of_hidden| Gradients {
            hidden: TchTensor::new(of_hidden),
            head: TchTensor::new(of_head.unwrap_or_else(|| head.zeros_like())),
        });
        (positions.outputs(queue, &logits, rules.z_coefficient), gradients)
    }
}

/// Rows of `row_bytes` bytes in a chunk, so that all chunks have about as many.
fn rows_at_once(rows: usize, row_bytes: usize) -> usize {
    let most = (CHUNK_BYTES / row_bytes.max(1)).max(1);
    rows.div_ceil(rows.div_ceil(most).max(1))
}

/// What kernels read of every position, and write.
struct Positions {
    targets: Tensor,
    weights: Tensor,
    loss_scale: Tensor,
    loss: Tensor,
    correct: Tensor,
    log_z: Tensor,
}

impl Positions {
    fn new(operation: &Fused, tokens: usize, like: &Tensor) -> Self {
        let targets = narrow(operation.targets.in_torch());
        let weights = wide(operation.weights.in_torch()).contiguous();
        for given in [&targets, &weights] {
            assert_eq!(given.size(), [tokens as i64], "every position has a target and a weight");
        }
        let loss_scale = wide(operation.loss_scale.in_torch());
        let [loss, correct, log_z] = [(); 3].map(|()| room(&[tokens], Kind::Float, like));
        Self { targets, weights, loss_scale, loss, correct, log_z }
    }

    /// Addresses from position `start` on, whose logits are these.
    fn at(&self, logits: &Tensor, start: usize) -> CrossEntropyAt {
        let from_start = |tensor: &Tensor| at(tensor).plus(4 * start);
        CrossEntropyAt {
            logits: at(logits),
            targets: from_start(&self.targets),
            weights: from_start(&self.weights),
            loss_scale: at(&self.loss_scale),
            loss: from_start(&self.loss),
            correct: from_start(&self.correct),
            log_z: from_start(&self.log_z),
        }
    }

    /// The weighted sum, losses, and which are correct.
    fn outputs(self, queue: Queue<'_>, logits: &Tensor, z_coefficient: f64) -> [Tensor; 3] {
        let sums = room(&[4], Kind::Float, logits);
        let (from, positions) = (self.at(logits, 0), self.loss.numel());
        // SAFETY: the tensors have a value for every position.
        started(unsafe { cross_entropy_sums(queue, from, positions, z_coefficient, at(&sums)) });
        [sums.narrow(0, 0, 1), self.loss, self.correct]
    }
}

fn on_host(values: &Tensor) -> Vec<f32> {
    exchanged("the parts of a vocabulary that ranks share");
    let values = values.view([-1]).to(tch::Device::Cpu);
    Vec::try_from(values).expect("a flat float32 tensor")
}

impl Operation<LibTorch, 2, 3> for Fused {
    type Saved = Saved;

    fn forward(&self, [hidden, head]: &[TchTensor; 2], tracked: bool) -> ([TchTensor; 3], Saved) {
        let (hidden, head) = (&hidden.tensor, &head.tensor);
        let (outputs, gradients) = no_grad(|| match self.kernels(hidden, head) {
            Some(queue) => self.launch(queue, hidden, head, tracked),
            None => self.composed(hidden, head, tracked),
        });
        (outputs.map(TchTensor::new), Saved { gradients: Mutex::new(gradients) })
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<TchTensor>; 3],
        _: [bool; 2],
    ) -> [Option<TchTensor>; 2] {
        let [Some(gradient), ..] = gradients else { return [None, None] };
        // One float32 value, not a scalar: products with it are rounded once, in place.
        let factor = gradient.tensor.view([1]) / self.loss_scale.in_torch();
        let taken = saved.gradients.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Gradients { mut hidden, mut head } = taken.expect("a graph that is tracked is walked once");
        let _ = hidden.tensor.g_mul_(&(&factor * self.rules.scale));
        let _ = head.tensor.g_mul_(&factor);
        [Some(hidden), Some(head)]
    }
}
