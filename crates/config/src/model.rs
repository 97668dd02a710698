//! The architecture of a model: every size decided, nothing about how it is trained.
//!
//! Owns the sizes and which layers are sparse. Does not own the names of tensors
//! (`parameters.rs`) or where presets come from (`presets.rs`).

use serde::{Deserialize, Serialize};

/// Pointwise function of a feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `max(x, 0)`: T5 v1.0 and Switch.
    Relu,
    /// The tanh approximation of GELU ("gelu_new"): T5 v1.1 and mT5.
    GeluTanh,
    /// The exact GELU, `x * Phi(x)`.
    Gelu,
    /// `x * sigmoid(x)`.
    Silu,
}

/// How fresh weights are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Initialization {
    /// Truncated normal, variance `init_scale / fan_in` (Switch Transformer, section 2.4).
    Paper,
    /// The rule of Hugging Face transformers.
    Hf,
}

/// Sizes and structure of an encoder-decoder, dense or sparse.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Rows of the embedding, padding ids included.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width inside a feed-forward layer or an expert.
    pub d_ff: usize,
    /// Width of one attention head.
    pub d_kv: usize,
    /// Attention heads; `num_heads * d_kv` need not equal `d_model`.
    pub num_heads: usize,
    /// Encoder layers.
    pub num_layers: usize,
    /// Decoder layers.
    pub num_decoder_layers: usize,
    /// Buckets of the relative position bias.
    pub relative_attention_num_buckets: usize,
    /// Distance from which all positions share the last bucket.
    pub relative_attention_max_distance: usize,
    /// Pointwise function of the feed-forward layers.
    pub activation: Activation,
    /// Feed-forward layers compute `act(x wi_0) * (x wi_1)` before `wo`.
    pub gated: bool,
    /// The head shares the embedding.
    pub tie_word_embeddings: bool,
    /// The head multiplies its input by `d_model^-0.5`.
    pub scale_decoder_outputs: bool,
    /// Added to the mean square in every norm.
    pub layer_norm_epsilon: f64,
    /// Experts in each sparse layer; 0 for a dense model.
    pub num_experts: usize,
    /// Encoder layer `i` is sparse when this is 1, or when `i % every == 1`; 0 for no sparse layer.
    pub encoder_expert_layer_every: usize,
    /// The same for the decoder.
    pub decoder_expert_layer_every: usize,
    /// The router has a bias vector.
    pub router_bias: bool,
    /// Rule for fresh weights.
    pub init: Initialization,
    /// Scale of the initial variance (`paper`), or Hugging Face's `initializer_factor` (`hf`).
    pub init_scale: f64,
    /// Padding id, also the decoder's start id.
    pub pad_token_id: u32,
    /// End of sequence id.
    pub eos_token_id: u32,
}

/// One of the two stacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StackKind {
    /// Reads the inputs, bidirectional.
    Encoder,
    /// Writes the targets, causal, attends to the encoder.
    Decoder,
}

impl StackKind {
    /// `encoder` or `decoder`, as in tensor names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Encoder => "encoder",
            Self::Decoder => "decoder",
        }
    }
}

impl ModelConfig {
    /// Layers of a stack.
    pub fn layers(&self, stack: StackKind) -> usize {
        match stack {
            StackKind::Encoder => self.num_layers,
            StackKind::Decoder => self.num_decoder_layers,
        }
    }

    /// Whether layer `layer` of `stack` has experts.
    pub fn is_sparse(&self, stack: StackKind, layer: usize) -> bool {
        let every = match stack {
            StackKind::Encoder => self.encoder_expert_layer_every,
            StackKind::Decoder => self.decoder_expert_layer_every,
        };
        self.num_experts > 0 && (every == 1 || (every > 1 && layer % every == 1))
    }

    /// Sparse layers of a stack, in order.
    pub fn sparse_layers(&self, stack: StackKind) -> Vec<usize> {
        (0..self.layers(stack)).filter(|&layer| self.is_sparse(stack, layer)).collect()
    }

    /// Width of all heads together.
    pub fn d_attention(&self) -> usize {
        self.num_heads * self.d_kv
    }

    /// Parameters in all, each tied tensor once.
    pub fn num_parameters(&self) -> u64 {
        crate::parameters::parameters(self).iter().map(|p| p.num_elements()).sum()
    }
}
