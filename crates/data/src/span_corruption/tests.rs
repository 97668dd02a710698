use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::Value;
use switchyard_config::plan::{Objective, OnCorrupt, TextDocument};
use switchyard_random::Philox;

use super::*;
use crate::permutation::StreamTag;
use crate::test_vectors::{i32_list, mask, section, u64_list};

const VOCAB_SIZE: usize = 32_100;

fn plan(inputs_length: usize, targets_length: usize) -> DataPlan {
    DataPlan {
        sources: Vec::new(),
        eval_sources: Vec::new(),
        mixture_temperature: 1.0,
        tokenizer: PathBuf::new(),
        train_tokenizer_vocab_size: 0,
        text_column: "text".to_owned(),
        text_document: TextDocument::Line,
        objective: Objective::SpanCorruption,
        noise_density: 0.15,
        mean_noise_span_length: 3.0,
        inputs_length,
        targets_length,
        batch_rows: 1,
        micro_batch_rows: 1,
        on_corrupt: OnCorrupt::Fail,
        cache_dir: PathBuf::new(),
        prefetch_batches: 1,
    }
}

fn cases(name: &str) -> Vec<Value> {
    section(name).as_array().expect("a list").clone()
}

fn size(case: &Value, key: &str) -> usize {
    case[key].as_u64().expect("a number") as usize
}

fn noise_settings(case: &Value) -> (f64, f64) {
    let float = |key: &str| case[key].as_f64().expect("a number");
    (float("noise_density"), float("mean_noise_span_length"))
}

/// Positions of the ones in a list of bits.
fn boundaries(bits: &Value) -> Vec<u32> {
    (0..).zip(u64_list(bits)).filter(|(_, bit)| *bit == 1).map(|(i, _)| i).collect()
}

#[test]
fn chunk_lengths_equal_the_vectors() {
    for case in cases("helper") {
        let (density, mean) = noise_settings(&case);
        let found = ChunkLengths::new(size(&case, "inputs_length"), density, mean);
        let expected = ChunkLengths {
            tokens_length: size(&case, "tokens_length"),
            targets_length: size(&case, "targets_length"),
        };
        assert_eq!(found, expected, "{case}");
    }
}

#[test]
fn noise_counts_equal_the_vectors() {
    for case in cases("noise_counts") {
        let (density, mean) = noise_settings(&case);
        let found = NoiseCounts::new(size(&case, "length"), density, mean);
        let expected = NoiseCounts {
            noise_tokens: size(&case, "num_noise_tokens"),
            nonnoise_tokens: size(&case, "num_nonnoise_tokens"),
            noise_spans: size(&case, "num_noise_spans"),
        };
        assert_eq!(found, expected, "{case}");
        assert_eq!(!found.fits(), case["seqio_raises"].as_bool().expect("a bool"), "{case}");
    }
}

#[test]
fn segmentation_equals_the_vectors() {
    for case in cases("segmentation") {
        let boundaries = boundaries(&case["boundary_bits"]);
        let found: Vec<u64> =
            segment_lengths(size(&case, "num_items"), &boundaries).map(|l| l as u64).collect();
        assert_eq!(found, u64_list(&case["span_lengths"]));
    }
}

#[test]
fn masks_equal_the_vectors() {
    for case in cases("mask") {
        let (density, mean) = noise_settings(&case);
        let counts = NoiseCounts::new(size(&case, "length"), density, mean);
        let mut found = vec![true; size(&case, "length")];
        let (noise, nonnoise) =
            (boundaries(&case["noise_boundary_bits"]), boundaries(&case["nonnoise_boundary_bits"]));
        fill_mask(&counts, &noise, &nonnoise, &mut found);
        found.rotate_right(case["roll_offset"].as_u64().unwrap_or(0) as usize);
        assert_eq!(found, mask(&case["mask"]), "{case}");
    }
}

