//! Attention of the layers of T5-Base: self-attention of encoder and decoder, and cross-attention.

use switchyard_cuda::{
    Address, Attention, AttentionGradients, AttentionInputs, AttentionNoise, AttentionOutput, Format,
    HeadRows, NoiseKey, attention, attention_backward, attention_dropout, attention_dropout_bytes,
    attention_workspace,
};

use crate::clock::{Clock, Room};

const RULES: Attention = Attention {
    batch: 64,
    num_heads: 12,
    d_kv: 64,
    queries: 512,
    keys: 512,
    key_room: 512,
    causal: false,
    query_offset: 0,
    dropout: 0.0,
    format: Format::Bf16,
};

pub(crate) fn run(clock: &Clock) {
    measure(clock, "encoder 512 x 512", RULES, true);
    measure(clock, "encoder 512 x 512 dropout", Attention { dropout: 0.1, ..RULES }, true);
    let decoder = Attention { queries: 114, keys: 114, key_room: 114, causal: true, ..RULES };
    measure(clock, "decoder 114 x 114 causal", decoder, true);
    measure(clock, "cross 114 x 512", Attention { queries: 114, ..RULES }, false);
    let long = Attention { batch: 16, queries: 2048, keys: 2048, key_room: 2048, ..RULES };
    measure(clock, "16 x 2048 x 2048", long, true);
    measure(clock, "16 x 2048 x 2048 causal", Attention { causal: true, ..long }, true);
    measure(clock, "6 heads of 128", Attention { num_heads: 6, d_kv: 128, ..RULES }, true);
}

/// From and to packed projections, with and without a learned bias.
fn measure(clock: &Clock, name: &str, rules: Attention, has_bias: bool) {
    let Attention { batch, num_heads, d_kv, queries, keys, .. } = rules;
    let width = num_heads * d_kv;
    let packed =
        |room: &Room, part: usize| HeadRows { at: room.at().plus(part * width * 2), stride: 3 * width };
    let tokens = batch * queries.max(keys);
    let (projected, gradients) =
        (clock.normal_bf16(3 * tokens * width, 0.35, 1), clock.zeros(3 * tokens * width * 2));
    let (out, gradient) = (clock.zeros(tokens * width * 2), clock.normal_bf16(tokens * width, 1.0, 2));
    let log_sums = clock.zeros(batch * num_heads * queries * 4);
    let bias_count = num_heads * (queries + keys - 1);
    let bias: Vec<f32> = (0..bias_count).map(|i| (i % 17) as f32 * 0.1).collect();
    let (bias, bias_gradient) = (clock.of(&bias), clock.zeros(bias_count * 4));
    let kept = clock.zeros(attention_dropout_bytes(&rules));
    let workspace = clock.zeros(attention_workspace(&rules));
    let step = clock.of(&[1_u32]);
    let key = NoiseKey { seed: 1, step: step.at(), site: 2 };
    let noise = AttentionNoise { key, first_row: 0, first_head: 0 };
    let given = |room: &Room| if has_bias { room.at() } else { Address::NONE };
    let inputs = AttentionInputs {
        q: packed(&projected, 0),
        k: packed(&projected, 1),
        v: packed(&projected, 2),
        relative_bias: given(&bias),
        key_mask: Address::NONE,
        segments: None,
        kept: kept.at(),
    };
    let plain = |room: &Room| HeadRows { at: room.at(), stride: width };
    let to = AttentionOutput { out: plain(&out), log_sums: log_sums.at() };
    let backward = AttentionGradients {
        out: plain(&gradient),
        q: packed(&gradients, 0),
        k: packed(&gradients, 1),
        v: packed(&gradients, 2),
        relative_bias: given(&bias_gradient),
        workspace: workspace.at(),
    };
    let pairs = (batch * num_heads * queries * keys * d_kv) as f64 * if rules.causal { 0.5 } else { 1.0 };
    let row_bytes = (batch * width * 2) as f64;
    let bytes = (2 * queries + 2 * keys) as f64 * row_bytes;
    if rules.dropout > 0.0 {
        // SAFETY: all rooms have the sizes that `rules` name.
        clock.time(&format!("attention bits, {name}"), 0.0, 0.0, |queue| unsafe {
            attention_dropout(queue, kept.at(), noise, rules)
        });
    }
    // SAFETY: as above.
    clock.time_both(&format!("attention forward, {name}"), 4.0 * pairs, bytes, |queue| unsafe {
        attention(queue, inputs, to, rules)
    });
    // SAFETY: as above.
    clock.time_all(&format!("attention backward, {name}"), 10.0 * pairs, 2.0 * bytes, |queue| unsafe {
        attention_backward(queue, inputs, to, backward, rules)
    });
}
