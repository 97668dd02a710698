//! One dense feed-forward sub-layer.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use switchyard_config::{ModelConfig, StackKind};
use switchyard_kernels::{FeedForwardWeights, TokenNoise, feed_forward, rms_norm_beside};

use crate::context::{ForwardContext, Site};
use crate::init::ParameterFactory;

/// Parameters of a dense layer: `wi` and `wo`, or `wi_0`, `wi_1` and `wo` when gated.
#[derive(Module, Debug)]
pub struct DenseLayer {
    norm: Param<Tensor<1>>,
    wi: Option<Param<Tensor<2>>>,
    wi_0: Option<Param<Tensor<2>>>,
    wi_1: Option<Param<Tensor<2>>>,
    wo: Param<Tensor<2>>,
}

impl DenseLayer {
    pub(crate) fn new(factory: &ParameterFactory, config: &ModelConfig, prefix: &str) -> Self {
        let parameter = |name: &str| factory.parameter(&format!("{prefix}.{name}"));
        Self {
            norm: factory.parameter(&format!("{prefix}.norm")),
            wi: (!config.gated).then(|| parameter("wi")),
            wi_0: config.gated.then(|| parameter("wi_0")),
            wi_1: config.gated.then(|| parameter("wi_1")),
            wo: parameter("wo"),
        }
    }

    /// The sub-layer with its residual. `[n, d] -> [n, d]`
    pub fn forward(
        &self,
        x_nd: Tensor<2>,
        stack: StackKind,
        layer: usize,
        row_tokens: usize,
        context: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let [x_nd, normed_nd] = rms_norm_beside(x_nd, self.norm.val(), context.model.layer_norm_epsilon);
        let activated = self.wi.as_ref().or(self.wi_0.as_ref()).expect("a layer is gated or not");
        let weights = FeedForwardWeights {
            wi: activated.val(),
            wi_gate: self.wi_1.as_ref().map(Param::val),
            wo: self.wo.val(),
        };
        let [_, d_ff] = weights.wi.dims();
        let columns = Some(context.tensor_parallel.columns(d_ff));
        let hidden = TokenNoise { columns, ..context.noise(stack, layer, Site::FeedForward, row_tokens) };
        let normed_nd = context.tensor_parallel.copy_in(normed_nd);
        let (activation, rate) = (kernel_activation(context.model), context.dropout_rate);
        let output = context.noise(stack, layer, Site::FeedForwardOutput, row_tokens);
        context.residual(x_nd, output, |residual_nd| {
            feed_forward(normed_nd, weights, activation, rate, hidden, residual_nd)
        })
    }
}

/// The kernels' name of the model's activation.
pub(crate) fn kernel_activation(config: &ModelConfig) -> switchyard_kernels::Activation {
    use switchyard_config::Activation as Model;
    use switchyard_kernels::Activation as Kernel;
    match config.activation {
        Model::Relu => Kernel::Relu,
        Model::GeluTanh => Kernel::GeluTanh,
        Model::Gelu => Kernel::Gelu,
        Model::Silu => Kernel::Silu,
    }
}
