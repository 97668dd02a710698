//! The small ones: the router's product, seeds of a backward pass, and maps that are computed elsewhere.

use burn::backend::{LibTorch, TensorMetadata};
use burn::tensor::{Shape, TensorData, bf16};
use burn_tch::{TchElement, TchTensor};
use tch::{Device, Kind, Tensor};

use crate::linear_map::Mapped;
use crate::operation::{Followed, Operand, Operation, given};
use crate::router_logits::RouterLogits;
use crate::seed::Seed;
use crate::torch::composed::composed_operation;
use crate::torch::{ONE_DEVICE, noise, wide};

composed_operation!(RouterLogits, 2, 2, true, |router, [x, weight]| {
    let mut seen = wide(x);
    if let Some((factor, noise)) = router.jitter {
        seen = seen * noise::factors(noise, factor, x);
    }
    [seen.to_kind(weight.kind()).matmul(weight), x.shallow_clone()]
});

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

impl Operation<LibTorch, 1, 1> for Mapped {
    /// Shape of the input.
    type Saved = Shape;

    fn forward(&self, [x]: &[TchTensor; 1], _: bool) -> ([TchTensor; 1], Shape) {
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
        [Some(match gradient.tensor.kind() {
            Kind::BFloat16 => mapped::<bf16>(&gradient, shape, |g| self.map.backward_bf16(g)),
            _ => mapped::<f32>(&gradient, shape, |g| self.map.backward(g)),
        })]
    }
}
