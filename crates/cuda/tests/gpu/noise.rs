//! Dropout and jitter draw the numbers of the CPU, bit for bit.

use switchyard_cuda::{
    Address, Columns, Dropout, Format, NoiseKey, TokenNoise, TokenTensor, dropout, jitter,
};
use switchyard_random::{Philox, unit_f32};

use crate::support::{Buffer, held, normal, queue};

pub(crate) const SEED: u64 = 0x1234_5678_9abc_def1;
pub(crate) const STEP: u32 = 77;
pub(crate) const SITE: u32 = 0x0100_0203;

/// The key with its step at `step`.
pub(crate) fn key(step: &Buffer) -> NoiseKey {
    NoiseKey { seed: SEED, step: step.at(), site: SITE }
}

/// The random word of an element of a batch row.
pub(crate) fn word(element: usize, row: u32, plane: u32) -> u32 {
    let philox = Philox::new(SEED).derive(u64::from(STEP) << 32 | u64::from(SITE));
    let block = (element / 4) as u64;
    philox.block([block as u32, (block >> 32) as u32, row, plane])[element % 4]
}

/// The factor of dropout for `word`.
pub(crate) fn dropout_factor(word: u32, rate: f64) -> f32 {
    let rate = rate as f32;
    if unit_f32(word) < rate { 0.0 } else { 1.0 / (1.0 - rate) }
}

/// The words of a `[tokens, width]` tensor.
pub(crate) fn words(noise: &TokenNoise, tokens: usize, width: usize) -> Vec<u32> {
    let Columns { first, total } = noise.columns.unwrap_or(Columns { first: 0, total: width });
    let of = |token: usize, column: usize| {
        let row = noise.first_row + (token / noise.row_tokens) as u32;
        word(token % noise.row_tokens * total + first + column, row, 0)
    };
    (0..tokens).flat_map(|token| (0..width).map(move |column| of(token, column))).collect()
}

/// `x`, held by `format`, times a factor, in the roundings of all kernels.
pub(crate) fn scaled(x: f64, factor: f32, format: Format) -> f64 {
    held(f64::from(x as f32 * factor), format)
}

/// Noise of several batch rows; a part of the columns in which no element stands where a block begins.
pub(crate) fn noise(step: &Buffer, columns: Option<Columns>) -> TokenNoise {
    TokenNoise { key: key(step), first_row: 3, row_tokens: 5, columns }
}

const SIZES: [(usize, usize, Option<Columns>); 7] = [
    (0, 8, None),
    (1, 8, None),
    (37, 768, None),
    (9, 1032, None),
    (6, 3072, Some(Columns { first: 3072, total: 6144 })),
    (11, 24, Some(Columns { first: 3, total: 101 })),
    (11, 40, Some(Columns { first: 2, total: 42 })),
];

fn check(
    kind: &str,
    launch: impl Fn(Address, Address, TokenTensor, TokenNoise),
    factor: impl Fn(u32) -> f32,
) {
    let step = Buffer::of(&[STEP]);
    for format in [Format::F32, Format::Bf16] {
        for (tokens, width, columns) in SIZES {
            let noise = noise(&step, columns);
            let values = normal(1, tokens * width, format);
            let (x, out) = (Buffer::floats(&values, format), Buffer::poisoned(tokens * width, format));
            let sizes = TokenTensor { tokens, width, format };
            let words = words(&noise, tokens, width);
            let expected: Vec<f64> =
                values.iter().zip(words).map(|(&x, word)| scaled(x, factor(word), format)).collect();
            launch(x.at(), out.at(), sizes, noise);
            assert_eq!(out.read_floats(format), expected, "{kind} {sizes:?} {columns:?}");
            launch(x.at(), x.at(), sizes, noise);
            assert_eq!(x.read_floats(format), expected, "{kind} in place {sizes:?} {columns:?}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn dropout_is_that_of_the_cpu() {
    for rate in [0.0, 0.1, 0.5, 1.0] {
        let launch = |x, out, sizes, noise| {
            // SAFETY: both buffers have the values of `sizes`.
            unsafe { dropout(queue(), x, out, sizes, Dropout { rate, noise }) }.unwrap();
        };
        check("dropout", launch, |word| dropout_factor(word, rate));
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn jitter_is_that_of_the_cpu() {
    let epsilon = 0.01;
    let launch = |x, out, sizes, noise| {
        // SAFETY: as above.
        unsafe { jitter(queue(), x, out, sizes, epsilon, noise) }.unwrap();
    };
    check("jitter", launch, |word| 1.0 + epsilon as f32 * (2.0 * unit_f32(word) - 1.0));
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn another_width_is_an_error_that_says_what_would_do() {
    let step = Buffer::of(&[STEP]);
    let sizes = TokenTensor { tokens: 1, width: 12, format: Format::Bf16 };
    let dropped = Dropout { rate: 0.5, noise: noise(&step, None) };
    // SAFETY: nothing is started.
    let error = unsafe { dropout(queue(), Address::NONE, Address::NONE, sizes, dropped) }.unwrap_err();
    assert!(error.to_string().contains("multiple of 8"), "{error}");
}
