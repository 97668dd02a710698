//! Matrix products of a model's sizes, as shares of what the multipliers can do.

use std::time::Instant;

use serde_json::{Value, json};
use switchyard_config::resolve_str;
use switchyard_kernels::gemm::bench::{Bf16Product, F32Product, Form, multiply_on_registers};
use switchyard_kernels::{CpuPath, copy_into};

use super::spread;
use crate::Outcome;
use crate::args::BenchGemmArguments;
use crate::commands::output;
use crate::job::share_cores;
use crate::report::in_options;

/// Rounds on registers in one measurement: some milliseconds.
const REGISTER_ROUNDS: usize = 1 << 19;

/// Values that are copied to measure memory: more than any cache holds.
const COPIED: usize = 1 << 26;

pub(crate) fn run(arguments: &BenchGemmArguments) -> anyhow::Result<Outcome> {
    share_cores(1);
    let text = format!(
        "name = \"bench\"\n[model]\npreset = \"{}\"\n[data]\nsources = [{{ path = \"synthetic\" }}]\n",
        arguments.preset
    );
    let model = resolve_str(&text, &[]).map_err(in_options)?.plan.model;
    let (d, f, inner) = (model.d_model, model.d_ff, model.num_heads * model.d_kv);
    let (tokens, few) = (arguments.tokens, (arguments.tokens / model.num_experts.max(8)).max(1));
    let sizes = [
        ("projection", [tokens, d, inner]),
        ("feed-forward in", [tokens, d, f]),
        ("feed-forward out", [tokens, f, d]),
        ("one expert in", [few, d, f]),
        ("one expert out", [few, f, d]),
        ("head", [tokens.min(512), d, model.vocab_size]),
    ];
    let bf16 = arguments.precision != "fp32";
    let peak = peak_flops(bf16, arguments.rounds);
    let threads = rayon::current_num_threads();
    let mut rows = Vec::new();
    for (name, [m, k, n]) in sizes {
        // What a training step makes of one weight: outputs, gradients of inputs, gradients of weights.
        let forms =
            [(Form::Plain, [m, k, n]), (Form::RightTransposed, [m, n, k]), (Form::LeftTransposed, [k, m, n])];
        for (form, [m, k, n]) in forms {
            let seconds = if bf16 {
                let mut product = Bf16Product::new(m, k, n, form);
                median(arguments.rounds, || product.run())
            } else {
                let mut product = F32Product::new(m, k, n, form);
                median(arguments.rounds, || product.run())
            };
            let flops = 2.0 * (m * k * n) as f64 / seconds;
            let form = match form {
                Form::Plain => "x w",
                Form::RightTransposed => "g w^T",
                Form::LeftTransposed => "x^T g",
            };
            rows.push(json!({
                "name": name, "form": form, "rows": m, "inner": k, "cols": n, "ms": seconds * 1e3,
                "gflops": flops / 1e9, "share_of_peak": flops / peak,
            }));
        }
    }
    show(arguments, peak, threads, &rows)
}

fn show(
    arguments: &BenchGemmArguments,
    peak: f64,
    threads: usize,
    rows: &[Value],
) -> anyhow::Result<Outcome> {
    if arguments.json {
        output::json(&json!({
            "preset": arguments.preset, "precision": arguments.precision, "threads": threads,
            "instructions": CpuPath::best().name(), "peak_gflops": peak / 1e9, "products": rows,
        }))?;
        return Ok(Outcome::Done);
    }
    output::line(format!("{}, {threads} threads, peak {:.0} GFLOP/s", CpuPath::best().name(), peak / 1e9))?;
    for row in rows {
        let size = format!("[{}, {}] x [{}, {}]", row["rows"], row["inner"], row["inner"], row["cols"]);
        output::line(format!(
            "{:<17} {:<6} {size:<28} {:>8.3} ms {:>6.0} GFLOP/s {:>4.0} %",
            row["name"].as_str().unwrap_or_default(),
            row["form"].as_str().unwrap_or_default(),
            row["ms"].as_f64().unwrap_or_default(),
            row["gflops"].as_f64().unwrap_or_default(),
            row["share_of_peak"].as_f64().unwrap_or_default() * 100.0,
        ))?;
    }
    Ok(Outcome::Done)
}

/// Median seconds of one call, after one that is not measured.
pub(super) fn median(rounds: usize, mut call: impl FnMut()) -> f64 {
    call();
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let started = Instant::now();
        call();
        times.push(started.elapsed().as_secs_f64());
    }
    spread(times)[0]
}

/// Floating-point operations a second of multiply-adds on registers, on all threads: the most of any round.
pub(super) fn peak_flops(bf16: bool, rounds: usize) -> f64 {
    let round = || {
        let started = Instant::now();
        multiply_on_registers(REGISTER_ROUNDS, bf16) / started.elapsed().as_secs_f64()
    };
    (0..rounds.max(9)).map(|_| round()).fold(0.0, f64::max)
}

/// Bytes read and written a second when one large buffer is copied into another by all threads.
pub(super) fn copy_bandwidth(rounds: usize) -> f64 {
    let (from, mut to) = (vec![1.0_f32; COPIED], Vec::new());
    2.0 * (COPIED * size_of::<f32>()) as f64 / median(rounds, || copy_into(&mut to, &from))
}
