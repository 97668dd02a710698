//! Whole training steps: forward, backward, clipping and optimizer on synthetic tokens.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;
use switchyard_config::{preset, resolve_str};
use switchyard_data::HostBatch;
use switchyard_parallel::Mesh;
use switchyard_train::Learner;

use super::{spread, synthetic_ids};
use crate::args::BenchStepArguments;
use crate::commands::output;
use crate::{Outcome, memory};

/// Steps before the clock starts: buffers and threads exist after them.
const WARM_UP: u64 = 3;

pub(crate) fn run(arguments: &BenchStepArguments, device: &Device) -> anyhow::Result<Outcome> {
    preset(&arguments.preset)?;
    let sparse = if arguments.experts == 0 {
        "num_experts = 0\nexpert_layer_every = 0".to_owned()
    } else {
        format!("num_experts = {}", arguments.experts)
    };
    let text = format!(
        "name = \"bench\"\n[model]\npreset = \"{}\"\n{sparse}\n[precision]\nmode = \"{}\"\n\
         [optimizer]\nkind = \"{}\"\nlearning_rate = 1e-4\n[schedule]\nkind = \"constant\"\nwarmup_steps = 0\n\
         [routing]\ncapacity_factor = {:?}\n\
         [data]\nsources = [{{ path = \"synthetic\" }}]\ninputs_length = {}\ntargets_length = {}\n\
         batch_rows = {rows}\nmicro_batch_rows = {rows}\n",
        arguments.preset,
        arguments.precision,
        arguments.optimizer,
        arguments.capacity_factor,
        arguments.inputs_length,
        arguments.targets_length,
        rows = arguments.rows,
    );
    let plan = resolve_str(&text, &[])?.plan;
    let vocabulary = plan.model.vocab_size;
    let mut learner = Learner::new(&plan, &device.clone().autodiff(), Arc::new(Mesh::solo()));
    let mut times = Vec::new();
    let mut loss = f64::NAN;
    let (mut routed, mut dropped) = (0, 0);
    for step in 0..WARM_UP + arguments.steps {
        let salt = step as u32 * 2;
        let batch = HostBatch {
            rows: arguments.rows,
            inputs_length: arguments.inputs_length,
            targets_length: arguments.targets_length,
            input_ids: synthetic_ids(arguments.rows * arguments.inputs_length, vocabulary, salt),
            target_ids: synthetic_ids(arguments.rows * arguments.targets_length, vocabulary, salt + 1),
            first_row: 0,
        };
        let started = Instant::now();
        let outcome = learner.step(&plan, &[batch], step)?;
        let elapsed_ms = started.elapsed().as_secs_f64() * 1e3;
        loss = outcome.loss;
        if step >= WARM_UP {
            times.push(elapsed_ms);
            routed += outcome.moe.iter().map(|(_, layer)| layer.tokens).sum::<u64>();
            dropped += outcome.moe.iter().map(|(_, layer)| layer.dropped).sum::<u64>();
        }
    }
    let [step_ms, min_ms, max_ms] = spread(times);
    let tokens = arguments.rows * (arguments.inputs_length + arguments.targets_length);
    let tokens_per_second = tokens as f64 / step_ms * 1e3;
    let fraction_tokens_dropped = dropped as f64 / routed.max(1) as f64;
    let peak = memory::peak_bytes();
    if arguments.json {
        output::json(&serde_json::json!({
            "preset": arguments.preset, "experts": arguments.experts, "optimizer": arguments.optimizer,
            "precision": arguments.precision, "parameters": plan.model.num_parameters(),
            "step_ms": step_ms, "min_ms": min_ms, "max_ms": max_ms,
            "tokens_per_second": tokens_per_second, "peak_memory_bytes": peak, "loss": loss,
            "fraction_tokens_dropped": fraction_tokens_dropped,
        }))?;
    } else {
        output::line(format!(
            "{step_ms:.1} ms a step ({min_ms:.1} to {max_ms:.1}), {} tokens/s, peak memory {}, {:.1} % dropped",
            output::grouped(tokens_per_second as u64),
            peak.map_or("unknown".to_owned(), output::bytes),
            fraction_tokens_dropped * 100.0,
        ))?;
    }
    Ok(Outcome::Done)
}
