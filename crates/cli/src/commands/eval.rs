//! `switchyard eval`: a model on held-out text.

use anyhow::Context;
use burn::tensor::Device;
use switchyard_config::plan::{DataPlan, SourcePlan};
use switchyard_config::resolve_str;
use switchyard_data::span_corruption::ChunkLengths;
use switchyard_data::{DataSet, HostBatch, Tokenizer};
use switchyard_train::evaluate::{EvaluationRules, evaluate};

use super::model_directory::LoadedModel;
use super::output;
use super::progress::Work;
use crate::Outcome;
use crate::args::{EvalArguments, Verbosity};

pub(crate) fn run(
    arguments: &EvalArguments,
    device: &Device,
    verbosity: Verbosity,
) -> anyhow::Result<Outcome> {
    anyhow::ensure!(arguments.batches > 0 && arguments.rows > 0, "--batches and --rows must be at least 1");
    let loaded = LoadedModel::open(&arguments.model, device)?;
    let tokenizer = loaded.tokenizer()?;
    let length = arguments.inputs_length.or(loaded.directory.inputs_length()).unwrap_or(512);
    let plan = data_plan(arguments, &tokenizer, length)?;
    let work = Work::new(verbosity.quiet);
    let data = DataSet::open(&plan, 0, &|report| work.data(report))?;
    let batches = data.evaluation_batches(arguments.batches).collect::<Result<Vec<HostBatch>, _>>()?;
    work.busy(&format!("evaluating {} batches", batches.len()));
    let rules =
        EvaluationRules { first_sentinel: tokenizer.first_sentinel_id() as i32, mismatched_inputs: false };
    let LoadedModel { model, config, routing, .. } = &loaded;
    let result = evaluate(model, config, routing, &batches, arguments.rows, rules);
    drop(work);
    if arguments.json {
        output::json(&result)?;
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

/// Held-out text only, cut as pretraining cuts it.
fn data_plan(
    arguments: &EvalArguments,
    tokenizer: &Tokenizer,
    inputs_length: usize,
) -> anyhow::Result<DataPlan> {
    anyhow::ensure!(inputs_length >= 4, "--inputs-length must be at least 4");
    let defaults = resolve_str("name = \"eval\"\nmodel.preset = \"tiny\"\n", &[])
        .context("the built-in defaults are a valid experiment")?;
    let mut plan = defaults.plan.data;
    let lengths = ChunkLengths::new(inputs_length, plan.noise_density, plan.mean_noise_span_length);
    plan.sources = Vec::new();
    plan.eval_sources =
        vec![SourcePlan { path: arguments.data.clone(), name: arguments.data.clone(), weight: 1.0 }];
    plan.tokenizer = tokenizer.path().to_owned();
    plan.text_column.clone_from(&arguments.text_column);
    plan.cache_dir.clone_from(&arguments.cache_dir);
    (plan.inputs_length, plan.targets_length) = (inputs_length, lengths.targets_length);
    (plan.batch_rows, plan.micro_batch_rows) = (arguments.rows, arguments.rows);
    Ok(plan)
}
