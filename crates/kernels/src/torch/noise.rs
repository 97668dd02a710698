//! [`crate::dropout`] and [`crate::jitter`].

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use rayon::prelude::*;
use switchyard_cuda::{Dropout, Queue, TokenTensor};
use tch::Tensor;

use crate::noise::{Factor, Scale, TokenNoise};
use crate::operation::{Operation, given};
use crate::torch::composed::{Graph, composed};
use crate::torch::gpu::{at, format, in_pieces, queue, started, token_noise};
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

/// What the backward pass needs.
#[derive(Debug)]
pub(crate) enum Saved {
    Composed(Graph),
    Kernel,
}

fn sizes(x: &Tensor) -> TokenTensor {
    let (tokens, width) = x.size2().expect("activations are matrices");
    TokenTensor { tokens: tokens as usize, width: width as usize, format: format(x) }
}

impl Scale {
    fn launch(&self, queue: Queue<'_>, x: &TchTensor) -> TchTensor {
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

impl Operation<LibTorch, 1, 1> for Scale {
    type Saved = Saved;

    fn forward(&self, inputs: &[TchTensor; 1], tracked: bool) -> ([TchTensor; 1], Saved) {
        let [x] = inputs;
        let TokenTensor { width, format, .. } = sizes(&x.tensor);
        if let Some(queue) = queue(&x.tensor).filter(|_| in_pieces(width, format)) {
            return ([self.launch(queue, x)], Saved::Kernel);
        }
        let (out, graph) = composed(inputs, tracked, |[x]| {
            [(wide(x) * factors(self.noise, self.factor, x)).to_kind(x.kind())]
        });
        (out, Saved::Composed(graph))
    }

    fn backward(
        &self,
        saved: &Saved,
        gradients: [Option<TchTensor>; 1],
        wanted: [bool; 1],
    ) -> [Option<TchTensor>; 1] {
        match saved {
            Saved::Composed(graph) => graph.gradients(gradients, wanted),
            Saved::Kernel => {
                let [gradient] = given(gradients);
                let queue = queue(&gradient.tensor).expect("kernels were chosen on a GPU");
                [Some(self.launch(queue, &gradient))]
            }
        }
    }
}
