//! [`crate::rms_norm`].

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use switchyard_cuda::{Address, Queue, RmsNormGradients, rms_norm_backward, rms_norm_workspace};
use tch::{Kind, Tensor};

use crate::norm::RmsNorm;
use crate::operation::{Operation, given};
use crate::torch::composed::{Graph, composed};
use crate::torch::gpu::{at, at_optional, format, in_pieces, queue, room, started, workspace};
use crate::torch::{contiguous, wide};

/// What the backward pass needs.
#[derive(Debug)]
pub(crate) enum Saved {
    Composed(Graph),
    Kernel { x: TchTensor, weight: TchTensor, inverse_rms: TchTensor },
}

/// Where kernels normalise `x`; they take rows of whole 16-byte pieces.
fn kernels_for(x: &Tensor) -> Option<Queue<'static>> {
    let width = x.size()[1] as usize;
    queue(x).filter(|_| in_pieces(width, format(x)) && width * format(x).bytes() <= 32 << 10)
}

impl RmsNorm {
    fn composed(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        let values = wide(x);
        let mean = values.square().mean_dim([-1_i64].as_slice(), true, None);
        let inverse_rms = (mean + f64::from(self.epsilon)).rsqrt();
        (values * inverse_rms * wide(weight)).to_kind(x.kind())
    }

    fn rules(&self, x: &Tensor, weight: &Tensor) -> switchyard_cuda::RmsNorm {
        let (rows, d_model) = x.size2().expect("activations are matrices");
        switchyard_cuda::RmsNorm {
            rows: rows as usize,
            d_model: d_model as usize,
            epsilon: f64::from(self.epsilon),
            format: format(x),
            weight_format: format(weight),
        }
    }

    fn launch(&self, queue: Queue<'_>, [x, weight]: &[TchTensor; 2]) -> (TchTensor, Saved) {
        let [x, weight] = [x, weight].map(contiguous);
        let rules = self.rules(&x.tensor, &weight.tensor);
        let out = x.tensor.empty_like();
        let inverse_rms = room(&[rules.rows], Kind::Float, &out);
        // SAFETY: all tensors have the sizes of the rules.
        started(unsafe {
            switchyard_cuda::rms_norm(
                queue,
                at(&x.tensor),
                at(&weight.tensor),
                at(&out),
                at(&inverse_rms),
                rules,
            )
        });
        (TchTensor::new(out), Saved::Kernel { x, weight, inverse_rms: TchTensor::new(inverse_rms) })
    }

    /// Gradients of `x` and the weight; `beside` is what else flows into `x`.
    fn launch_backward(
        &self,
        [x, weight, inverse_rms]: [&Tensor; 3],
        gradient: &Tensor,
        beside: Option<&Tensor>,
    ) -> [Option<TchTensor>; 2] {
        let rules = self.rules(x, weight);
        let (of_x, of_weight) = (x.empty_like(), weight.empty_like());
        let bytes = started(rms_norm_workspace(&rules));
        let scratch = workspace(bytes, x);
        let addresses = RmsNormGradients {
            x: at(x),
            weight: at(weight),
            inverse_rms: at(inverse_rms),
            gradient: at(gradient),
            beside: at_optional(beside),
            x_gradient: at(&of_x),
            branch_gradient: Address::NONE,
            weight_gradient: at(&of_weight),
            workspace: at(&scratch),
        };
        let queue = queue(x).expect("kernels were chosen on a GPU");
        // SAFETY: all tensors have the sizes of the rules; scratch memory is reused in the order of the stream.
        started(unsafe { rms_norm_backward(queue, addresses, rules, None, false) });
        [of_x, of_weight].map(|gradient| Some(TchTensor::new(gradient)))
    }
}

impl Operation<LibTorch, 2, 1> for RmsNorm {
    type Saved = Saved;

    fn forward(&self, inputs: &[TchTensor; 2], tracked: bool) -> ([TchTensor; 1], Saved) {
        if let Some(queue) = kernels_for(&inputs[0].tensor) {
            let (out, saved) = self.launch(queue, inputs);
            return ([out], saved);
        }
        let (out, graph) = composed(inputs, tracked, |[x, weight]| [self.composed(x, weight)]);
        (out, Saved::Composed(graph))
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<TchTensor>; 1],
        wanted: [bool; 2],
    ) -> [Option<TchTensor>; 2] {
        match saved {
            Saved::Composed(graph) => graph.gradients(gradients, wanted),
            Saved::Kernel { x, weight, inverse_rms } => {
                let [gradient] = given(gradients);
                let saved = [x, weight, inverse_rms].map(|tensor| &tensor.tensor);
                self.launch_backward(saved, &gradient.tensor, None)
            }
        }
    }
}

impl Operation<LibTorch, 2, 2> for RmsNorm {
    type Saved = Saved;

    const TOGETHER: bool = true;

    fn forward(&self, inputs: &[TchTensor; 2], tracked: bool) -> ([TchTensor; 2], Saved) {
        if let Some(queue) = kernels_for(&inputs[0].tensor) {
            let (out, saved) = self.launch(queue, inputs);
            return ([inputs[0].clone(), out], saved);
        }
        let (out, graph) =
            composed(inputs, tracked, |[x, weight]| [x.shallow_clone(), self.composed(x, weight)]);
        (out, Saved::Composed(graph))
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<TchTensor>; 2],
        wanted: [bool; 2],
    ) -> [Option<TchTensor>; 2] {
        match saved {
            Saved::Composed(graph) => graph.gradients(gradients, wanted),
            Saved::Kernel { x, weight, inverse_rms } => {
                let [beside, gradient] = given(gradients);
                let saved = [x, weight, inverse_rms].map(|tensor| &tensor.tensor);
                self.launch_backward(saved, &gradient.tensor, Some(&beside.tensor))
            }
        }
    }
}
