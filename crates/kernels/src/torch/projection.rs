//! [`crate::project`] and its relatives.

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use tch::{Tensor, no_grad};

use crate::operation::{Operation, given};
use crate::projection::{Add, Project, ProjectOnto};
use crate::torch::contiguous;
use crate::torch::packed::{packed, unpacked};
use crate::torch::products::{Products, product, product_onto};

/// What the backward pass needs.
#[derive(Debug)]
pub(crate) struct Saved {
    x: TchTensor,
    /// The columns of all matrices, so that one product serves them.
    weight: TchTensor,
    /// How many columns each has.
    widths: Vec<i64>,
}

impl Saved {
    fn new(x: &TchTensor, weights: &[TchTensor]) -> Self {
        let widths = weights.iter().map(|weight| weight.tensor.size()[1]).collect();
        let weight = match weights {
            [only] => contiguous(only),
            several => {
                let several: Vec<&Tensor> = several.iter().map(|weight| &weight.tensor).collect();
                TchTensor::new(Tensor::cat(&several, 1))
            }
        };
        Self { x: contiguous(x), weight, widths }
    }

    /// `x` times all matrices.
    fn product(&self) -> Tensor {
        product(&self.x.tensor, &self.weight.tensor)
    }

    /// Gradients of `x` and of every matrix, given that of their product.
    fn gradients(&self, of_product: &Tensor) -> impl Iterator<Item = TchTensor> + use<> {
        let of_x = product(of_product, &self.weight.tensor.tr());
        let of_weights = self.weight_gradients(of_product).into_iter();
        std::iter::once(TchTensor::new(of_x)).chain(of_weights)
    }

    fn weight_gradients(&self, of_product: &Tensor) -> Vec<TchTensor> {
        let (rows, count, width) = (of_product.size()[0], self.widths.len() as i64, self.widths[0]);
        let x = self.x.tensor.tr();
        if self.widths.iter().any(|&other| other != width) {
            return unpacked(&product(&x, of_product), &self.widths);
        }
        // As a stack each lies by itself, as the optimizer takes it.
        let parts = of_product.view([rows, count, width]).transpose(0, 1);
        let stack = Products { apart: false }.of(&x.unsqueeze(0).expand([count, -1, -1], false), &parts);
        stack.unbind(0).into_iter().map(TchTensor::new).collect()
    }
}

macro_rules! project {
    ($inputs:literal, $outputs:literal) => {
        impl Operation<LibTorch, $inputs, $outputs> for Project {
            type Saved = Saved;

            const TOGETHER: bool = true;

            const ANY_STRIDES: bool = true;

            fn forward(&self, inputs: &[TchTensor; $inputs], _: bool) -> ([TchTensor; $outputs], Saved) {
                let saved = Saved::new(&inputs[0], &inputs[1..]);
                let products = no_grad(|| unpacked(&saved.product(), &saved.widths));
                (products.try_into().expect("a product for every matrix"), saved)
            }

            fn backward(
                &self,
                saved: &Saved,
                gradients: [Option<TchTensor>; $outputs],
                _: [bool; $inputs],
            ) -> [Option<TchTensor>; $inputs] {
                let mut all = no_grad(|| saved.gradients(&packed(&given(gradients))));
                std::array::from_fn(|_| all.next())
            }
        }
    };
}

project!(2, 1);
project!(3, 2);
project!(4, 3);

impl Operation<LibTorch, 3, 1> for ProjectOnto {
    type Saved = Saved;

    fn forward(&self, [x, weight, residual]: &[TchTensor; 3], _: bool) -> ([TchTensor; 1], Saved) {
        let saved = Saved::new(x, std::slice::from_ref(weight));
        let out = no_grad(|| product_onto(&residual.tensor, &saved.x.tensor, &saved.weight.tensor));
        ([TchTensor::new(out)], saved)
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<TchTensor>; 1],
        _: [bool; 3],
    ) -> [Option<TchTensor>; 3] {
        let [gradient] = given(gradients);
        let mut all = no_grad(|| saved.gradients(&gradient.tensor));
        [all.next(), all.next(), Some(gradient)]
    }
}

impl Operation<LibTorch, 2, 1> for Add {
    type Saved = ();

    fn forward(&self, [a, b]: &[TchTensor; 2], _: bool) -> ([TchTensor; 1], ()) {
        ([TchTensor::new(no_grad(|| &a.tensor + &b.tensor))], ())
    }

    fn backward(&self, (): &(), gradients: [Option<TchTensor>; 1], _: [bool; 2]) -> [Option<TchTensor>; 2] {
        let [gradient] = given(gradients);
        [Some(gradient.clone()), Some(gradient)]
    }
}
