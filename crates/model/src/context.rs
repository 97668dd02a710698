//! What a forward pass knows beside its tensors.

use burn::tensor::Tensor;
use switchyard_config::plan::RoutingConfig;
use switchyard_config::{ModelConfig, StackKind};
use switchyard_kernels::{DeferredGradients, GradientMarks, NoiseKey, TokenNoise, add, dropout};

use crate::dispatcher::{LocalDispatcher, TokenDispatcher};
use crate::tensor_parallel::{TensorParallel, WholeTensors};

/// Which rule gives experts their slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capacity {
    /// `capacity_factor`.
    Training,
    /// `eval_capacity_factor`.
    Evaluation,
    /// As many slots as the fullest expert needs: nothing is dropped, as when decoding token by token.
    Unlimited,
}

/// Rates, randomness and seams of one forward pass.
#[derive(Clone, Copy)]
pub struct ForwardContext<'a> {
    /// Architecture.
    pub model: &'a ModelConfig,
    /// Routing rules.
    pub routing: &'a RoutingConfig,
    /// Slots of experts.
    pub capacity: Capacity,
    /// Dropout everywhere T5 has it; 0 outside training.
    pub dropout_rate: f64,
    /// Dropout on the hidden activations of experts; 0 outside training.
    pub expert_dropout: f64,
    /// Noise on the router's input; 0 outside training.
    pub router_jitter_noise: f64,
    /// What the sum of the cross-entropies will be multiplied by, where that is known. `[1]`
    pub loss_scale: Option<&'a Tensor<1>>,
    /// Where gradients of experts may wait for those of other micro-batches, for
    /// [`take_deferred_gradients`](crate::SwitchTransformer::take_deferred_gradients).
    pub deferred: Option<&'a DeferredGradients>,
    /// Gets a mark when the backward pass comes past the beginning of a block, numbered by
    /// [`block_number`](crate::block_number).
    pub marks: Option<&'a GradientMarks>,
    /// Seed of the run.
    pub seed: u64,
    /// Step of the run.
    pub step: u32,
    /// Number of the first batch row within the global batch.
    pub first_row: u32,
    /// Moves tokens to experts.
    pub dispatcher: &'a dyn TokenDispatcher,
    /// Splits matrices over devices.
    pub tensor_parallel: &'a dyn TensorParallel,
}

impl<'a> ForwardContext<'a> {
    /// No noise and evaluation capacity, on one device.
    pub fn evaluation(model: &'a ModelConfig, routing: &'a RoutingConfig) -> Self {
        Self {
            model,
            routing,
            capacity: Capacity::Evaluation,
            dropout_rate: 0.0,
            expert_dropout: 0.0,
            router_jitter_noise: 0.0,
            loss_scale: None,
            deferred: None,
            marks: None,
            seed: 0,
            step: 0,
            first_row: 0,
            dispatcher: &LocalDispatcher,
            tensor_parallel: &WholeTensors,
        }
    }

    /// The sum of `residual_nd` and of what a sub-layer computes, with dropout. `[n, d]`
    ///
    /// Where nothing stands between, neither devices that hold parts of a sum nor dropout, `sub_layer` is
    /// given the residual and must add it itself.
    pub fn residual(
        &self,
        residual_nd: Tensor<2>,
        noise: TokenNoise,
        sub_layer: impl FnOnce(Option<Tensor<2>>) -> Tensor<2>,
    ) -> Tensor<2> {
        if self.dropout_rate == 0.0 && !self.tensor_parallel.splits() {
            return sub_layer(Some(residual_nd));
        }
        let out_nd = self.tensor_parallel.reduce_out(sub_layer(None));
        add(residual_nd, dropout(out_nd, self.dropout_rate, noise))
    }

    /// Key of the random numbers of one place.
    pub fn key(&self, stack: StackKind, layer: usize, site: Site) -> NoiseKey {
        let stack = u32::from(stack == StackKind::Decoder);
        NoiseKey { seed: self.seed, step: self.step, site: stack << 24 | (layer as u32) << 8 | site as u32 }
    }

    /// Random numbers of a `[tokens, width]` tensor at one place, whole on this device.
    pub fn noise(&self, stack: StackKind, layer: usize, site: Site, row_tokens: usize) -> TokenNoise {
        TokenNoise { key: self.key(stack, layer, site), first_row: self.first_row, row_tokens, columns: None }
    }
}

/// Places inside a layer that draw random numbers. The numbers are part of the format of a run:
/// changing one changes the losses of every seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Site {
    /// After the embedding.
    Embedding = 0,
    /// Self-attention probabilities.
    SelfAttention = 1,
    /// Output of self-attention.
    SelfAttentionOutput = 2,
    /// Cross-attention probabilities.
    CrossAttention = 3,
    /// Output of cross-attention.
    CrossAttentionOutput = 4,
    /// Hidden activations of a dense layer.
    FeedForward = 5,
    /// Output of a dense or sparse layer.
    FeedForwardOutput = 6,
    /// Router jitter.
    RouterJitter = 7,
    /// Hidden activations of experts.
    Expert = 8,
    /// After the final norm.
    Final = 9,
}
