//! The model as a whole: its parameters, decoding, router losses and gradients.

use burn::tensor::Tensor;
use switchyard_config::plan::{CapacityRounding, RouterKind, RoutingConfig, RoutingSemantics};
use switchyard_config::{Activation, Initialization, ModelConfig};
use switchyard_kernels::{test_device, with_values};
use switchyard_model::Seq2SeqBatch;
use switchyard_random::Philox;

mod decoding;
mod gradients;
mod losses;
mod metrics;
mod parameters;
mod seams;
mod tensor_parallel;

/// Small, with sparse layers in both stacks; weights large enough to make attention and routing matter.
fn small_model() -> ModelConfig {
    ModelConfig {
        vocab_size: 40,
        d_model: 16,
        d_ff: 24,
        d_kv: 6,
        num_heads: 3,
        num_layers: 2,
        num_decoder_layers: 2,
        relative_attention_num_buckets: 8,
        relative_attention_max_distance: 16,
        activation: Activation::Relu,
        gated: false,
        tie_word_embeddings: true,
        scale_decoder_outputs: true,
        layer_norm_epsilon: 1e-6,
        num_experts: 4,
        encoder_expert_layer_every: 2,
        decoder_expert_layer_every: 2,
        router_bias: false,
        init: Initialization::Hf,
        init_scale: 1.0,
        pad_token_id: 0,
        eos_token_id: 1,
    }
}

fn paper_routing() -> RoutingConfig {
    RoutingConfig {
        router: RouterKind::Top1,
        semantics: RoutingSemantics::Paper,
        capacity_factor: 1.25,
        eval_capacity_factor: 2.0,
        min_expert_capacity: 4,
        capacity_rounding: CapacityRounding::Ceil,
        expert_capacity: 0,
        router_jitter_noise: 0.01,
        load_balancing_loss_coef: 0.01,
        router_z_loss_coef: 0.0,
        group_rows: 0,
        force_balanced: false,
    }
}

/// Random ids above EOS.
fn random_ids(count: usize, vocab_size: usize, seed: u64) -> Vec<i32> {
    let mut stream = Philox::new(seed).stream([0, 0, 0]);
    (0..count).map(|_| 2 + stream.below(vocab_size as u32 - 2) as i32).collect()
}

/// Rows of `inputs` encoder and `targets` decoder tokens without padding.
fn random_batch(rows: usize, inputs: usize, targets: usize, vocab_size: usize) -> Seq2SeqBatch {
    let ids = random_ids(rows * inputs, vocab_size, 1);
    let labels = random_ids(rows * targets, vocab_size, 2);
    Seq2SeqBatch::from_ids(rows, ids, shift_right(&labels, targets), labels, 0, &test_device())
}

fn shift_right(labels: &[i32], length: usize) -> Vec<i32> {
    labels
        .chunks(length)
        .flat_map(|row| std::iter::once(0).chain(row[..length - 1].iter().copied()))
        .collect()
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    with_values(tensor, <[f32]>::to_vec)
}

fn scalar(tensor: Tensor<1>) -> f64 {
    f64::from(values(tensor)[0])
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
