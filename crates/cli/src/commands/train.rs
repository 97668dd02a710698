//! `switchyard train`: a whole run, and at its end what it is good for.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use burn::tensor::Device;
use switchyard_checkpoint::hf::{self, StoredDtype};
use switchyard_checkpoint::open_model;
use switchyard_comm::Choice;
use switchyard_config::{ConfigError, MemorySummary, MeshShape, Resolved, RunPlan, rank_memory, resolve};
use switchyard_data::DataSet;
use switchyard_kernels::{DeviceName, allow_tf32, device_memory};
use switchyard_parallel::Mesh;
use switchyard_train::{
    EvalRecord, Observer, Resume, RunDirectory, StepRecord, TrainOptions, TrainOutcome,
    refuse_different_runs, train,
};

use super::model_directory::{LoadedModel, checkpoint_of};
use super::progress::Work;
use super::{data, export, output};
use crate::args::{TrainArguments, Verbosity};
use crate::job::{Job, TIMEOUT, of_all_ranks};
use crate::{Outcome, logging, memory, signals};

/// Most tokens that are written for a prompt at the end of a run.
const PROMPT_TOKENS: usize = 64;

pub(crate) fn run(
    arguments: &TrainArguments,
    device: DeviceName,
    launcher: Choice,
    verbosity: Verbosity,
) -> anyhow::Result<Outcome> {
    let resolved = resolve(&arguments.config, &arguments.set);
    let timeout = |resolved: &Resolved| Duration::from_secs(resolved.plan.comm.timeout_s);
    let job = Job::join(launcher, resolved.as_ref().map_or(TIMEOUT, timeout))?;
    let trained = train_together(arguments, resolved, device, verbosity, &job);
    let first = job.is_first();
    let mut ended = None;
    let outcome = job.end(trained.and_then(|trained| {
        if let Some(stopped) = stopped(&trained.outcome, &continuation(arguments)) {
            // Before any rank ends with a code that makes the launcher end the others.
            if first {
                output::line(stopped)?;
            }
            return Ok(Outcome::Interrupted);
        }
        ended = Some(trained);
        Ok(Outcome::Done)
    }))?;
    // The other ranks are not needed for what comes after training, and must not wait for it.
    if let (true, Some(trained)) = (first, &ended) {
        finish(trained)?;
    }
    Ok(outcome)
}

/// A run that came to its end, or was interrupted.
struct Trained {
    plan: RunPlan,
    device: Device,
    root: PathBuf,
    outcome: TrainOutcome,
}

/// Everything that the ranks do together.
fn train_together(
    arguments: &TrainArguments,
    resolved: Result<Resolved, ConfigError>,
    device: DeviceName,
    verbosity: Verbosity,
    job: &Job,
) -> anyhow::Result<Trained> {
    let resolved = job.agree(resolved.map_err(anyhow::Error::from))?;
    let plan = &resolved.plan;
    refuse_different_runs(&**job.communicator(), plan, env!("CARGO_PKG_VERSION")).map_err(of_all_ranks)?;
    let shape = job.agree(MeshShape::of(plan, job.ranks(), &resolved.provenance).map_err(Into::into))?;
    let machines = job.communicator().machines();
    job.agree(shape.check_machines(plan, machines, &resolved.provenance).map_err(Into::into))?;
    let device = job.device(device)?;
    let mesh = Arc::new(Mesh::new(job.communicator_on(&device)?, shape, (&plan.comm).into())?);
    job.agree(allow_tf32(plan.allow_tf32).map_err(Into::into))?;
    let root = arguments.run_dir.clone().unwrap_or_else(|| Path::new("runs").join(&plan.name));
    let opened = job.agree(resume(&arguments.resume).and_then(|resume| {
        if plan.checkpoint.export {
            hf::representable(&plan.model, &plan.routing)
                .context("checkpoint.export = true cannot be done")?;
        }
        let directory = if job.is_first() { Some(RunDirectory::open(&root, &resume)?) } else { None };
        Ok((directory, resume))
    }));
    let (directory, resume) = opened?;
    let directory = directory.unwrap_or_else(|| RunDirectory::join(&root));
    let log = directory.logs().join(format!("rank-{}.log", job.rank()));
    let verbosity = job.verbosity(verbosity);
    job.agree(logging::start(verbosity, Some(&log)))?;
    for line in shape.describe(&plan.model) {
        tracing::info!(rank = job.rank(), "{line}");
    }
    if mesh.is_hierarchical() {
        tracing::info!(rank = job.rank(), "tokens travel machine by machine");
    }
    let data = job.agree(data::open(plan, verbosity.quiet))?;
    // Until here Ctrl-C ends the program at once: what was prepared is kept and nothing was learned.
    let stop = job.agree(signals::stop_flag())?;
    let config = format!("# switchyard {}\n{}", env!("CARGO_PKG_VERSION"), resolved.to_toml());
    let options = TrainOptions {
        device: device.clone(),
        mesh,
        directory,
        resume,
        max_steps: arguments.max_steps,
        stop,
        config,
    };
    let mut watched = Watched {
        screen: Screen::new(plan, &data, verbosity.quiet, shape),
        job,
        device: &device,
        planned_memory: rank_memory(plan, shape, job.rank()),
        told_peak: 0,
    };
    let outcome = train(plan, &data, &options, &mut watched).map_err(of_all_ranks)?;
    Ok(Trained { plan: resolved.plan, device, root, outcome })
}

