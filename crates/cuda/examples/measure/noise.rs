//! Dropout of activations of T5-Base.

use switchyard_cuda::{Dropout, Format, NoiseKey, TokenNoise, TokenTensor, dropout, jitter};

use crate::clock::Clock;

pub(crate) fn run(clock: &Clock) {
    let (tokens, width) = (32_768, 768);
    let len = tokens * width;
    let bytes = 2.0 * len as f64 * 2.0;
    let (x, out) = (clock.normal_bf16(len, 1.0, 1), clock.zeros(len * 2));
    let step = clock.of(&[1_u32]);
    let key = NoiseKey { seed: 1, step: step.at(), site: 2 };
    let noise = TokenNoise { key, first_row: 0, row_tokens: 512, columns: None };
    let sizes = TokenTensor { tokens, width, format: Format::Bf16 };
    // SAFETY: both rooms have the values of `sizes`.
    clock.time("noise dropout [32768, 768] bf16", 0.0, bytes, |queue| unsafe {
        dropout(queue, x.at(), out.at(), sizes, Dropout { rate: 0.1, noise })
    });
    // SAFETY: as above.
    clock.time("noise jitter [32768, 768] bf16", 0.0, bytes, |queue| unsafe {
        jitter(queue, x.at(), out.at(), sizes, 0.01, noise)
    });
}
