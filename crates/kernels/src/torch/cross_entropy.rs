//! [`crate::cross_entropy`].

use std::sync::{Mutex, PoisonError};

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use tch::{Kind, Tensor, no_grad};

use crate::cross_entropy::{Fused, HeadLayout};
use crate::operation::Operation;
use crate::torch::{uploaded, wide};
use crate::vocabulary::VocabularyShard;

/// Gradients of the scaled loss sum, if a backward pass may follow, which takes them out.
#[derive(Debug)]
pub(crate) struct Saved {
    gradients: Mutex<Option<[TchTensor; 2]>>,
}

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

    fn composed(
        &self,
        hidden: &Tensor,
        head: &Tensor,
        tracked: bool,
    ) -> ([Tensor; 3], Option<[TchTensor; 2]>) {
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
            let through =
                (log_z.shallow_clone() * (2.0 * rules.z_coefficient) + 1.0) * &weights * rules.loss_scale;
            let g = (logits - &log_z).exp() * through;
            let g = g.scatter_add(1, &target, &(weights * here * -rules.loss_scale));
            let g = wide(&g.to_kind(hidden.kind()));
            let of_hidden = g.matmul(&by_model.tr()) * rules.scale;
            let of_head = if by_vocabulary { g.tr().matmul(&x) } else { x.tr().matmul(&g) };
            [of_hidden.to_kind(hidden.kind()), of_head.to_kind(head.kind())].map(TchTensor::new)
        });
        let flat = |x: Tensor| x.view([-1]);
        ([sum.to_kind(Kind::Float).view([1]), flat(loss), flat(correct)], gradients)
    }
}

fn on_host(values: &Tensor) -> Vec<f32> {
    let values = values.view([-1]).to(tch::Device::Cpu);
    Vec::try_from(values).expect("a flat float32 tensor")
}

impl Operation<LibTorch, 2, 3> for Fused {
    type Saved = Saved;

    fn forward(&self, [hidden, head]: &[TchTensor; 2], tracked: bool) -> ([TchTensor; 3], Saved) {
        let (outputs, gradients) = no_grad(|| self.composed(&hidden.tensor, &head.tensor, tracked));
        (outputs.map(TchTensor::new), Saved { gradients: Mutex::new(gradients) })
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<TchTensor>; 3],
        _: [bool; 2],
    ) -> [Option<TchTensor>; 2] {
        let [Some(gradient), ..] = gradients else { return [None, None] };
        let factor = gradient.tensor / self.rules.loss_scale;
        let taken = saved.gradients.lock().unwrap_or_else(PoisonError::into_inner).take();
        let taken = taken.expect("a graph that is tracked is walked once");
        taken.map(|gradient| {
            let kind = gradient.tensor.kind();
            Some(TchTensor::new((gradient.tensor * &factor).to_kind(kind)))
        })
    }
}
