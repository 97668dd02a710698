//! Shards beside plain writes of as many bytes, and reading them back.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use rustix::time::{ClockId, clock_gettime};
use switchyard_checkpoint::{
    Checkpoint, Contents, Pace, PendingCheckpoint, TensorPart, TensorSource, write_shards,
};
use switchyard_config::parameters::parameters;
use switchyard_config::partition::Part;
use switchyard_config::{RunPlan, resolve_str};

use super::spread;
use crate::Outcome;
use crate::args::BenchCheckpointArguments;
use crate::commands::output;

/// Bytes of a plain write.
const BLOCK: usize = 1 << 20;
/// Parameters with two moments, in float32.
const BYTES_OF_A_PARAMETER: u64 = 3 * 4;

pub(crate) fn run(arguments: &BenchCheckpointArguments) -> anyhow::Result<Outcome> {
    let plan = plan_of(arguments.megabytes as u64 * 1_000_000)?;
    let (tensors, moments) = synthetic(&plan);
    let bytes = plan.model.num_parameters() * BYTES_OF_A_PARAMETER;
    let scratch = Scratch::new(&arguments.dir)?;
    let plain_file = scratch.0.join("plain");
    let remove =
        || fs::remove_file(&plain_file).with_context(|| format!("cannot remove {}", plain_file.display()));
    // A disk that has idled or grows is slow at first. Each way then begins with the memory that the
    // other has just left, which is faster than memory that the machine has to find.
    write_plainly(&plain_file, bytes)?;
    remove()?;
    let (mut shards, mut plain) = (Measured::default(), Measured::default());
    for round in 0..arguments.rounds as u64 {
        let pending = PendingCheckpoint::begin(&scratch.0, round)?;
        shards.time(|| Ok(write_shards(pending.path(), 0, &tensors, &moments, &Pace::unlimited())?))?;
        drop(pending);
        plain.time(|| write_plainly(&plain_file, bytes))?;
        remove()?;
    }
    let pending = PendingCheckpoint::begin(&scratch.0, 0)?;
    let report = write_shards(pending.path(), 0, &tensors, &moments, &Pace::unlimited())?;
    drop((tensors, moments));
    let contents =
        Contents { model: &plan.model, routing: &plan.routing, trainer: serde_json::Value::Null, files: &[] };
    let path = pending.commit(contents, vec![report])?;
    let (mut opened, mut halves, mut columns) =
        (Measured::default(), Measured::default(), Measured::default());
    for _ in 0..arguments.rounds {
        let checkpoint = opened.time(|| Ok(Checkpoint::open(&path)?))?;
        halves.time(|| read_halves(&checkpoint, |_| 0))?;
        columns.time(|| read_halves(&checkpoint, |shape| shape.len() - 1))?;
    }
    let rows = [
        ("write_shards", shards.row(bytes)),
        ("plain write", plain.row(bytes)),
        ("open, cached", opened.row(bytes)),
        ("read half the rows", halves.row(bytes / 2)),
        ("read half the columns", columns.row(bytes / 2)),
    ];
    let ratio = rows[0].1.mb_per_second / rows[1].1.mb_per_second;
    if arguments.json {
        let named: serde_json::Map<_, _> =
            rows.iter().map(|(name, row)| ((*name).to_owned(), row.json())).collect();
        output::json(&serde_json::json!({
            "bytes": bytes, "rounds": arguments.rounds, "ratio": ratio, "measured": named,
        }))?;
    } else {
        for (name, row) in &rows {
            output::line(format!(
                "{name:<22} {:>7.0} MB/s  ({:.0} to {:.0}), {:.3} s of CPU",
                row.mb_per_second, row.min, row.max, row.cpu_s
            ))?;
        }
        output::line(format!(
            "{} of shards, written at {ratio:.2} of the plain speed",
            output::bytes(bytes)
        ))?;
    }
    Ok(Outcome::Done)
}

