//! Decoding token by token with cached keys and values equals decoding all at once.

use burn::tensor::Tensor;
use switchyard_config::plan::{RouterKind, RoutingConfig};
use switchyard_config::{Activation, ModelConfig};
use switchyard_kernels::int_tensor;
use switchyard_kernels::test_device;
use switchyard_model::generate::{argmax, greedy};
use switchyard_model::t5::DecoderCache;
use switchyard_model::{Capacity, ForwardContext, Seq2SeqBatch, SwitchTransformer};

use super::{largest_difference, paper_routing, random_ids, shift_right, small_model, values};

const ROWS: usize = 3;
const INPUTS: usize = 9;

/// Encoder ids with padding at the end of rows 1 and 2.
fn inputs(vocab_size: usize) -> Vec<i32> {
    let mut ids = random_ids(ROWS * INPUTS, vocab_size, 5);
    ids[2 * INPUTS - 2..2 * INPUTS].fill(0);
    ids[3 * INPUTS - 4..].fill(0);
    ids
}

fn unlimited<'a>(model: &'a ModelConfig, routing: &'a RoutingConfig) -> ForwardContext<'a> {
    ForwardContext { capacity: Capacity::Unlimited, ..ForwardContext::evaluation(model, routing) }
}

/// Logits of every position when all decoder inputs are given at once. `[rows * length, vocab_size]`
fn all_at_once(model: &SwitchTransformer, batch: &Seq2SeqBatch, context: &ForwardContext<'_>) -> Tensor<2> {
    let encoder = model.encode(batch.input_ids.clone(), batch.input_mask.clone(), context);
    let inputs = model.decoder_inputs(batch, &encoder, context);
    let embedded = model.embed(batch.decoder_input_ids.clone(), context);
    let (hidden, _) = model.decoder().forward(embedded, &inputs, None, context);
    model.logits(hidden, context)
}

fn assert_cache_changes_nothing(config: &ModelConfig, routing: &RoutingConfig) {
    // More than the first room for keys and the first bias.
    const LENGTH: usize = 70;
    let device = test_device();
    let model = SwitchTransformer::new(config, 11, &device);
    let context = unlimited(config, routing);
    let labels = random_ids(ROWS * LENGTH, config.vocab_size, 6);
    let decoder_ids = shift_right(&labels, LENGTH);
    let batch =
        Seq2SeqBatch::from_ids(ROWS, inputs(config.vocab_size), decoder_ids.clone(), labels, 0, &device);
    let whole = values(all_at_once(&model, &batch, &context));
    let largest = whole.iter().fold(0.0_f32, |a, b| a.max(b.abs()));

    let encoder = model.encode(batch.input_ids.clone(), batch.input_mask.clone(), &context);
    let mut cache = DecoderCache::new(config.num_decoder_layers);
    for position in 0..LENGTH {
        let ids = (0..ROWS).map(|row| decoder_ids[row * LENGTH + position]).collect();
        let ids = int_tensor(ids, [ROWS], &device);
        let step = values(model.decode_step(ids, position, &encoder, &mut cache, &context));
        for (row, step) in step.chunks(config.vocab_size).enumerate() {
            let whole = &whole[(row * LENGTH + position) * config.vocab_size..][..config.vocab_size];
            let difference = largest_difference(step, whole);
            assert!(difference < 2e-6 * largest.max(1.0), "position {position}, row {row}: {difference}");
        }
    }
}

#[test]
fn cached_steps_equal_the_whole_sequence() {
    let dense = ModelConfig { num_experts: 0, num_decoder_layers: 3, ..small_model() };
    assert_cache_changes_nothing(&dense, &paper_routing());
    let v1_1 = ModelConfig {
        activation: Activation::GeluTanh,
        gated: true,
        tie_word_embeddings: false,
        scale_decoder_outputs: false,
        ..dense
    };
    assert_cache_changes_nothing(&v1_1, &paper_routing());
    for router in [RouterKind::Top1, RouterKind::Top2] {
        let sparse = ModelConfig { router_bias: true, decoder_expert_layer_every: 1, ..small_model() };
        assert_cache_changes_nothing(&sparse, &RoutingConfig { router, ..paper_routing() });
    }
}

#[test]
fn greedy_takes_the_likeliest_id_of_the_whole_prefix() {
    const STEPS: usize = 8;
    let device = test_device();
    let (config, routing) = (small_model(), paper_routing());
    let context = unlimited(&config, &routing);
    for seed in 0..4 {
        let model = SwitchTransformer::new(&config, seed, &device);
        let ids = int_tensor(inputs(40), [ROWS * INPUTS], &device);
        let batch = Seq2SeqBatch::from_ids(ROWS, inputs(40), vec![0; ROWS], vec![2; ROWS], 0, &device);
        let mut steps = 0;
        let written = greedy(&model, ids, batch.input_mask, STEPS, &context, |step| {
            assert_eq!(step.logits.len(), ROWS * 40);
            steps += 1;
            true
        });
        assert!(steps <= STEPS && written.iter().map(Vec::len).max() == Some(steps));
        for (row, written) in written.iter().enumerate() {
            // One row alone, its prefix run through the whole decoder.
            let prefix = shift_right(written, written.len());
            let inputs = inputs(40)[row * INPUTS..][..INPUTS].to_vec();
            let alone = Seq2SeqBatch::from_ids(1, inputs, prefix, vec![2; written.len()], 0, &device);
            let logits = values(all_at_once(&model, &alone, &context));
            let best: Vec<i32> = logits.chunks(40).map(argmax).collect();
            assert_eq!(written, &best, "seed {seed}, row {row}");
            let ended = written.iter().position(|&id| id == 1).map_or(STEPS, |at| at + 1);
            assert_eq!(written.len(), ended, "a row goes on until EOS or the limit");
        }
    }
}

#[test]
fn greedy_stops_when_told() {
    let device = test_device();
    let (config, routing) = (small_model(), paper_routing());
    let model = SwitchTransformer::new(&config, 1, &device);
    let batch = Seq2SeqBatch::from_ids(ROWS, inputs(40), vec![0; ROWS], vec![2; ROWS], 0, &device);
    let context = unlimited(&config, &routing);
    let written = greedy(&model, batch.input_ids, batch.input_mask, 10, &context, |_| false);
    assert!(written.iter().all(|row| row.len() == 1));
}
