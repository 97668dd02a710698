//! [`crate::dispatch`] and [`crate::combine`].

use tch::Tensor;

use crate::dispatch::{Combine, Dispatch, Indices};
use crate::torch::composed::composed_operation;
use crate::torch::wide;

impl Indices {
    /// Token of each slot, 0 for empty ones, and 1 for slots in use, 0 for empty ones, `[slots, 1]`.
    fn slots(&self, like: &Tensor) -> [Tensor; 2] {
        let tokens = self.token_of_slot.in_torch();
        [tokens.clamp_min(0), tokens.ge(0).to_kind(like.kind()).unsqueeze(1)]
    }

    fn composed_combine(&self, outputs: &Tensor, gates: &Tensor, residual: Option<&Tensor>) -> Tensor {
        let width = outputs.size()[2];
        let gated = wide(outputs).view([-1, width]) * gates.unsqueeze(1);
        let [tokens, used] = self.slots(&gated);
        let onto = match residual {
            Some(residual) => wide(residual),
            None => Tensor::zeros([self.tokens as i64, width], (gated.kind(), gated.device())),
        };
        onto.index_add(0, &tokens, &(gated * used)).to_kind(outputs.kind())
    }
}

composed_operation!(Dispatch, 1, 1, false, |dispatch, [rows]| {
    let indices = &dispatch.0;
    let [tokens, used] = indices.slots(rows);
    let shape = [indices.experts as i64, indices.slots as i64, rows.size()[1]];
    [(rows.index_select(0, &tokens) * used).view(shape)]
});
composed_operation!(Combine, 2, 1, false, |combine, [outputs, gates]| {
    [combine.0.composed_combine(outputs, gates, None)]
});
composed_operation!(Combine, 3, 1, false, |combine, [outputs, gates, residual]| {
    [combine.0.composed_combine(outputs, gates, Some(residual))]
});
