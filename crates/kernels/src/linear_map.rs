//! A linear map of values that somebody else computes, within automatic differentiation.
//!
//! Owns the seam through which other crates put communication into a graph; knows of none.

use std::fmt::Debug;
use std::sync::Arc;

use burn::backend::Flex;
use burn::tensor::{DType, Shape, Tensor};
use burn_flex::FlexTensor;

use crate::DeviceValues;
use crate::element::{Element, bf16};
use crate::host;
use crate::operation::{Operand, Operation, apply, given};

/// A linear function of all values of a tensor, and its transpose.
///
/// `None` stands for values that stay as they are, and saves a copy.
///
/// # Collective
/// An implementation may communicate. Then every rank of its group must build the same operations in
/// the same order: automatic differentiation walks equal graphs in an equal order on every rank, and
/// calls [`backward`](Self::backward) once for each map that the loss depends on.
pub trait LinearMap: Debug + Send + Sync + 'static {
    /// Values of the output, row-major, from those of the input.
    fn forward(&self, x: &[f32]) -> Option<Vec<f32>>;

    /// The transpose: the gradient of the input, row-major, from that of the output.
    fn backward(&self, gradient: &[f32]) -> Option<Vec<f32>>;

    /// [`forward`](Self::forward) of bfloat16 values: by default in float32, rounded once.
    fn forward_bf16(&self, x: &[bf16]) -> Option<Vec<bf16>> {
        self.forward(&widened(x)).map(rounded)
    }

    /// [`backward`](Self::backward) of bfloat16 values: by default in float32, rounded once.
    fn backward_bf16(&self, gradient: &[bf16]) -> Option<Vec<bf16>> {
        self.backward(&widened(gradient)).map(rounded)
    }

    /// The same map where LibTorch has the values, if it is computed there.
    fn on_devices(&self) -> Option<&dyn DeviceMap> {
        None
    }
}

/// A [`LinearMap`] of values that stay where LibTorch has them; `None` for values that stay as they are.
///
/// # Collective
/// As a [`LinearMap`].
pub trait DeviceMap {
    /// Values of the output, row-major, from those of the input.
    fn forward(&self, x: &DeviceValues) -> Option<DeviceValues>;

    /// The transpose.
    fn backward(&self, gradient: &DeviceValues) -> Option<DeviceValues>;
}

fn widened(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.widen()).collect()
}

fn rounded(values: Vec<f32>) -> Vec<bf16> {
    values.into_iter().map(bf16::round).collect()
}

/// `map` of `x` as a tensor of `shape`, differentiable where `x` is.
///
/// # Shapes
/// `x`: any. The output has `shape`, of as many values as `map` returns; as many as `x` where it
/// returns `None`.
///
/// # Panics
/// When a map returns another number of values.
pub fn linear_map<const D: usize, const E: usize>(
    x: Tensor<D>,
    map: Arc<dyn LinearMap>,
    shape: [usize; E],
) -> Tensor<E> {
    let [out] = apply(Mapped { map, shape: Shape::from(shape) }, [Operand::from(x)]);
    out.into_tensor()
}

#[derive(Debug)]
pub(crate) struct Mapped {
    pub(crate) map: Arc<dyn LinearMap>,
    /// Of the output.
    pub(crate) shape: Shape,
}

impl Operation<Flex, 1, 1> for Mapped {
    /// Shape of the input.
    type Saved = Shape;

    fn forward(&self, [x]: &[FlexTensor; 1], _: bool) -> ([FlexTensor; 1], Shape) {
        let x = host::contiguous(x);
        let out = match x.dtype() {
            DType::BF16 => shaped(self.map.forward_bf16(host::values(&x)), &x, self.shape.clone()),
            _ => shaped(self.map.forward(host::values(&x)), &x, self.shape.clone()),
        };
        ([out], x.layout().shape().clone())
    }

    fn backward(
        &self,
        shape: &Shape,
        gradients: [Option<FlexTensor>; 1],
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let [gradient] = given(gradients);
        [Some(match gradient.dtype() {
            DType::BF16 => shaped(self.map.backward_bf16(host::values(&gradient)), &gradient, shape.clone()),
            _ => shaped(self.map.backward(host::values(&gradient)), &gradient, shape.clone()),
        })]
    }
}

