//! A stack: the bias table, a list of blocks and the final norm.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use switchyard_config::{ModelConfig, StackKind};
use switchyard_kernels::{dropout, mark_gradients, rms_norm};

use crate::context::{ForwardContext, Site};
use crate::init::ParameterFactory;
use crate::moe::RouterOutput;
use crate::t5::block::{Block, BlockCache, BlockInputs};
use crate::t5::relative_bias::relative_bias;

/// The number of a stack's first block where all blocks are numbered, the encoder's first.
fn first_block(stack: StackKind, model: &ModelConfig) -> usize {
    match stack {
        StackKind::Encoder => 0,
        StackKind::Decoder => model.layers(StackKind::Encoder),
    }
}

/// The block, all numbered and the encoder's first, with whose beginning a backward pass has the gradient of a parameter;
/// `None` for parameters that serve several blocks.
///
/// A backward pass goes from what was computed behind more operations to what was behind fewer. Keys and values of the
/// encoder's output are behind the encoder alone, so their gradients come after those of all decoder blocks.
pub fn block_number(parameter: &str, model: &ModelConfig) -> Option<usize> {
    [StackKind::Encoder, StackKind::Decoder].into_iter().find_map(|stack| {
        let (first, layers) = (first_block(stack, model), model.layers(stack));
        let within = parameter.strip_prefix(stack.name())?.strip_prefix('.')?;
        if within == "final_norm" {
            return (first + layers).checked_sub(1);
        }
        let (layer, part) = within.strip_prefix("block.")?.split_once('.')?;
        let layer = layer.parse().ok().filter(|&layer: &usize| layer < layers)?;
        if matches!(part, "cross_attention.k" | "cross_attention.v") {
            return first.checked_sub(1);
        }
        Some(first + layer)
    })
}

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
            if let Some(marks) = context.marks {
                let place = first_block(inputs.stack, context.model) + layer;
                hidden_nd = mark_gradients(hidden_nd, marks, place);
            }
            let (next_nd, router) = block.forward(layer, hidden_nd, inputs, cache, context);
            hidden_nd = next_nd;
            routers.extend(router);
        }
        (self.finish(hidden_nd, inputs, context), routers)
    }
}

#[cfg(test)]
mod tests {
    use switchyard_config::parameters::parameters;
    use switchyard_config::preset;

    use super::*;

    #[test]
    fn parameters_of_a_block_have_its_number_and_shared_ones_none() {
        let model = preset("tiny").expect("a preset");
        let (encoder, decoder) = (model.layers(StackKind::Encoder), model.layers(StackKind::Decoder));
        let number = |name: &str| block_number(name, &model);
        assert_eq!(number("encoder.block.1.self_attention.q"), Some(1));
        assert_eq!(number("decoder.block.1.self_attention.q"), Some(encoder + 1));
        assert_eq!(number("decoder.block.1.cross_attention.q"), Some(encoder + 1));
        assert_eq!(number("decoder.block.1.cross_attention.v"), Some(encoder - 1));
        assert_eq!(number("encoder.final_norm"), Some(encoder - 1));
        assert_eq!(number("decoder.final_norm"), Some(encoder + decoder - 1));
        assert_eq!(number(&format!("decoder.block.{decoder}.self_attention.q")), None);
        let shared: Vec<String> = (parameters(&model).into_iter().map(|spec| spec.name))
            .filter(|name| number(name).is_none())
            .collect();
        assert!(shared.iter().all(|name| !name.contains("block")), "{shared:?}");
        assert!(shared.contains(&"encoder.relative_bias".to_owned()), "{shared:?}");
    }
}
