//! The differentiable part of routing.

use tch::{Kind, Tensor};

use crate::route::{Gate, GateRule};
use crate::torch::composed::composed_operation;
use crate::torch::{uploaded, wide};

fn integers(values: impl Iterator<Item = i64>, like: &Tensor) -> Tensor {
    Tensor::from_slice(&values.collect::<Vec<_>>()).to(like.device())
}

impl Gate {
    /// Gates, mean probabilities and mean squares of `log_z`.
    fn composed(&self, logits: &Tensor) -> [Tensor; 3] {
        let scores = &self.scores;
        let (experts, groups) = (scores.experts as i64, scores.options.groups as i64);
        let values = wide(logits);
        let probabilities = values.softmax(-1, Kind::Float).to_kind(logits.kind());
        let probabilities = wide(&probabilities);
        let flat = probabilities.view([-1]);
        let slots = self.token_of_slot.len() / scores.experts;
        let assigned = || self.token_of_slot.iter().enumerate();
        let token = |token: i32| i64::from(token.max(0));
        let index = integers(assigned().map(|(slot, &t)| token(t) * experts + (slot / slots) as i64), logits);
        let mut gates = flat.index_select(0, &index);
        if let GateRule::Normalized { second } = &self.rule {
            let of = |choice: &[i32]| {
                let choice =
                    choice.iter().enumerate().map(|(t, &e)| t as i64 * experts + i64::from(e.max(0)));
                flat.index_select(0, &integers(choice, logits))
            };
            let divisor = of(&scores.best) + of(second);
            gates = gates / divisor.index_select(0, &integers(assigned().map(|(_, &t)| token(t)), logits));
        }
        let used: Vec<f32> = self.token_of_slot.iter().map(|&t| if t < 0 { 0.0 } else { 1.0 }).collect();
        let gates = wide(&(gates * uploaded(&used, &[used.len() as i64], logits)).to_kind(logits.kind()));

        let counted: Vec<f32> = scores.mask.iter().map(|&counted| if counted { 1.0 } else { 0.0 }).collect();
        let shares: Vec<f32> = self.counted.iter().map(|&n| 1.0 / n.max(1) as f32).collect();
        let weights =
            uploaded(&counted, &[groups, -1, 1], logits) * uploaded(&shares, &[groups, 1, 1], logits);
        let over_tokens = |x: Tensor| (x * &weights).sum_dim_intlist([1_i64].as_slice(), false, Kind::Float);
        let mean = over_tokens(probabilities.view([groups, -1, experts]));
        let log_z = values.logsumexp([-1_i64].as_slice(), true);
        let z = over_tokens(log_z.square().view([groups, -1, 1])).view([groups]);
        [gates, mean, z]
    }
}

composed_operation!(Gate, 1, 3, false, |gate, [logits]| gate.composed(logits));
