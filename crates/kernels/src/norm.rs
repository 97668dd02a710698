//! Root-mean-square norm: `weight * x / sqrt(mean(x^2) + epsilon)`.

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::host;
use crate::math::{dot, sum_of_squares};
use crate::operation::{Operand, Operation, apply};

/// Normalises every row of `x`, `[tokens, d_model]`, and scales it by `weight`, `[d_model]`.
///
/// # Source
/// Zhang and Sennrich 2019 (arXiv:1910.07467), as in T5: no mean is subtracted and there is no bias.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, epsilon: f64) -> Tensor<2> {
    let [out] = apply(RmsNorm { epsilon: epsilon as f32 }, [Operand::from(x), Operand::from(weight)]);
    out.into_tensor()
}

#[derive(Debug)]
struct RmsNorm {
    epsilon: f32,
}

#[derive(Debug)]
struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
    inverse_rms: Vec<f32>,
}

/// Rows that one task handles.
const TASK_ROWS: usize = 32;

impl Operation<2, 1> for RmsNorm {
    type Saved = Saved;

    fn forward(&self, [x, weight]: &[FlexTensor; 2], _: bool) -> ([FlexTensor; 1], Saved) {
        let (x, weight) = (host::contiguous(x), host::contiguous(weight));
        let [rows, width] = x.layout().shape().dims();
        let mut out = host::uninit(rows * width);
        let mut inverse_rms = host::uninit(rows);
        let (xs, ws) = (host::values(&x), host::values(&weight));
        out.par_chunks_mut(width * TASK_ROWS)
            .zip(xs.par_chunks(width * TASK_ROWS))
            .zip(inverse_rms.par_chunks_mut(TASK_ROWS))
            .for_each(|((out, x), inverse_rms)| forward_rows(x, ws, self.epsilon, out, inverse_rms));
        ([host::tensor(out, [rows, width])], Saved { x, weight, inverse_rms })
    }

    fn backward(
        &self,
        saved: &Saved,
        _: usize,
        gradient: &FlexTensor,
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [rows, width] = saved.x.layout().shape().dims();
        let mut gx = host::uninit(rows * width);
        let (xs, ws, gs) = (host::values(&saved.x), host::values(&saved.weight), host::values(gradient));
        let partial: Vec<Vec<f32>> = gx
            .par_chunks_mut(width * TASK_ROWS)
            .zip(xs.par_chunks(width * TASK_ROWS))
            .zip(gs.par_chunks(width * TASK_ROWS))
            .zip(saved.inverse_rms.par_chunks(TASK_ROWS))
            .map(|(((gx, x), g), inverse_rms)| {
                let mut gw = vec![0.0; width];
                backward_rows(x, ws, inverse_rms, g, gx, &mut gw);
                gw
            })
            .collect();
        let mut gw = vec![0.0; width];
        for part in &partial {
            for (sum, value) in gw.iter_mut().zip(part) {
                *sum += value;
            }
        }
        [Some(host::tensor(gx, [rows, width])), Some(host::tensor(gw, [width]))]
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn forward_rows(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32], inverse_rms: &mut [f32]) {
    let width = weight.len();
    for ((x, out), inverse) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(inverse_rms) {
        *inverse = 1.0 / (sum_of_squares(x) / width as f32 + epsilon).sqrt();
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = x * *inverse * w;
        }
    }
}

/// With `y = w x r`, `r = 1/rms`: `gx = r (g w - x r^2 mean(g w x))`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn backward_rows(x: &[f32], weight: &[f32], inverse_rms: &[f32], g: &[f32], gx: &mut [f32], gw: &mut [f32]) {
    let width = weight.len();
    for (((x, g), gx), &r) in
        x.chunks_exact(width).zip(g.chunks_exact(width)).zip(gx.chunks_exact_mut(width)).zip(inverse_rms)
    {
        for ((gx, g), w) in gx.iter_mut().zip(g).zip(weight) {
            *gx = g * w;
        }
        let mean = dot(gx, x) / width as f32 * r * r;
        for (((gx, gw), x), g) in gx.iter_mut().zip(gw.iter_mut()).zip(x).zip(g) {
            *gx = r * (*gx - x * mean);
            *gw += g * x * r;
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;

    fn reference(x: Tensor<2>, weight: Tensor<1>) -> Tensor<2> {
        let mean = x.clone().square().mean_dim(1);
        x / (mean + 1e-6).sqrt() * weight.unsqueeze()
    }

    #[test]
    fn equals_the_composed_reference_forward_and_backward() {
        let device = Device::flex().autodiff();
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
    fn a_row_of_zeros_stays_zero_and_finite() {
        let device = Device::flex().autodiff();
        let x = Tensor::<2>::zeros([2, 20], &device).require_grad();
        let w = Tensor::<1>::ones([20], &device).require_grad();
        let y = rms_norm(x.clone(), w.clone(), 1e-6);
        let gradients = y.clone().sum().backward();
        assert_eq!(y.abs().max().into_scalar::<f32>(), 0.0);
        let gradient: f32 = x.grad(&gradients).expect("leaf").max().into_scalar();
        assert!((gradient - 1e3).abs() < 1.0, "1 / sqrt(epsilon), not infinite: {gradient}");
    }
}