/// What `--resume` asks for: of a run that is named, its newest checkpoint.
fn resume(argument: &str) -> anyhow::Result<Resume> {
    let path = Path::new(argument);
    match argument {
        "never" => Ok(Resume::Never),
        "auto" => Ok(Resume::Auto),
        _ => checkpoint_of(path)?.map(Resume::From).with_context(|| {
            format!("--resume {argument} is neither `auto` nor `never` nor a checkpoint or run with one")
        }),
    }
}

/// The command that continues this run.
fn continuation(arguments: &TrainArguments) -> String {
    let mut words = vec![arguments.config.display().to_string()];
    words.extend(arguments.set.iter().flat_map(|set| ["--set".to_owned(), set.clone()]));
    if let Some(run_dir) = &arguments.run_dir {
        words.extend(["--run-dir".to_owned(), run_dir.display().to_string()]);
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,".contains(c);
    let quoted = words.iter().map(|word| {
        if word.chars().all(plain) { word.clone() } else { format!("'{}'", word.replace('\'', "'\\''")) }
    });
    format!("switchyard train {} --resume auto", quoted.collect::<Vec<_>>().join(" "))
}

/// What is said of a run that was interrupted and goes on by the command `again`.
fn stopped(outcome: &TrainOutcome, again: &str) -> Option<String> {
    match &outcome.checkpoint {
        None => Some(format!("stopped before anything was learned; start again with: {again}")),
        Some(checkpoint) if outcome.interrupted => Some(format!(
            "stopped at step {}, saved in {}\ncontinue with: {again}",
            outcome.step,
            checkpoint.display()
        )),
        Some(_) => None,
    }
}

/// How good the model became, where everything is and what to do next.
fn finish(trained: &Trained) -> anyhow::Result<()> {
    let Trained { plan, device, root, outcome } = trained;
    let Some(checkpoint) = &outcome.checkpoint else { return Ok(()) };
    if let Some(record) = &outcome.evaluation {
        show_evaluation(record)?;
    }
    if !plan.eval.prompts.is_empty() {
        show_prompts(checkpoint, &plan.eval.prompts, device)?;
    }
    let row = |name: &str, path: &Path| output::line(format!("{name:<12} {}", path.display()));
    row("checkpoint", checkpoint)?;
    if plan.checkpoint.export {
        row("transformers", &write_export(checkpoint, root)?)?;
    }
    row("metrics", &root.join("metrics.jsonl"))?;
    row("log", &root.join("logs/rank-0.log"))?;
    row("config", &root.join("config.toml"))?;
    output::line(format!(
        "try: switchyard generate --model {} --prompt \"The <extra_id_0> is read from the file.\"",
        root.display()
    ))
}

fn show_evaluation(record: &EvalRecord) -> anyhow::Result<()> {
    let eval = &record.eval;
    output::line(format!(
        "held-out text, {} targets that are words, nats a word:",
        output::grouped(eval.words)
    ))?;
    output::line(format!("  loss of the model                       {:.3}", eval.word_loss))?;
    output::line(format!("  loss given another document's inputs    {:.3}", record.mismatched_word_loss))?;
    output::line(format!("  unigram entropy of these words          {:.3}", eval.word_unigram_entropy))
}

fn show_prompts(checkpoint: &Path, prompts: &[String], device: &Device) -> anyhow::Result<()> {
    let loaded = LoadedModel::open(checkpoint, device)?;
    let tokenizer = loaded.tokenizer()?;
    for filled in loaded.filler(&tokenizer).fill(prompts, PROMPT_TOKENS, |_| Ok(()))? {
        output::line(format!("  {}\n  → {}", filled.prompt, filled.filled))?;
    }
    Ok(())
}

/// Replaces `RUN/export` by the model of `checkpoint`, once that is written.
fn write_export(checkpoint: &Path, root: &Path) -> anyhow::Result<PathBuf> {
    let (out, new) = (root.join("export"), root.join("export.new"));
    let remove = |path: &Path| match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    remove(&new).with_context(|| format!("cannot replace {}", new.display()))?;
    export::write(&open_model(checkpoint)?, &new, StoredDtype::F32, None, None)?;
    remove(&out)
        .and_then(|()| std::fs::rename(&new, &out))
        .with_context(|| format!("cannot replace {}", out.display()))?;
    Ok(out)
}

/// The progress of a run on the terminal.
struct Screen {
    work: Work,
}

impl Screen {
    fn new(plan: &RunPlan, data: &DataSet, quiet: bool, mesh: MeshShape) -> Self {
        let work = Work::new(quiet);
        if mesh.ranks() > 1 {
            mesh.describe(&plan.model).iter().for_each(|line| work.note(line));
        }
        work.note(&format!(
            "{}: {} parameters, {} training tokens, {} ids",
            plan.name,
            output::grouped(plan.model.num_parameters()),
            output::grouped(data.num_tokens()),
            output::grouped(data.tokenizer().size() as u64),
        ));
        Self { work }
    }
}

/// Tells the watchdog what this rank is at, the log how much of a GPU's memory is needed, and the screen the rest.
struct Watched<'a> {
    screen: Screen,
    job: &'a Job,
    device: &'a Device,
    planned_memory: MemorySummary,
    /// Peak that the log has been told, in bytes.
    told_peak: u64,
}

