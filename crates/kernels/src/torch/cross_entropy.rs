//! [`crate::cross_entropy`].

use std::sync::{Mutex, PoisonError};

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use switchyard_cuda::{
    Address, CrossEntropy, CrossEntropyAt, Queue, ShardSums, cross_entropy_joined, cross_entropy_shard,
    cross_entropy_sums,
};
use tch::{Kind, Tensor, no_grad};

use crate::cross_entropy::{Fused, HeadLayout};
use crate::operation::Operation;
use crate::torch::gpu::{at, format, narrow, queue, room, started};
use crate::torch::products::{add_product, product, product_into};
use crate::torch::update::DeviceValues;
use crate::torch::{exchanged, uploaded, wide};
use crate::vocabulary::{DeviceVocabularyGroup, VocabularyGroup, VocabularyShard};

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

impl Fused {
    /// Products, and between them what makes gradients of logits where they lie: kernels where they run, else
    /// LibTorch's own operations on float32 logits.
    fn in_chunks(&self, hidden: &Tensor, head: &Tensor, tracked: bool) -> ([Tensor; 3], Option<Gradients>) {
        let rules = &self.rules;
        let queue = queue(hidden).filter(|_| hidden.kind() == head.kind());
        let factor = |tensor: &Tensor| if queue.is_some() { tensor.shallow_clone() } else { wide(tensor) };
        let by_vocabulary = rules.layout == HeadLayout::VocabularyByModel;
        let x = if rules.scale == 1.0 { factor(hidden) } else { factor(&(hidden * rules.scale)) };
        let by_model = factor(&if by_vocabulary { head.tr() } else { head.shallow_clone() });
        let (tokens, vocab_size) = (x.size()[0] as usize, by_model.size()[1] as usize);
        let rows = rows_at_once(tokens, vocab_size * format(&x).bytes());
        let positions = Positions::new(self, tokens, hidden);
        let logits = room(&[rows, vocab_size], x.kind(), &x);
        let of_hidden = tracked.then(|| x.empty_like());
        let mut of_head: Option<Tensor> = None;
        for start in (0..tokens).step_by(rows.max(1)) {
            let rows = rows.min(tokens - start);
            let of_chunk = |tensor: &Tensor| tensor.narrow(0, start as i64, rows as i64);
            let (x, logits) = (of_chunk(&x), logits.narrow(0, 0, rows as i64));
            product_into(&logits, &x, &by_model);
            let chunk = Chunk { positions: &positions, start, logits: &logits, tracked };
            match queue {
                Some(queue) => self.launch(queue, &chunk),
                None => self.compose(&chunk, hidden.kind()),
            }
            let Some(of_hidden) = &of_hidden else { continue };
            product_into(&of_chunk(of_hidden), &logits, &by_model.tr());
            let (left, right) = if by_vocabulary { (logits.tr(), &x) } else { (x.tr(), &logits) };
            match &mut of_head {
                Some(sum) => add_product(sum, &left, right),
                None => of_head = Some(product(&left, right)),
            }
        }
        let gradients = of_hidden.map(|of_hidden| Gradients {
            hidden: TchTensor::new(of_hidden.to_kind(hidden.kind())),
            head: TchTensor::new(of_head.unwrap_or_else(|| head.zeros_like()).to_kind(head.kind())),
        });
        (positions.outputs(queue, rules.z_coefficient), gradients)
    }

    /// Losses of a chunk by kernels, and gradients of its logits where they lie.
    fn launch(&self, queue: Queue<'_>, chunk: &Chunk<'_>) {
        let logits = chunk.logits;
        let [rows, vocab_size] = [0, 1].map(|dim| logits.size()[dim] as usize);
        let rules = CrossEntropy {
            rows,
            vocab_size,
            format: format(logits),
            z_coefficient: self.rules.z_coefficient,
            gradients: chunk.tracked,
        };
        let addresses = chunk.positions.at(at(logits), chunk.start);
        let Some(shard) = &self.shard else {
            // SAFETY: the tensors have room for these rows from there on.
            started(unsafe { switchyard_cuda::cross_entropy(queue, addresses, rules) });
            return;
        };
        let largest = room(&[rows], Kind::Float, logits);
        // Of every row its sum of exponentials, then of every row its target's logit.
        let sums = room(&[2, rows], Kind::Float, logits);
        let lying = |largest: &Tensor, sums: &Tensor| ShardSums {
            largest: at(largest),
            total: at(sums),
            target_logit: at(sums).plus(4 * rows),
        };
        // SAFETY: as above.
        started(unsafe { cross_entropy_shard(queue, addresses, lying(&largest, &sums), shard.first, rules) });
        let of_all = shard.max(&largest);
        let _ = sums.select(0, 0).g_mul_(&(largest - &of_all).exp());
        let sums = shard.sum(&sums);
        // SAFETY: as above.
        started(unsafe { cross_entropy_joined(queue, addresses, lying(&of_all, &sums), shard.first, rules) });
    }

