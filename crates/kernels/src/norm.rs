//! Root-mean-square norm: `weight * x / sqrt(mean(x^2) + epsilon)`.

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::element::Element;
use crate::host::{self, by_format};
use crate::math::{dot, sum_of_squares};
use crate::operation::{Operand, Operation, apply, given};

/// Normalises every row of `x`, `[tokens, d_model]`, and scales it by `weight`, `[d_model]`.
///
/// # Source
/// Zhang and Sennrich 2019 (arXiv:1910.07467), as in T5: no mean is subtracted and there is no bias.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, epsilon: f64) -> Tensor<2> {
    let [out] = apply(RmsNorm { epsilon: epsilon as f32 }, [Operand::from(x), Operand::from(weight)]);
    out.into_tensor()
}

/// `x` itself, for the residual connection, and its [`rms_norm`].
///
/// Both gradients then meet in one pass. The loss must depend on both.
pub fn rms_norm_beside(x: Tensor<2>, weight: Tensor<1>, epsilon: f64) -> [Tensor<2>; 2] {
    apply(RmsNorm { epsilon: epsilon as f32 }, [Operand::from(x), Operand::from(weight)])
        .map(Operand::into_tensor)
}

#[derive(Debug)]
pub(crate) struct RmsNorm {
    pub(crate) epsilon: f32,
}

#[derive(Debug)]
pub(crate) struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    inverse_rms: Vec<f32>,
}

/// Rows that one task handles.
const TASK_ROWS: usize = 32;

impl RmsNorm {
    fn normed<E: Element>(&self, x: &FlexTensor, weight: &FlexTensor) -> (FlexTensor, Saved) {
        let (x, weight) = (host::contiguous(x), host::contiguous(weight));
        let [rows, width] = x.layout().shape().dims();
        let mut out = host::uninit(rows * width);
        let mut inverse_rms = host::uninit(rows);
        let (xs, ws) = (host::values::<E>(&x), host::widened(&weight));
        out.par_chunks_mut(width * TASK_ROWS)
            .zip(xs.par_chunks(width * TASK_ROWS))
            .zip(inverse_rms.par_chunks_mut(TASK_ROWS))
            .for_each(|((out, x), inverse_rms)| forward_rows(x, &ws, self.epsilon, out, inverse_rms));
        drop(ws);
        (host::tensor::<E, 2>(out, [rows, width]), Saved { x, weight, inverse_rms })
    }

    /// Gradients of `x` and the weight; `beside` is what else flows into `x`.
    fn gradients<E: Element>(
        saved: &Saved,
        gradient: &FlexTensor,
        beside: Option<&FlexTensor>,
    ) -> [Option<FlexTensor>; 2] {
        let [rows, width] = saved.x.layout().shape().dims();
        let mut gx = host::uninit(rows * width);
        let task = width * TASK_ROWS;
        let (xs, ws, gs) =
            (host::values::<E>(&saved.x), host::widened(&saved.weight), host::values::<E>(gradient));
        let beside = beside.map(host::values::<E>);
        let partial: Vec<Vec<f32>> = gx
            .par_chunks_mut(task)
            .zip(xs.par_chunks(task))
            .zip(gs.par_chunks(task))
            .zip(saved.inverse_rms.par_chunks(TASK_ROWS))
            .enumerate()
            .map(|(i, (((gx, x), g), inverse_rms))| {
                let mut gw = vec![0.0; width];
                let beside = beside.map_or(&[] as &[E], |beside| &beside[i * task..][..gx.len()]);
                backward_rows(x, &ws, inverse_rms, g, beside, gx, &mut gw);
                gw
            })
            .collect();
        let mut gw = vec![0.0; width];
        for part in &partial {
            for (sum, value) in gw.iter_mut().zip(part) {
                *sum += value;
            }
        }
        let gw = host::rounded(gw, [width], saved.weight.dtype());
        [Some(host::tensor::<E, 2>(gx, [rows, width])), Some(gw)]
    }
}

impl Operation<Flex, 2, 1> for RmsNorm {
    type Saved = Saved;

    fn forward(&self, [x, weight]: &[FlexTensor; 2], _: bool) -> ([FlexTensor; 1], Saved) {
        let (out, saved) = by_format!(x, E => self.normed::<E>(x, weight));
        ([out], saved)
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<FlexTensor>; 1],
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [gradient] = given(gradients);
        by_format!(gradient, E => Self::gradients::<E>(saved, &gradient, None))
    }
}

impl Operation<Flex, 2, 2> for RmsNorm {
    type Saved = Saved;

    const TOGETHER: bool = true;

    fn forward(&self, [x, weight]: &[FlexTensor; 2], _: bool) -> ([FlexTensor; 2], Saved) {
        let (out, saved) = by_format!(x, E => self.normed::<E>(x, weight));
        ([saved.x.clone(), out], saved)
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<FlexTensor>; 2],
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [beside, gradient] = given(gradients);
        by_format!(gradient, E => Self::gradients::<E>(saved, &gradient, Some(&beside)))
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn forward_rows<E: Element>(x: &[E], weight: &[f32], epsilon: f32, out: &mut [E], inverse_rms: &mut [f32]) {
    let width = weight.len();
    for ((x, out), inverse) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(inverse_rms) {
        *inverse = 1.0 / (sum_of_squares(x) / width as f32 + epsilon).sqrt();
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = E::round(x.widen() * *inverse * w);
        }
    }
}

