//! Gradients block by block: what a block keeps for its backward pass lives only while it runs.
//!
//! The first pass keeps the state before each block and nothing else. The second walks the blocks from
//! the last to the first, runs each one again and at once backward. Routing and noise are functions of
//! states and counters, so both passes take the same decisions; losses come from the first.

use burn::module::Module;
use burn::tensor::{Gradients, Int, Tensor};
use switchyard_kernels::{Values, add, with_gradient};

use crate::context::ForwardContext;
use crate::init::leaf;
use crate::model::{EncoderOutput, LossOutput, Seq2SeqBatch, SwitchTransformer};
use crate::moe::RouterOutput;
use crate::t5::{BlockInputs, Stack};

/// A stack after its first pass.
struct Walked {
    inputs: BlockInputs,
    /// State before each block, and after the last.
    states: Vec<Tensor<2>>,
    /// Router outputs that the router losses are functions of; one for each sparse layer.
    routers: Vec<RouterOutput>,
}

/// What flows back from a stack.
struct Pulled {
    /// Gradient of the state before the first block.
    state_nd: Tensor<2>,
    relative_bias: Tensor<2>,
    encoder_nd: Option<Tensor<2>>,
}

impl SwitchTransformer {
    /// The loss of `batch`, as [`loss`](Self::loss), and the gradients of what `total` makes of it.
    ///
    /// `take` gets every gradient by the name of its parameter; that of the shared embedding comes in
    /// parts, which the caller adds up.
    ///
    /// # Collective
    /// Ranks that run their forward passes together must call this together.
    pub fn gradients_by_block(
        &self,
        batch: &Seq2SeqBatch,
        z_loss: f64,
        context: &ForwardContext<'_>,
        total: impl FnOnce(&LossOutput) -> Tensor<1>,
        mut take: impl FnMut(&str, Values),
    ) -> (LossOutput, Tensor<1>) {
        let plain = self.valid();
        let inputs = plain.encoder_inputs(&batch.input_mask, context);
        let encoder = walk(plain.encoder(), plain.embed(batch.input_ids.clone(), context), inputs, context);
        let hidden_nd = plain.encoder().finish(encoder.last(), &encoder.inputs, context);
        let (mask, rows) = (batch.input_mask.clone(), batch.rows);
        let encoded = EncoderOutput { hidden_nd, rows, mask, routers: Vec::new() };
        let inputs = plain.decoder_inputs(batch, &encoded, context);
        let ids = batch.decoder_input_ids.clone();
        let decoder = walk(plain.decoder(), plain.embed(ids.clone(), context), inputs, context);

        let decoded = followed(decoder.last());
        let hidden_nd = self.decoder().finish(decoded.clone(), &decoder.inputs, context);
        let cross_entropy = self.cross_entropy(hidden_nd, batch, z_loss, context);
        let (encoder_routers, decoder_routers) = (encoder.routers.clone(), decoder.routers.clone());
        let output = LossOutput::new(cross_entropy, encoder_routers, decoder_routers, context);
        let loss = total(&output);
        let mut gradients = loss.clone().backward();
        self.take_gradients(&mut gradients, &mut take);

        let state_nd = pulled(&decoded, &mut gradients);
        let back = self.pull(self.decoder(), &decoder, state_nd, &mut gradients, context, &mut take);
        let encoder_gradient = back.encoder_nd.clone().expect("a decoder reads the encoder");
        self.pull_start(self.decoder(), ids, &decoder.inputs, back, context, &mut take);

        let ended = followed(encoder.last());
        let hidden_nd = self.encoder().finish(ended.clone(), &encoder.inputs, context);
        let mut through = with_gradient(hidden_nd, encoder_gradient).backward();
        self.take_gradients(&mut through, &mut take);
        let state_nd = pulled(&ended, &mut through);
        let back = self.pull(self.encoder(), &encoder, state_nd, &mut gradients, context, &mut take);
        let ids = batch.input_ids.clone();
        self.pull_start(self.encoder(), ids, &encoder.inputs, back, context, &mut take);
        (output, loss)
    }

