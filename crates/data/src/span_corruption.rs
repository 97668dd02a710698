//! T5's span-corruption objective: a chunk of tokens becomes inputs and targets.
//!
//! Owns lengths, noise masks and sentinels, number for number as seqio computes them. Where
//! chunks come from and how rows become batches belongs to the loader.

use switchyard_config::plan::DataPlan;
use switchyard_random::Stream;

use crate::tokenizer::{EOS_ID, PAD_ID, TrainOptions};

/// Sizes that span corruption cannot work with.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SpanCorruptionError {
    /// A density that is no share, or spans shorter than a token.
    #[error(
        "span corruption needs 0 < data.noise_density < 1 and data.mean_noise_span_length >= 1; \
         found {noise_density} and {mean_noise_span_length}"
    )]
    BadNoise {
        /// `data.noise_density`.
        noise_density: f64,
        /// `data.mean_noise_span_length`.
        mean_noise_span_length: f64,
    },

    /// Rows with no room for text.
    #[error("data.inputs_length = {inputs_length} leaves no room for text; use at least {MIN_INPUTS_LENGTH}")]
    InputsTooShort {
        /// `data.inputs_length`.
        inputs_length: usize,
    },

    /// Rows whose noise cannot be counted.
    #[error("data.inputs_length = {inputs_length} is more than {MAX_TOKENS_LENGTH}; use shorter rows")]
    InputsTooLong {
        /// `data.inputs_length`.
        inputs_length: usize,
    },

    /// Rows that would lose target tokens.
    #[error(
        "data.targets_length = {targets_length} is too short: inputs of {inputs_length} with noise_density \
         {noise_density} and mean_noise_span_length {mean_noise_span_length} give targets of {needed}; \
         set data.targets_length = {needed}"
    )]
    TargetsTooShort {
        /// `data.targets_length`.
        targets_length: usize,
        /// `data.inputs_length`.
        inputs_length: usize,
        /// `data.noise_density`.
        noise_density: f64,
        /// `data.mean_noise_span_length`.
        mean_noise_span_length: f64,
        /// Length that fits.
        needed: usize,
    },

    /// More spans than tokens to separate or to fill them.
    #[error(
        "{spans} noise spans do not fit a chunk of {noise} noise and {nonnoise} other tokens \
         (each span needs one of both); lower data.noise_density or raise data.mean_noise_span_length"
    )]
    TooManySpans {
        /// Spans asked for.
        spans: usize,
        /// Noise tokens of a chunk.
        noise: usize,
        /// Other tokens of a chunk.
        nonnoise: usize,
    },

    /// More spans than the tokenizer that will be trained has sentinels.
    #[error(
        "a row of data.inputs_length = {inputs_length} needs {spans} sentinels and a tokenizer trained for \
         data.train_tokenizer_vocab_size has {sentinels}; shorten data.inputs_length, raise \
         data.mean_noise_span_length, or point data.tokenizer at a tokenizer with more"
    )]
    TooFewSentinels {
        /// `data.inputs_length`.
        inputs_length: usize,
        /// Spans of a chunk.
        spans: usize,
        /// Sentinels of a trained tokenizer.
        sentinels: usize,
    },
}

/// Longest chunk considered: float32, in which noise is counted, holds every whole number up to here.
const MAX_TOKENS_LENGTH: usize = 1 << 24;

/// Least `data.inputs_length`: a token, a sentinel, a token and EOS.
pub const MIN_INPUTS_LENGTH: usize = 4;

/// How many tokens of a chunk are noise, and in how many spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoiseCounts {
    /// Tokens that are masked.
    pub noise_tokens: usize,
    /// Tokens that are kept.
    pub nonnoise_tokens: usize,
    /// Spans the masked tokens form.
    pub noise_spans: usize,
}

impl NoiseCounts {
    /// Counts for a chunk of `length` tokens, in single precision and rounding half to even.
    ///
    /// # Source
    /// seqio `random_spans_noise_mask`, which computes in float32.
    pub fn new(length: usize, noise_density: f64, mean_noise_span_length: f64) -> Self {
        let length = length.max(2);
        let noise = (length as f32 * noise_density as f32).round_ties_even() as usize;
        let noise_tokens = noise.clamp(1, length - 1);
        let spans = (noise_tokens as f32 / mean_noise_span_length as f32).round_ties_even() as usize;
        Self { noise_tokens, nonnoise_tokens: length - noise_tokens, noise_spans: spans.max(1) }
    }

    /// Whether every span can have a noise token and a token before it.
    pub fn fits(&self) -> bool {
        self.noise_spans <= self.noise_tokens.min(self.nonnoise_tokens)
    }
}

/// Lengths of a chunk and of its targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkLengths {
    /// Tokens that fill the inputs exactly once corrupted.
    pub tokens_length: usize,
    /// Length of the targets, EOS included.
    pub targets_length: usize,
}

