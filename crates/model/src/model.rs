//! The whole encoder-decoder: embedding, two stacks, head and losses.

use std::collections::HashMap;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor};
use switchyard_config::plan::PrecisionMode;
use switchyard_config::{Coordinates, MeshShape, ModelConfig, StackKind};
use switchyard_kernels::{
    CrossEntropy, CrossEntropyOutput, HeadLayout, cross_entropy, embedding, embedding_and_table,
    embedding_shard, embedding_two, int_tensor, logits,
};

use crate::context::ForwardContext;
use crate::init::ParameterFactory;
use crate::moe::{RouterLosses, RouterOutput, router_losses};
use crate::t5::{BlockInputs, DecoderCache, Stack};

/// T5, T5 v1.1, mT5 or Switch Transformer: the config decides.
#[derive(Module, Debug)]
pub struct SwitchTransformer {
    shared: SharedEmbedding,
    encoder: Stack,
    decoder: Stack,
    lm_head: Option<Param<Tensor<2>>>,
    /// Format of every parameter, which one that is not drawn yet does not tell.
    #[module(skip)]
    pub(crate) formats: Arc<HashMap<String, DType>>,
}

/// The embedding of both stacks and, when tied, of the head.
#[derive(Module, Debug)]
struct SharedEmbedding {
    embedding: Param<Tensor<2>>,
}

/// One batch on the device, rows padded to one length.
#[derive(Debug, Clone)]
pub struct Seq2SeqBatch {
    /// Rows.
    pub rows: usize,
    /// Encoder ids, `[rows * inputs_length]`.
    pub input_ids: Tensor<1, Int>,
    /// 1 for encoder tokens, 0 for padding. `[rows, inputs_length]`
    pub input_mask: Tensor<2, Int>,
    /// Decoder inputs, `[rows * targets_length]`.
    pub decoder_input_ids: Tensor<1, Int>,
    /// 1 where decoder self-attention may look; all may when absent. `[rows, targets_length]`
    pub decoder_mask: Option<Tensor<2, Int>>,
    /// Targets, `[rows * targets_length]`.
    pub target_ids: Tensor<1, Int>,
    /// 1 where the target counts, 0 where not. `[rows * targets_length]`
    pub weights: Tensor<1>,
}

/// The encoder's output and what the decoder needs to read it.
#[derive(Debug, Clone)]
pub struct EncoderOutput {
    /// `[rows * inputs_length, d_model]`
    pub hidden_nd: Tensor<2>,
    /// `[rows, inputs_length]`
    pub mask: Tensor<2, Int>,
    /// Rows.
    pub rows: usize,
    /// One for each sparse layer.
    pub routers: Vec<RouterOutput>,
}

/// Everything the loss of a step is made of.
#[derive(Debug)]
pub struct LossOutput {
    /// Sums over weighted positions.
    pub cross_entropy: CrossEntropyOutput,
    /// Router losses of the stacks that have sparse layers.
    pub router_losses: Vec<RouterLosses>,
    /// Router outputs of the encoder's sparse layers.
    pub encoder_routers: Vec<RouterOutput>,
    /// Router outputs of the decoder's sparse layers.
    pub decoder_routers: Vec<RouterOutput>,
}

impl SwitchTransformer {
    /// A model whose parameters are drawn from `seed` when first used.
    pub fn new(config: &ModelConfig, seed: u64, device: &Device) -> Self {
        let at = MeshShape::SOLO.coordinates(0);
        Self::part(config, seed, device, MeshShape::SOLO, at, PrecisionMode::Fp32)
    }

    /// What the rank `at` of `mesh` holds of [`new`](Self::new): of every parameter the
    /// [`held_part`](switchyard_config::partition::held_part), with the values that the whole has there.
    ///
    /// Each parameter is rounded to the format that it has in `precision`. A forward pass needs the
    /// dispatcher and the tensor parallelism of the same mesh in its context.
    pub fn part(
        config: &ModelConfig,
        seed: u64,
        device: &Device,
        mesh: MeshShape,
        at: Coordinates,
        precision: PrecisionMode,
    ) -> Self {
        let factory = ParameterFactory::new(config, seed, device, mesh, at, precision);
        Self {
            shared: SharedEmbedding { embedding: factory.parameter("shared.embedding") },
            encoder: Stack::new(&factory, config, StackKind::Encoder),
            decoder: Stack::new(&factory, config, StackKind::Decoder),
            lm_head: (!config.tie_word_embeddings).then(|| factory.parameter("lm_head")),
            formats: factory.formats(),
        }
    }

    /// Where the parameters live and, unless it differentiates, where inputs go.
    pub fn device(&self) -> Device {
        self.shared.embedding.lazy_device()
    }

    /// The encoder stack.
    pub fn encoder(&self) -> &Stack {
        &self.encoder
    }

    /// The decoder stack.
    pub fn decoder(&self) -> &Stack {
        &self.decoder
    }

