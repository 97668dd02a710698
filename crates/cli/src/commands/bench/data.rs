//! Corrupted samples from cached tokens, on the calling thread.

use std::path::Path;
use std::time::Instant;

use switchyard_config::resolve;

use crate::Outcome;
use crate::args::Verbosity;
use crate::commands::{data, output};

/// Time spent measuring.
const SECONDS: f64 = 3.0;

pub(crate) fn run(
    config: &Path,
    set: &[String],
    json: bool,
    verbosity: Verbosity,
) -> anyhow::Result<Outcome> {
    let plan = resolve(config, set)?.plan;
    let data = data::open(&plan, verbosity.quiet)?;
    let started = Instant::now();
    let mut step = 0;
    while started.elapsed().as_secs_f64() < SECONDS {
        std::hint::black_box(data.batch(step)?);
        step += 1;
    }
    let seconds = started.elapsed().as_secs_f64();
    let samples = step * plan.data.batch_rows as u64;
    let tokens = samples * data.objective().tokens_length() as u64;
    let (samples_per_second, tokens_per_second) = (samples as f64 / seconds, tokens as f64 / seconds);
    if json {
        output::json(&serde_json::json!({
            "samples_per_second": samples_per_second, "tokens_per_second": tokens_per_second,
        }))?;
    } else {
        output::line(format!(
            "{} samples/s, {} raw tokens/s on one core",
            output::grouped(samples_per_second as u64),
            output::grouped(tokens_per_second as u64),
        ))?;
    }
    Ok(Outcome::Done)
}