impl ChunkLengths {
    /// Lengths for an encoder length, in double precision and rounding half to even.
    ///
    /// # Source
    /// T5 `random_spans_helper`, one sentinel a span in inputs and in targets.
    pub fn new(inputs_length: usize, noise_density: f64, mean_noise_span_length: f64) -> Self {
        let corrupted = |tokens: usize| {
            let noise = (tokens as f64 * noise_density).round_ties_even() as usize;
            let spans = (noise as f64 / mean_noise_span_length).round_ties_even() as usize;
            (tokens.saturating_sub(noise) + spans + 1, noise + spans + 1)
        };
        // Inputs never shrink as tokens are added, so the last length that fits is found by halving:
        // for densities near 1 it lies far from the first.
        let mut tokens_length = inputs_length.saturating_sub(1);
        let mut most = tokens_length.max(MAX_TOKENS_LENGTH);
        while tokens_length < most {
            let middle = most - (most - tokens_length) / 2;
            if corrupted(middle).0 <= inputs_length {
                tokens_length = middle;
            } else {
                most = middle - 1;
            }
        }
        let (inputs, mut targets_length) = corrupted(tokens_length);
        if noise_density == 0.5 && targets_length > inputs {
            tokens_length -= 1;
            targets_length -= 1;
        }
        Self { tokens_length, targets_length }
    }
}

/// The objective with every length decided.
#[derive(Debug, Clone, PartialEq)]
pub struct SpanCorruption {
    counts: NoiseCounts,
    tokens_length: usize,
    inputs_length: usize,
    targets_length: usize,
    vocab_size: usize,
}

/// Buffers that [`SpanCorruption::corrupt`] reuses from row to row.
#[derive(Debug, Default)]
pub struct Scratch {
    boundaries: Boundaries,
    mask: Vec<bool>,
    ids: Vec<i32>,
}

impl SpanCorruption {
    /// Checks that the lengths of a plan fit each other, which takes no tokenizer and no text.
    ///
    /// Where a tokenizer would be trained, its sentinels have to suffice too.
    ///
    /// # Errors
    /// Those of [`Self::new`], and [`SpanCorruptionError::TooFewSentinels`].
    pub fn check(plan: &DataPlan) -> Result<(), SpanCorruptionError> {
        let spans = Self::decide(plan, 0)?.num_spans();
        let sentinels = TrainOptions::new(plan.train_tokenizer_vocab_size).num_sentinels;
        let trains = plan.train_tokenizer_vocab_size > 0 && !plan.tokenizer.exists();
        if trains && spans > sentinels {
            let inputs_length = plan.inputs_length;
            return Err(SpanCorruptionError::TooFewSentinels { inputs_length, spans, sentinels });
        }
        Ok(())
    }

    /// Decides the lengths of a plan; sentinels count down from `vocab_size`, the tokenizer's.
    ///
    /// Masks count in float32 and the helper in float64; for a few lengths the mask then has one
    /// noise token more, and targets are widened so that none is lost.
    ///
    /// # Errors
    /// Noise settings out of range, targets too short for the inputs, or more spans than fit.
    pub fn new(plan: &DataPlan, vocab_size: usize) -> Result<Self, SpanCorruptionError> {
        let objective = Self::decide(plan, vocab_size)?;
        if objective.targets_length > plan.targets_length {
            tracing::info!(
                configured = plan.targets_length,
                widened = objective.targets_length,
                "targets are widened: masks of this inputs_length hold one noise token more than its length formula"
            );
        }
        Ok(objective)
    }

    fn decide(plan: &DataPlan, vocab_size: usize) -> Result<Self, SpanCorruptionError> {
        let (density, mean) = (plan.noise_density, plan.mean_noise_span_length);
        let inputs_length = plan.inputs_length;
        if !(density > 0.0 && density < 1.0 && mean >= 1.0) {
            let (noise_density, mean_noise_span_length) = (density, mean);
            return Err(SpanCorruptionError::BadNoise { noise_density, mean_noise_span_length });
        }
        if inputs_length < MIN_INPUTS_LENGTH {
            return Err(SpanCorruptionError::InputsTooShort { inputs_length });
        }
        if inputs_length > MAX_TOKENS_LENGTH {
            return Err(SpanCorruptionError::InputsTooLong { inputs_length });
        }

        let ChunkLengths { mut tokens_length, targets_length } =
            ChunkLengths::new(inputs_length, density, mean);
        let mut counts = NoiseCounts::new(tokens_length, density, mean);
        while counts.nonnoise_tokens + counts.noise_spans + 1 > inputs_length {
            tokens_length -= 1;
            counts = NoiseCounts::new(tokens_length, density, mean);
        }
        if !counts.fits() {
            let NoiseCounts { noise_tokens: noise, nonnoise_tokens: nonnoise, noise_spans: spans } = counts;
            return Err(SpanCorruptionError::TooManySpans { spans, noise, nonnoise });
        }

        let true_targets = counts.noise_tokens + counts.noise_spans + 1;
        if plan.targets_length < targets_length {
            return Err(SpanCorruptionError::TargetsTooShort {
                targets_length: plan.targets_length,
                inputs_length,
                noise_density: density,
                mean_noise_span_length: mean,
                needed: true_targets.max(targets_length),
            });
        }
        let targets_length = plan.targets_length.max(true_targets);
        Ok(Self { counts, tokens_length, inputs_length, targets_length, vocab_size })
    }

