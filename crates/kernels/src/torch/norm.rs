//! [`crate::rms_norm`].

use burn_tch::TchTensor;
use switchyard_cuda::{Queue, RmsNormGradients, rms_norm_backward, rms_norm_workspace};
use tch::{Kind, Tensor};

use crate::norm::RmsNorm;
use crate::torch::gpu::{at, at_optional, format, in_pieces, queue, room, started, workspace};
use crate::torch::with_kernels::WithKernels;
use crate::torch::{contiguous, wide};

/// What the kernels of the backward pass need.
#[derive(Debug)]
pub(crate) struct Kept {
    x: TchTensor,
    weight: TchTensor,
    inverse_rms: TchTensor,
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

    fn normed_by_kernel(&self, [x, weight]: &[TchTensor; 2]) -> Option<(TchTensor, Kept)> {
        let queue = kernels_for(&x.tensor)?;
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
        Some((TchTensor::new(out), Kept { x, weight, inverse_rms: TchTensor::new(inverse_rms) }))
    }

    /// Gradients of `x` and the weight; `beside` is what else flows into `x`.
    fn gradients_by_kernel(
        &self,
        kept: &Kept,
        gradient: &TchTensor,
        beside: Option<&TchTensor>,
    ) -> [Option<TchTensor>; 2] {
        let [x, weight, inverse_rms] = [&kept.x, &kept.weight, &kept.inverse_rms].map(|kept| &kept.tensor);
        let rules = self.rules(x, weight);
        let (of_x, of_weight) = (x.empty_like(), weight.empty_like());
        let bytes = started(rms_norm_workspace(&rules));
        let scratch = workspace(bytes, x);
        let addresses = RmsNormGradients {
            x: at(x),
            weight: at(weight),
            inverse_rms: at(inverse_rms),
            gradient: at(&gradient.tensor),
            beside: at_optional(beside.map(|beside| &beside.tensor)),
            x_gradient: at(&of_x),
            weight_gradient: at(&of_weight),
            workspace: at(&scratch),
        };
        let queue = queue(x).expect("kernels were chosen on a GPU");
        // SAFETY: all tensors have the sizes of the rules; scratch memory is reused in the order of the stream.
        started(unsafe { rms_norm_backward(queue, addresses, rules) });
        [of_x, of_weight].map(|gradient| Some(TchTensor::new(gradient)))
    }
}

impl WithKernels<2, 1> for RmsNorm {
    type Kept = Kept;

    fn compose(&self, [x, weight]: [&Tensor; 2]) -> [Tensor; 1] {
        [self.composed(x, weight)]
    }

    fn launch(&self, inputs: &[TchTensor; 2]) -> Option<([TchTensor; 1], Kept)> {
        let (out, kept) = self.normed_by_kernel(inputs)?;
        Some(([out], kept))
    }

    fn launch_backward(
        &self,
        kept: &Kept,
        [gradient]: [TchTensor; 1],
        _: [bool; 2],
    ) -> [Option<TchTensor>; 2] {
        self.gradients_by_kernel(kept, &gradient, None)
    }
}

impl WithKernels<2, 2> for RmsNorm {
    type Kept = Kept;

    fn compose(&self, [x, weight]: [&Tensor; 2]) -> [Tensor; 2] {
        [x.shallow_clone(), self.composed(x, weight)]
    }

    fn launch(&self, inputs: &[TchTensor; 2]) -> Option<([TchTensor; 2], Kept)> {
        let (out, kept) = self.normed_by_kernel(inputs)?;
        Some(([inputs[0].clone(), out], kept))
    }

    fn launch_backward(
        &self,
        kept: &Kept,
        [beside, gradient]: [TchTensor; 2],
        _: [bool; 2],
    ) -> [Option<TchTensor>; 2] {
        self.gradients_by_kernel(kept, &gradient, Some(&beside))
    }
}
