//! `switchyard eval`: a model on held-out text.

use anyhow::Context;
use burn::tensor::Device;
use serde::Deserialize;
use switchyard_checkpoint::open_model;
use switchyard_comm::Choice;
use switchyard_config::plan::{DataPlan, SourcePlan};
use switchyard_config::resolve_str;
use switchyard_data::span_corruption::ChunkLengths;
use switchyard_data::{DataSet, HostBatch, Tokenizer};
use switchyard_kernels::DeviceName;
use switchyard_train::evaluate::{Evaluation, EvaluationRules, evaluate};

use super::model_directory::LoadedModel;
use super::output;
use super::progress::Work;
use crate::Outcome;
use crate::args::{EvalArguments, Verbosity};
use crate::job::{Job, TIMEOUT};
use crate::report::in_options;

pub(crate) fn run(
    arguments: &EvalArguments,
    device: DeviceName,
    launcher: Choice,
    verbosity: Verbosity,
) -> anyhow::Result<Outcome> {
    let job = Job::join(launcher, TIMEOUT)?;
    let first = job.is_first();
    let verbosity = job.verbosity(verbosity);
    let evaluated =
        job.device(device).and_then(|device| evaluate_together(arguments, &device, verbosity, &job));
    let mut result = None;
    let outcome = job.end(evaluated.map(|evaluation| {
        result = Some(evaluation);
        Outcome::Done
    }))?;
    match result {
        Some(result) if first => show(arguments, &result),
        _ => Ok(outcome),
    }
}

fn evaluate_together(
    arguments: &EvalArguments,
    device: &Device,
    verbosity: Verbosity,
    job: &Job,
) -> anyhow::Result<Evaluation> {
    let directory = job.agree(open_model(&arguments.model).map_err(Into::into))?;
    let mesh = job.mesh(directory.model(), arguments.mesh, device)?;
    let prepared = LoadedModel::of(directory, device, mesh).and_then(|loaded| {
        let tokenizer = loaded.tokenizer()?;
        let plan = data_plan(arguments, &loaded, &tokenizer)?;
        let work = Work::new(verbosity.quiet);
        let data = DataSet::open(&plan, 0, &|report| work.data(report)).map_err(in_options)?;
        let batches = data.evaluation_batches(arguments.batches).collect::<Result<Vec<HostBatch>, _>>()?;
        Ok((loaded, tokenizer, plan, batches))
    });
    let (loaded, tokenizer, plan, batches) = job.agree(prepared)?;
    let work = Work::new(verbosity.quiet);
    work.busy(&format!("evaluating {} batches", batches.len()));
    let rules =
        EvaluationRules { first_sentinel: tokenizer.first_sentinel_id() as i32, mismatched_inputs: false };
    let LoadedModel { model, config, routing, mesh, .. } = &loaded;
    Ok(evaluate(model, config, routing, &batches, plan.micro_batch_rows, rules, mesh)?)
}

fn show(arguments: &EvalArguments, result: &Evaluation) -> anyhow::Result<Outcome> {
    if arguments.json {
        output::json(result)?;
        return Ok(Outcome::Done);
    }
    let row = |name: &str, value: String| output::line(format!("{name:<24} {value}"));
    row("loss", format!("{:.4} nats a target, {} targets", result.loss, output::grouped(result.targets)))?;
    row("negative log perplexity", format!("{:.4}", result.negative_log_perplexity))?;
    row("token accuracy", format!("{:.2} %", result.token_accuracy * 100.0))?;
    row("loss over words", format!("{:.4} nats, {} words", result.word_loss, output::grouped(result.words)))?;
    row("their unigram entropy", format!("{:.4} nats", result.word_unigram_entropy))?;
    for (layer, metrics) in &result.moe {
        let value = |name: &str| metrics.get(name).and_then(serde_json::Value::as_f64).unwrap_or(f64::NAN);
        row(
            layer,
            format!(
                "{:.2} % dropped, {:.0} % of experts used, load cv {:.2}, confidence {:.2}, entropy {:.2} nats",
                value("fraction_tokens_dropped") * 100.0,
                value("expert_usage") * 100.0,
                value("load_cv"),
                value("router_confidence"),
                value("router_entropy"),
            ),
        )?;
    }
    Ok(Outcome::Done)
}

/// Held-out text only, cut as the model's training cut it; of a model without a run, as T5's.
fn data_plan(
    arguments: &EvalArguments,
    loaded: &LoadedModel,
    tokenizer: &Tokenizer,
) -> anyhow::Result<DataPlan> {
    let trained = loaded.directory.trainer().pointer("/plan/data");
    let mut plan = match trained {
        Some(plan) => DataPlan::deserialize(plan).with_context(|| {
            format!("{}: trainer.json is of another version", loaded.directory.path().display())
        })?,
        None => resolve_str("name = \"eval\"\nmodel.preset = \"tiny\"\n", &[])?.plan.data,
    };
    if let Some(inputs_length) = arguments.inputs_length {
        let lengths = ChunkLengths::new(inputs_length, plan.noise_density, plan.mean_noise_span_length);
        (plan.inputs_length, plan.targets_length) = (inputs_length, lengths.targets_length);
    }
    if let Some(text_column) = &arguments.text_column {
        plan.text_column.clone_from(text_column);
    }
    let rows = arguments.rows.unwrap_or(if trained.is_some() { plan.micro_batch_rows } else { 32 });
    plan.sources = Vec::new();
    plan.eval_sources =
        vec![SourcePlan { path: arguments.data.clone(), name: arguments.data.clone(), weight: 1.0 }];
    plan.tokenizer = tokenizer.path().to_owned();
    plan.cache_dir.clone_from(&arguments.cache_dir);
    (plan.batch_rows, plan.micro_batch_rows) = (rows, rows);
    Ok(plan)
}
