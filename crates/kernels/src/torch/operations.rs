//! The small ones: the router's product, seeds of a backward pass, and maps that are computed elsewhere.

use burn::backend::{LibTorch, TensorMetadata};
use burn::tensor::{Shape, TensorData, bf16};
use burn_tch::{TchElement, TchTensor};
use switchyard_cuda::{Format, TokenTensor, jitter};
use tch::{Device, Kind, Tensor};

use crate::linear_map::Mapped;
use crate::noise::Factor;
use crate::operation::{Followed, Operand, Operation, given};
use crate::router_logits::RouterLogits;
use crate::seed::Seed;
use crate::torch::gpu::{at, format, in_pieces, queue, started, token_noise};
use crate::torch::update::DeviceValues;
use crate::torch::with_kernels::WithKernels;
use crate::torch::{ONE_DEVICE, contiguous, exchanged, noise, wide};

impl RouterLogits {
    /// Whether this runs on a GPU without LibTorch's automatic differentiation.
    fn has_kernel(&self, x: &Tensor) -> bool {
        let whole = || in_pieces(x.size()[1] as usize, Format::Bf16);
        queue(x).is_some() && (self.jitter.is_none() || whole())
    }

    /// Writes `x`, `[tokens, d_model]`, times the router's noise to `out`, which may be `x`.
    fn multiply_by_jitter(&self, x: &Tensor, out: &Tensor) {
        let Some((Factor::Jitter { epsilon }, noise)) = self.jitter else { return };
        let (tokens, width) = x.size2().expect("activations are matrices");
        let sizes = TokenTensor { tokens: tokens as usize, width: width as usize, format: format(x) };
        let queue = queue(x).expect("kernels were chosen on a GPU");
        let noise = token_noise(noise, x);
        // SAFETY: both tensors have the sizes given.
        started(unsafe { jitter(queue, at(x), at(out), sizes, f64::from(epsilon), noise) });
    }

    /// What the router sees of `x`, in the format of its weight.
    fn seen_on_gpu(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        if self.jitter.is_none() {
            return x.to_kind(weight.kind());
        }
        let (wide, out) = if x.kind() == Kind::Float || x.kind() == weight.kind() {
            (x.shallow_clone(), x.empty_like())
        } else {
            let wide = x.to_kind(weight.kind());
            (wide.shallow_clone(), wide)
        };
        self.multiply_by_jitter(&wide, &out);
        out.to_kind(weight.kind())
    }

    /// Gradients of `x` and the weight; `beside` is what else flows into `x`.
    fn gradients_on_gpu(&self, [x, weight]: [&Tensor; 2], logits: &Tensor, beside: &Tensor) -> [Tensor; 2] {
        let of_weight = self.seen_on_gpu(x, weight).tr().mm(logits);
        if self.jitter.is_none() && x.kind() == weight.kind() {
            return [beside.addmm(logits, &weight.tr()), of_weight];
        }
        let through = logits.mm(&weight.tr());
        self.multiply_by_jitter(&through, &through);
        let of_x = x.empty_like();
        // Computed in the wider format, rounded once.
        let _ = through.add_out(&of_x, beside);
        [of_x, of_weight]
    }
}

impl WithKernels<2, 2> for RouterLogits {
    /// What the router is given, and its weight.
    type Kept = [TchTensor; 2];

    fn compose(&self, [x, weight]: [&Tensor; 2]) -> [Tensor; 2] {
        let mut seen = wide(x);
        if let Some((factor, noise)) = self.jitter {
            seen = &seen * noise::factors(noise, factor, x);
        }
        [seen.to_kind(weight.kind()).matmul(weight), x.shallow_clone()]
    }

    fn launch(&self, inputs: &[TchTensor; 2]) -> Option<([TchTensor; 2], [TchTensor; 2])> {
        if !self.has_kernel(&inputs[0].tensor) {
            return None;
        }
        let [x, weight] = inputs.each_ref().map(contiguous);
        let logits = self.seen_on_gpu(&x.tensor, &weight.tensor).mm(&weight.tensor);
        Some(([TchTensor::new(logits), inputs[0].clone()], [x, weight]))
    }

