//! One attention sub-layer: norm, projections, core, output projection.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use switchyard_config::StackKind;
use switchyard_kernels::{Attention, AttentionInputs, attention, dropout, rms_norm};

use crate::context::{ForwardContext, Site};
use crate::init::ParameterFactory;

/// Parameters of self-attention or cross-attention.
#[derive(Module, Debug)]
pub struct AttentionLayer {
    norm: Param<Tensor<1>>,
    q: Param<Tensor<2>>,
    k: Param<Tensor<2>>,
    v: Param<Tensor<2>>,
    o: Param<Tensor<2>>,
}

/// Keys and values of earlier positions, or of the encoder. `[batch * keys, num_heads * d_kv]`
#[derive(Debug, Clone)]
pub struct KeyValues {
    /// Keys.
    pub k: Tensor<2>,
    /// Values.
    pub v: Tensor<2>,
    /// Keys of each row.
    pub keys: usize,
}

/// Where an attention stands and what it may see.
#[derive(Clone, Copy)]
pub struct AttentionScope<'a> {
    /// The stack.
    pub stack: StackKind,
    /// The layer within it.
    pub layer: usize,
    /// Batch rows.
    pub batch: usize,
    /// Queries of a row.
    pub queries: usize,
    /// Attends to the encoder.
    pub cross: bool,
    /// Position of the first query.
    pub query_offset: usize,
    /// Bias of relative positions, `[num_heads, queries + keys - 1]`.
    pub relative_bias: Option<&'a Tensor<2>>,
    /// 1 where a key may be seen, `[batch, keys]`.
    pub key_mask: Option<&'a Tensor<2, Int>>,
}

impl AttentionLayer {
    pub(crate) fn new(factory: &ParameterFactory, prefix: &str) -> Self {
        Self {
            norm: factory.parameter(&format!("{prefix}.norm")),
            q: factory.parameter(&format!("{prefix}.q")),
            k: factory.parameter(&format!("{prefix}.k")),
            v: factory.parameter(&format!("{prefix}.v")),
            o: factory.parameter(&format!("{prefix}.o")),
        }
    }

    /// The normed input of this sub-layer, ready for the projections. `[n, d]`
    pub fn normed(&self, x_nd: Tensor<2>, context: &ForwardContext<'_>) -> Tensor<2> {
        let x_nd = rms_norm(x_nd, self.norm.val(), context.model.layer_norm_epsilon);
        context.tensor_parallel.copy_in(x_nd)
    }

    /// Keys and values of `source_nd`, which is the normed input or the encoder's output.
    pub fn key_values(&self, source_nd: Tensor<2>, batch: usize) -> KeyValues {
        let [tokens, _] = source_nd.dims();
        let k = source_nd.clone().matmul(self.k.val());
        KeyValues { k, v: source_nd.matmul(self.v.val()), keys: tokens / batch }
    }

    /// Attention of `normed_nd` over `memory`, with the output's dropout but without the residual.
    pub fn attend(
        &self,
        normed_nd: Tensor<2>,
        memory: &KeyValues,
        scope: AttentionScope<'_>,
        context: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let (core, output) = if scope.cross {
            (Site::CrossAttention, Site::CrossAttentionOutput)
        } else {
            (Site::SelfAttention, Site::SelfAttentionOutput)
        };
        let inputs = AttentionInputs {
            q: normed_nd.matmul(self.q.val()),
            k: memory.k.clone(),
            v: memory.v.clone(),
            relative_bias: scope.relative_bias.cloned(),
            key_mask: scope.key_mask.cloned(),
            segments: None,
        };
        let rules = Attention {
            batch: scope.batch,
            num_heads: context.model.num_heads,
            queries: scope.queries,
            keys: memory.keys,
            causal: scope.stack == StackKind::Decoder && !scope.cross,
            query_offset: scope.query_offset,
            dropout: context.dropout_rate,
            noise: context.key(scope.stack, scope.layer, core),
            first_row: context.first_row,
        };
        let out_nd = attention(inputs, rules).matmul(self.o.val());
        let out_nd = context.tensor_parallel.reduce_out(out_nd);
        let noise = context.noise(scope.stack, scope.layer, output, scope.queries);
        dropout(out_nd, context.dropout_rate, noise)
    }
}
