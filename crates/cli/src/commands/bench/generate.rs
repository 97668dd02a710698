//! Greedy decoding with cached keys and values, of a model with random weights.

use std::time::Instant;

use burn::tensor::Device;
use switchyard_config::resolve_str;
use switchyard_kernels::int_tensor;
use switchyard_model::generate::greedy;
use switchyard_model::{Capacity, ForwardContext, SwitchTransformer};

use super::{spread, synthetic_ids};
use crate::Outcome;
use crate::commands::output;

/// Runs that are timed.
const RUNS: usize = 5;

pub(crate) fn run(
    preset: &str,
    batch: usize,
    inputs_length: usize,
    new_tokens: usize,
    json: bool,
    device: &Device,
) -> anyhow::Result<Outcome> {
    switchyard_config::preset(preset)?;
    let text = format!(
        "name = \"bench\"\n[model]\npreset = \"{preset}\"\n[data]\nsources = [{{ path = \"synthetic\" }}]\n"
    );
    let mut plan = resolve_str(&text, &[])?.plan;
    // No id ends a row: every run writes all its tokens.
    plan.model.eos_token_id = u32::MAX;
    let model = SwitchTransformer::new(&plan.model, 0, device);
    let context = ForwardContext {
        capacity: Capacity::Unlimited,
        ..ForwardContext::evaluation(&plan.model, &plan.routing)
    };
    let ids = synthetic_ids(batch * inputs_length, plan.model.vocab_size, 0);
    let mut times = Vec::new();
    for run in 0..=RUNS {
        let ids = int_tensor(ids.clone(), [batch * inputs_length], device);
        let mask = int_tensor(vec![1; batch * inputs_length], [batch, inputs_length], device);
        let started = Instant::now();
        greedy(&model, ids, mask, new_tokens, &context, |_| true);
        if run > 0 {
            times.push(started.elapsed().as_secs_f64());
        }
    }
    let [seconds, min, max] = spread(times);
    let tokens_per_second = (batch * new_tokens) as f64 / seconds;
    if json {
        output::json(&serde_json::json!({
            "preset": preset, "batch": batch, "inputs_length": inputs_length, "new_tokens": new_tokens,
            "seconds": seconds, "min_seconds": min, "max_seconds": max, "tokens_per_second": tokens_per_second,
        }))?;
    } else {
        output::line(format!(
            "{} tokens/s at batch {batch} ({:.1} ms for {new_tokens} tokens, {:.1} to {:.1})",
            output::grouped(tokens_per_second as u64),
            seconds * 1e3,
            min * 1e3,
            max * 1e3,
        ))?;
    }
    Ok(Outcome::Done)
}
