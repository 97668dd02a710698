//! `switchyard bench`: the numbers of docs/benchmarks.md.

mod checkpoint;
mod collectives;
mod data;
mod dispatch;
mod gemm;
mod generate;
mod layer;
mod step;

use switchyard_comm::Choice;
use switchyard_kernels::DeviceName;

use crate::Outcome;
use crate::args::{BenchCommand, Verbosity};

pub(crate) fn run(
    command: &BenchCommand,
    device: DeviceName,
    launcher: Choice,
    verbosity: Verbosity,
) -> anyhow::Result<Outcome> {
    match command {
        BenchCommand::Step(arguments) => step::run(arguments, device, launcher),
        BenchCommand::Layer(arguments) => layer::run(arguments, &device.open()?),
        BenchCommand::Gemm(arguments) => gemm::run(arguments),
        BenchCommand::Collectives { mebibytes, rounds, json } => {
            collectives::run(mebibytes, *rounds, *json, device, launcher)
        }
        BenchCommand::Dispatch { tokens, d_model, experts, hierarchical_all_to_all, json } => {
            dispatch::run(*tokens, *d_model, experts, *hierarchical_all_to_all, *json, device, launcher)
        }
        BenchCommand::Data { config, set, json } => data::run(config, set, *json, verbosity),
        BenchCommand::Checkpoint(arguments) => checkpoint::run(arguments),
        BenchCommand::Generate { preset, batch, inputs_length, new_tokens, json } => {
            generate::run(preset, *batch, *inputs_length, *new_tokens, *json, &device.open()?)
        }
    }
}

/// Middle value of the durations, and the smallest and largest.
fn spread(mut samples: Vec<f64>) -> [f64; 3] {
    samples.sort_by(f64::total_cmp);
    [samples[samples.len() / 2], samples[0], samples[samples.len() - 1]]
}

/// Token ids that fill the vocabulary, the same in every run.
fn synthetic_ids(count: usize, vocab_size: usize, salt: u32) -> Vec<i32> {
    let mut random = switchyard_random::Philox::new(1).stream([salt, 0, 0]);
    (0..count).map(|_| (3 + random.below(vocab_size as u32 - 128)) as i32).collect()
}
