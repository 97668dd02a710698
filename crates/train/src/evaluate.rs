//! Evaluation on held-out batches: loss and accuracy, also over real words only.

use burn::module::Module;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use switchyard_config::ModelConfig;
use switchyard_config::plan::RoutingConfig;
use switchyard_data::HostBatch;
use switchyard_kernels::with_values;
use switchyard_model::moe::LayerMetrics;
use switchyard_model::{ForwardContext, SwitchTransformer};

use crate::metrics::layer_metrics;
use crate::step::{device_batch, merge_moe};

/// Sums and means over an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean cross-entropy of all targets in nats.
    pub loss: f64,
    /// `-loss`: the quality measure of the paper's tables.
    pub negative_log_perplexity: f64,
    /// Share of targets that are the likeliest id.
    pub token_accuracy: f64,
    /// Mean cross-entropy of targets that are neither sentinel nor end of sequence.
    pub word_loss: f64,
    /// Share of such targets that are the likeliest id.
    pub word_accuracy: f64,
    /// Entropy in nats of such targets as independent draws: what a model that ignores its input could reach.
    pub word_unigram_entropy: f64,
    /// Targets.
    pub targets: u64,
    /// Targets that are neither sentinel nor end of sequence.
    pub words: u64,
    /// Share of routed tokens that found no slot, over all sparse layers.
    pub fraction_tokens_dropped: f64,
    /// Metrics of every sparse layer, by `encoder.LAYER` and `decoder.LAYER`.
    pub moe: Map<String, Value>,
}

/// Which targets are words, and where every encoder input comes from.
#[derive(Debug, Clone, Copy)]
pub struct EvaluationRules {
    /// Lowest sentinel id; targets from here on are no words.
    pub first_sentinel: i32,
    /// Give every row the inputs of another document: shows how much the model uses its encoder.
    pub mismatched_inputs: bool,
}

#[derive(Default)]
struct Sums {
    loss: f64,
    correct: f64,
    targets: u64,
    word_loss: f64,
    word_correct: f64,
    word_ids: Vec<i32>,
    moe: Vec<(String, LayerMetrics)>,
}

/// Evaluates `model` on `batches`; no dropout, no jitter, evaluation capacity.
pub fn evaluate<'a>(
    model: &SwitchTransformer,
    config: &ModelConfig,
    routing: &RoutingConfig,
    batches: impl IntoIterator<Item = &'a HostBatch>,
    micro_batch_rows: usize,
    rules: EvaluationRules,
) -> Evaluation {
    let context = ForwardContext::evaluation(config, routing);
    // Without this every pass would be recorded for a backward pass that never comes.
    let model = &model.valid();
    let device = model.device();
    let mut sums = Sums::default();
    for batch in batches {
        let shifted = if rules.mismatched_inputs { rotate_inputs(batch) } else { batch.clone() };
        for start in (0..shifted.rows).step_by(micro_batch_rows) {
            let micro = shifted.slice(start, micro_batch_rows.min(shifted.rows - start));
            let micro = micro.padded(routing.group_rows);
            let tensors = device_batch(&micro, config.pad_token_id as i32, &device);
            let output = model.loss(&tensors, 0.0, &context);
            let loss = with_values(output.cross_entropy.token_loss.clone(), <[f32]>::to_vec);
            let correct = with_values(output.cross_entropy.token_correct.clone(), <[f32]>::to_vec);
            merge_moe(&mut sums.moe, &output);
            for ((&id, loss), correct) in micro.target_ids.iter().zip(loss).zip(correct) {
                sums.add(id, f64::from(loss), f64::from(correct), config, rules.first_sentinel);
            }
        }
    }
    sums.finish()
}

/// Row `i` gets the inputs of row `i + rows / 2`.
fn rotate_inputs(batch: &HostBatch) -> HostBatch {
    let mut rotated = batch.clone();
    rotated.input_ids.rotate_left(batch.rows / 2 * batch.inputs_length);
    rotated
}

impl Sums {
    fn add(&mut self, id: i32, loss: f64, correct: f64, config: &ModelConfig, first_sentinel: i32) {
        if id == config.pad_token_id as i32 {
            return;
        }
        self.loss += loss;
        self.correct += correct;
        self.targets += 1;
        if id != config.eos_token_id as i32 && id < first_sentinel {
            self.word_loss += loss;
            self.word_correct += correct;
            self.word_ids.push(id);
        }
    }

    fn finish(self) -> Evaluation {
        let (targets, words) = (self.targets.max(1) as f64, self.word_ids.len().max(1) as f64);
        let routed: u64 = self.moe.iter().map(|(_, layer)| layer.tokens).sum();
        let dropped: u64 = self.moe.iter().map(|(_, layer)| layer.dropped).sum();
        Evaluation {
            loss: self.loss / targets,
            negative_log_perplexity: -self.loss / targets,
            token_accuracy: self.correct / targets,
            word_loss: self.word_loss / words,
            word_accuracy: self.word_correct / words,
            word_unigram_entropy: unigram_entropy(&self.word_ids),
            targets: self.targets,
            words: self.word_ids.len() as u64,
            fraction_tokens_dropped: dropped as f64 / routed.max(1) as f64,
            moe: layer_metrics(&self.moe),
        }
    }
}

/// Entropy in nats of the distribution of `ids`.
fn unigram_entropy(ids: &[i32]) -> f64 {
    let mut counts = std::collections::BTreeMap::new();
    for id in ids {
        *counts.entry(id).or_insert(0_u64) += 1;
    }
    let total = ids.len().max(1) as f64;
    -counts.values().map(|&n| n as f64 / total * (n as f64 / total).ln()).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_of_equal_counts_is_the_logarithm_of_their_number() {
        assert!((unigram_entropy(&[3, 4, 5, 6, 3, 4, 5, 6]) - 4_f64.ln()).abs() < 1e-12);
        assert_eq!(unigram_entropy(&[7, 7]), 0.0);
    }

    #[test]
    fn mismatched_inputs_keep_the_targets() {
        let batch = HostBatch {
            rows: 3,
            inputs_length: 2,
            targets_length: 1,
            input_ids: vec![1, 1, 2, 2, 3, 3],
            target_ids: vec![7, 8, 9],
            first_row: 0,
        };
        let rotated = rotate_inputs(&batch);
        assert_eq!(rotated.input_ids, [2, 2, 3, 3, 1, 1]);
        assert_eq!(rotated.target_ids, batch.target_ids);
    }
}
