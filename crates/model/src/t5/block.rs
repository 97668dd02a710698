//! One block of a stack: self-attention, cross-attention in the decoder, dense or sparse feed-forward.

use burn::module::Module;
use burn::tensor::{Int, Tensor};
use switchyard_config::{ModelConfig, StackKind};

use crate::context::ForwardContext;
use crate::init::ParameterFactory;
use crate::moe::{MoeLayer, RouterOutput};
use crate::t5::attention::{AttentionLayer, AttentionScope, KeyValues};
use crate::t5::feed_forward::DenseLayer;

/// Parameters of a block; it has either `feed_forward` or `moe`.
#[derive(Module, Debug)]
pub struct Block {
    self_attention: AttentionLayer,
    cross_attention: Option<AttentionLayer>,
    feed_forward: Option<DenseLayer>,
    moe: Option<MoeLayer>,
}

/// What every block of a stack reads and none changes.
#[derive(Debug, Clone)]
pub struct BlockInputs {
    /// The stack.
    pub stack: StackKind,
    /// Batch rows.
    pub batch: usize,
    /// Tokens of a row.
    pub row_tokens: usize,
    /// Position of the first token, above 0 when decoding with a cache.
    pub position: usize,
    /// Bias of self-attention, `[num_heads, queries + keys - 1]`.
    pub relative_bias: Tensor<2>,
    /// 1 where a token may be seen by self-attention, `[batch, keys]`.
    pub self_mask: Option<Tensor<2, Int>>,
    /// 1 where a token is routed and counted, `[batch * row_tokens]`.
    pub token_mask: Option<Tensor<1, Int>>,
    /// Encoder output that cross-attention reads, `[batch * encoder_tokens, d]`.
    pub encoder: Option<Tensor<2>>,
    /// 1 where cross-attention may look, `[batch, encoder_tokens]`.
    pub encoder_mask: Option<Tensor<2, Int>>,
}

/// Keys and values that one decoder block keeps between steps.
#[derive(Debug, Clone, Default)]
pub struct BlockCache {
    /// Of the tokens decoded so far.
    pub own: Option<KeyValues>,
    /// Of the encoder's output, computed once.
    pub cross: Option<KeyValues>,
}

/// What a decoder keeps between steps.
#[derive(Debug, Clone)]
pub struct DecoderCache {
    /// One for each block.
    pub blocks: Vec<BlockCache>,
    /// Bias of the last of some number of positions over all of them, whose last columns are the bias
    /// of an earlier one. `[num_heads, positions]`
    relative_bias: Option<Tensor<2>>,
}

/// Positions for which the first bias is built.
const FIRST_POSITIONS: usize = 64;

impl DecoderCache {
    /// Nothing decoded yet, for a stack of `num_layers`.
    pub fn new(num_layers: usize) -> Self {
        Self { blocks: vec![BlockCache::default(); num_layers], relative_bias: None }
    }

    /// Bias of `position` over the positions up to it, `[num_heads, position + 1]`; `build` makes that
    /// of any position.
    pub(crate) fn bias(&mut self, position: usize, build: impl FnOnce(usize) -> Tensor<2>) -> Tensor<2> {
        let bias = match self.relative_bias.take() {
            Some(bias) if bias.dims()[1] > position => bias,
            _ => build((2 * position).max(FIRST_POSITIONS)),
        };
        let [heads, positions] = bias.dims();
        let own = bias.clone().slice([0..heads, positions - 1 - position..positions]);
        self.relative_bias = Some(bias);
        own
    }
}

impl Block {
    pub(crate) fn new(
        factory: &ParameterFactory,
        config: &ModelConfig,
        stack: StackKind,
        layer: usize,
    ) -> Self {
        let prefix = format!("{}.block.{layer}", stack.name());
        let sparse = config.is_sparse(stack, layer);
        Self {
            self_attention: AttentionLayer::new(factory, &format!("{prefix}.self_attention")),
            cross_attention: (stack == StackKind::Decoder)
                .then(|| AttentionLayer::new(factory, &format!("{prefix}.cross_attention"))),
            feed_forward: (!sparse)
                .then(|| DenseLayer::new(factory, config, &format!("{prefix}.feed_forward"))),
            moe: sparse.then(|| MoeLayer::new(factory, config, &format!("{prefix}.moe"))),
        }
    }

    /// Hidden state in, hidden state and router output out. `[n, d] -> [n, d]`
    pub fn forward(
        &self,
        layer: usize,
        hidden_nd: Tensor<2>,
        inputs: &BlockInputs,
        cache: Option<&mut BlockCache>,
        context: &ForwardContext<'_>,
    ) -> (Tensor<2>, Option<RouterOutput>) {
        let mut cache = cache;
        let hidden_nd = self.attend_to_itself(layer, hidden_nd, inputs, cache.as_deref_mut(), context);
        let hidden_nd = self.attend_to_encoder(layer, hidden_nd, inputs, cache, context);
        match (&self.moe, &self.feed_forward) {
            (Some(moe), _) => {
                let (hidden_nd, router) = moe.forward(hidden_nd, layer, inputs, context);
                (hidden_nd, Some(router))
            }
            (None, Some(dense)) => {
                (dense.forward(hidden_nd, inputs.stack, layer, inputs.row_tokens, context), None)
            }
            (None, None) => unreachable!("a block is dense or sparse"),
        }
    }

    fn attend_to_itself(
        &self,
        layer: usize,
        hidden_nd: Tensor<2>,
        inputs: &BlockInputs,
        cache: Option<&mut BlockCache>,
        context: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let [hidden_nd, normed_nd] = self.self_attention.normed(hidden_nd, context);
        let (q, mut memory) = self.self_attention.self_projections(normed_nd, inputs.batch);
        if let Some(cache) = cache {
            memory = match cache.own.take() {
                Some(earlier) => earlier.followed_by(&memory, inputs.batch),
                None => memory,
            };
            cache.own = Some(memory.clone());
        }
        let scope = AttentionScope {
            stack: inputs.stack,
            layer,
            batch: inputs.batch,
            queries: inputs.row_tokens,
            cross: false,
            query_offset: inputs.position,
            relative_bias: Some(&inputs.relative_bias),
            key_mask: inputs.self_mask.as_ref(),
        };
        self.self_attention.attend(hidden_nd, q, &memory, scope, context)
    }

    fn attend_to_encoder(
        &self,
        layer: usize,
        hidden_nd: Tensor<2>,
        inputs: &BlockInputs,
        cache: Option<&mut BlockCache>,
        context: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let (Some(attention), Some(encoder)) = (&self.cross_attention, &inputs.encoder) else {
            return hidden_nd;
        };
        let project = || attention.key_values(context.tensor_parallel.copy_in(encoder.clone()), inputs.batch);
        let memory = match cache {
            Some(cache) => cache.cross.get_or_insert_with(project).clone(),
            None => project(),
        };
        let scope = AttentionScope {
            stack: inputs.stack,
            layer,
            batch: inputs.batch,
            queries: inputs.row_tokens,
            cross: true,
            query_offset: inputs.position,
            relative_bias: None,
            key_mask: inputs.encoder_mask.as_ref(),
        };
        let [hidden_nd, normed_nd] = attention.normed(hidden_nd, context);
        attention.attend(hidden_nd, attention.queries(normed_nd), &memory, scope, context)
    }
}
