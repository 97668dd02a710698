//! The one table of logical tensors: name, shape, kind and fan-in of every parameter of a model.
//!
//! The model is built from it, checkpoints store by it, exports translate it, optimizers key
//! their state by it, and counts are sums over it. Matrices are stored `[in, out]`, the experts
//! of a layer stacked in front: `[num_experts, in, out]`.

use crate::model::{ModelConfig, StackKind};

/// What a parameter is: decides its initial distribution and how exports lay it out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ParameterKind {
    /// Token embedding `[vocab_size, d_model]`.
    Embedding,
    /// Untied head `[d_model, vocab_size]`.
    Head,
    /// Bucket table `[relative_attention_num_buckets, num_heads]`.
    RelativeBias,
    /// Norm weight `[d_model]`.
    Norm,
    /// Query projection `[d_model, num_heads * d_kv]`.
    Query,
    /// Key or value projection `[d_model, num_heads * d_kv]`.
    KeyValue,
    /// Attention output projection `[num_heads * d_kv, d_model]`.
    AttentionOutput,
    /// Dense feed-forward input `[d_model, d_ff]`.
    FeedForwardIn,
    /// Dense feed-forward output `[d_ff, d_model]`.
    FeedForwardOut,
    /// Router matrix `[d_model, num_experts]`, always float32.
    Router,
    /// Router bias `[num_experts]`.
    RouterBias,
    /// Stacked expert input `[num_experts, d_model, d_ff]`.
    ExpertIn,
    /// Stacked expert output `[num_experts, d_ff, d_model]`.
    ExpertOut,
}

impl ParameterKind {
    /// Whether axis 0 counts experts.
    pub fn is_expert(self) -> bool {
        matches!(self, Self::ExpertIn | Self::ExpertOut)
    }
}

/// One logical tensor of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterSpec {
    /// Unique name, such as `encoder.block.1.moe.experts.wi`.
    pub name: String,
    /// Global shape.
    pub shape: Vec<usize>,
    /// What it is.
    pub kind: ParameterKind,
}

impl ParameterSpec {
    /// Elements of the tensor.
    pub fn num_elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

/// Every parameter of `config`, in the order in which the forward pass meets them.
///
/// Names: `shared.embedding`, `lm_head` (untied only), then for each stack
/// `{stack}.relative_bias`, `{stack}.block.{i}.{self_attention,cross_attention}.{norm,q,k,v,o}`,
/// `{stack}.block.{i}.feed_forward.{norm,wi|wi_0,wi_1,wo}` or
/// `{stack}.block.{i}.moe.{norm,router,router_bias}` and
/// `{stack}.block.{i}.moe.experts.{wi|wi_0,wi_1,wo}`, and `{stack}.final_norm`.
pub fn parameters(config: &ModelConfig) -> Vec<ParameterSpec> {
    let mut table = Table { config, specs: Vec::new() };
    table.push("shared.embedding", &[config.vocab_size, config.d_model], ParameterKind::Embedding);
    table.stack(StackKind::Encoder);
    table.stack(StackKind::Decoder);
    if !config.tie_word_embeddings {
        table.push("lm_head", &[config.d_model, config.vocab_size], ParameterKind::Head);
    }
    table.specs
}

struct Table<'a> {
    config: &'a ModelConfig,
    specs: Vec<ParameterSpec>,
}

impl Table<'_> {
    fn push(&mut self, name: &str, shape: &[usize], kind: ParameterKind) {
        self.specs.push(ParameterSpec { name: name.to_owned(), shape: shape.to_vec(), kind });
    }

    fn stack(&mut self, stack: StackKind) {
        let c = self.config;
        let prefix = stack.name();
        self.push(
            &format!("{prefix}.relative_bias"),
            &[c.relative_attention_num_buckets, c.num_heads],
            ParameterKind::RelativeBias,
        );
        for layer in 0..c.layers(stack) {
            let block = format!("{prefix}.block.{layer}");
            self.attention(&format!("{block}.self_attention"));
            if stack == StackKind::Decoder {
                self.attention(&format!("{block}.cross_attention"));
            }
            if c.is_sparse(stack, layer) {
                self.mixture_of_experts(&format!("{block}.moe"));
            } else {
                self.feed_forward(&format!("{block}.feed_forward"));
            }
        }
        self.push(&format!("{prefix}.final_norm"), &[c.d_model], ParameterKind::Norm);
    }

    fn attention(&mut self, prefix: &str) {
        let (d, a) = (self.config.d_model, self.config.d_attention());
        self.push(&format!("{prefix}.norm"), &[d], ParameterKind::Norm);
        self.push(&format!("{prefix}.q"), &[d, a], ParameterKind::Query);
        self.push(&format!("{prefix}.k"), &[d, a], ParameterKind::KeyValue);
        self.push(&format!("{prefix}.v"), &[d, a], ParameterKind::KeyValue);
        self.push(&format!("{prefix}.o"), &[a, d], ParameterKind::AttentionOutput);
    }

    fn feed_forward(&mut self, prefix: &str) {
        let (d, f) = (self.config.d_model, self.config.d_ff);
        self.push(&format!("{prefix}.norm"), &[d], ParameterKind::Norm);
        for name in input_names(self.config.gated) {
            self.push(&format!("{prefix}.{name}"), &[d, f], ParameterKind::FeedForwardIn);
        }
        self.push(&format!("{prefix}.wo"), &[f, d], ParameterKind::FeedForwardOut);
    }

    fn mixture_of_experts(&mut self, prefix: &str) {
        let (d, f, e) = (self.config.d_model, self.config.d_ff, self.config.num_experts);
        self.push(&format!("{prefix}.norm"), &[d], ParameterKind::Norm);
        self.push(&format!("{prefix}.router"), &[d, e], ParameterKind::Router);
        if self.config.router_bias {
            self.push(&format!("{prefix}.router_bias"), &[e], ParameterKind::RouterBias);
        }
        for name in input_names(self.config.gated) {
            self.push(&format!("{prefix}.experts.{name}"), &[e, d, f], ParameterKind::ExpertIn);
        }
        self.push(&format!("{prefix}.experts.wo"), &[e, f, d], ParameterKind::ExpertOut);
    }
}

/// Names of the matrices before the activation: `wi`, or `wi_0` (activated) and `wi_1` (linear).
pub fn input_names(gated: bool) -> &'static [&'static str] {
    if gated { &["wi_0", "wi_1"] } else { &["wi"] }
}
