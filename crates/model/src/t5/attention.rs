//! One attention sub-layer: norm, projections, core, output projection.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use switchyard_config::StackKind;
use switchyard_kernels::{
    Attention, AttentionInputs, attention, dropout, rms_norm, update_in_place, with_values,
};

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

/// Keys and values of earlier positions, or of the encoder. `[batch * room, num_heads * d_kv]`
#[derive(Debug, Clone)]
pub struct KeyValues {
    /// Keys.
    pub k: Tensor<2>,
    /// Values.
    pub v: Tensor<2>,
    /// Keys of each batch row.
    pub keys: usize,
    /// Keys that each batch row has room for; the first `keys` are there.
    pub room: usize,
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
        let (k, keys) = (source_nd.clone().matmul(self.k.val()), tokens / batch);
        KeyValues { k, v: source_nd.matmul(self.v.val()), keys, room: keys }
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
        let q = normed_nd.matmul(self.q.val());
        // The heads of this device, which may be a part.
        let num_heads = q.dims()[1] / context.model.d_kv;
        let inputs = AttentionInputs {
            q,
            k: memory.k.clone(),
            v: memory.v.clone(),
            relative_bias: scope.relative_bias.cloned(),
            key_mask: scope.key_mask.cloned(),
            segments: None,
        };
        let rules = Attention {
            batch: scope.batch,
            num_heads,
            queries: scope.queries,
            keys: memory.keys,
            key_room: memory.room,
            causal: scope.stack == StackKind::Decoder && !scope.cross,
            query_offset: scope.query_offset,
            dropout: context.dropout_rate,
            noise: context.key(scope.stack, scope.layer, core),
            first_row: context.first_row,
            first_head: context.tensor_parallel.columns(num_heads).first,
        };
        let out_nd = attention(inputs, rules).matmul(self.o.val());
        let out_nd = context.tensor_parallel.reduce_out(out_nd);
        let noise = context.noise(scope.stack, scope.layer, output, scope.queries);
        dropout(out_nd, context.dropout_rate, noise)
    }
}

/// Positions for which a fresh cache has room.
const FIRST_ROOM: usize = 32;

impl KeyValues {
    /// These positions, then the `later` ones, in every batch row.
    ///
    /// Writes into the room there is; without any left, moves to twice as much, so that a position
    /// costs the same however many came before. Carries no gradient.
    pub(crate) fn followed_by(self, later: &Self, batch: usize) -> Self {
        let keys = self.keys + later.keys;
        let room = if keys <= self.room { self.room } else { (2 * keys).max(FIRST_ROOM) };
        let append = |earlier: Tensor<2>, later: &Tensor<2>| {
            let [_, width] = earlier.dims();
            let (had, has) = (self.room * width, room * width);
            let grown = if room == self.room {
                earlier
            } else {
                let wider = Tensor::zeros([batch * room, width], &earlier.device().inner());
                let copy = |from: &[f32], to: &mut [f32]| {
                    for (to, from) in to.chunks_exact_mut(has).zip(from.chunks_exact(had)) {
                        to[..self.keys * width].copy_from_slice(&from[..self.keys * width]);
                    }
                };
                with_values(earlier, |from| update_in_place(wider, |to| copy(from, to)))
            };
            with_values(later.clone(), |from| {
                update_in_place(grown, |to| {
                    let rows = to.chunks_exact_mut(has).zip(from.chunks_exact(from.len() / batch));
                    rows.for_each(|(to, from)| to[self.keys * width..keys * width].copy_from_slice(from));
                })
            })
        };
        Self { k: append(self.k, &later.k), v: append(self.v, &later.v), keys, room }
    }
}
