//! [`crate::feed_forward`] and [`crate::expert_feed_forward`].

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use tch::Tensor;

use crate::activation::Activation;
use crate::feed_forward::FeedForward;
use crate::noise::Factor;
use crate::operation::Operation;
use crate::torch::composed::{Graph, composed};
use crate::torch::{uploaded, wide};

fn activated(activation: Activation, x: &Tensor) -> Tensor {
    match activation {
        Activation::Relu => x.relu(),
        Activation::GeluTanh => x.gelu("tanh"),
        Activation::Gelu => x.gelu("none"),
        Activation::Silu => x.silu(),
    }
}

impl FeedForward {
    /// Inputs in the order of the operation; weights have one matrix for each gradient.
    fn composed(&self, inputs: &[&Tensor]) -> Tensor {
        let [x, wo, wi, others @ ..] = inputs else { panic!("a layer has three tensors at least") };
        let (gate, residual) =
            if self.gated { (others.first(), others.get(1)) } else { (None, others.first()) };
        let (shape, matrices) = (x.size(), wi.size()[0]);
        let rows = x.view([matrices, -1, shape[2]]);
        let mut hidden = activated(self.activation, &wide(&rows.matmul(wi)));
        if let Some(gate) = gate {
            hidden = hidden * wide(&rows.matmul(gate));
        }
        let factors = self.factors(shape[0] as usize, shape[1] as usize, wi.size()[2] as usize, x);
        if let Some(factors) = factors {
            hidden = &hidden * factors.view_as(&hidden);
        }
        let hidden = hidden.to_kind(x.kind());
        let out = match residual {
            Some(residual) => residual.view([matrices, -1, shape[2]]).baddbmm(&hidden, wo, 1.0, 1.0),
            None => hidden.matmul(wo),
        };
        out.view(shape.as_slice())
    }

    /// 0 for hidden values of slots that hold no token, and dropout of the others; `None` where all are 1.
    fn factors(&self, experts: usize, slots: usize, width: usize, like: &Tensor) -> Option<Tensor> {
        let used = |expert| self.rows.runs(expert, slots).map(|run| run.len()).sum::<usize>();
        if self.dropout.rate == 0.0 && (0..experts).all(|expert| used(expert) == slots) {
            return None;
        }
        let mut factors = vec![0.0; experts * slots * width];
        for (expert, factors) in factors.chunks_mut((slots * width).max(1)).enumerate().take(experts) {
            for run in self.rows.runs(expert, slots) {
                let part = &mut factors[run.start * width..run.end * width];
                part.fill(1.0);
                self.drop_factors(expert * slots + run.start, expert, width, part);
            }
        }
        Some(uploaded(&factors, &[experts as i64, slots as i64, width as i64], like))
    }

    fn drop_factors(&self, first: usize, expert: usize, width: usize, factors: &mut [f32]) {
        let dropout = self.dropout;
        if dropout.rate == 0.0 {
            return;
        }
        let factor = Factor::Dropout { rate: dropout.rate as f32 };
        let places = self.rows.places.as_ref().expect("rows come with places where dropout needs them");
        let expert = (self.rows.first_expert + expert) as u32;
        let mut words = vec![0; width];
        for (factors, place) in factors.chunks_exact_mut(width).zip(&places[first..]) {
            place.fill(dropout.key, expert, dropout.columns, &mut words);
            factors.iter_mut().zip(&words).for_each(|(value, &word)| *value = factor.of(word));
        }
    }

    /// The inputs with each expert's matrices as often as they get gradients.
    fn repeated<const N: usize>(&self, inputs: &[TchTensor; N]) -> [TchTensor; N] {
        let parts = self.rows.gradients() as i64;
        let weights = if self.gated { 1..4 } else { 1..3 };
        std::array::from_fn(|i| {
            if parts > 1 && weights.contains(&i) {
                return TchTensor::new(inputs[i].tensor.repeat_interleave_self_int(parts, 0, None));
            }
            inputs[i].clone()
        })
    }
}

macro_rules! operation {
    ($inputs:literal) => {
        impl Operation<LibTorch, $inputs, 1> for FeedForward {
            type Saved = Graph;

            fn forward(&self, inputs: &[TchTensor; $inputs], tracked: bool) -> ([TchTensor; 1], Graph) {
                composed(&self.repeated(inputs), tracked, |inputs| [self.composed(&inputs)])
            }

            fn backward(
                &self,
                saved: &Graph,
                gradients: [Option<TchTensor>; 1],
                wanted: [bool; $inputs],
            ) -> [Option<TchTensor>; $inputs] {
                saved.gradients(gradients, wanted)
            }
        }
    };
}

operation!(3);
operation!(4);
operation!(5);
