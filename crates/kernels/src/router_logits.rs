//! The router's product: the one place of a bfloat16 model that computes in float32, if it is told to.

use burn::backend::Flex;
use burn::tensor::{DType, Tensor};
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::element::{Element, bf16};
use crate::gemm::{Multiply, Threads, View, ViewMut, Write, matmul};
use crate::host::{self, by_format};
use crate::noise::{Factor, TokenNoise};
use crate::operation::{Operand, Operation, apply, given};

/// Logits of every token, `[tokens, num_experts]`, and `x` itself for the experts.
///
/// `x` is `[tokens, d_model]`, `weight` `[d_model, num_experts]`. The format of the weight is that of
/// the product and of the logits, whatever that of `x`. With `jitter` above 0 the router alone sees `x`
/// times noise uniform in `[1 - jitter, 1 + jitter)`. Both gradients of `x` meet in one pass; the loss
/// must depend on both outputs.
///
/// # Source
/// Switch Transformer, section 2.4 (arXiv:2101.03961): selective precision, and jitter in training.
pub fn router_logits(x: Tensor<2>, weight: Tensor<2>, jitter: f64, noise: TokenNoise) -> [Tensor<2>; 2] {
    let jitter = (jitter > 0.0).then_some((Factor::Jitter { epsilon: jitter as f32 }, noise));
    apply(RouterLogits { jitter }, [x, weight].map(Operand::from)).map(Operand::into_tensor)
}

#[derive(Debug)]
pub(crate) struct RouterLogits {
    pub(crate) jitter: Option<(Factor, TokenNoise)>,
}

#[derive(Debug)]
pub(crate) struct Saved {
    x: FlexTensor,
    weight: FlexTensor,
}

impl Saved {
    /// Tokens, `d_model` and experts.
    fn sizes(&self) -> [usize; 3] {
        let ([n, d], [_, e]) = (self.x.layout().shape().dims(), self.weight.layout().shape().dims());
        [n, d, e]
    }
}

/// Tokens that one pointwise task handles.
const TASK_TOKENS: usize = 64;

impl RouterLogits {
    /// Applies `each` to the rows of `out`, their numbers and their jitter, which is empty without any.
    fn by_token<T: Send>(
        &self,
        out: &mut [T],
        width: usize,
        each: impl Fn(usize, &mut [T], &[f32]) + Sync + Send,
    ) {
        out.par_chunks_mut(width.max(1)).enumerate().with_min_len(TASK_TOKENS).for_each_init(
            || (vec![0; width], vec![0.0; width]),
            |(words, factors), (token, out)| match self.jitter {
                None => each(token, out, &[]),
                Some((factor, noise)) => {
                    noise.fill(token, words);
                    factors.iter_mut().zip(&*words).for_each(|(f, &word)| *f = factor.of(word));
                    each(token, out, factors);
                }
            },
        );
    }

    /// What the router sees of `x`, in the format `W` of its weight.
    fn seen<W: Element>(&self, saved: &Saved) -> Vec<W> {
        let [n, d, _] = saved.sizes();
        let mut seen = host::uninit::<W>(n * d);
        by_format!(saved.x, E => {
            let x = host::values::<E>(&saved.x);
            self.by_token(&mut seen, d, |token, out, factors| see(&x[token * d..][..d], factors, out));
        });
        seen
    }

    fn logits<W: Multiply<W> + Multiply<f32>>(&self, saved: &Saved) -> FlexTensor {
        let [n, d, e] = saved.sizes();
        let seen = self.seen::<W>(saved);
        let mut logits = host::uninit::<W>(n * e);
        let (x, w) = (View::new(&seen, n, d), View::new(host::values(&saved.weight), d, e));
        matmul(ViewMut::new(&mut logits, n, e), x, w, Write::Overwrite, Threads::All);
        host::tensor(logits, [n, e])
    }