    /// Embeddings of `ids`, `[n]`: `[n, d_model]`.
    pub fn embed(&self, ids: Tensor<1, Int>, context: &ForwardContext<'_>) -> Tensor<2> {
        let (table, whole) = (self.shared.embedding.val(), 0..context.model.vocab_size);
        let here = context.tensor_parallel.vocabulary(whole.end);
        let embedded_nd =
            if here == whole { embedding(table, ids) } else { embedding_shard(table, ids, here.start) };
        context.tensor_parallel.reduce_out(embedded_nd)
    }

    /// What the encoder's blocks read. `input_mask` is `[rows, inputs_length]`.
    pub fn encoder_inputs(&self, input_mask: &Tensor<2, Int>, context: &ForwardContext<'_>) -> BlockInputs {
        let [rows, length] = input_mask.dims();
        BlockInputs {
            stack: StackKind::Encoder,
            batch: rows,
            row_tokens: length,
            position: 0,
            relative_bias: self.encoder.bias(StackKind::Encoder, length, 0, context.model),
            self_mask: Some(input_mask.clone()),
            token_mask: Some(input_mask.clone().reshape([rows * length])),
            encoder: None,
            encoder_mask: None,
        }
    }

    /// What the decoder's blocks read when all targets are given.
    pub fn decoder_inputs(
        &self,
        batch: &Seq2SeqBatch,
        encoder: &EncoderOutput,
        context: &ForwardContext<'_>,
    ) -> BlockInputs {
        let length = batch.decoder_input_ids.dims()[0] / batch.rows;
        BlockInputs {
            stack: StackKind::Decoder,
            batch: batch.rows,
            row_tokens: length,
            position: 0,
            relative_bias: self.decoder.bias(StackKind::Decoder, length, 0, context.model),
            self_mask: batch.decoder_mask.clone(),
            token_mask: Some(batch.weights.clone().not_equal_elem(0.0).int()),
            encoder: Some(encoder.hidden_nd.clone()),
            encoder_mask: Some(encoder.mask.clone()),
        }
    }

    /// Runs the encoder.
    pub fn encode(
        &self,
        input_ids: Tensor<1, Int>,
        input_mask: Tensor<2, Int>,
        context: &ForwardContext<'_>,
    ) -> EncoderOutput {
        self.encode_embedded(self.embed(input_ids, context), input_mask, context)
    }

    fn encode_embedded(
        &self,
        embedded_nd: Tensor<2>,
        input_mask: Tensor<2, Int>,
        context: &ForwardContext<'_>,
    ) -> EncoderOutput {
        let inputs = self.encoder_inputs(&input_mask, context);
        let (hidden_nd, routers) = self.encoder.forward(embedded_nd, &inputs, None, context);
        EncoderOutput { hidden_nd, rows: inputs.batch, mask: input_mask, routers }
    }

    /// Runs both stacks and the loss.
    ///
    /// # Shapes
    /// See [`Seq2SeqBatch`]; `z_loss` is the coefficient of the output softmax's z term.
    pub fn loss(&self, batch: &Seq2SeqBatch, z_loss: f64, context: &ForwardContext<'_>) -> LossOutput {
        // All uses of the table at once: its gradient, as large as the table, is then built once.
        let ids = [batch.input_ids.clone(), batch.decoder_input_ids.clone()];
        let here = context.tensor_parallel.vocabulary(context.model.vocab_size);
        let shard = context.tensor_parallel.splits().then_some(here.start);
        let table = self.shared.embedding.val();
        let ([encoded_nd, decoded_nd], head) = match &self.lm_head {
            Some(head) => (embedding_two(table, ids, shard), head.val()),
            None => {
                let [encoded_nd, decoded_nd, table] = embedding_and_table(table, ids, shard);
                ([encoded_nd, decoded_nd], table)
            }
        };
        let [encoded_nd, decoded_nd] =
            [encoded_nd, decoded_nd].map(|embedded_nd| context.tensor_parallel.reduce_out(embedded_nd));
        let mut encoder = self.encode_embedded(encoded_nd, batch.input_mask.clone(), context);
        let encoder_routers = std::mem::take(&mut encoder.routers);
        let inputs = self.decoder_inputs(batch, &encoder, context);
        let (hidden_nd, decoder_routers) = self.decoder.forward(decoded_nd, &inputs, None, context);
        let cross_entropy = self.cross_entropy_under(head, hidden_nd, batch, z_loss, context);
        LossOutput::new(cross_entropy, encoder_routers, decoder_routers, context)
    }

    /// Cross-entropy of the batch's targets under the decoder's output `[n, d_model]`.
    pub fn cross_entropy(
        &self,
        hidden_nd: Tensor<2>,
        batch: &Seq2SeqBatch,
        z_loss: f64,
        context: &ForwardContext<'_>,
    ) -> CrossEntropyOutput {
        self.cross_entropy_under(self.head().0, hidden_nd, batch, z_loss, context)
    }

