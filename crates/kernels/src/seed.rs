//! Where a backward pass begins that does not begin at a loss.

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::host;
use crate::operation::{Followed, Operand, Operation, apply};

/// A zero whose gradient in `x` is `gradient`: its backward pass goes on with that of `x`.
///
/// # Panics
/// When the shapes differ.
pub fn with_gradient<const D: usize>(x: Tensor<D>, gradient: Tensor<D>) -> Tensor<1> {
    assert_eq!(x.dims(), gradient.dims(), "a gradient has the shape of its tensor");
    let gradient = Operand::from(gradient.inner());
    let [out] = apply(Seed { gradient }, [Operand::from(x)]);
    out.into_tensor()
}

#[derive(Debug)]
pub(crate) struct Seed {
    /// Without history.
    pub(crate) gradient: Operand,
}

impl Operation<Flex, 1, 1> for Seed {
    type Saved = ();

    fn forward(&self, _: &[FlexTensor; 1], _: bool) -> ([FlexTensor; 1], ()) {
        ([host::tensor(vec![0.0_f32], [1])], ())
    }

    fn backward(&self, (): &(), _: [Option<FlexTensor>; 1], _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        match &self.gradient {
            Operand::Flex(Followed::Plain(gradient)) => [Some(gradient.clone())],
            _ => panic!("all tensors of an operation lie on one device"),
        }
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::test_device;

    #[test]
    fn the_gradient_goes_on_from_there() {
        let device = test_device().autodiff();
        let x = Tensor::<2>::from_data([[1.0, -2.0], [3.0, 4.0]], &device).require_grad();
        let upstream = Tensor::<2>::from_data([[1.0, 2.0], [0.5, 0.0]], &test_device());
        let gradients = with_gradient(x.clone().square(), upstream).backward();
        let gradient = x.grad(&gradients).expect("leaf").into_data();
        assert_eq!(gradient.try_to_vec::<f32>().unwrap(), [2.0, -8.0, 3.0, 0.0]);
    }
}