    /// Tokens of a chunk.
    pub fn tokens_length(&self) -> usize {
        self.tokens_length
    }

    /// Encoder length, EOS included.
    pub fn inputs_length(&self) -> usize {
        self.inputs_length
    }

    /// Decoder length, EOS included; at least the plan's.
    pub fn targets_length(&self) -> usize {
        self.targets_length
    }

    /// Spans of a chunk, and so sentinels a tokenizer must have.
    pub fn num_spans(&self) -> usize {
        self.counts.noise_spans
    }

    /// Corrupts one chunk into one row of inputs and one of targets, padded.
    ///
    /// `noise` is read for the mask.
    ///
    /// # Shapes
    /// `tokens`: `[tokens_length]`, `inputs`: `[inputs_length]`, `targets`: `[targets_length]`.
    pub fn corrupt(
        &self,
        tokens: &[u32],
        noise: &mut Stream,
        scratch: &mut Scratch,
        inputs: &mut [i32],
        targets: &mut [i32],
    ) {
        let Scratch { boundaries, mask, ids } = scratch;
        mask.resize(tokens.len(), false);
        random_spans_noise_mask(&self.counts, noise, boundaries, mask);
        noise_span_to_unique_sentinel(tokens, mask, true, self.vocab_size, ids);
        append_eos_and_pad(ids, inputs);
        noise_span_to_unique_sentinel(tokens, mask, false, self.vocab_size, ids);
        append_eos_and_pad(ids, targets);
    }
}

/// Positions at which the parts of a random composition begin, drawn and reused in place.
#[derive(Debug, Default)]
struct Boundaries {
    slots: Vec<u32>,
    noise: Vec<u32>,
    nonnoise: Vec<u32>,
}

impl Boundaries {
    /// Draws `segments - 1` of the `items - 1` inner boundaries, each set equally likely, sorted.
    fn draw(slots: &mut Vec<u32>, items: usize, segments: usize, stream: &mut Stream, out: &mut Vec<u32>) {
        let last = items as u32 - 1;
        slots.clear();
        slots.extend(0..last);
        for i in 0..segments as u32 - 1 {
            let j = i + stream.below(last - i);
            slots.swap(i as usize, j as usize);
        }
        out.clear();
        out.extend_from_slice(&slots[..segments - 1]);
        out.sort_unstable();
    }
}

/// Lengths of the parts of `items` when a new part begins after each of `boundaries` (sorted).
fn segment_lengths(items: usize, boundaries: &[u32]) -> impl Iterator<Item = usize> {
    let ends = boundaries.iter().map(|&b| b as usize + 1).chain([items]);
    ends.scan(0, |start, end| {
        let length = end - *start;
        *start = end;
        Some(length)
    })
}

/// Draws a mask with exactly `counts` of noise: `true` where a token is masked.
fn random_spans_noise_mask(
    counts: &NoiseCounts,
    stream: &mut Stream,
    boundaries: &mut Boundaries,
    mask: &mut [bool],
) {
    let Boundaries { slots, noise, nonnoise } = boundaries;
    Boundaries::draw(slots, counts.noise_tokens, counts.noise_spans, stream, noise);
    Boundaries::draw(slots, counts.nonnoise_tokens, counts.noise_spans, stream, nonnoise);
    fill_mask(counts, noise, nonnoise, mask);
}

/// Alternates kept and masked spans, kept first; what exceeds the mask is cut off.
fn fill_mask(counts: &NoiseCounts, noise: &[u32], nonnoise: &[u32], mask: &mut [bool]) {
    mask.fill(false);
    let spans =
        segment_lengths(counts.nonnoise_tokens, nonnoise).zip(segment_lengths(counts.noise_tokens, noise));
    let mut at = 0;
    for (kept, masked) in spans {
        let start = (at + kept).min(mask.len());
        at = (start + masked).min(mask.len());
        mask[start..at].fill(true);
    }
}

/// Replaces every run of tokens whose mask equals `noise` by the next sentinel and copies the rest.
///
/// Sentinel `k` is `vocab_size - 1 - k`.
fn noise_span_to_unique_sentinel(
    tokens: &[u32],
    mask: &[bool],
    noise: bool,
    vocab_size: usize,
    out: &mut Vec<i32>,
) {
    out.clear();
    let mut sentinel = vocab_size as i32;
    let mut in_span = false;
    for (&token, &masked) in tokens.iter().zip(mask) {
        if masked != noise {
            out.push(token as i32);
        } else if !in_span {
            sentinel -= 1;
            out.push(sentinel);
        }
        in_span = masked == noise;
    }
}

/// Writes `ids` cut to leave room for EOS, EOS, and padding.
fn append_eos_and_pad(ids: &[i32], row: &mut [i32]) {
    let kept = ids.len().min(row.len() - 1);
    row[..kept].copy_from_slice(&ids[..kept]);
    row[kept] = EOS_ID as i32;
    row[kept + 1..].fill(PAD_ID as i32);
}

#[cfg(test)]
mod tests;
