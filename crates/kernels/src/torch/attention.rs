//! [`crate::attention`].

use tch::{Device, Kind, Tensor};

use crate::attention::Core;
use crate::noise::Factor;
use crate::torch::composed::composed_operation;
use crate::torch::{uploaded, wide};

const HIDDEN: f64 = f32::MIN as f64;

impl Core {
    fn composed(&self, [q, k, v]: [&Tensor; 3], bias: Option<&Tensor>) -> Tensor {
        let rules = &self.rules;
        let [batch, heads, s, t, room] =
            [rules.batch, rules.num_heads, rules.queries, rules.keys, rules.key_room].map(|n| n as i64);
        let by_head = |x: &Tensor, rows: i64| wide(x).view([batch, rows, heads, -1]).transpose(1, 2);
        let keys = |x: &Tensor| by_head(x, room).narrow(2, 0, t);
        let mut scores = by_head(q, s).matmul(&keys(k).transpose(2, 3));
        let position = |n: i64| Tensor::arange(n, (Kind::Int64, q.device()));
        if let Some(bias) = bias {
            let column = position(t).unsqueeze(0) - position(s).unsqueeze(1) + (s - 1);
            scores = scores + wide(bias).index_select(1, &column.view([-1])).view([1, heads, s, t]);
        }
        let mut hidden = Tensor::zeros([1, 1, s, t], (Kind::Bool, q.device()));
        if let Some(mask) = &self.key_mask {
            hidden = hidden.logical_or(&mask.in_torch().view([batch, 1, 1, t]).eq(0));
        }
        if let Some([queries, keys]) = &self.segments {
            let [queries, keys] =
                [queries.in_torch().view([batch, 1, s, 1]), keys.in_torch().view([batch, 1, 1, t])];
            hidden = hidden.logical_or(&queries.ne_tensor(&keys));
        }
        if rules.causal {
            let last = position(s).unsqueeze(1) + rules.query_offset as i64;
            hidden = hidden.logical_or(&position(t).unsqueeze(0).gt_tensor(&last));
        }
        // Adding swallows the score and lets its gradient pass, which counts where a query sees nothing.
        let scores = scores + hidden.to_kind(Kind::Float) * HIDDEN;
        let mut probabilities = scores.softmax(-1, Kind::Float);
        if rules.dropout > 0.0 {
            probabilities = probabilities * self.dropout_factors(q.device());
        }
        // What the kernels multiply is rounded as the activations are.
        let probabilities = wide(&probabilities.to_kind(q.kind()));
        let out = probabilities.matmul(&keys(v)).transpose(1, 2).reshape([batch * s, -1]);
        out.to_kind(q.kind())
    }

    /// `[batch, heads, queries, keys]`
    fn dropout_factors(&self, device: Device) -> Tensor {
        let rules = &self.rules;
        let factor = Factor::Dropout { rate: rules.dropout as f32 };
        let rows = (0..rules.batch).flat_map(|b| (0..rules.num_heads).map(move |head| (b, head)));
        let factors: Vec<f32> =
            rows.flat_map(|(b, head)| self.noise_words(b, head)).map(|word| factor.of(word)).collect();
        let shape = [rules.batch, rules.num_heads, rules.queries, rules.keys].map(|n| n as i64);
        uploaded(&factors, &shape, &Tensor::empty([0], (Kind::Float, device)))
    }
}

composed_operation!(Core, 3, 1, false, |core, [q, k, v]| [core.composed([q, k, v], None)]);
composed_operation!(Core, 4, 1, false, |core, [q, k, v, bias]| [core.composed([q, k, v], Some(bias))]);
