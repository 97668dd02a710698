//! The experts of one layer, their matrices stacked.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use switchyard_config::ModelConfig;
use switchyard_kernels::{ExpertWeights, HiddenDropout, NoiseKey, expert_feed_forward};

use crate::context::ForwardContext;
use crate::dispatcher::Dispatched;
use crate::init::ParameterFactory;
use crate::t5::kernel_activation;

/// Stacked matrices: `wi` `[l, d, f]` (or `wi_0`, `wi_1` when gated) and `wo` `[l, f, d]`.
#[derive(Module, Debug)]
pub struct Experts {
    wi: Option<Param<Tensor<3>>>,
    wi_0: Option<Param<Tensor<3>>>,
    wi_1: Option<Param<Tensor<3>>>,
    wo: Param<Tensor<3>>,
}

impl Experts {
    pub(crate) fn new(factory: &ParameterFactory, config: &ModelConfig, prefix: &str) -> Self {
        let parameter = |name: &str| factory.parameter(&format!("{prefix}.{name}"));
        Self {
            wi: (!config.gated).then(|| parameter("wi")),
            wi_0: config.gated.then(|| parameter("wi_0")),
            wi_1: config.gated.then(|| parameter("wi_1")),
            wo: parameter("wo"),
        }
    }

    /// Every expert on its own slots; outputs are shaped as these. `[l, c, d] -> [l, c, d]`
    pub fn forward(&self, dispatched: Dispatched, key: NoiseKey, context: &ForwardContext<'_>) -> Tensor<3> {
        let activated = self.wi.as_ref().or(self.wi_0.as_ref()).expect("experts are gated or not");
        let weights = ExpertWeights {
            wi: activated.val(),
            wi_gate: self.wi_1.as_ref().map(Param::val),
            wo: self.wo.val(),
        };
        let [_, _, d_ff] = weights.wi.dims();
        let columns = Some(context.tensor_parallel.columns(d_ff));
        let dropout = HiddenDropout { rate: context.expert_dropout, key, columns };
        let activation = kernel_activation(context.model);
        let inputs =
            [Some(activated), self.wi_1.as_ref()].into_iter().flatten().map(|matrix| matrix.id.val());
        let deferral = context.deferred.map(|deferred| deferred.of(self.wo.id.val(), inputs));
        let Dispatched { slots_lcd, rows, way, .. } = dispatched;
        expert_feed_forward(slots_lcd, weights, activation, dropout, rows, way, deferral)
    }
}
