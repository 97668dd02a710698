//! [`crate::dropout`] and [`crate::jitter`].

use burn_tch::TchTensor;
use rayon::prelude::*;
use switchyard_cuda::{Dropout, Queue, TokenTensor};
use tch::Tensor;

use crate::noise::{Factor, Scale, TokenNoise};
use crate::torch::gpu::{at, format, in_pieces, queue, started, token_noise};
use crate::torch::with_kernels::WithKernels;
use crate::torch::{contiguous, uploaded, wide};

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

fn sizes(x: &Tensor) -> TokenTensor {
    let (tokens, width) = x.size2().expect("activations are matrices");
    TokenTensor { tokens: tokens as usize, width: width as usize, format: format(x) }
}

impl Scale {
    fn scaled(&self, queue: Queue<'_>, x: &TchTensor) -> TchTensor {
        let x = contiguous(x).tensor;
        let out = x.empty_like();
        let (noise, sizes) = (token_noise(self.noise, &x), sizes(&x));
        // SAFETY: both tensors have the sizes given.
        started(unsafe {
            match self.factor {
                Factor::Dropout { rate } => {
                    let dropout = Dropout { rate: f64::from(rate), noise };
                    switchyard_cuda::dropout(queue, at(&x), at(&out), sizes, dropout)
                }
                Factor::Jitter { epsilon } => {
                    switchyard_cuda::jitter(queue, at(&x), at(&out), sizes, f64::from(epsilon), noise)
                }
            }
        });
        TchTensor::new(out)
    }
}

impl WithKernels<1, 1> for Scale {
    type Kept = ();

    fn compose(&self, [x]: [&Tensor; 1]) -> [Tensor; 1] {
        [(wide(x) * factors(self.noise, self.factor, x)).to_kind(x.kind())]
    }

    fn launch(&self, [x]: &[TchTensor; 1]) -> Option<([TchTensor; 1], ())> {
        let TokenTensor { width, format, .. } = sizes(&x.tensor);
        let queue = queue(&x.tensor).filter(|_| in_pieces(width, format))?;
        Some(([self.scaled(queue, x)], ()))
    }

    fn launch_backward(&self, (): &(), [gradient]: [TchTensor; 1], _: [bool; 1]) -> [Option<TchTensor>; 1] {
        let queue = queue(&gradient.tensor).expect("kernels were chosen on a GPU");
        [Some(self.scaled(queue, &gradient))]
    }
}
