//! [`crate::project`] and its relatives: products by LibTorch, on all of its devices.

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use tch::{Tensor, no_grad};

use crate::operation::{Operation, given};
use crate::projection::{Add, Project, ProjectOnto};
use crate::torch::contiguous;

/// What the backward pass needs.
#[derive(Debug)]
pub(crate) struct Saved {
    x: TchTensor,
    weights: Vec<TchTensor>,
}

impl Saved {
    fn new(x: &TchTensor, weights: &[TchTensor]) -> Self {
        Self { x: contiguous(x), weights: weights.iter().map(contiguous).collect() }
    }

    fn products(&self) -> impl Iterator<Item = TchTensor> + '_ {
        self.weights.iter().map(|weight| TchTensor::new(self.x.tensor.matmul(&weight.tensor)))
    }

    /// Gradients of `x` and of every weight, in order.
    fn gradients(&self, gradients: &[TchTensor]) -> std::vec::IntoIter<Option<TchTensor>> {
        let mut of_input: Option<Tensor> = None;
        let mut all = vec![None; 1 + gradients.len()];
        for (i, (weight, gradient)) in self.weights.iter().zip(gradients).enumerate() {
            let back = weight.tensor.tr();
            of_input = Some(match of_input {
                None => gradient.tensor.matmul(&back),
                Some(mut sum) => sum.addmm_(&gradient.tensor, &back),
            });
            all[1 + i] = Some(TchTensor::new(self.x.tensor.tr().matmul(&gradient.tensor)));
        }
        all[0] = of_input.map(TchTensor::new);
        all.into_iter()
    }
}

macro_rules! project {
    ($inputs:literal, $outputs:literal) => {
        impl Operation<LibTorch, $inputs, $outputs> for Project {
            type Saved = Saved;

            const TOGETHER: bool = true;

            fn forward(&self, inputs: &[TchTensor; $inputs], _: bool) -> ([TchTensor; $outputs], Saved) {
                let saved = Saved::new(&inputs[0], &inputs[1..]);
                let products: Vec<TchTensor> = no_grad(|| saved.products().collect());
                (products.try_into().expect("a product for every matrix"), saved)
            }

            fn backward(
                &self,
                saved: &Saved,
                gradients: [Option<TchTensor>; $outputs],
                _: [bool; $inputs],
            ) -> [Option<TchTensor>; $inputs] {
                let mut all = no_grad(|| saved.gradients(&given(gradients)));
                std::array::from_fn(|_| all.next().flatten())
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
        let out = no_grad(|| residual.tensor.addmm(&saved.x.tensor, &saved.weights[0].tensor));
        ([TchTensor::new(out)], saved)
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<TchTensor>; 1],
        _: [bool; 3],
    ) -> [Option<TchTensor>; 3] {
        let gradients = given(gradients);
        let mut all = no_grad(|| saved.gradients(&gradients));
        let (of_x, of_weight) = (all.next().flatten(), all.next().flatten());
        let [gradient] = gradients;
        [of_x, of_weight, Some(gradient)]
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
