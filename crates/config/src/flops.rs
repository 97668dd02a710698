//! Arithmetic of a model: what a step must compute whatever computes it.

use crate::model::{ModelConfig, StackKind};
use crate::plan::RouterKind;

/// Floating-point operations of the matrix products of one training step.
///
/// Forward once and backward twice as many, on rows without padding. Every token counts at as many
/// experts as its router chooses, whatever the capacity; a decoder's mask saves nothing.
pub fn step_flops(
    model: &ModelConfig,
    router: RouterKind,
    rows: usize,
    inputs_length: usize,
    targets_length: usize,
) -> f64 {
    let [d, f, inner] = [model.d_model, model.d_ff, model.d_attention()].map(|size| size as f64);
    let (encoder, decoder) = ((rows * inputs_length) as f64, (rows * targets_length) as f64);
    let [keys, own_keys] = [inputs_length, targets_length].map(|length| length as f64);
    // Products of two numbers, of which each is a multiplication and an addition.
    let scores = |queries: f64, keys: f64| 2.0 * queries * keys * inner;
    let matrices = if model.gated { 3.0 } else { 2.0 };
    let feed_forward = |stack: StackKind, tokens: f64| {
        let layers = model.layers(stack);
        let sparse = model.sparse_layers(stack).len();
        let choices = match router {
            RouterKind::Top2 => 2.0,
            RouterKind::Top1 | RouterKind::ExpertChoice => 1.0,
        };
        let visited = (layers - sparse) as f64 + sparse as f64 * choices;
        tokens * (visited * matrices * d * f + sparse as f64 * d * model.num_experts as f64)
    };
    let encoder_layers = model.layers(StackKind::Encoder) as f64;
    let decoder_layers = model.layers(StackKind::Decoder) as f64;
    let products = encoder_layers * (4.0 * encoder * d * inner + scores(encoder, keys))
        + decoder_layers * (4.0 * decoder * d * inner + scores(decoder, own_keys))
        + decoder_layers * (2.0 * (decoder + encoder) * d * inner + scores(decoder, keys))
        + feed_forward(StackKind::Encoder, encoder)
        + feed_forward(StackKind::Decoder, decoder)
        + decoder * d * model.vocab_size as f64;
    3.0 * 2.0 * products
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preset;

    #[test]
    fn a_dense_token_costs_six_operations_a_parameter_and_the_scores() {
        let model = preset("t5-base").expect("a preset");
        // Long enough that every parameter but the embedding is used by either stack's tokens alone.
        let flops = step_flops(&model, RouterKind::Top1, 1, 512, 114);
        let layer = 4.0 * 768.0 * 768.0 + 2.0 * 768.0 * 3072.0;
        let cross = 2.0 * 768.0 * 768.0;
        let encoder = 512.0 * 12.0 * (layer + cross + 2.0 * 512.0 * 768.0);
        let decoder = 114.0 * (12.0 * (layer + cross + 2.0 * (114.0 + 512.0) * 768.0) + 768.0 * 32128.0);
        assert!((flops / (6.0 * (encoder + decoder)) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn experts_cost_what_their_tokens_do() {
        let sparse = preset("switch-base-8").expect("a preset");
        let dense = preset("t5-base").expect("a preset");
        assert!(
            (sparse.d_ff, sparse.num_layers, sparse.gated) == (dense.d_ff, dense.num_layers, dense.gated)
        );
        let of = |model: &ModelConfig, router| step_flops(model, router, 4, 64, 16);
        let ratio = of(&sparse, RouterKind::Top1) / of(&dense, RouterKind::Top1);
        assert!((1.0..1.001).contains(&ratio), "the router alone: {ratio}");
        assert!(of(&sparse, RouterKind::Top2) > 1.1 * of(&sparse, RouterKind::Top1));
    }
}