/// `values`, or those of `unchanged`, as a tensor of `shape`.
fn shaped<E: Element>(values: Option<Vec<E>>, unchanged: &FlexTensor, shape: Shape) -> FlexTensor {
    let Some(values) = values else {
        return unchanged.reshape(shape);
    };
    assert_eq!(values.len(), shape.num_elements(), "a linear map returns the values of its shape");
    let count = values.len();
    host::tensor(values, [count]).reshape(shape)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::test_device;

    /// `y = A x`, or nothing in the directions that are switched off.
    #[derive(Debug)]
    struct Matrix {
        rows: Vec<Vec<f32>>,
        forward: bool,
        backward: bool,
    }

    impl LinearMap for Matrix {
        fn forward(&self, x: &[f32]) -> Option<Vec<f32>> {
            let dot = |row: &Vec<f32>| row.iter().zip(x).map(|(a, x)| a * x).sum();
            self.forward.then(|| self.rows.iter().map(dot).collect())
        }

        fn backward(&self, gradient: &[f32]) -> Option<Vec<f32>> {
            let column = |j: usize| self.rows.iter().zip(gradient).map(|(row, g)| row[j] * g).sum();
            self.backward.then(|| (0..self.rows[0].len()).map(column).collect())
        }
    }

    fn matrix(rows: usize, cols: usize, forward: bool, backward: bool) -> Arc<dyn LinearMap> {
        let row = |i: usize| (0..cols).map(|j| ((i * cols + j) % 7) as f32 - 2.0).collect();
        Arc::new(Matrix { rows: (0..rows).map(row).collect(), forward, backward })
    }

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        host::with_values(tensor, <[f32]>::to_vec)
    }

    fn counted<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
        let count = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..count).map(|i| i as f32 - 3.0).collect();
        Tensor::<1>::from_data(values.as_slice(), device).reshape(shape)
    }

    /// Output and gradient of `sum(y * weights)` for `x` of `[2, 3]`, read through a transposed view.
    fn run<const E: usize>(map: &Arc<dyn LinearMap>, shape: [usize; E]) -> (Vec<f32>, Vec<f32>) {
        let device = test_device().autodiff();
        let x = counted([3, 2], &device).require_grad();
        let y = linear_map(x.clone().transpose(), map.clone(), shape);
        assert_eq!(y.dims(), shape);
        let gradients = (y.clone() * counted(shape, &device)).sum().backward();
        let gradient = x.grad(&gradients).expect("x is a leaf");
        assert_eq!(gradient.dims(), [3, 2]);
        (values(y), values(gradient.transpose()))
    }

    #[test]
    fn the_gradient_is_the_transpose_whatever_the_size_of_the_output() {
        let x = [-3.0, -1.0, 1.0, -2.0, 0.0, 2.0];
        for rows in [1, 4, 24] {
            let map = matrix(rows, 6, true, true);
            let weights: Vec<f32> = (0..rows).map(|i| i as f32 - 3.0).collect();
            let (y, gradient) = run(&map, [rows, 1, 1]);
            assert_eq!(Some(y), map.forward(&x));
            assert_eq!(Some(gradient), map.backward(&weights));
        }
    }

    #[test]
    fn what_a_map_leaves_alone_is_only_reshaped() {
        let x = [-3.0, -1.0, 1.0, -2.0, 0.0, 2.0];
        let weights = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0];
        let whole = matrix(6, 6, true, true);
        for (forward, backward) in [(false, false), (true, false), (false, true)] {
            let (y, gradient) = run(&matrix(6, 6, forward, backward), [6]);
            assert_eq!(y, if forward { whole.forward(&x).unwrap() } else { x.to_vec() });
            assert_eq!(gradient, if backward { whole.backward(&weights).unwrap() } else { weights.to_vec() });
        }
    }

    #[test]
    fn plain_and_empty_tensors_pass() {
        let device = test_device();
        let y = linear_map(counted([2, 3], &device), matrix(4, 6, true, true), [2, 2]);
        assert!(!y.is_autodiff());
        assert_eq!(y.dims(), [2, 2]);
        let none = Tensor::<2>::zeros([0, 5], &device);
        assert_eq!(linear_map(none.clone(), matrix(1, 6, false, false), [5, 0]).dims(), [5, 0]);
        assert_eq!(values(linear_map(none, matrix(3, 6, true, true), [3])), [0.0; 3]);
    }

    #[test]
    #[should_panic(expected = "a linear map returns the values of its shape")]
    fn another_number_of_values_is_refused() {
        linear_map(counted([2, 3], &test_device()), matrix(4, 6, true, true), [5]);
    }
}
