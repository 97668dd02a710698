//! Counts and sizes, alone and multiplied: refused here, they overflow nowhere later.

use super::Conflict;
use crate::plan::RunPlan;

/// Most layers of a stack.
const MOST_LAYERS: u64 = 1 << 16;

/// Most rows of a batch, most tokens of a row, and the farthest distance that has a bucket.
const MOST_OF_A_BATCH: u64 = 1 << 20;

/// Most buckets of the relative position bias.
const MOST_BUCKETS: u64 = 1 << 16;

/// Most ranks along an axis of the mesh.
const MOST_RANKS: u64 = 1 << 16;

/// Most batches that wait for the trainer.
const MOST_PREFETCHED: u64 = 1024;

/// Most tokens of the batches that are in memory at once; their ids take four bytes each.
const MOST_TOKENS_IN_MEMORY: u64 = 1 << 32;

/// Refuses zeros where at least one is needed.
pub(super) fn counts_are_positive(plan: &RunPlan) -> Result<(), Conflict> {
    let (model, data) = (&plan.model, &plan.data);
    let counts = [
        ("model.vocab_size", model.vocab_size as u64),
        ("model.d_model", model.d_model as u64),
        ("model.d_ff", model.d_ff as u64),
        ("model.d_kv", model.d_kv as u64),
        ("model.num_heads", model.num_heads as u64),
        ("model.num_layers", model.num_layers as u64),
        ("model.num_decoder_layers", model.num_decoder_layers as u64),
        ("routing.min_expert_capacity", plan.routing.min_expert_capacity as u64),
        ("schedule.total_steps", plan.schedule.total_steps),
        ("data.inputs_length", data.inputs_length as u64),
        ("data.targets_length", data.targets_length as u64),
        ("data.batch_rows", data.batch_rows as u64),
        ("data.micro_batch_rows", data.micro_batch_rows as u64),
        ("trainer.log_every_steps", plan.trainer.log_every_steps),
        ("trainer.max_skipped_steps", plan.trainer.max_skipped_steps),
        ("eval.batches", plan.eval.batches as u64),
        ("parallel.expert_parallel_size", plan.parallel.expert_parallel_size as u64),
        ("parallel.tensor_parallel_size", plan.parallel.tensor_parallel_size as u64),
    ];
    match counts.into_iter().find(|(_, count)| *count == 0) {
        None => Ok(()),
        Some((key, _)) => Err(Conflict {
            message: format!("{key} = 0 must be at least 1"),
            keys: vec![key],
            help: format!("set {key} to 1 or more"),
        }),
    }
}

/// Refuses sizes beyond any use, before anything multiplies or allocates them.
pub(super) fn counts_are_bounded(plan: &RunPlan) -> Result<(), Conflict> {
    let (model, data) = (&plan.model, &plan.data);
    let counts = [
        ("model.num_layers", model.num_layers, MOST_LAYERS),
        ("model.num_decoder_layers", model.num_decoder_layers, MOST_LAYERS),
        ("model.relative_attention_num_buckets", model.relative_attention_num_buckets, MOST_BUCKETS),
        ("model.relative_attention_max_distance", model.relative_attention_max_distance, MOST_OF_A_BATCH),
        ("data.inputs_length", data.inputs_length, MOST_OF_A_BATCH),
        ("data.targets_length", data.targets_length, MOST_OF_A_BATCH),
        ("data.batch_rows", data.batch_rows, MOST_OF_A_BATCH),
        ("data.micro_batch_rows", data.micro_batch_rows, MOST_OF_A_BATCH),
        ("data.prefetch_batches", data.prefetch_batches, MOST_PREFETCHED),
        ("parallel.data_parallel_size", plan.parallel.data_parallel_size, MOST_RANKS),
        ("parallel.expert_parallel_size", plan.parallel.expert_parallel_size, MOST_RANKS),
        ("parallel.tensor_parallel_size", plan.parallel.tensor_parallel_size, MOST_RANKS),
    ];
    match counts.into_iter().find(|(_, count, most)| *count as u64 > *most) {
        None => Ok(()),
        Some((key, count, most)) => Err(Conflict {
            message: format!("{key} = {count} is more than {most}"),
            keys: vec![key],
            help: format!("set {key} to {most} or less"),
        }),
    }
}

/// Refuses sizes whose products no machine can count, before anything multiplies them.
pub(super) fn model_is_countable(plan: &RunPlan) -> Result<(), Conflict> {
    const MOST: f64 = (1_u64 << 53) as f64;
    let model = &plan.model;
    let (d, f) = (model.d_model as f64, model.d_ff as f64);
    let attention = 8.0 * d * model.num_heads as f64 * model.d_kv as f64;
    let experts = (3.0 * f + 1.0) * d * model.num_experts.max(1) as f64;
    let layers = (model.num_layers + model.num_decoder_layers) as f64;
    let parameters = layers * (attention + experts) + 2.0 * d * model.vocab_size as f64;
    if parameters > MOST {
        return Err(Conflict {
            message: format!("the model would have about {parameters:.1e} parameters"),
            keys: vec![
                "model.d_model",
                "model.d_ff",
                "model.num_heads",
                "model.d_kv",
                "model.num_experts",
                "model.vocab_size",
            ],
            help: "check the sizes for a slipped digit".to_owned(),
        });
    }
    Ok(())
}

/// Refuses batches whose ids alone would fill the memory, together with those made ahead.
pub(super) fn batches_fit_in_memory(plan: &RunPlan) -> Result<(), Conflict> {
    let data = &plan.data;
    let batch = data.batch_rows as u64 * (data.inputs_length as u64 + data.targets_length as u64);
    // One is in use and one is being made, however few wait.
    let batches = data.prefetch_batches as u64 + 2;
    if batch * batches <= MOST_TOKENS_IN_MEMORY {
        return Ok(());
    }
    let fitting = MOST_TOKENS_IN_MEMORY / batch;
    let mut keys =
        vec!["data.batch_rows", "data.inputs_length", "data.targets_length", "data.prefetch_batches"];
    let help = match fitting.checked_sub(2) {
        Some(ahead) => {
            keys.rotate_right(1);
            format!("set data.prefetch_batches to {ahead} or less")
        }
        None => "use fewer rows or shorter ones".to_owned(),
    };
    Err(Conflict {
        message: format!(
            "{batches} batches of {batch} tokens would be in memory, more than {MOST_TOKENS_IN_MEMORY} tokens"
        ),
        keys,
        help,
    })
}

/// Refuses runs whose samples have no number.
pub(super) fn samples_are_countable(plan: &RunPlan) -> Result<(), Conflict> {
    let (steps, rows) = (plan.schedule.total_steps, plan.data.batch_rows as u64);
    if steps.checked_mul(rows).is_some() {
        return Ok(());
    }
    Err(Conflict {
        message: format!(
            "schedule.total_steps = {steps} of data.batch_rows = {rows} are more than 2^64 samples"
        ),
        keys: vec!["schedule.total_steps", "data.batch_rows"],
        help: format!("set schedule.total_steps to {} or less", u64::MAX / rows),
    })
}
