//! Training and comparison of whole models.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::sync::Arc;

use switchyard_config::{RunPlan, resolve_str};
use switchyard_data::{HostBatch, Share};
use switchyard_kernels::test_device;
use switchyard_parallel::Mesh;
use switchyard_random::Philox;
use switchyard_train::{Learner, StepOutcome};

mod fixture;
mod golden;
mod hf_names;
mod mesh;
mod parity;
mod step;
mod verify;

/// A small Switch Transformer and its training, decided by the defaults but for `sets`.
fn small_plan(sets: &[&str]) -> RunPlan {
    let text = r#"
        name = "test"
        [model]
        vocab_size = 64
        d_model = 16
        d_ff = 24
        d_kv = 4
        num_heads = 4
        num_layers = 2
        num_experts = 4
        expert_layer_every = 2
        init = "hf"
        [schedule]
        kind = "constant"
        warmup_steps = 0
        total_steps = 10
        [data]
        inputs_length = 12
        targets_length = 7
        batch_rows = 8
        micro_batch_rows = 8
    "#;
    let sets: Vec<String> = sets.iter().map(|&set| set.to_owned()).collect();
    resolve_str(text, &sets).expect("the plan is valid").plan
}

/// Random ids with some padding in half of the rows.
fn batch(plan: &RunPlan, seed: u64) -> HostBatch {
    let data = &plan.data;
    let mut stream = Philox::new(seed).stream([0, 0, 0]);
    let mut fill = |length: usize| -> Vec<i32> {
        let mut ids = Vec::new();
        for row in 0..data.batch_rows {
            let end = if row % 2 == 0 { length } else { length - row % length.min(5) };
            let vocabulary = plan.model.vocab_size as u32;
            ids.extend(
                (0..length).map(|i| if i < end { 2 + stream.below(vocabulary - 2) as i32 } else { 0 }),
            );
        }
        ids
    };
    HostBatch {
        rows: data.batch_rows,
        inputs_length: data.inputs_length,
        targets_length: data.targets_length,
        input_ids: fill(data.inputs_length),
        target_ids: fill(data.targets_length),
        first_row: 0,
    }
}

/// A learner that is alone.
fn solo(plan: &RunPlan) -> Learner {
    Learner::new(plan, &test_device().autodiff(), Arc::new(Mesh::solo()))
}

/// One step of a learner that is alone.
fn step(learner: &mut Learner, plan: &RunPlan, batch: &HostBatch, step: u64) -> StepOutcome {
    let micro_batches = batch.micro_batches(Share::whole(plan.data.micro_batch_rows));
    learner.step(plan, &micro_batches, step).expect("one rank waits for nobody")
}