    fn launch_backward(
        &self,
        kept: &[TchTensor; 2],
        [logits, beside]: [TchTensor; 2],
        _: [bool; 2],
    ) -> [Option<TchTensor>; 2] {
        let inputs = kept.each_ref().map(|input| &input.tensor);
        let computed = self.gradients_on_gpu(inputs, &logits.tensor, &beside.tensor);
        computed.map(|gradient| Some(TchTensor::new(gradient)))
    }
}

impl Operation<LibTorch, 1, 1> for Seed {
    type Saved = ();

    fn forward(&self, [x]: &[TchTensor; 1], _: bool) -> ([TchTensor; 1], ()) {
        ([TchTensor::new(Tensor::zeros([1], (Kind::Float, x.tensor.device())))], ())
    }

    fn backward(&self, (): &(), _: [Option<TchTensor>; 1], _: [bool; 1]) -> [Option<TchTensor>; 1] {
        match &self.gradient {
            Operand::Torch(Followed::Plain(gradient)) => [Some(gradient.clone())],
            _ => panic!("{ONE_DEVICE}"),
        }
    }
}

/// `map` of the values, computed in main memory; the tensor itself where it changes nothing.
fn mapped<T: TchElement + Copy>(
    x: &TchTensor,
    shape: &Shape,
    map: impl FnOnce(&[T]) -> Option<Vec<T>>,
) -> TchTensor {
    exchanged("a map in main memory");
    let sizes: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
    let flat = x.tensor.contiguous().view([-1]);
    let host = TchTensor::new(flat.to(Device::Cpu));
    let values = Vec::<T>::try_from(&host).expect("values of the format that was asked for");
    match map(&values) {
        Some(values) => {
            assert_eq!(values.len(), shape.num_elements(), "a linear map returns the values of its shape");
            let data = TensorData::new(values, shape.clone());
            TchTensor::from_data::<T>(data, x.tensor.device())
        }
        None => TchTensor::from_existing(x.tensor.reshape(sizes), x.storage.clone()),
    }
}

/// `map` of the values where they are; the tensor itself where it changes nothing.
fn mapped_there(
    x: &TchTensor,
    shape: &Shape,
    map: impl FnOnce(&DeviceValues) -> Option<DeviceValues>,
) -> TchTensor {
    let sizes: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
    match map(&DeviceValues::there(x)) {
        Some(values) => {
            assert_eq!(values.len(), shape.num_elements(), "a linear map returns the values of its shape");
            let values = values.into_tensor();
            TchTensor::from_existing(values.tensor.view(sizes.as_slice()), values.storage)
        }
        None => TchTensor::from_existing(x.tensor.reshape(sizes), x.storage.clone()),
    }
}

impl Operation<LibTorch, 1, 1> for Mapped {
    /// Shape of the input.
    type Saved = Shape;

    fn forward(&self, [x]: &[TchTensor; 1], _: bool) -> ([TchTensor; 1], Shape) {
        if let Some(map) = self.map.on_devices() {
            return ([mapped_there(x, &self.shape, |x| map.forward(x))], x.shape());
        }
        let out = match x.tensor.kind() {
            Kind::BFloat16 => mapped::<bf16>(x, &self.shape, |x| self.map.forward_bf16(x)),
            _ => mapped::<f32>(x, &self.shape, |x| self.map.forward(x)),
        };
        ([out], x.shape())
    }

    fn backward(
        &self,
        shape: &Shape,
        gradients: [Option<TchTensor>; 1],
        _: [bool; 1],
    ) -> [Option<TchTensor>; 1] {
        let [gradient] = given(gradients);
        if let Some(map) = self.map.on_devices() {
            return [Some(mapped_there(&gradient, shape, |gradient| map.backward(gradient)))];
        }
        [Some(match gradient.tensor.kind() {
            Kind::BFloat16 => mapped::<bf16>(&gradient, shape, |g| self.map.backward_bf16(g)),
            _ => mapped::<f32>(&gradient, shape, |g| self.map.backward(g)),
        })]
    }
}
