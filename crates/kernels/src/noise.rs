//! Dropout and router jitter from counters: the same numbers on any ranks, threads or micro-batches.

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;
use switchyard_random::{Philox, unit_f32};

use crate::element::Element;
use crate::host::{self, by_format};
use crate::operation::{Operand, Operation, apply, given};

/// Names one place of one step: with a batch row and an element it fixes a random number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoiseKey {
    /// Seed of the run.
    pub seed: u64,
    /// Step of the run.
    pub step: u32,
    /// Place inside the model; no two places share one.
    pub site: u32,
}

impl NoiseKey {
    /// The random words of elements `[start, start + out.len())` of a batch row.
    ///
    /// Each `plane` has words of its own: the same row may pass a place several times, as at the
    /// experts of a layer.
    pub(crate) fn fill(self, row: u32, plane: u32, start: usize, out: &mut [u32]) {
        let philox = Philox::new(self.seed).derive(u64::from(self.step) << 32 | u64::from(self.site));
        let (block, skip) = ((start / 4) as u64, start % 4);
        let head = if skip == 0 { 0 } else { (4 - skip).min(out.len()) };
        if head > 0 {
            let words = philox.block([block as u32, (block >> 32) as u32, row, plane]);
            out[..head].copy_from_slice(&words[skip..skip + head]);
        }
        fill_blocks(philox, block + u64::from(head > 0), [row, plane], &mut out[head..]);
    }
}

/// The words of consecutive blocks from number `first` on.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn fill_blocks(philox: Philox, first: u64, tail: [u32; 2], out: &mut [u32]) {
    const AT_ONCE: usize = 16;
    let mut block = first;
    for out in out.chunks_mut(4 * AT_ONCE) {
        let words = philox.blocks::<AT_ONCE>(block, tail);
        for (i, out) in out.chunks_mut(4).enumerate() {
            for (out, words) in out.iter_mut().zip(&words) {
                *out = words[i];
            }
        }
        block += AT_ONCE as u64;
    }
}

/// Columns of a tensor that is split over devices: those that one of them holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// Number of the first.
    pub first: usize,
    /// Columns of the whole tensor.
    pub total: usize,
}

/// Where a token stands in the global batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenPlace {
    /// Number of its batch row.
    pub row: u32,
    /// Position within the row.
    pub token: u32,
}

impl TokenPlace {
    /// The random words of a token's columns, which are all of the tensor's when `columns` is absent.
    pub(crate) fn fill(self, key: NoiseKey, plane: u32, columns: Option<Columns>, out: &mut [u32]) {
        let Columns { first, total } = columns.unwrap_or(Columns { first: 0, total: out.len() });
        key.fill(self.row, plane, self.token as usize * total + first, out);
    }
}

/// Random numbers of a `[tokens, width]` tensor whose tokens come from consecutive batch rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenNoise {
    /// Place and step.
    pub key: NoiseKey,
    /// Number of the first token's batch row within the global batch.
    pub first_row: u32,
    /// Tokens in a batch row.
    pub row_tokens: usize,
    /// Columns at hand of a tensor split over devices, so that all draw parts of one mask; absent when
    /// the tensor is whole.
    pub columns: Option<Columns>,
}

impl TokenNoise {
    /// Where token number `token` stands.
    pub fn place(self, token: usize) -> TokenPlace {
        let row = self.first_row + (token / self.row_tokens) as u32;
        TokenPlace { row, token: (token % self.row_tokens) as u32 }
    }

    /// The random words of one token.
    pub(crate) fn fill(self, token: usize, out: &mut [u32]) {
        self.place(token).fill(self.key, 0, self.columns, out);
    }
}

/// How a random word becomes a factor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Factor {
    /// 0 with probability `rate`, else `1 / (1 - rate)`.
    Dropout { rate: f32 },
    /// Uniform in `[1 - epsilon, 1 + epsilon)`.
    Jitter { epsilon: f32 },
}

impl Factor {
    #[inline(always)]
    pub(crate) fn of(self, word: u32) -> f32 {
        match self {
            Self::Dropout { rate } => {
                if unit_f32(word) < rate {
                    0.0
                } else {
                    1.0 / (1.0 - rate)
                }
            }
            Self::Jitter { epsilon } => 1.0 + epsilon * (2.0 * unit_f32(word) - 1.0),
        }
    }
}

/// Dropout of `x`, `[tokens, width]`; rate 0 returns `x` itself.
pub fn dropout(x: Tensor<2>, rate: f64, noise: TokenNoise) -> Tensor<2> {
    if rate == 0.0 {
        return x;
    }
    scale(x, Factor::Dropout { rate: rate as f32 }, noise)
}

/// Multiplies `x`, `[tokens, width]`, by noise uniform in `[1 - epsilon, 1 + epsilon)`.
///
/// # Source
/// Switch Transformer, section 2.4 (arXiv:2101.03961): applied to the router's input in training.
pub fn jitter(x: Tensor<2>, epsilon: f64, noise: TokenNoise) -> Tensor<2> {
    if epsilon == 0.0 {
        return x;
    }
    scale(x, Factor::Jitter { epsilon: epsilon as f32 }, noise)
}