#[test]
fn drawn_masks_equal_the_vectors() {
    for case in section("design")["mask"].as_array().expect("a list") {
        let number = |key: &str| case[key].as_u64().expect("a number");
        let (density, mean) = noise_settings(case);
        let counts = NoiseCounts::new(size(case, "length"), density, mean);
        let chunk = number("chunk");
        let tail = [StreamTag::Noise.epoch_word(number("epoch")), chunk as u32, (chunk >> 32) as u32];
        let mut stream = Philox::new(number("seed")).stream(tail);
        let mut found = vec![false; size(case, "length")];
        random_spans_noise_mask(&counts, &mut stream, &mut Boundaries::default(), &mut found);
        assert_eq!(found, mask(&case["mask"]), "{case}");
    }
}

#[test]
fn inputs_and_targets_equal_the_vectors() {
    for case in cases("span_corruption") {
        let tokens: Vec<u32> = u64_list(&case["tokens"]).into_iter().map(|t| t as u32).collect();
        let mask = mask(&case["mask"]);
        for (noise, side) in [(true, "inputs"), (false, "targets")] {
            let mut ids = Vec::new();
            noise_span_to_unique_sentinel(&tokens, &mask, noise, size(&case, "vocab_size"), &mut ids);
            assert_eq!(ids, i32_list(&case[side]), "{}", case["case"]);
            let length = size(&case, &format!("{side}_length"));
            let mut row = vec![-1; length];
            append_eos_and_pad(&ids, &mut row);
            assert_eq!(row, i32_list(&case[format!("{side}_padded")]), "{}", case["case"]);
            let with_eos = i32_list(&case[format!("{side}_eos")]);
            assert_eq!(row[..with_eos.len().min(length)], with_eos[..with_eos.len().min(length)]);
        }
    }
}

#[test]
fn standard_lengths_need_no_widening() {
    let objective = SpanCorruption::new(&plan(512, 114), VOCAB_SIZE).expect("T5's lengths");
    assert_eq!(
        (objective.tokens_length(), objective.targets_length(), objective.num_spans()),
        (568, 114, 28)
    );
}

#[test]
fn targets_are_widened_where_masks_hold_more_than_the_formula() {
    for inputs_length in [172, 316, 352, 604, 1180] {
        let formula = ChunkLengths::new(inputs_length, 0.15, 3.0);
        let objective =
            SpanCorruption::new(&plan(inputs_length, formula.targets_length), VOCAB_SIZE).expect("fits");
        assert!(objective.targets_length() > formula.targets_length, "{inputs_length}");
        let counts = objective.counts;
        assert_eq!(objective.targets_length(), counts.noise_tokens + counts.noise_spans + 1);
    }
}

#[test]
fn impossible_sizes_are_refused_with_the_mend() {
    let short = SpanCorruption::new(&plan(512, 100), VOCAB_SIZE).expect_err("targets are too short");
    assert!(short.to_string().ends_with("set data.targets_length = 114"), "{short}");
    let dense = DataPlan { noise_density: 0.9, ..plan(8, 4096) };
    assert!(matches!(SpanCorruption::new(&dense, VOCAB_SIZE), Err(SpanCorruptionError::TooManySpans { .. })));
    let negative = DataPlan { noise_density: -0.1, ..plan(8, 8) };
    assert!(matches!(SpanCorruption::new(&negative, VOCAB_SIZE), Err(SpanCorruptionError::BadNoise { .. })));
    let nan = DataPlan { noise_density: f64::NAN, ..plan(8, 8) };
    assert!(matches!(SpanCorruption::new(&nan, VOCAB_SIZE), Err(SpanCorruptionError::BadNoise { .. })));
    for length in [0, 2] {
        let lengths = ChunkLengths::new(length, 0.15, 3.0);
        let error = SpanCorruption::new(&plan(length, lengths.targets_length), VOCAB_SIZE);
        assert!(matches!(error, Err(SpanCorruptionError::InputsTooShort { .. })), "{error:?}");
    }
    for length in [(1 << 24) + 1, 1 << 60] {
        let lengths = ChunkLengths::new(length, 0.15, 3.0);
        let error = SpanCorruption::new(&plan(length, lengths.targets_length), VOCAB_SIZE);
        assert_eq!(error, Err(SpanCorruptionError::InputsTooLong { inputs_length: length }));
    }
}