    fn gradients<W: Multiply<W> + Multiply<f32>>(
        &self,
        saved: &Saved,
        logits: &FlexTensor,
        beside: &FlexTensor,
    ) -> [FlexTensor; 2] {
        let [n, d, e] = saved.sizes();
        let g = View::new(host::values::<W>(logits), n, e);
        let seen = self.seen::<W>(saved);
        let mut gw = host::uninit::<W>(d * e);
        matmul(ViewMut::new(&mut gw, d, e), View::new(&seen, n, d).t(), g, Write::Overwrite, Threads::All);
        let mut through = host::uninit::<f32>(n * d);
        let w = View::new(host::values::<W>(&saved.weight), d, e);
        matmul(ViewMut::new(&mut through, n, d), g, w.t(), Write::Overwrite, Threads::All);
        let gx = by_format!(saved.x, E => {
            let beside = host::values::<E>(beside);
            let mut gx = host::uninit::<E>(n * d);
            self.by_token(&mut gx, d, |token, out, factors| {
                let row = token * d..(token + 1) * d;
                join(&beside[row.clone()], &through[row], factors, out);
            });
            host::tensor(gx, [n, d])
        });
        [gx, host::tensor(gw, [d, e])]
    }
}

impl Operation<Flex, 2, 2> for RouterLogits {
    type Saved = Saved;

    const TOGETHER: bool = true;

    fn forward(&self, [x, weight]: &[FlexTensor; 2], _: bool) -> ([FlexTensor; 2], Saved) {
        let saved = Saved { x: host::contiguous(x), weight: host::contiguous(weight) };
        let logits = match weight.dtype() {
            DType::BF16 => self.logits::<bf16>(&saved),
            _ => self.logits::<f32>(&saved),
        };
        ([logits, saved.x.clone()], saved)
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<FlexTensor>; 2],
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [logits, beside] = given(gradients);
        let gradients = match saved.weight.dtype() {
            DType::BF16 => self.gradients::<bf16>(saved, &logits, &beside),
            _ => self.gradients::<f32>(saved, &logits, &beside),
        };
        gradients.map(Some)
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn see<E: Element, W: Element>(x: &[E], factors: &[f32], out: &mut [W]) {
    if factors.is_empty() {
        for (out, x) in out.iter_mut().zip(x) {
            *out = W::round(x.widen());
        }
    } else {
        for ((out, x), factor) in out.iter_mut().zip(x).zip(factors) {
            *out = W::round(x.widen() * factor);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn join<E: Element>(beside: &[E], through: &[f32], factors: &[f32], out: &mut [E]) {
    if factors.is_empty() {
        for ((out, beside), through) in out.iter_mut().zip(beside).zip(through) {
            *out = E::round(beside.widen() + through);
        }
    } else {
        for (((out, beside), through), factor) in out.iter_mut().zip(beside).zip(through).zip(factors) {
            *out = E::round(beside.widen() + through * factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Tolerance};

    use super::*;
    use crate::noise::{NoiseKey, jitter};
    use crate::test_device;

    #[test]
    fn logits_and_both_gradients_equal_the_composed_reference() {
        let device = test_device().autodiff();
        let random = |shape| Tensor::<2>::random(shape, Distribution::Default, &device).require_grad();
        let (x, w) = (random([70, 24]), random([24, 5]));
        let key = NoiseKey { seed: 1, step: 2, site: 3 };
        let noise = TokenNoise { key, first_row: 4, row_tokens: 7, columns: None };
        for rate in [0.0, 0.1] {
            let run = |[logits, x_again]: [Tensor<2>; 2]| {
                let gradients = (logits.clone().square().sum() + x_again.powi_scalar(3).sum()).backward();
                [logits.inner(), x.grad(&gradients).expect("leaf"), w.grad(&gradients).expect("leaf")]
            };
            let fused = run(router_logits(x.clone(), w.clone(), rate, noise));
            let plain = run([jitter(x.clone(), rate, noise).matmul(w.clone()), x.clone()]);
            for (fused, plain) in fused.into_iter().zip(plain) {
                fused.into_data().assert_approx_eq::<f32>(&plain.into_data(), Tolerance::relative(1e-5));
            }
        }
    }
}