    /// [`cross_entropy`](Self::cross_entropy) under the values of the head.
    fn cross_entropy_under(
        &self,
        head: Tensor<2>,
        hidden_nd: Tensor<2>,
        batch: &Seq2SeqBatch,
        z_loss: f64,
        context: &ForwardContext<'_>,
    ) -> CrossEntropyOutput {
        let (_, layout) = self.head();
        let device = hidden_nd.device().inner();
        let rules = CrossEntropy { layout, scale: output_scale(context.model), z_coefficient: z_loss };
        let loss_scale = context.loss_scale.cloned().unwrap_or_else(|| Tensor::ones([1], &device));
        cross_entropy(
            context.tensor_parallel.copy_in(hidden_nd),
            head,
            batch.target_ids.clone(),
            batch.weights.clone(),
            loss_scale,
            rules,
            context.tensor_parallel.vocabulary_shard(context.model.vocab_size),
        )
    }

    /// One decoding step: logits of the token after `ids`, which stand at `position` in every row.
    ///
    /// # Shapes
    /// `ids`: `[rows]`; returns `[rows, vocab_size]`.
    pub fn decode_step(
        &self,
        ids: Tensor<1, Int>,
        position: usize,
        encoder: &EncoderOutput,
        cache: &mut DecoderCache,
        context: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let bias = |position| self.decoder.bias(StackKind::Decoder, 1, position, context.model);
        let inputs = BlockInputs {
            stack: StackKind::Decoder,
            batch: encoder.rows,
            row_tokens: 1,
            position,
            relative_bias: cache.bias(position, bias),
            self_mask: None,
            token_mask: None,
            encoder: Some(encoder.hidden_nd.clone()),
            encoder_mask: Some(encoder.mask.clone()),
        };
        let (hidden_nd, _) =
            self.decoder.forward(self.embed(ids, context), &inputs, Some(&mut cache.blocks), context);
        self.logits(hidden_nd, context)
    }

    /// Logits of every row of `hidden_nd`, without gradient. `[n, d_model] -> [n, vocab_size]`
    pub fn logits(&self, hidden_nd: Tensor<2>, context: &ForwardContext<'_>) -> Tensor<2> {
        let (head, layout) = self.head();
        let hidden_nd = context.tensor_parallel.copy_in(hidden_nd * output_scale(context.model));
        context.tensor_parallel.gather_vocabulary(logits(hidden_nd, head, layout))
    }

    fn head(&self) -> (Tensor<2>, HeadLayout) {
        match &self.lm_head {
            Some(head) => (head.val(), HeadLayout::ModelByVocabulary),
            None => (self.shared.embedding.val(), HeadLayout::VocabularyByModel),
        }
    }
}

/// T5 v1.0 and Switch scale what enters the tied head.
fn output_scale(config: &ModelConfig) -> f64 {
    if config.scale_decoder_outputs { (config.d_model as f64).powf(-0.5) } else { 1.0 }
}

impl LossOutput {
    /// Joins the cross-entropy and the router outputs of both stacks, whose losses it computes.
    pub(crate) fn new(
        cross_entropy: CrossEntropyOutput,
        encoder_routers: Vec<RouterOutput>,
        decoder_routers: Vec<RouterOutput>,
        context: &ForwardContext<'_>,
    ) -> Self {
        let stacks = [(&encoder_routers, StackKind::Encoder), (&decoder_routers, StackKind::Decoder)];
        let router_losses = stacks
            .into_iter()
            .filter_map(|(outputs, stack)| {
                let every_layer = outputs.len() == context.model.layers(stack);
                router_losses(outputs, context.routing, every_layer)
            })
            .collect();
        Self { cross_entropy, router_losses, encoder_routers, decoder_routers }
    }
}

impl Seq2SeqBatch {
    /// A batch from padded ids: padding is masked in the encoder and carries no loss.
    ///
    /// # Shapes
    /// `input_ids`: `[rows * inputs_length]`; the other two `[rows * targets_length]`.
    pub fn from_ids(
        rows: usize,
        input_ids: Vec<i32>,
        decoder_input_ids: Vec<i32>,
        target_ids: Vec<i32>,
        pad_token_id: i32,
        device: &Device,
    ) -> Self {
        let ids = |ids: Vec<i32>| {
            let count = ids.len();
            int_tensor(ids, [count], device)
        };
        Self::of_tensors(rows, [ids(input_ids), ids(decoder_input_ids), ids(target_ids)], pad_token_id)
    }

    /// A batch from input, decoder and target ids on the device, as [`from_ids`](Self::from_ids).
    pub fn of_tensors(rows: usize, ids: [Tensor<1, Int>; 3], pad_token_id: i32) -> Self {
        let [input_ids, decoder_input_ids, target_ids] = ids;
        let [inputs] = input_ids.dims();
        let counts = |ids: &Tensor<1, Int>| ids.clone().not_equal_elem(pad_token_id);
        Self {
            rows,
            input_mask: counts(&input_ids).int().reshape([rows, inputs / rows]),
            weights: counts(&target_ids).float().cast(DType::F32),
            input_ids,
            decoder_input_ids,
            decoder_mask: None,
            target_ids,
        }
    }
}
