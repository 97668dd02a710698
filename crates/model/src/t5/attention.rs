//! One attention sub-layer: norm, projections, core, output projection.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use switchyard_config::StackKind;
use switchyard_kernels::{
    Attention, AttentionInputs, ValuesMut, attention, project, project_onto, project_three, project_two,
    rms_norm_beside, update_in_place, with_values,
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

    /// The residual and the normed input of this sub-layer, ready for the projections. `[n, d]`
    pub fn normed(&self, x_nd: Tensor<2>, context: &ForwardContext<'_>) -> [Tensor<2>; 2] {
        let [x_nd, normed_nd] = rms_norm_beside(x_nd, self.norm.val(), context.model.layer_norm_epsilon);
        [x_nd, context.tensor_parallel.copy_in(normed_nd)]
    }

    /// Queries, keys and values of the normed input.
    pub fn self_projections(&self, normed_nd: Tensor<2>, batch: usize) -> (Tensor<2>, KeyValues) {
        let keys = normed_nd.dims()[0] / batch;
        let [q, k, v] = project_three(normed_nd, [self.q.val(), self.k.val(), self.v.val()]);
        (q, KeyValues { k, v, keys, room: keys })
    }

    /// Queries of the normed input, for the keys and values of something else.
    pub fn queries(&self, normed_nd: Tensor<2>) -> Tensor<2> {
        project(normed_nd, self.q.val())
    }

    /// Keys and values of the encoder's output.
    pub fn key_values(&self, encoder_nd: Tensor<2>, batch: usize) -> KeyValues {
        let keys = encoder_nd.dims()[0] / batch;
        let [k, v] = project_two(encoder_nd, [self.k.val(), self.v.val()]);
        KeyValues { k, v, keys, room: keys }
    }

    /// `residual_nd` and the attention of queries `q` over `memory`. `[n, d]`
    pub fn attend(
        &self,
        residual_nd: Tensor<2>,
        q: Tensor<2>,
        memory: &KeyValues,
        scope: AttentionScope<'_>,
        context: &ForwardContext<'_>,
    ) -> Tensor<2> {
        let (core, output) = if scope.cross {
            (Site::CrossAttention, Site::CrossAttentionOutput)
        } else {
            (Site::SelfAttention, Site::SelfAttentionOutput)
        };
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
        let core = attention(inputs, rules);
        let noise = context.noise(scope.stack, scope.layer, output, scope.queries);
        context.residual(residual_nd, noise, |residual_nd| match residual_nd {
            Some(residual_nd) => project_onto(residual_nd, core, self.o.val()),
            None => project(core, self.o.val()),
        })
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
                let wider =
                    Tensor::zeros([batch * room, width], (&earlier.device().inner(), earlier.dtype()));
                let copy = |from: &[f32], mut to: ValuesMut<'_>| {
                    for (row, from) in from.chunks_exact(had).enumerate() {
                        to.part(row * has..row * has + self.keys * width).set(&from[..self.keys * width]);
                    }
                };
                with_values(earlier, |from| update_in_place(wider, |to| copy(from, to)))
            };
            with_values(later.clone(), |from| {
                update_in_place(grown, |mut to| {
                    for (row, from) in from.chunks_exact(from.len() / batch).enumerate() {
                        to.part(row * has + self.keys * width..row * has + keys * width).set(from);
                    }
                })
            })
        };
        Self { k: append(self.k, &later.k), v: append(self.v, &later.v), keys, room }
    }
}
