//! Matrices that several outputs share one input with, and the residual sum around a sub-layer.

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::element::Element;
use crate::gemm::{Multiply, Threads, View, ViewMut, Write, matmul};
use crate::host::{self, by_format};
use crate::operation::{Operand, Operation, apply, given};

/// `x`, `[tokens, d]`, times one matrix, `[d, out]`.
pub fn project(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let [out] = apply(Project, [x, weight].map(Operand::from));
    out.into_tensor()
}

/// `x` times two matrices, whose gradients meet in one sum. The loss must depend on both products.
pub fn project_two(x: Tensor<2>, weights: [Tensor<2>; 2]) -> [Tensor<2>; 2] {
    let [a, b] = weights;
    apply(Project, [x, a, b].map(Operand::from)).map(Operand::into_tensor)
}

/// `x` times three matrices, whose gradients meet in one sum. The loss must depend on all products.
pub fn project_three(x: Tensor<2>, weights: [Tensor<2>; 3]) -> [Tensor<2>; 3] {
    let [a, b, c] = weights;
    apply(Project, [x, a, b, c].map(Operand::from)).map(Operand::into_tensor)
}

/// `residual + x weight`, rounded once. `[tokens, out]`
pub fn project_onto(residual: Tensor<2>, x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let [out] = apply(ProjectOnto, [x, weight, residual].map(Operand::from));
    out.into_tensor()
}

/// `a + b`, where both are activations. `[tokens, d]`
pub fn add(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    let [out] = apply(Add, [a, b].map(Operand::from));
    out.into_tensor()
}

#[derive(Debug)]
pub(crate) struct Project;

#[derive(Debug)]
pub(crate) struct Saved {
    x: FlexTensor,
    weights: Vec<FlexTensor>,
}

impl Saved {
    fn new(x: &FlexTensor, weights: &[FlexTensor]) -> Self {
        Self { x: host::contiguous(x), weights: weights.iter().map(host::contiguous).collect() }
    }

    fn product<E: Multiply<E> + Multiply<f32>>(
        &self,
        weight: &FlexTensor,
        residual: Option<&FlexTensor>,
    ) -> FlexTensor {
        let ([n, d], [_, out]) = (self.x.layout().shape().dims(), weight.layout().shape().dims());
        let mut product = host::uninit::<E>(n * out);
        let residual = residual.map(|residual| View::new(host::values::<E>(residual), n, out));
        let (x, w) = (View::new(host::values::<E>(&self.x), n, d), View::new(host::values(weight), d, out));
        let write = residual.map_or(Write::Overwrite, Write::Onto);
        matmul(ViewMut::new(&mut product, n, out), x, w, write, Threads::All);
        host::tensor(product, [n, out])
    }

    /// Gradients of `x` and of every weight, in order.
    fn gradients<E: Multiply<E> + Multiply<f32>>(&self, gradients: &[FlexTensor]) -> Vec<Option<FlexTensor>> {
        let [n, d] = self.x.layout().shape().dims();
        let g = |i: usize| {
            let [_, out] = self.weights[i].layout().shape().dims();
            View::new(host::values::<E>(&gradients[i]), n, out)
        };
        let of_input = || {
            let mut gx = host::uninit::<E>(n * d);
            // One rounding for the whole sum would need sums aside: each product is rounded onto it.
            for (i, weight) in self.weights.iter().enumerate() {
                let w = View::new(host::values::<E>(weight), d, g(i).cols());
                let write = if i == 0 { Write::Overwrite } else { Write::Add };
                matmul(ViewMut::new(&mut gx, n, d), g(i), w.t(), write, Threads::All);
            }
            host::tensor(gx, [n, d])
        };
        let of_weight = |i: usize| {
            let (x, out) = (View::new(host::values::<E>(&self.x), n, d), g(i).cols());
            let mut gw = host::uninit::<E>(d * out);
            matmul(ViewMut::new(&mut gw, d, out), x.t(), g(i), Write::Overwrite, Threads::All);
            host::tensor(gw, [d, out])
        };
        let of_weights = || (0..self.weights.len()).into_par_iter().with_max_len(1).map(of_weight).collect();
        let (gx, gws): (_, Vec<_>) = rayon::join(of_input, of_weights);
        [gx].into_iter().chain(gws).map(Some).collect()
    }
}

macro_rules! project {
    ($inputs:literal, $outputs:literal) => {
        impl Operation<Flex, $inputs, $outputs> for Project {
            type Saved = Saved;

            const TOGETHER: bool = true;

            fn forward(&self, inputs: &[FlexTensor; $inputs], _: bool) -> ([FlexTensor; $outputs], Saved) {
                let saved = Saved::new(&inputs[0], &inputs[1..]);
                let product = |i: usize| by_format!(saved.x, E => saved.product::<E>(&saved.weights[i], None));
                let products: Vec<_> = (0..$outputs).into_par_iter().with_max_len(1).map(product).collect();
                (products.try_into().expect("a product for every matrix"), saved)
            }

            fn backward(
                &self,
                saved: &Saved,
                gradients: [Option<FlexTensor>; $outputs],
                _: [bool; $inputs],
            ) -> [Option<FlexTensor>; $inputs] {
                let gradients = given(gradients);
                let mut all = by_format!(saved.x, E => saved.gradients::<E>(&gradients)).into_iter();
                std::array::from_fn(|_| all.next().flatten())
            }
        }
    };
}