#[test]
fn lengths_are_checked_without_a_tokenizer() {
    SpanCorruption::check(&plan(512, 114)).expect("T5's lengths");
    let short = SpanCorruption::check(&plan(512, 100)).expect_err("targets are too short");
    assert_eq!(Err(short), SpanCorruption::new(&plan(512, 100), VOCAB_SIZE));

    let long = plan(2048, 456);
    SpanCorruption::check(&long).expect("the tokenizer that is there decides how many sentinels there are");
    let trained = DataPlan {
        train_tokenizer_vocab_size: 1000,
        tokenizer: PathBuf::from("no/such/tokenizer.json"),
        ..long
    };
    let error = SpanCorruption::check(&trained).expect_err("a trained tokenizer has 100 sentinels");
    assert!(error.to_string().contains("needs 114 sentinels"), "{error}");
    let wide = DataPlan { mean_noise_span_length: 4.0, ..trained };
    SpanCorruption::check(&wide).expect("fewer spans");
}

/// Chunks grow without bound as the density nears 1; refusing must not take as long.
#[test]
fn densities_near_one_are_refused_at_once() {
    for density in [0.9999, 1.0 - 1e-9, 1.0 - f64::EPSILON / 2.0] {
        let dense = DataPlan { noise_density: density, mean_noise_span_length: 1e300, ..plan(512, 114) };
        let error = SpanCorruption::check(&dense).expect_err("the targets would be millions");
        assert!(matches!(error, SpanCorruptionError::TargetsTooShort { .. }), "{error}");
    }
}

/// Puts the spans of the targets back where the sentinels stand in the inputs.
fn rebuild(inputs: &[i32], targets: &[i32], vocab_size: i32, sentinels: i32) -> Vec<u32> {
    let is_sentinel = |id: i32| id >= vocab_size - sentinels;
    let text = |row: &[i32]| row.iter().copied().take_while(|&id| id != EOS_ID as i32).collect::<Vec<_>>();
    let (inputs, targets) = (text(inputs), text(targets));
    let mut rebuilt = Vec::new();
    for id in inputs {
        if is_sentinel(id) {
            let start = targets.iter().position(|&t| t == id).expect("the span is in the targets") + 1;
            rebuilt.extend(targets[start..].iter().take_while(|&&t| !is_sentinel(t)).map(|&t| t as u32));
        } else {
            rebuilt.push(id as u32);
        }
    }
    rebuilt
}

proptest! {
    #[test]
    fn corruption_is_reversible(
        inputs_length in 8_usize..1200,
        density in 0.05_f64..0.5,
        mean in 2.0_f64..8.0,
        seed: u64,
    ) {
        let plan = DataPlan { noise_density: density, mean_noise_span_length: mean, ..plan(inputs_length, 8192) };
        let objective = SpanCorruption::new(&plan, VOCAB_SIZE)?;
        let mut draws = Philox::new(seed).stream([0, 0, 0]);
        let tokens: Vec<u32> = (0..objective.tokens_length()).map(|_| 3 + draws.below(30_000)).collect();
        let (mut inputs, mut targets) = (vec![0; inputs_length], vec![0; 8192]);
        let mut scratch = Scratch::default();
        objective.corrupt(&tokens, &mut draws, &mut scratch, &mut inputs, &mut targets);
        let sentinels = objective.num_spans() as i32;
        prop_assert_eq!(rebuild(&inputs, &targets, VOCAB_SIZE as i32, sentinels), tokens);
    }
}