impl Watched<'_> {
    fn at(&self, what: &str) {
        self.job.world().activity().at(what);
    }

    /// Logs the memory of a GPU at first, and again when its peak has grown by more than a sixteenth.
    fn tell_memory(&mut self) {
        let Some(memory) = device_memory(self.device) else { return };
        if memory.peak_allocated > self.told_peak + self.told_peak / 16 {
            self.told_peak = memory.peak_allocated;
            tracing::info!(
                rank = self.job.rank(),
                "on the GPU {}",
                memory::on_device(memory, self.planned_memory)
            );
        }
    }
}

impl Observer for Watched<'_> {
    fn resumed(&mut self, step: u64, checkpoint: &Path) {
        self.screen.resumed(step, checkpoint);
    }

    fn step(&mut self, record: &StepRecord, end: u64) {
        self.at(&format!("after step {}", record.step));
        self.tell_memory();
        self.screen.step(record, end);
    }

    fn evaluation(&mut self, record: &EvalRecord) {
        self.at(&format!("after the evaluation of step {}", record.step));
        self.tell_memory();
        self.screen.evaluation(record);
    }

    fn saved(&mut self, checkpoint: &Path) {
        self.screen.saved(checkpoint);
    }
}

impl Observer for Screen {
    fn resumed(&mut self, step: u64, checkpoint: &Path) {
        self.work.restart(step);
        self.work.note(&format!("continuing at step {step} from {}", checkpoint.display()));
    }

    fn step(&mut self, record: &StepRecord, end: u64) {
        let mut message = format!(
            "step {}  loss {:.3}  {} tokens/s",
            record.step,
            record.loss,
            output::grouped(record.tokens_per_second as u64),
        );
        if !record.moe.is_empty() {
            message.push_str(&format!("  dropped {:.1} %", record.fraction_tokens_dropped() * 100.0));
        }
        self.work.at(record.step, end, &message);
    }

    fn evaluation(&mut self, record: &EvalRecord) {
        let eval = &record.eval;
        self.work.note(&format!(
            "step {}: held-out loss {:.3}, words {:.3} (other inputs {:.3}, unigram {:.3}), accuracy {:.1} %",
            record.step,
            eval.loss,
            eval.word_loss,
            record.mismatched_word_loss,
            eval.word_unigram_entropy,
            eval.token_accuracy * 100.0,
        ));
    }

    fn saved(&mut self, checkpoint: &Path) {
        tracing::info!(checkpoint = %checkpoint.display(), "saved");
    }
}