project!(2, 1);
project!(3, 2);
project!(4, 3);

#[derive(Debug)]
pub(crate) struct ProjectOnto;

impl Operation<Flex, 3, 1> for ProjectOnto {
    type Saved = Saved;

    fn forward(&self, [x, weight, residual]: &[FlexTensor; 3], _: bool) -> ([FlexTensor; 1], Saved) {
        let saved = Saved::new(x, std::slice::from_ref(weight));
        let residual = host::contiguous(residual);
        let out = by_format!(saved.x, E => saved.product::<E>(&saved.weights[0], Some(&residual)));
        ([out], saved)
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<FlexTensor>; 1],
        _: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let gradients = given(gradients);
        let mut all = by_format!(saved.x, E => saved.gradients::<E>(&gradients));
        let [gradient] = gradients;
        [all[0].take(), all[1].take(), Some(gradient)]
    }
}

#[derive(Debug)]
pub(crate) struct Add;

/// Values that one task adds.
const TASK_VALUES: usize = 1 << 14;

impl Operation<Flex, 2, 1> for Add {
    type Saved = ();

    fn forward(&self, [a, b]: &[FlexTensor; 2], _: bool) -> ([FlexTensor; 1], ()) {
        let (a, b) = (host::contiguous(a), host::contiguous(b));
        let shape: [usize; 2] = a.layout().shape().dims();
        let out = by_format!(a, E => {
            let (a, b) = (host::values::<E>(&a), host::values::<E>(&b));
            let mut out = host::uninit::<E>(a.len());
            out.par_chunks_mut(TASK_VALUES)
                .zip(a.par_chunks(TASK_VALUES).zip(b.par_chunks(TASK_VALUES)))
                .for_each(|(out, (a, b))| add_values(a, b, out));
            host::tensor(out, shape)
        });
        ([out], ())
    }

    fn backward(&self, (): &(), gradients: [Option<FlexTensor>; 1], _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let [gradient] = given(gradients);
        [Some(gradient.clone()), Some(gradient)]
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn add_values<E: Element>(a: &[E], b: &[E], out: &mut [E]) {
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out = E::round(a.widen() + b.widen());
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Distribution;

    use super::*;
    use crate::test_device;

    #[test]
    fn products_of_one_input_equal_separate_ones() {
        let device = test_device().autodiff();
        let random = |shape| Tensor::<2>::random(shape, Distribution::Default, &device);
        let leaf = |shape| random(shape).require_grad();
        let (x, weights) = (leaf([33, 20]), [leaf([20, 17]), leaf([20, 5]), leaf([20, 40])]);
        let close = |a: &burn::tensor::TensorData, b: &burn::tensor::TensorData| {
            a.assert_approx_eq::<f32>(b, burn::tensor::Tolerance::relative(1e-5));
        };
        // Gradients come in memory of their own, as parts of one tensor, transposed, and repeated.
        let (wide, tall) = (random([33, 62]), random([62, 33]));
        type Loss = fn([Tensor<2>; 3], Tensor<2>, Tensor<2>) -> Tensor<1>;
        let losses: [Loss; 6] = [
            |[a, b, c], _, _| a.square().sum() + b.square().sum() + c.square().sum(),
            |[a, b, c], wide, _| (Tensor::cat(vec![a, b, c], 1) * wide).sum(),
            |[a, b, c], wide, _| (Tensor::cat(vec![c, a, b], 1) * wide).sum(),
            |[a, b, c], _, tall| (Tensor::cat(vec![a, b, c], 1).transpose() * tall).sum(),
            |[a, b, c], _, _| a.sum() + b.sum() * 2.0 + c.sum() * 3.0,
            |[a, b, c], _, _| a.sum_dim(1).square().sum() + b.sum() + c.square().sum(),
        ];
        for loss in losses {
            let run = |outs: [Tensor<2>; 3]| {
                let gradients = loss(outs.clone(), wide.clone(), tall.clone()).backward();
                let of = |t: &Tensor<2>| t.grad(&gradients).expect("leaf").into_data();
                (outs.map(|out| out.into_data()), of(&x), weights.each_ref().map(of))
            };
            let fused = run(project_three(x.clone(), weights.clone()));
            let plain = run(weights.clone().map(|w| x.clone().matmul(w)));
            for i in 0..3 {
                close(&fused.0[i], &plain.0[i]);
                close(&fused.2[i], &plain.2[i]);
            }
            close(&fused.1, &plain.1);
        }
    }

    #[test]
    fn a_residual_is_added_and_gets_the_gradient() {
        let device = test_device().autodiff();
        let random = |shape| Tensor::<2>::random(shape, Distribution::Default, &device).require_grad();
        let (x, w, residual) = (random([6, 8]), random([8, 10]), random([6, 10]));
        let run = |out: Tensor<2>| {
            let gradients = out.clone().square().sum().backward();
            [&x, &w, &residual].map(|t| t.grad(&gradients).expect("leaf").into_data())
        };
        let fused = run(project_onto(residual.clone(), x.clone(), w.clone()));
        let plain = run(add(residual.clone(), project(x.clone(), w.clone())));
        for (fused, plain) in fused.iter().zip(&plain) {
            fused.assert_approx_eq::<f32>(plain, burn::tensor::Tolerance::relative(1e-5));
        }
    }
}
