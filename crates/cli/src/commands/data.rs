//! `switchyard data`: the sample corpus and the batches of a run.

use std::path::Path;
use std::sync::Arc;

use switchyard_config::{RunPlan, resolve};
use switchyard_data::{DataSet, Tokenizer, corpus};

use super::output;
use super::progress::Work;
use crate::Outcome;
use crate::args::{DataCommand, Verbosity};

pub(crate) fn run(command: &DataCommand, verbosity: Verbosity) -> anyhow::Result<Outcome> {
    match command {
        DataCommand::Build { cache_dir, json } => build(cache_dir, *json, verbosity),
        DataCommand::Preview { config, set, step, rows } => preview(config, set, *step, *rows, verbosity),
    }
}

/// Opens the text of a run, tokenising it first where that has not been done.
pub(crate) fn open(plan: &RunPlan, quiet: bool) -> anyhow::Result<Arc<DataSet>> {
    let work = Work::new(quiet);
    work.busy("opening the text");
    Ok(Arc::new(DataSet::open(&plan.data, plan.seed, &|report| work.data(report))?))
}

fn build(cache_dir: &Path, json: bool, verbosity: Verbosity) -> anyhow::Result<Outcome> {
    let corpus = {
        let work = Work::new(verbosity.quiet);
        work.busy("extracting the documentation of this program's packages");
        corpus::ensure(cache_dir)?
    };
    if json {
        output::json(&serde_json::json!({
            "train": corpus.train, "validation": corpus.validation, "summary": corpus.summary,
        }))?;
        return Ok(Outcome::Done);
    }
    let splits = [
        ("training", &corpus.train, &corpus.summary.train),
        ("held out", &corpus.validation, &corpus.summary.validation),
    ];
    for (name, path, split) in splits {
        output::line(format!(
            "{name:<9} {:>6} documents, {:>8} of text  {}",
            output::grouped(split.documents as u64),
            output::bytes(split.bytes as u64),
            path.display()
        ))?;
    }
    output::line(format!("from {} packages, sha256 {}", corpus.summary.packages, corpus.summary.sha256))?;
    Ok(Outcome::Done)
}

fn preview(
    config: &Path,
    set: &[String],
    step: u64,
    rows: usize,
    verbosity: Verbosity,
) -> anyhow::Result<Outcome> {
    let plan = resolve(config, set)?.plan;
    let data = open(&plan, verbosity.quiet)?;
    let mut shown = Vec::new();
    for row in 0..rows.min(plan.data.batch_rows) {
        let example = data.example(step, row)?;
        let text = |ids: &[i32]| decoded(data.tokenizer(), ids);
        shown.push(serde_json::json!({
            "source": example.source,
            "epoch": example.epoch,
            "first_token": example.first_token,
            "inputs": text(&example.input_ids)?,
            "targets": text(&example.target_ids)?,
            "input_ids": example.input_ids,
            "target_ids": example.target_ids,
        }));
    }
    output::json(&serde_json::json!({"step": step, "batch_rows": plan.data.batch_rows, "rows": shown}))?;
    Ok(Outcome::Done)
}

fn decoded(tokenizer: &Tokenizer, ids: &[i32]) -> anyhow::Result<String> {
    let ids: Vec<u32> = ids.iter().filter(|&&id| id != 0).map(|&id| id as u32).collect();
    Ok(tokenizer.decode(&ids, false)?)
}