fn scale(x: Tensor<2>, factor: Factor, noise: TokenNoise) -> Tensor<2> {
    let [out] = apply(Scale { factor, noise }, [Operand::from(x)]);
    out.into_tensor()
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    pub(crate) factor: Factor,
    pub(crate) noise: TokenNoise,
}

impl Scale {
    fn run<E: Element>(&self, x: &FlexTensor) -> FlexTensor {
        let x = host::contiguous(x);
        let [tokens, width] = x.layout().shape().dims();
        let values = host::values::<E>(&x);
        let mut out = host::uninit(tokens * width);
        out.par_chunks_mut(width.max(1)).enumerate().with_min_len(16).for_each_init(
            || vec![0; width],
            |words, (token, out)| {
                self.noise.fill(token, words);
                for ((out, value), &word) in out.iter_mut().zip(&values[token * width..]).zip(words.iter()) {
                    *out = E::round(value.widen() * self.factor.of(word));
                }
            },
        );
        host::tensor(out, [tokens, width])
    }
}

impl Operation<Flex, 1, 1> for Scale {
    type Saved = ();

    fn forward(&self, [x]: &[FlexTensor; 1], _: bool) -> ([FlexTensor; 1], ()) {
        ([by_format!(x, E => self.run::<E>(x))], ())
    }

    fn backward(&self, (): &(), gradients: [Option<FlexTensor>; 1], _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let [gradient] = given(gradients);
        [Some(by_format!(gradient, E => self.run::<E>(&gradient)))]
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::test_device;

    fn noise(first_row: u32) -> TokenNoise {
        let key = NoiseKey { seed: 1, step: 2, site: 3 };
        TokenNoise { key, first_row, row_tokens: 5, columns: None }
    }

    #[test]
    fn devices_that_split_a_tensor_draw_parts_of_its_mask() {
        let device = test_device();
        let whole = dropout(Tensor::ones([10, 9], &device), 0.5, noise(0));
        for (first, width) in [(0, 4), (4, 5)] {
            let columns = Some(Columns { first, total: 9 });
            let part = dropout(Tensor::ones([10, width], &device), 0.5, TokenNoise { columns, ..noise(0) });
            let expected = whole.clone().slice([0..10, first..first + width]);
            assert_eq!(part.into_data(), expected.into_data());
        }
    }

    #[test]
    fn a_row_has_the_same_noise_in_any_micro_batch() {
        let device = test_device();
        let whole = dropout(Tensor::ones([20, 7], &device), 0.5, noise(0)).into_data();
        let half = dropout(Tensor::ones([10, 7], &device), 0.5, noise(2)).into_data();
        assert_eq!(whole.try_to_vec::<f32>().unwrap()[70..], half.try_to_vec::<f32>().unwrap()[..]);
    }

    #[test]
    fn dropout_keeps_the_mean_and_its_gradient_is_the_mask() {
        let device = test_device().autodiff();
        let x = Tensor::<2>::ones([200, 64], &device).require_grad();
        let y = dropout(x.clone(), 0.25, noise(0));
        let mean: f32 = y.clone().mean().into_scalar();
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
        let gradients = y.clone().sum().backward();
        let gradient = x.grad(&gradients).expect("x is a leaf");
        assert_eq!(gradient.into_data(), y.inner().into_data());
    }

    #[test]
    fn jitter_multiplies_forward_and_backward() {
        let device = test_device().autodiff();
        let x = Tensor::<2>::full([15, 9], 3.0, &device).require_grad();
        let factors = jitter(Tensor::ones([15, 9], &device), 0.1, noise(4)).inner();
        let y = jitter(x.clone(), 0.1, noise(4));
        let gradients = y.clone().square().sum().backward();
        let difference = |a: Tensor<2>, b: Tensor<2>| (a - b).abs().max().into_scalar::<f32>();
        assert!(difference(y.clone().inner(), factors.clone() * 3.0) < 1e-6);
        let expected = y.inner() * factors * 2.0;
        assert!(difference(x.grad(&gradients).expect("x is a leaf"), expected) < 1e-5);
    }

    #[test]
    fn places_steps_rows_and_planes_draw_numbers_of_their_own() {
        let base = NoiseKey { seed: 1, step: 2, site: 3 };
        let plane = |key: NoiseKey, row, plane| {
            let mut words = vec![0; 64];
            key.fill(row, plane, 0, &mut words);
            words
        };
        let draw = |key, row| plane(key, row, 0);
        let others = [
            draw(NoiseKey { seed: 2, ..base }, 0),
            draw(NoiseKey { step: 3, ..base }, 0),
            draw(NoiseKey { site: 4, ..base }, 0),
            draw(base, 1),
            plane(base, 0, 1),
        ];
        for other in others {
            assert!(draw(base, 0).iter().zip(&other).all(|(a, b)| a != b));
        }
        let mut tail = vec![0; 50];
        base.fill(0, 0, 14, &mut tail);
        assert_eq!(tail, draw(base, 0)[14..]);
    }

    #[test]
    fn jitter_stays_within_epsilon() {
        let y = jitter(Tensor::ones([50, 64], &test_device()), 0.01, noise(0)).into_data();
        let values = y.try_to_vec::<f32>().unwrap();
        assert!(values.iter().all(|v| (0.99..=1.01).contains(v)));
        assert!(values.iter().any(|&v| v > 1.009) && values.iter().any(|&v| v < 0.991));
    }
}
