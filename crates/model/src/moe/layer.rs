//! A sparse feed-forward sub-layer: norm, router, dispatch, experts, combine.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use switchyard_config::ModelConfig;
use switchyard_config::plan::RoutingSemantics;
use switchyard_kernels::{RouteOptions, Routing, rms_norm_beside, router_logits};

use crate::context::{Capacity, ForwardContext, Site};
use crate::init::ParameterFactory;
use crate::moe::experts::Experts;
use crate::moe::router::router_of;
use crate::t5::BlockInputs;

/// Parameters of a sparse layer.
#[derive(Module, Debug)]
pub struct MoeLayer {
    norm: Param<Tensor<1>>,
    router: Param<Tensor<2>>,
    router_bias: Option<Param<Tensor<1>>>,
    experts: Experts,
}

/// What a sparse layer says of its routing; losses are made from it, never kept aside.
#[derive(Debug, Clone)]
pub struct RouterOutput {
    /// The layer within its stack.
    pub layer: usize,
    /// Logits before the softmax. `[n, num_experts]`
    pub logits_ne: Tensor<2>,
    /// Plan, gates and loss quantities.
    pub routing: Routing,
}

impl MoeLayer {
    pub(crate) fn new(factory: &ParameterFactory, config: &ModelConfig, prefix: &str) -> Self {
        Self {
            norm: factory.parameter(&format!("{prefix}.norm")),
            router: factory.parameter(&format!("{prefix}.router")),
            router_bias: config.router_bias.then(|| factory.parameter(&format!("{prefix}.router_bias"))),
            experts: Experts::new(factory, config, &format!("{prefix}.experts")),
        }
    }

    /// The sub-layer with its residual. `[n, d] -> [n, d]`
    ///
    /// # Source
    /// Switch Transformer, section 2 (arXiv:2101.03961).
    pub fn forward(
        &self,
        x_nd: Tensor<2>,
        layer: usize,
        inputs: &BlockInputs,
        context: &ForwardContext<'_>,
    ) -> (Tensor<2>, RouterOutput) {
        let [x_nd, normed_nd] = rms_norm_beside(x_nd, self.norm.val(), context.model.layer_norm_epsilon);
        let [logits_ne, normed_nd] = self.logits(normed_nd, layer, inputs, context);
        let options = self.options(inputs, context);
        let routing = router_of(context.routing.router).route(logits_ne.clone(), options);
        let slots = context.dispatcher.slots(&routing.plan);
        let routing = routing.widened(slots);

        let tokens_nd = context.tensor_parallel.copy_in(normed_nd);
        let hidden = context.noise(inputs.stack, layer, Site::Expert, inputs.row_tokens);
        let places = (context.expert_dropout > 0.0).then_some(hidden);
        let dispatched = context.dispatcher.dispatch(tokens_nd, &routing.plan, places);
        let counts = dispatched.counts.clone();
        let outputs_lcd = self.experts.forward(dispatched, hidden.key, context);
        let gates = context.tensor_parallel.copy_in_gates(routing.gates.clone());
        let noise = context.noise(inputs.stack, layer, Site::FeedForwardOutput, inputs.row_tokens);
        let out_nd = context.residual(x_nd, noise, |residual_nd| {
            context.dispatcher.combine(outputs_lcd, gates, &routing.plan, &counts, residual_nd)
        });
        (out_nd, RouterOutput { layer, logits_ne, routing })
    }

    /// Router logits, `[n, e]`, in the format of the router's matrix, and the input for the experts.
    fn logits(
        &self,
        normed_nd: Tensor<2>,
        layer: usize,
        inputs: &BlockInputs,
        context: &ForwardContext<'_>,
    ) -> [Tensor<2>; 2] {
        let noise = context.noise(inputs.stack, layer, Site::RouterJitter, inputs.row_tokens);
        let jitter = context.router_jitter_noise;
        let [logits_ne, normed_nd] = router_logits(normed_nd, self.router.val(), jitter, noise);
        let logits_ne = match &self.router_bias {
            Some(bias) => logits_ne + bias.val().unsqueeze(),
            None => logits_ne,
        };
        [logits_ne, normed_nd]
    }

    fn options(&self, inputs: &BlockInputs, context: &ForwardContext<'_>) -> RouteOptions {
        let routing = context.routing;
        let hugging_face = routing.semantics == RoutingSemantics::Hf;
        let groups = match (hugging_face, context.capacity, routing.group_rows) {
            (true, ..) => inputs.batch,
            // Where nothing is dropped, groups change no output: any number of rows may decode.
            (false, Capacity::Unlimited, _) | (false, _, 0) => 1,
            (false, _, rows) => {
                assert!(
                    inputs.batch.is_multiple_of(rows),
                    "{} batch rows are not whole routing groups of {rows}: rows left over would share \
                     the capacity of others, so pad the batch to a multiple of routing.group_rows",
                    inputs.batch
                );
                inputs.batch / rows
            }
        };
        let tokens = inputs.batch * inputs.row_tokens / groups;
        let expert_capacity = match context.capacity {
            Capacity::Training => Some(routing.capacity(tokens, context.model.num_experts, true)),
            Capacity::Evaluation => Some(routing.capacity(tokens, context.model.num_experts, false)),
            Capacity::Unlimited => None,
        };
        RouteOptions {
            groups,
            expert_capacity,
            token_mask: if hugging_face { None } else { inputs.token_mask.clone() },
            force_balanced: routing.force_balanced,
        }
    }
}
