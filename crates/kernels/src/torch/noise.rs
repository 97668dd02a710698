//! [`crate::dropout`] and [`crate::jitter`].

use rayon::prelude::*;
use tch::Tensor;

use crate::noise::{Factor, Scale, TokenNoise};
use crate::torch::composed::composed_operation;
use crate::torch::{uploaded, wide};

/// The factors of `like`, `[tokens, width]`, in float32.
pub(crate) fn factors(noise: TokenNoise, factor: Factor, like: &Tensor) -> Tensor {
    let (tokens, width) = like.size2().expect("activations are matrices");
    let mut factors = vec![0.0; (tokens * width) as usize];
    factors.par_chunks_mut((width as usize).max(1)).enumerate().for_each_init(
        || vec![0; width as usize],
        |words, (token, factors)| {
            noise.fill(token, words);
            factors.iter_mut().zip(&*words).for_each(|(f, &word)| *f = factor.of(word));
        },
    );
    uploaded(&factors, &[tokens, width], like)
}

composed_operation!(Scale, 1, 1, false, |scale, [x]| {
    [(wide(x) * factors(scale.noise, scale.factor, x)).to_kind(x.kind())]
});
