//! `switchyard check`: what an experiment file means, without starting it.

use switchyard_checkpoint::hf;
use switchyard_config::{MemorySummary, MeshShape, Resolved, RunPlan, rank_memory, resolve, summarize};
use switchyard_data::span_corruption::SpanCorruption;

use super::output::{self, bytes, grouped};
use crate::Outcome;
use crate::args::{CheckArguments, Verbosity};

/// What precision.allow_tf32 allows.
const IN_TF32: &str = "factors of matrix products on GPUs, the router's too; on other devices nothing";

pub(crate) fn run(arguments: &CheckArguments, verbosity: Verbosity) -> anyhow::Result<Outcome> {
    let Resolved { plan, provenance } = resolve(&arguments.config, &arguments.set)?;
    SpanCorruption::check(&plan.data)?;
    if plan.checkpoint.export {
        hf::representable(&plan.model, &plan.routing)?;
    }
    let summary = summarize(&plan);
    let mesh = arguments.ranks.map(|ranks| MeshShape::of(&plan, ranks, &provenance)).transpose()?;
    let rank_memory = mesh.map(|mesh| fullest_rank(&plan, mesh));
    if arguments.json {
        output::json(&serde_json::json!({"plan": plan, "summary": summary, "rank_memory": rank_memory}))?;
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
    row("memory", memory(&summary.memory))?;
    if verbosity.verbose > 0 {
        for (i, kept) in plan.precision.kept_in_fp32(plan.accumulation).iter().enumerate() {
            row(if i == 0 { "in float32" } else { "" }, (*kept).to_owned())?;
        }
        row("in TF32", if plan.allow_tf32 { IN_TF32 } else { "nothing" }.to_owned())?;
    }
    for line in mesh.iter().flat_map(|mesh| mesh.describe(&plan.model)) {
        let (name, value) = line.split_once(": ").unwrap_or(("", &line));
        row(name, value.to_owned())?;
    }
    if let Some(fullest) = &rank_memory {
        row("memory of a rank", memory(fullest))?;
    }
    Ok(Outcome::Done)
}

/// Memory of the rank that needs most.
fn fullest_rank(plan: &RunPlan, mesh: MeshShape) -> MemorySummary {
    let of_ranks = (0..mesh.ranks()).map(|rank| rank_memory(plan, mesh, rank));
    of_ranks.max_by_key(MemorySummary::total_bytes).unwrap_or(summarize(plan).memory)
}

fn memory(memory: &MemorySummary) -> String {
    let on_gpu = match memory.gpu_saves_bytes {
        0 => String::new(),
        saved => format!(", on a GPU {}", bytes(memory.optimizer_bytes - saved)),
    };
    format!(
        "{} and activations (parameters {}, gradients {}, optimizer {}{on_gpu})",
        bytes(memory.total_bytes()),
        bytes(memory.parameter_bytes),
        bytes(memory.gradient_bytes),
        bytes(memory.optimizer_bytes),
    )
}