    /// Losses of a chunk by LibTorch's own operations, and gradients of its logits where they lie, rounded to
    /// `kind` as what they meet in products is.
    fn compose(&self, chunk: &Chunk<'_>, kind: Kind) {
        let (positions, logits) = (chunk.positions, chunk.logits);
        let (vocab_size, last) = (logits.size()[1], [-1_i64].as_slice());
        let joined = |values: Tensor, join: fn(&VocabularyShard, &Tensor) -> Tensor| match &self.shard {
            Some(shard) => join(shard, &values),
            None => values,
        };
        let first = self.shard.as_ref().map_or(0, |shard| shard.first as i64);
        let target = chunk.column(&positions.targets).to_kind(Kind::Int64) - first;
        let here = target.ge(0).logical_and(&target.lt(vocab_size)).to_kind(Kind::Float);
        let target = target.clamp(0, vocab_size - 1);
        let largest = joined(logits.amax(last, true), VocabularyShard::max);
        let total = (logits - &largest).exp_().sum_dim_intlist(last, true, Kind::Float);
        let target_logit = logits.gather(1, &target, false) * &here;
        let sums = joined(Tensor::stack(&[total, target_logit], 0), VocabularyShard::sum);
        let (total, target_logit) = (sums.get(0), sums.get(1));
        let log_z = &largest + total.log();
        let correct = target_logit.ge_tensor(&largest).to_kind(Kind::Float);
        chunk.column(&positions.loss).copy_(&(&log_z - target_logit));
        chunk.column(&positions.correct).copy_(&correct);
        chunk.column(&positions.log_z).copy_(&log_z);
        if !chunk.tracked {
            return;
        }
        let (weights, loss_scale) = (chunk.column(&positions.weights), &positions.loss_scale);
        let through = (&log_z * (2.0 * self.rules.z_coefficient) + 1.0) * &weights * loss_scale;
        let mut gradients = logits.shallow_clone();
        let _ = gradients.g_sub_(&log_z).exp_().g_mul_(&through);
        let _ = gradients.scatter_add_(1, &target, &(weights * here * loss_scale.neg()));
        gradients.copy_(&logits.to_kind(kind));
    }
}

impl VocabularyShard {
    /// The values as the largest over the ranks.
    fn max(&self, values: &Tensor) -> Tensor {
        self.over_ranks(values, |group, values| group.max(values), |group, values| group.max(values))
    }

    /// The values as the sum over the ranks.
    fn sum(&self, values: &Tensor) -> Tensor {
        self.over_ranks(values, |group, values| group.sum(values), |group, values| group.sum(values))
    }

    /// What the ranks make of float32 values: `there` where these are, if the ranks can, else on the host.
    fn over_ranks(
        &self,
        values: &Tensor,
        there: fn(&dyn DeviceVocabularyGroup, &DeviceValues) -> DeviceValues,
        on_host: fn(&dyn VocabularyGroup, &mut [f32]),
    ) -> Tensor {
        if let Some(devices) = self.group.on_devices() {
            let reduced = there(devices, &DeviceValues::there(&TchTensor::new(values.shallow_clone())));
            return reduced.into_tensor().tensor.view_as(values);
        }
        exchanged("the parts of a vocabulary that ranks share");
        let flat = values.contiguous().view([-1]).to(tch::Device::Cpu);
        let mut shared = Vec::try_from(&flat).expect("a flat float32 tensor");
        on_host(&*self.group, &mut shared);
        uploaded(&shared, &values.size(), values)
    }
}

/// Rows of `row_bytes` bytes in a chunk, so that all chunks have about as many.
fn rows_at_once(rows: usize, row_bytes: usize) -> usize {
    let most = (CHUNK_BYTES / row_bytes.max(1)).max(1);
    rows.div_ceil(rows.div_ceil(most).max(1))
}

/// What is read of every position, and what is written.
struct Positions {
    targets: Tensor,
    weights: Tensor,
    loss_scale: Tensor,
    loss: Tensor,
    correct: Tensor,
    log_z: Tensor,
}

/// Positions from `start` on with their logits, `[rows, vocab_size]`.
struct Chunk<'a> {
    positions: &'a Positions,
    start: usize,
    logits: &'a Tensor,
    /// Whether gradients take the place of the logits.
    tracked: bool,
}

impl Chunk<'_> {
    /// The part that belongs to the chunk of a tensor of the positions. `[tokens] -> [rows, 1]`
    fn column(&self, of_all: &Tensor) -> Tensor {
        of_all.narrow(0, self.start as i64, self.logits.size()[0]).unsqueeze(1)
    }
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

    /// Addresses from position `start` on.
    fn at(&self, logits: Address, start: usize) -> CrossEntropyAt {
        let from_start = |tensor: &Tensor| at(tensor).plus(4 * start);
        CrossEntropyAt {
            logits,
            targets: from_start(&self.targets),
            weights: from_start(&self.weights),
            loss_scale: at(&self.loss_scale),
            loss: from_start(&self.loss),
            correct: from_start(&self.correct),
            log_z: from_start(&self.log_z),
        }
    }

    /// The weighted sum, losses, and which are correct.
    fn outputs(self, queue: Option<Queue<'_>>, z_coefficient: f64) -> [Tensor; 3] {
        let Self { weights, loss, log_z, .. } = &self;
        let sum = match queue {
            Some(queue) => {
                let sums = room(&[4], Kind::Float, loss);
                let from = self.at(Address::NONE, 0);
                // SAFETY: the tensors have a value for every position.
                started(unsafe { cross_entropy_sums(queue, from, loss.numel(), z_coefficient, at(&sums)) });
                sums.narrow(0, 0, 1)
            }
            None => {
                let terms = weights * (loss + log_z.square() * z_coefficient);
                // What does not count stays out, also where it is not a number.
                terms.masked_fill(&weights.eq(0.0), 0.0).sum(Kind::Double).to_kind(Kind::Float).view([1])
            }
        };
        [sum, self.loss, self.correct]
    }
}

impl Operation<LibTorch, 2, 3> for Fused {
    type Saved = Saved;

    fn forward(&self, [hidden, head]: &[TchTensor; 2], tracked: bool) -> ([TchTensor; 3], Saved) {
        let (hidden, head) = (&hidden.tensor, &head.tensor);
        let (outputs, gradients) = no_grad(|| self.in_chunks(hidden, head, tracked));
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
