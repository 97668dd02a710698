//! A stack: the bias table, a list of blocks and the final norm.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use switchyard_config::{ModelConfig, StackKind};
use switchyard_kernels::{dropout, rms_norm};

use crate::context::{ForwardContext, Site};
use crate::init::ParameterFactory;
use crate::moe::RouterOutput;
use crate::t5::block::{Block, BlockCache, BlockInputs};
use crate::t5::relative_bias::relative_bias;

/// Parameters of the encoder or the decoder.
#[derive(Module, Debug)]
pub struct Stack {
    relative_bias: Param<Tensor<2>>,
    block: Vec<Block>,
    final_norm: Param<Tensor<1>>,
}

impl Stack {
    pub(crate) fn new(factory: &ParameterFactory, config: &ModelConfig, stack: StackKind) -> Self {
        let name = stack.name();
        Self {
            relative_bias: factory.parameter(&format!("{name}.relative_bias")),
            block: (0..config.layers(stack)).map(|layer| Block::new(factory, config, stack, layer)).collect(),
            final_norm: factory.parameter(&format!("{name}.final_norm")),
        }
    }

    /// The blocks, in order.
    pub fn blocks(&self) -> &[Block] {
        &self.block
    }

    /// Self-attention bias of `queries` tokens from `position` on, over all tokens up to them.
    /// `[num_heads, queries + keys - 1]`
    pub fn bias(&self, stack: StackKind, queries: usize, position: usize, config: &ModelConfig) -> Tensor<2> {
        relative_bias(
            self.relative_bias.val(),
            queries,
            position + queries,
            position,
            stack == StackKind::Encoder,
            config.relative_attention_max_distance,
        )
    }

    /// Dropout after the embedding: the state before the first block. `[n, d]`
    pub fn begin(
        &self,
        embedded_nd: Tensor<2>,
        inputs: &BlockInputs,
        context: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let noise = context.noise(inputs.stack, 0, Site::Embedding, inputs.row_tokens);
        dropout(embedded_nd, context.dropout_rate, noise)
    }

    /// Final norm and dropout after the last block. `[n, d]`
    pub fn finish(
        &self,
        hidden_nd: Tensor<2>,
        inputs: &BlockInputs,
        context: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let out_nd = rms_norm(hidden_nd, self.final_norm.val(), context.model.layer_norm_epsilon);
        let noise = context.noise(inputs.stack, 0, Site::Final, inputs.row_tokens);
        dropout(out_nd, context.dropout_rate, noise)
    }

    /// All blocks between `begin` and `finish`; one router output for each sparse layer.
    pub fn forward(
        &self,
        embedded_nd: Tensor<2>,
        inputs: &BlockInputs,
        mut caches: Option<&mut [BlockCache]>,
        context: &ForwardContext<'_>,
    ) -> (Tensor<2>, Vec<RouterOutput>) {
        let mut hidden_nd = self.begin(embedded_nd, inputs, context);
        let mut routers = Vec::new();
        for (layer, block) in self.block.iter().enumerate() {
            let cache = caches.as_deref_mut().map(|caches| &mut caches[layer]);
            let (next_nd, router) = block.forward(layer, hidden_nd, inputs, cache, context);
            hidden_nd = next_nd;
            routers.extend(router);
        }
        (self.finish(hidden_nd, inputs, context), routers)
    }
}
