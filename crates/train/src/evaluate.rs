//! Evaluation on held-out batches: loss and accuracy, also over real words only.

use burn::module::Module;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use switchyard_comm::CommError;
use switchyard_config::ModelConfig;
use switchyard_config::plan::RoutingConfig;
use switchyard_data::{HostBatch, Share};
use switchyard_kernels::with_values;
use switchyard_model::moe::LayerMetrics;
use switchyard_model::{ForwardContext, SwitchTransformer};
use switchyard_parallel::Mesh;

use crate::metrics::layer_metrics;
use crate::report::{in_batch_order, sum_moe};
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

/// Evaluates `model` on `batches`; no dropout, no jitter, evaluation capacity.
///
/// The data-parallel ranks of `mesh` share the micro-batches; every rank gets the same result, which
/// does not depend on how many they are. A micro-batch that is short is filled with padding.
///
/// # Errors
/// When the ranks cannot finish it together.
pub fn evaluate(
    model: &SwitchTransformer,
    config: &ModelConfig,
    routing: &RoutingConfig,
    batches: &[HostBatch],
    micro_batch_rows: usize,
    rules: EvaluationRules,
    mesh: &Mesh,
) -> Result<Evaluation, CommError> {
    let context = ForwardContext {
        dispatcher: mesh.dispatcher(),
        tensor_parallel: mesh.tensor_parallel(),
        ..ForwardContext::evaluation(config, routing)
    };
    // Without this every pass would be recorded for a backward pass that never comes.
    let model = &model.valid();
    let device = model.device();
    let words = Words { pad: config.pad_token_id as i32, eos: config.eos_token_id as i32, rules };
    let (mut sums, mut moe) = (Vec::new(), Vec::new());
    for micro in share_of(batches, micro_batch_rows, rules, mesh) {
        let tensors = device_batch(&micro, words.pad, &device);
        let output = model.loss(&tensors, 0.0, &context);
        mesh.wait_for_device("an evaluation", &device)?;
        let loss = with_values(output.cross_entropy.token_loss.clone(), <[f32]>::to_vec);
        let correct = with_values(output.cross_entropy.token_correct.clone(), <[f32]>::to_vec);
        merge_moe(&mut moe, &output);
        sums.push(words.sums(&micro.target_ids, &loss, &correct));
    }
    let all = in_batch_order(mesh, &sums)?;
    sum_moe(mesh, &mut moe)?;
    let [loss, correct, word_loss, word_correct] =
        std::array::from_fn(|i| all.iter().map(|row| row[i]).sum());
    Ok(words.evaluation([loss, correct, word_loss, word_correct], batches, &moe))
}

/// The micro-batches of this rank: as many as any other has.
fn share_of(
    batches: &[HostBatch],
    micro_batch_rows: usize,
    rules: EvaluationRules,
    mesh: &Mesh,
) -> Vec<HostBatch> {
    let all = batches.iter().flat_map(|batch| {
        let shown = if rules.mismatched_inputs { rotate_inputs(batch) } else { batch.clone() };
        shown.micro_batches(Share::whole(micro_batch_rows))
    });
    let mut all: Vec<HostBatch> = all.map(|micro| micro.padded(micro_batch_rows)).collect();
    let (ranks, rank) = (mesh.shape().data, mesh.at().data);
    if let Some(first) = all.first() {
        // Ranks that share experts must come to every one of their messages.
        let mut empty = first.clone();
        empty.input_ids.fill(0);
        empty.target_ids.fill(0);
        all.resize(all.len().next_multiple_of(ranks), empty);
    }
    all.into_iter().skip(rank).step_by(ranks).collect()
}

/// Row `i` gets the inputs of row `i + rows / 2`.
fn rotate_inputs(batch: &HostBatch) -> HostBatch {
    let mut rotated = batch.clone();
    rotated.input_ids.rotate_left(batch.rows / 2 * batch.inputs_length);
    rotated
}

/// Which targets are words.
struct Words {
    pad: i32,
    eos: i32,
    rules: EvaluationRules,
}

impl Words {
    fn is_word(&self, id: i32) -> bool {
        id != self.pad && id != self.eos && id < self.rules.first_sentinel
    }

    /// Loss and correct targets of one micro-batch, of all targets and of words.
    fn sums(&self, target_ids: &[i32], loss: &[f32], correct: &[f32]) -> [f64; 4] {
        let mut sums = [0.0; 4];
        for ((&id, &loss), &correct) in target_ids.iter().zip(loss).zip(correct) {
            if id != self.pad {
                sums[0] += f64::from(loss);
                sums[1] += f64::from(correct);
            }
            if self.is_word(id) {
                sums[2] += f64::from(loss);
                sums[3] += f64::from(correct);
            }
        }
        sums
    }

    fn evaluation(
        &self,
        [loss, correct, word_loss, word_correct]: [f64; 4],
        batches: &[HostBatch],
        moe: &[(String, LayerMetrics)],
    ) -> Evaluation {
        let ids = || batches.iter().flat_map(|batch| &batch.target_ids).copied();
        let targets = ids().filter(|&id| id != self.pad).count();
        let word_ids: Vec<i32> = ids().filter(|&id| self.is_word(id)).collect();
        let (per_target, per_word) = (targets.max(1) as f64, word_ids.len().max(1) as f64);
        let routed: u64 = moe.iter().map(|(_, layer)| layer.tokens).sum();
        let dropped: u64 = moe.iter().map(|(_, layer)| layer.dropped).sum();
        Evaluation {
            loss: loss / per_target,
            negative_log_perplexity: -loss / per_target,
            token_accuracy: correct / per_target,
            word_loss: word_loss / per_word,
            word_accuracy: word_correct / per_word,
            word_unigram_entropy: unigram_entropy(&word_ids),
            targets: targets as u64,
            words: word_ids.len() as u64,
            fraction_tokens_dropped: dropped as f64 / routed.max(1) as f64,
            moe: layer_metrics(moe),
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