/// With `y = w x r`, `r = 1/rms`: `gx = r (g w - x r^2 mean(g w x))`, plus what flows `beside`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn backward_rows<E: Element>(
    x: &[E],
    weight: &[f32],
    inverse_rms: &[f32],
    g: &[E],
    beside: &[E],
    gx: &mut [E],
    gw: &mut [f32],
) {
    let width = weight.len();
    let mut scaled = vec![0.0; width];
    let rows = x.chunks_exact(width).zip(g.chunks_exact(width)).zip(gx.chunks_exact_mut(width));
    for (i, (((x, g), gx), &r)) in rows.zip(inverse_rms).enumerate() {
        for ((scaled, g), w) in scaled.iter_mut().zip(g).zip(weight) {
            *scaled = g.widen() * w;
        }
        let mean = dot(&scaled, x) / width as f32 * r * r;
        if beside.is_empty() {
            for ((gx, scaled), x) in gx.iter_mut().zip(&scaled).zip(x) {
                *gx = E::round(r * (scaled - x.widen() * mean));
            }
        } else {
            let beside = &beside[i * width..][..width];
            for (((gx, scaled), x), beside) in gx.iter_mut().zip(&scaled).zip(x).zip(beside) {
                *gx = E::round(beside.widen() + r * (scaled - x.widen() * mean));
            }
        }
        for ((gw, x), g) in gw.iter_mut().zip(x).zip(g) {
            *gw += g.widen() * x.widen() * r;
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Distribution;

    use super::*;
    use crate::test_device;

    fn reference(x: Tensor<2>, weight: Tensor<1>) -> Tensor<2> {
        let mean = x.clone().square().mean_dim(1);
        x / (mean + 1e-6).sqrt() * weight.unsqueeze()
    }

    #[test]
    fn equals_the_composed_reference_forward_and_backward() {
        let device = test_device().autodiff();
        let x = Tensor::<2>::random([45, 40], Distribution::Default, &device).require_grad();
        let w = Tensor::<1>::random([40], Distribution::Default, &device).require_grad();
        let upstream = Tensor::<2>::random([45, 40], Distribution::Default, &device);
        let run = |out: Tensor<2>| {
            let gradients = (out.clone() * upstream.clone()).sum().backward();
            (out.inner(), x.grad(&gradients).expect("leaf"), w.grad(&gradients).expect("leaf"))
        };
        let fused = run(rms_norm(x.clone(), w.clone(), 1e-6));
        let plain = run(reference(x.clone(), w.clone()));
        let difference = |a: Tensor<2>, b: Tensor<2>| (a - b).abs().max().into_scalar::<f32>();
        assert!(difference(fused.0, plain.0) < 1e-5);
        assert!(difference(fused.1, plain.1) < 1e-5);
        assert!(difference(fused.2.unsqueeze(), plain.2.unsqueeze()) < 1e-4);
    }

    #[test]
    fn the_residual_connection_meets_the_norm() {
        let device = test_device().autodiff();
        let x = Tensor::<2>::random([45, 40], Distribution::Default, &device).require_grad();
        let w = Tensor::<1>::random([40], Distribution::Default, &device).require_grad();
        let upstream = Tensor::<2>::random([45, 40], Distribution::Default, &device);
        let run = |[x_again, out]: [Tensor<2>; 2]| {
            let gradients = (out * upstream.clone() + x_again.square()).sum().backward();
            (x.grad(&gradients).expect("leaf"), w.grad(&gradients).expect("leaf"))
        };
        let fused = run(rms_norm_beside(x.clone(), w.clone(), 1e-6));
        let plain = run([x.clone(), reference(x.clone(), w.clone())]);
        let difference = |a: Tensor<2>, b: Tensor<2>| (a - b).abs().max().into_scalar::<f32>();
        assert!(difference(fused.0, plain.0) < 1e-5);
        assert!(difference(fused.1.unsqueeze(), plain.1.unsqueeze()) < 1e-4);
    }

    #[test]
    fn a_row_of_zeros_stays_zero_and_finite() {
        let device = test_device().autodiff();
        let x = Tensor::<2>::zeros([2, 20], &device).require_grad();
        let w = Tensor::<1>::ones([20], &device).require_grad();
        let y = rms_norm(x.clone(), w.clone(), 1e-6);
        let gradients = y.clone().sum().backward();
        assert_eq!(y.abs().max().into_scalar::<f32>(), 0.0);
        let gradient: f32 = x.grad(&gradients).expect("leaf").max().into_scalar();
        assert!((gradient - 1e3).abs() < 1.0, "1 / sqrt(epsilon), not infinite: {gradient}");
    }
}
