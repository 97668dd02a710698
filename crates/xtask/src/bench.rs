//! Switchyard and transformers on the same machine, measured in turn.
//!
//! Owns the order of measurements and the tables. Does not measure: `switchyard bench` and
//! `scripts/bench/hf_step.py` do, each measurement in a fresh process.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use clap::Args;
use serde::Deserialize;

use crate::say;

/// What to measure.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Python with torch and transformers.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// Times that each measurement is repeated; the two programs take turns.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Numbers of experts for training steps.
    #[arg(long, value_delimiter = ',', default_value = "8,32,128")]
    experts: Vec<u32>,
    /// Steps of one measurement.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Batch sizes for generation.
    #[arg(long, value_delimiter = ',', default_value = "1,8")]
    batches: Vec<u32>,
    /// Threads of both programs.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    threads: u32,
}

/// A kind of measurement.
#[derive(Debug, Clone, Copy)]
enum Task {
    /// Training steps of a model with this many experts.
    Step { experts: u32 },
    /// Greedy decoding of this many rows.
    Generate { batch: u32 },
}

/// The programs to compare.
#[derive(Debug, Clone, Copy)]
enum Program {
    Switchyard,
    Transformers,
}

/// What a program prints. `switchyard bench generate` reports no memory, and steps alone have a time.
#[derive(Debug, Deserialize)]
struct Report {
    step_ms: Option<f64>,
    tokens_per_second: f64,
    peak_memory_bytes: Option<f64>,
}

/// The values of one column, one for each round.
#[derive(Debug, Default)]
struct Samples(Vec<f64>);

/// One row of a table: what was measured, and whether more is better.
struct Row {
    name: String,
    more_is_better: bool,
    switchyard: Samples,
    transformers: Samples,
}

/// Measures everything and prints one table.
pub(crate) fn run(root: &Path, options: &Options) -> anyhow::Result<()> {
    build(root)?;
    let tasks = options
        .experts
        .iter()
        .map(|&experts| Task::Step { experts })
        .chain(options.batches.iter().map(|&batch| Task::Generate { batch }));
    let mut rows = Vec::new();
    for task in tasks {
        rows.extend(measure(root, options, task)?);
    }
    say(format_args!(
        "\n{}, {} threads, {} x {} steps; median of rounds (smallest to largest)\n",
        processor(),
        options.threads,
        options.rounds,
        options.steps
    ));
    say("| measurement | Switchyard | transformers | times as good |\n|---|---:|---:|---:|");
    rows.iter().filter(|row| !row.switchyard.0.is_empty()).for_each(|row| say(row.markdown()));
    Ok(())
}

/// Builds the binary that is measured, with the selection that every other command uses.
fn build(root: &Path) -> anyhow::Result<()> {
    let status = Command::new("cargo")
        .args(["build", "--release", "--bin", "switchyard"])
        .current_dir(root)
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "switchyard does not build");
    Ok(())
}

/// Lets both programs do `task` in turn.
fn measure(root: &Path, options: &Options, task: Task) -> anyhow::Result<Vec<Row>> {
    let mut rows = match task {
        Task::Step { experts } => vec![
            Row::new(format!("step, {experts} experts, ms"), false),
            Row::new(format!("step, {experts} experts, tokens/s"), true),
            Row::new(format!("step, {experts} experts, peak memory, MiB"), false),
        ],
        Task::Generate { batch } => vec![Row::new(format!("generation, batch {batch}, tokens/s"), true)],
    };
    for _ in 0..options.rounds {
        for program in [Program::Switchyard, Program::Transformers] {
            let report = report(root, options, task, program)?;
            let values = match task {
                Task::Step { .. } => vec![
                    report.step_ms,
                    Some(report.tokens_per_second),
                    report.peak_memory_bytes.map(|bytes| bytes / f64::from(1 << 20)),
                ],
                Task::Generate { .. } => vec![Some(report.tokens_per_second)],
            };
            for (row, value) in rows.iter_mut().zip(values) {
                row.samples(program).0.extend(value);
            }
        }
    }
    Ok(rows)
}

/// Transformers gives an expert 64 slots of each row's 128 tokens, with 8 experts four times the mean.
const CAPACITY_FACTOR: &str = "4";

/// One process of `program` doing `task`.
fn report(root: &Path, options: &Options, task: Task, program: Program) -> anyhow::Result<Report> {
    let mut command = match program {
        Program::Switchyard => {
            let mut command = Command::new(root.join("target/release/switchyard"));
            command.env("RAYON_NUM_THREADS", options.threads.to_string()).arg("bench");
            command
        }
        Program::Transformers => {
            let mut command = Command::new(&options.python);
            command.arg("scripts/bench/hf_step.py").args(["--threads", &options.threads.to_string()]);
            command
        }
    };
    match task {
        Task::Step { experts } => {
            command.args(["step", "--experts", &experts.to_string(), "--steps", &options.steps.to_string()])
        }
        Task::Generate { batch } => command.args(["generate", "--batch", &batch.to_string()]),
    };
    if let Program::Switchyard = program {
        command.args(["--preset", "tiny", "--json"]);
        if let Task::Step { .. } = task {
            command.args(["--capacity-factor", CAPACITY_FACTOR]);
        }
    }
    let output = command.current_dir(root).output().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(output.status.success(), "{command:?} failed:\n{}", String::from_utf8_lossy(&output.stderr));
    let printed: serde_json::Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{command:?} printed no JSON object"))?;
    say(format_args!("{program:?} {printed}"));
    Report::deserialize(printed).with_context(|| format!("{command:?} lacks a figure"))
}

/// The processor's own name, as far as this system tells.
fn processor() -> String {
    std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

impl Samples {
    fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            length if length % 2 == 0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
            _ => sorted[middle],
        }
    }

    /// Median and spread, such as `12.3 (12.1 to 12.9)`.
    fn markdown(&self) -> String {
        let smallest = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        let largest = self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let digits = if self.median() < 1000.0 { 1 } else { 0 };
        format!("{:.digits$} ({smallest:.digits$} to {largest:.digits$})", self.median())
    }
}

impl Row {
    fn new(name: String, more_is_better: bool) -> Self {
        Self { name, more_is_better, switchyard: Samples::default(), transformers: Samples::default() }
    }

    fn samples(&mut self, program: Program) -> &mut Samples {
        match program {
            Program::Switchyard => &mut self.switchyard,
            Program::Transformers => &mut self.transformers,
        }
    }

    fn markdown(&self) -> String {
        let ratio = self.switchyard.median() / self.transformers.median();
        let advantage = if self.more_is_better { ratio } else { ratio.recip() };
        format!(
            "| {} | {} | {} | {advantage:.2} |",
            self.name,
            self.switchyard.markdown(),
            self.transformers.markdown()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(more_is_better: bool) -> Row {
        Row {
            switchyard: Samples(vec![30.0, 10.0, 20.0]),
            transformers: Samples(vec![1500.0, 2500.0]),
            ..Row::new("x".to_owned(), more_is_better)
        }
    }

    #[test]
    fn a_row_shows_medians_spread_and_who_is_better() {
        let cells = "| x | 20.0 (10.0 to 30.0) | 2000 (1500 to 2500) |";
        assert_eq!(row(false).markdown(), format!("{cells} 100.00 |"));
        assert_eq!(row(true).markdown(), format!("{cells} 0.01 |"));
    }
}
