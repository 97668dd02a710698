//! [`crate::dispatch`] and [`crate::combine`].

use burn_tch::TchTensor;
use switchyard_cuda::{CombineGradients, Queue, Slots};
use tch::{Kind, Tensor};

use crate::dispatch::{Combine, Dispatch, Indices};
use crate::plan::ByToken;
use crate::torch::gpu::{at, at_optional, format, in_pieces, queue, room, started};
use crate::torch::with_kernels::WithKernels;
use crate::torch::{contiguous, wide};

impl Indices {
    /// Token of each slot, 0 for empty ones, and 1 for slots in use, 0 for empty ones, `[slots, 1]`.
    fn slots(&self, like: &Tensor) -> [Tensor; 2] {
        let tokens = self.token_of_slot.in_torch();
        [tokens.clamp_min(0), tokens.ge(0).to_kind(like.kind()).unsqueeze(1)]
    }

    fn composed_dispatch(&self, rows: &Tensor) -> Tensor {
        let [tokens, used] = self.slots(rows);
        let shape = [self.experts as i64, self.slots as i64, rows.size()[1]];
        (rows.index_select(0, &tokens) * used).view(shape)
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

    /// What the kernels need to know of tokens as wide as the rows of `like`; `None` where they have no form.
    fn for_kernels(&self, like: &Tensor) -> Option<(Queue<'static>, Slots)> {
        let ByToken::Table(slot_of_token) = &self.by_token else { return None };
        let (d_model, format) = (*like.size().last()? as usize, format(like));
        let queue = queue(like).filter(|_| in_pieces(d_model, format))?;
        let slots = Slots {
            tokens: self.tokens,
            choices: slot_of_token.tensor.size()[1] as usize,
            slots: self.experts * self.slots,
            d_model,
            format,
            token_of_slot: at(self.token_of_slot.in_torch()),
            slot_of_token: at(&slot_of_token.tensor),
        };
        Some((queue, slots))
    }
}

impl WithKernels<1, 1> for Dispatch {
    type Kept = ();

    fn compose(&self, [rows]: [&Tensor; 1]) -> [Tensor; 1] {
        [self.0.composed_dispatch(rows)]
    }

    fn launch(&self, [tokens]: &[TchTensor; 1]) -> Option<([TchTensor; 1], ())> {
        let (queue, slots) = self.0.for_kernels(&tokens.tensor)?;
        let tokens = contiguous(tokens).tensor;
        let out = room(&[self.0.experts, self.0.slots, slots.d_model], tokens.kind(), &tokens);
        // SAFETY: all tensors have the sizes of `slots`.
        started(unsafe { switchyard_cuda::dispatch(queue, at(&tokens), at(&out), slots) });
        Some(([TchTensor::new(out)], ()))
    }

    fn launch_backward(&self, (): &(), [gradient]: [TchTensor; 1], _: [bool; 1]) -> [Option<TchTensor>; 1] {
        let gradient = gradient.tensor;
        let (queue, slots) = self.0.for_kernels(&gradient).expect("kernels were chosen on a GPU");
        let out = room(&[slots.tokens, slots.d_model], gradient.kind(), &gradient);
        // SAFETY: all tensors have the sizes of `slots`.
        started(unsafe { switchyard_cuda::dispatch_backward(queue, at(&gradient), at(&out), slots) });
        [Some(TchTensor::new(out))]
    }
}

/// What the kernels of the backward pass of [`Combine`] need.
#[derive(Debug)]
pub(crate) struct Combined {
    expert_outputs: TchTensor,
    gates: TchTensor,
}

/// With a residual or without.
impl<const N: usize> WithKernels<N, 1> for Combine {
    type Kept = Combined;

    fn compose(&self, inputs: [&Tensor; N]) -> [Tensor; 1] {
        [self.0.composed_combine(inputs[0], inputs[1], inputs.get(2).copied())]
    }

    fn launch(&self, inputs: &[TchTensor; N]) -> Option<([TchTensor; 1], Combined)> {
        let (queue, slots) = self.0.for_kernels(&inputs[0].tensor)?;
        let (expert_outputs, gates) = (contiguous(&inputs[0]), contiguous(&inputs[1]));
        let residual = inputs.get(2).map(contiguous);
        let outputs = &expert_outputs.tensor;
        let out = room(&[slots.tokens, slots.d_model], outputs.kind(), outputs);
        let residual = at_optional(residual.as_ref().map(|residual| &residual.tensor));
        // SAFETY: all tensors have the sizes of `slots`.
        started(unsafe {
            switchyard_cuda::combine(queue, at(outputs), at(&gates.tensor), residual, at(&out), slots)
        });
        Some(([TchTensor::new(out)], Combined { expert_outputs, gates }))
    }

    fn launch_backward(
        &self,
        Combined { expert_outputs, gates }: &Combined,
        [gradient]: [TchTensor; 1],
        _: [bool; N],
    ) -> [Option<TchTensor>; N] {
        let (expert_outputs, gates) = (&expert_outputs.tensor, &gates.tensor);
        let (queue, slots) = self.0.for_kernels(expert_outputs).expect("kernels were chosen on a GPU");
        let (of_outputs, of_gates) = (expert_outputs.empty_like(), room(&[slots.slots], Kind::Float, gates));
        let addresses = CombineGradients {
            gradient: at(&gradient.tensor),
            expert_outputs: at(expert_outputs),
            gates: at(gates),
            expert_outputs_gradient: at(&of_outputs),
            gates_gradient: at(&of_gates),
        };
        // SAFETY: all tensors have the sizes of `slots`.
        started(unsafe { switchyard_cuda::combine_backward(queue, addresses, slots) });
        // The gradient of a residual is that of the sum.
        let mut all = [TchTensor::new(of_outputs), TchTensor::new(of_gates), gradient].into_iter();
        std::array::from_fn(|_| all.next())
    }
}