/// A small Switch model with as many experts as come closest to `bytes` of checkpoint.
fn plan_of(bytes: u64) -> anyhow::Result<RunPlan> {
    let plan = |num_experts: u64| -> anyhow::Result<RunPlan> {
        let text = format!(
            "name = \"bench\"\n[model]\npreset = \"tiny\"\nd_model = 128\nd_ff = 512\nvocab_size = 1024\n\
             num_experts = {num_experts}\n[data]\nsources = [{{ path = \"synthetic\" }}]\n"
        );
        Ok(resolve_str(&text, &[])?.plan)
    };
    let bytes_of = |plan: &RunPlan| plan.model.num_parameters() * BYTES_OF_A_PARAMETER;
    let least = bytes_of(&plan(2)?);
    let each = bytes_of(&plan(3)?) - least;
    plan(2 + (bytes.saturating_sub(least) + each / 2) / each)
}

/// Parameters and moments as one rank owns them; the moments share their values.
fn synthetic(plan: &RunPlan) -> (Vec<TensorPart>, Vec<TensorPart>) {
    let (mut tensors, mut moments) = (Vec::new(), Vec::new());
    for (number, spec) in parameters(&plan.model).into_iter().enumerate() {
        let values: Vec<f32> = (0..spec.num_elements()).map(|i| (i * 7 + number as u64) as f32).collect();
        let tensor = TensorPart::whole(&spec.name, &spec.shape, values);
        for moment in ["m", "v"] {
            let values = Arc::clone(&tensor.values);
            moments.push(TensorPart { name: format!("{}/{moment}", spec.name), values, ..tensor.clone() });
        }
        tensors.push(tensor);
    }
    (tensors, moments)
}

/// `dd bs=1M conv=fsync`.
fn write_plainly(path: &Path, bytes: u64) -> anyhow::Result<()> {
    let block = vec![0; BLOCK];
    let write = || {
        let mut file = File::create(path)?;
        let mut left = bytes as usize;
        while left > 0 {
            let now = left.min(BLOCK);
            file.write_all(&block[..now])?;
            left -= now;
        }
        file.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Reads the first half of every tensor along the axis that `axis` chooses by shape.
fn read_halves(checkpoint: &Checkpoint, axis: fn(&[usize]) -> usize) -> anyhow::Result<()> {
    for (name, shape) in checkpoint.specs().into_iter().chain(checkpoint.optimizer_specs()) {
        let mut half = Part::whole(&shape);
        half.shape[axis(&shape)] /= 2;
        std::hint::black_box(checkpoint.read_part(&name, &half)?);
    }
    Ok(())
}

/// Seconds of each round.
#[derive(Default)]
struct Measured {
    seconds: Vec<f64>,
    cpu_seconds: Vec<f64>,
}

/// What the rounds come to; speeds in MB/s.
struct Row {
    mb_per_second: f64,
    min: f64,
    max: f64,
    cpu_s: f64,
}

impl Measured {
    fn time<T>(&mut self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let (started, cpu) = (Instant::now(), cpu_seconds_so_far());
        let result = work()?;
        self.cpu_seconds.push(cpu_seconds_so_far() - cpu);
        self.seconds.push(started.elapsed().as_secs_f64());
        Ok(result)
    }

    fn row(self, bytes: u64) -> Row {
        let speed = |seconds: f64| bytes as f64 / seconds / 1e6;
        let [median, fastest, slowest] = spread(self.seconds);
        let [cpu_s, ..] = spread(self.cpu_seconds);
        Row { mb_per_second: speed(median), min: speed(slowest), max: speed(fastest), cpu_s }
    }
}

impl Row {
    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "mb_per_second": self.mb_per_second, "min": self.min, "max": self.max, "cpu_s": self.cpu_s,
        })
    }
}

/// Time that all threads have computed so far, in the system as well.
fn cpu_seconds_so_far() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// A directory of its own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(within: &Path) -> anyhow::Result<Self> {
        let path = within.join(format!(".switchyard-bench-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing is left to do for a directory that cannot be removed.
        let _ = fs::remove_dir_all(&self.0);
    }
}
