//! [`crate::dispatch`] and [`crate::combine`].

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use switchyard_cuda::{Address, CombineGradients, Queue, Slots};
use tch::{Kind, Tensor};

use crate::dispatch::{Combine, Dispatch, Indices};
use crate::operation::{Operation, given};
use crate::plan::ByToken;
use crate::torch::composed::{Graph, composed};
use crate::torch::gpu::{at, at_optional, format, in_pieces, queue, room, started};
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

/// What the backward pass of [`Dispatch`] needs.
#[derive(Debug)]
pub(crate) enum Dispatched {
    Composed(Graph),
    Kernel,
}

impl Operation<LibTorch, 1, 1> for Dispatch {
    type Saved = Dispatched;

    fn forward(&self, inputs: &[TchTensor; 1], tracked: bool) -> ([TchTensor; 1], Dispatched) {
        let indices = &self.0;
        if let Some((queue, slots)) = indices.for_kernels(&inputs[0].tensor) {
            let tokens = contiguous(&inputs[0]).tensor;
            let out = room(&[indices.experts, indices.slots, slots.d_model], tokens.kind(), &tokens);
            // SAFETY: all tensors have the sizes of `slots`.
            started(unsafe { switchyard_cuda::dispatch(queue, at(&tokens), at(&out), slots) });
            return ([TchTensor::new(out)], Dispatched::Kernel);
        }
        let (out, graph) = composed(inputs, tracked, |[rows]| [indices.composed_dispatch(rows)]);
        (out, Dispatched::Composed(graph))
    }

    fn backward(
        &self,
        saved: &Dispatched,
        gradients: [Option<TchTensor>; 1],
        wanted: [bool; 1],
    ) -> [Option<TchTensor>; 1] {
        let Dispatched::Composed(graph) = saved else {
            let [gradient] = given(gradients).map(|gradient| gradient.tensor);
            let (queue, slots) = self.0.for_kernels(&gradient).expect("kernels were chosen on a GPU");
            let out = room(&[slots.tokens, slots.d_model], gradient.kind(), &gradient);
            // SAFETY: all tensors have the sizes of `slots`.
            started(unsafe {
                switchyard_cuda::dispatch_backward(queue, at(&gradient), Address::NONE, at(&out), slots)
            });
            return [Some(TchTensor::new(out))];
        };
        graph.gradients(gradients, wanted)
    }
}

/// What the backward pass of [`Combine`] needs.
#[derive(Debug)]
pub(crate) enum Combined {
    Composed(Graph),
    Kernel { expert_outputs: TchTensor, gates: TchTensor },
}

impl Combine {
    fn launch(&self, (queue, slots): (Queue<'_>, Slots), inputs: &[TchTensor]) -> (TchTensor, Combined) {
        let (expert_outputs, gates) = (contiguous(&inputs[0]), contiguous(&inputs[1]));
        let residual = inputs.get(2).map(contiguous);
        let outputs = &expert_outputs.tensor;
        let out = room(&[slots.tokens, slots.d_model], outputs.kind(), outputs);
        let residual = at_optional(residual.as_ref().map(|residual| &residual.tensor));
        // SAFETY: all tensors have the sizes of `slots`.
        started(unsafe {
            switchyard_cuda::combine(queue, at(outputs), at(&gates.tensor), residual, at(&out), slots)
        });
        (TchTensor::new(out), Combined::Kernel { expert_outputs, gates })
    }

    /// Gradients of the expert outputs and of the gates.
    fn launch_backward(&self, expert_outputs: &Tensor, gates: &Tensor, gradient: &Tensor) -> [TchTensor; 2] {
        let (queue, slots) = self.0.for_kernels(expert_outputs).expect("kernels were chosen on a GPU");
        let (of_outputs, of_gates) = (expert_outputs.empty_like(), room(&[slots.slots], Kind::Float, gates));
        let addresses = CombineGradients {
            gradient: at(gradient),
            expert_outputs: at(expert_outputs),
            gates: at(gates),
            expert_outputs_gradient: at(&of_outputs),
            gates_gradient: at(&of_gates),
        };
        // SAFETY: all tensors have the sizes of `slots`.
        started(unsafe { switchyard_cuda::combine_backward(queue, addresses, slots) });
        [of_outputs, of_gates].map(TchTensor::new)
    }
}

macro_rules! combine {
    ($inputs:literal) => {
        impl Operation<LibTorch, $inputs, 1> for Combine {
            type Saved = Combined;

            fn forward(&self, inputs: &[TchTensor; $inputs], tracked: bool) -> ([TchTensor; 1], Combined) {
                if let Some(kernels) = self.0.for_kernels(&inputs[0].tensor) {
                    let (out, saved) = self.launch(kernels, inputs);
                    return ([out], saved);
                }
                let (out, graph) = composed(inputs, tracked, |inputs| {
                    [self.0.composed_combine(inputs[0], inputs[1], inputs.get(2).copied())]
                });
                (out, Combined::Composed(graph))
            }

            fn backward(
                &self,
                saved: &Combined,
                gradients: [Option<TchTensor>; 1],
                wanted: [bool; $inputs],
            ) -> [Option<TchTensor>; $inputs] {
                match saved {
                    Combined::Composed(graph) => graph.gradients(gradients, wanted),
                    Combined::Kernel { expert_outputs, gates } => {
                        let [gradient] = given(gradients);
                        let computed =
                            self.launch_backward(&expert_outputs.tensor, &gates.tensor, &gradient.tensor);
                        // The gradient of a residual is that of the sum.
                        let mut all = computed.into_iter().chain([gradient]);
                        std::array::from_fn(|_| all.next())
                    }
                }
            }
        }
    };
}

combine!(2);
combine!(3);
