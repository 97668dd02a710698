//! `switchyard check`: what an experiment file means, without starting it.

use switchyard_checkpoint::hf;
use switchyard_config::{resolve, summarize};
use switchyard_data::span_corruption::SpanCorruption;

use super::output::{self, bytes, grouped};
use crate::Outcome;
use crate::args::CheckArguments;

pub(crate) fn run(arguments: &CheckArguments) -> anyhow::Result<Outcome> {
    let plan = resolve(&arguments.config, &arguments.set)?.plan;
    SpanCorruption::check(&plan.data)?;
    if plan.checkpoint.export {
        hf::representable(&plan.model, &plan.routing)?;
    }
    let summary = summarize(&plan);
    if arguments.json {
        output::json(&serde_json::json!({"plan": plan, "summary": summary}))?;
        return Ok(Outcome::Done);
    }
    let row = |name: &str, value: String| output::line(format!("{name:<22} {value}"));
    row("run", plan.name.clone())?;
    row("parameters", grouped(summary.total_parameters))?;
    row("active for a token", grouped(summary.active_parameters))?;
    for stack in &summary.stacks {
        let layers: Vec<String> = stack.sparse_layers.iter().map(ToString::to_string).collect();
        row(
            &format!("{} experts", stack.stack),
            format!(
                "{} in layers {}; groups of {} tokens; expert_capacity {} in training, {} in evaluation",
                plan.model.num_experts,
                layers.join(", "),
                grouped(stack.tokens_per_group as u64),
                stack.expert_capacity,
                stack.eval_expert_capacity,
            ),
        )?;
    }
    row(
        "global batch",
        format!(
            "{} rows, {} tokens, {} micro-batches",
            grouped(plan.data.batch_rows as u64),
            grouped(summary.tokens_per_step),
            summary.micro_batches_per_step,
        ),
    )?;
    row("steps", grouped(plan.schedule.total_steps))?;
    row(
        "memory",
        format!(
            "{} and activations (parameters {}, gradients {}, optimizer {})",
            bytes(summary.memory.total_bytes()),
            bytes(summary.memory.parameter_bytes),
            bytes(summary.memory.gradient_bytes),
            bytes(summary.memory.optimizer_bytes),
        ),
    )?;
    Ok(Outcome::Done)
}