    /// Walks a stack back from the gradient of its last state; `of_routers` has those of the router losses.
    fn pull(
        &self,
        stack: &Stack,
        walked: &Walked,
        mut state_nd: Tensor<2>,
        of_routers: &mut Gradients,
        context: &ForwardContext<'_>,
        take: &mut impl FnMut(&str, Values),
    ) -> Pulled {
        let (mut bias_sum, mut encoder_sum) = (None, None);
        let mut routers = walked.routers.iter().rev().peekable();
        for (layer, block) in stack.blocks().iter().enumerate().rev() {
            let before = followed(walked.states[layer].clone());
            let inputs = BlockInputs {
                relative_bias: followed(walked.inputs.relative_bias.clone()),
                encoder: walked.inputs.encoder.clone().map(followed),
                ..walked.inputs.clone()
            };
            let (after, router) = block.forward(layer, before.clone(), &inputs, None, context);
            let mut seed = with_gradient(after, state_nd);
            if let Some(first) = routers.next_if(|first| first.layer == layer) {
                let again = router.expect("the same layers are sparse").routing;
                if let Some(gradient) = first.routing.mean_probability.grad_remove(of_routers) {
                    seed = seed + with_gradient(again.mean_probability, gradient);
                }
                if let Some(gradient) = first.routing.z.grad_remove(of_routers) {
                    seed = seed + with_gradient(again.z, gradient);
                }
            }
            let mut gradients = seed.backward();
            self.take_gradients(&mut gradients, &mut *take);
            state_nd = pulled(&before, &mut gradients);
            let bias = pulled(&inputs.relative_bias, &mut gradients);
            bias_sum = Some(summed(bias_sum, bias));
            if let Some(encoder) = &inputs.encoder {
                encoder_sum = Some(summed(encoder_sum, pulled(encoder, &mut gradients)));
            }
        }
        Pulled {
            state_nd,
            relative_bias: bias_sum.expect("a stack has one block at least"),
            encoder_nd: encoder_sum,
        }
    }

    /// The backward pass of what comes before the first block of a stack.
    fn pull_start(
        &self,
        stack: &Stack,
        ids: Tensor<1, Int>,
        inputs: &BlockInputs,
        back: Pulled,
        context: &ForwardContext<'_>,
        take: &mut impl FnMut(&str, Values),
    ) {
        let embedded_nd = stack.begin(self.embed(ids, context), inputs, context);
        let bias = stack.bias(inputs.stack, inputs.row_tokens, 0, context.model);
        let seed = with_gradient(embedded_nd, back.state_nd) + with_gradient(bias, back.relative_bias);
        self.take_gradients(&mut seed.backward(), take);
    }
}

impl Walked {
    fn last(&self) -> Tensor<2> {
        self.states.last().cloned().expect("there is a state before the first block")
    }
}

/// The first pass of a stack.
fn walk(stack: &Stack, embedded_nd: Tensor<2>, inputs: BlockInputs, context: &ForwardContext<'_>) -> Walked {
    let mut states = vec![stack.begin(embedded_nd, &inputs, context)];
    let mut routers = Vec::new();
    for (layer, block) in stack.blocks().iter().enumerate() {
        let (next_nd, router) = block.forward(layer, states[layer].clone(), &inputs, None, context);
        states.push(next_nd);
        routers.extend(router.map(|mut router| {
            router.routing.mean_probability = followed(router.routing.mean_probability);
            router.routing.z = followed(router.routing.z);
            router
        }));
    }
    Walked { inputs, states, routers }
}

/// A leaf of a graph of its own with the values of `tensor`.
fn followed<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    leaf(tensor.autodiff())
}

/// The gradient of a leaf that the loss depends on.
fn pulled<const D: usize>(leaf: &Tensor<D>, gradients: &mut Gradients) -> Tensor<D> {
    leaf.grad_remove(gradients).expect("the loss depends on every state, bias and encoder output")
}

fn summed(sum: Option<Tensor<2>>, part: Tensor<2>) -> Tensor<2> {
    match sum {
        Some(sum) => add(sum, part),
        None => part,
    }
}
