//! The order of events of a run: batch, step, log, evaluate, save.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use burn::tensor::Device;
use serde::{Deserialize, Serialize};
use switchyard_config::RunPlan;
use switchyard_data::loader::Prefetched;
use switchyard_data::{DataSet, HostBatch, LoadError, Prefetcher, Share};
use switchyard_parallel::Mesh;

use crate::agreement::agreed;
use crate::checkpointing::{Checkpoints, Saved};
use crate::error::TrainError;
use crate::evaluate::{EvaluationRules, evaluate};
use crate::metrics::{EvalRecord, MetricsFile, StepRecord};
use crate::run_directory::{Resume, RunDirectory};
use crate::step::{BegunStep, Learner};

/// What a run needs beside its plan and its data.
#[derive(Debug)]
pub struct TrainOptions {
    /// Where to compute.
    pub device: Device,
    /// This rank's place in the job.
    pub mesh: Arc<Mesh>,
    /// The run's directory, open.
    pub directory: RunDirectory,
    /// What to do with earlier checkpoints.
    pub resume: Resume,
    /// Stop after this many updates, counted from the start of the run; the schedule is not changed.
    pub max_steps: Option<u64>,
    /// Raised to finish the step, save and stop.
    pub stop: Arc<AtomicBool>,
    /// The resolved experiment, for the run's `config.toml`.
    pub config: String,
}

/// Watches a run.
pub trait Observer {
    /// The run continues from an earlier checkpoint.
    fn resumed(&mut self, step: u64, checkpoint: &std::path::Path);
    /// A step is done.
    fn step(&mut self, record: &StepRecord, end: u64);
    /// An evaluation is done.
    fn evaluation(&mut self, record: &EvalRecord);
    /// A checkpoint is on the disk.
    fn saved(&mut self, checkpoint: &std::path::Path);
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOutcome {
    /// Updates done.
    pub step: u64,
    /// Whether it was asked to stop before its end.
    pub interrupted: bool,
    /// The newest checkpoint.
    pub checkpoint: Option<PathBuf>,
    /// The last evaluation of this process, if there was one.
    pub evaluation: Option<EvalRecord>,
}

/// Counters of a run, as its checkpoints keep them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Updates done, skipped ones included.
    pub step: u64,
    /// Tokens seen, padding not counted.
    pub tokens: u64,
    /// Steps skipped for a loss or gradient that was not finite.
    pub skipped_steps: u64,
    /// Of these, the ones in a row up to now.
    pub skipped_in_a_row: u64,
}

/// Trains until the end of the plan's schedule, or until asked to stop.
///
/// # Errors
/// [`TrainError`] for data, checkpoints or disks that fail, and for too many steps in a row whose
/// loss or gradient is not finite.
pub fn train(
    plan: &RunPlan,
    data: &Arc<DataSet>,
    options: &TrainOptions,
    observer: &mut dyn Observer,
) -> Result<TrainOutcome, TrainError> {
    let mut run = Run::start(plan, data, options, observer)?;
    let end = options.max_steps.unwrap_or(u64::MAX).min(plan.schedule.total_steps);
    let mut batches = run.prefetch(data, end)?;
    let mut stopping = run.mesh.any(options.stop.load(Ordering::Relaxed))?;
    let mut next = if stopping { None } else { run.begin(&mut batches)? };
    while let Some(step) = next.take() {
        let ahead = !options.stop.load(Ordering::Relaxed) && !stopping && run.may_run_ahead_of(&step);
        let begun = if ahead { run.begin(&mut batches) } else { Ok(None) };
        let record = run.finish(step)?;
        // All ranks stop, and take a save to its next stage, at the same step.
        let asked = [options.stop.load(Ordering::Relaxed), run.checkpoints.is_busy()];
        let [stop, busy] = run.mesh.any_of(asked)?;
        stopping |= stop;
        if run.is_due(plan.trainer.log_every_steps) {
            run.write(&record)?;
        }
        observer.step(&record, end);
        if !busy {
            let ended = run.checkpoints.advance()?;
            run.note(ended, observer);
        }
        next = begun?;
        if next.is_some() {
            continue;
        }
        // Whoever asked to stop may not wait long: what is due besides is made up for on resume.
        let last = stopping || record.step == end;
        if last || run.is_due(plan.checkpoint.every_steps) {
            run.save(last, observer)?;
        }
        if !stopping {
            if run.is_due(plan.eval.every_steps) {
                run.evaluate(observer)?;
            }
            next = run.begin(&mut batches)?;
        }
    }
    let ended = run.checkpoints.finish()?;
    run.note(ended, observer);
    let interrupted = run.progress.step < end;
    Ok(run.outcome(interrupted))
}

/// A step that has been begun.
struct StepUnderWay {
    begun: BegunStep,
    /// Its number, from 1.
    number: u64,
    started: Instant,
    waited: Duration,
}

/// A run under way.
struct Run<'a> {
    plan: &'a RunPlan,
    mesh: &'a Mesh,
    learner: Learner,
    progress: Progress,
    /// Steps begun; the last may still be under way.
    begun: u64,
    /// Rows of text learned from.
    samples: u64,
    /// Of the first rank only.
    metrics: Option<MetricsFile>,
    checkpoints: Checkpoints<'a>,
    held_out: Vec<HostBatch>,
    first_sentinel: i32,
    saved: Option<PathBuf>,
    /// Length of the last step in seconds, and its end.
    step_s: f64,
    finished: Instant,
    evaluation: Option<EvalRecord>,
}

impl<'a> Run<'a> {
    fn start(
        plan: &'a RunPlan,
        data: &'a DataSet,
        options: &'a TrainOptions,
        observer: &mut dyn Observer,
    ) -> Result<Self, TrainError> {
        let (tokenizer, model) = (data.tokenizer().size(), plan.model.vocab_size);
        let mesh = &*options.mesh;
        if tokenizer > model {
            // Met by all ranks alike: they end together, and one says why.
            return agreed(mesh, Err(TrainError::VocabularyTooSmall { tokenizer, model }));
        }
        let held_out = data.evaluation_batches(plan.eval.batches).collect::<Result<_, _>>();
        let held_out = agreed(mesh, held_out.map_err(TrainError::from))?;
        let checkpoints = Checkpoints::new(plan, data, options);
        let mut learner = Learner::new(plan, &options.device.clone().autodiff(), Arc::clone(&options.mesh));
        let (mut progress, mut samples) = (Progress::default(), 0);
        let mut saved = None;
        if let Some(path) = checkpoints.to_resume()? {
            (progress, samples) = checkpoints.load(&path, &mut learner)?;
            observer.resumed(progress.step, &path);
            saved = Some(path);
        }
        let opened =
            if mesh.is_first() { open_files(data, options, progress.step).map(Some) } else { Ok(None) };
        let (metrics, evaluated) = agreed(mesh, opened)?.unzip();
        let mut run = Self {
            plan,
            mesh,
            learner,
            metrics,
            begun: progress.step,
            progress,
            samples,
            checkpoints,
            held_out,
            first_sentinel: data.tokenizer().first_sentinel_id() as i32,
            saved,
            step_s: 0.0,
            finished: Instant::now(),
            evaluation: None,
        };
        // An interrupted run saves first: the evaluation that was due is made up for.
        let missing = mesh.any(evaluated == Some(false))?;
        if missing && run.is_due(plan.eval.every_steps) {
            run.evaluate(observer)?;
        }
        Ok(run)
    }

    /// Whether something that happens every so many steps, 0 for never, and at the end of the schedule
    /// happens now.
    fn is_due(&self, every: u64) -> bool {
        self.is_due_at(self.progress.step, every)
    }

    fn is_due_at(&self, step: u64, every: u64) -> bool {
        step == self.plan.schedule.total_steps || (every > 0 && step.is_multiple_of(every))
    }

    /// Makes the batches from here to step `end` in the background.
    fn prefetch(&self, data: &Arc<DataSet>, end: u64) -> Result<Prefetcher, TrainError> {
        let steps = end.saturating_sub(self.progress.step);
        let share = Share {
            index: self.mesh.at().data,
            of: self.mesh.shape().data,
            micro_batch_rows: self.plan.data.micro_batch_rows,
        };
        let ahead = self.plan.data.prefetch_batches;
        Ok(Prefetcher::start(Arc::clone(data), share, self.samples, steps, ahead)?)
    }

    /// Begins the next step, if there is a batch for it.
    fn begin(&mut self, batches: &mut Prefetcher) -> Result<Option<StepUnderWay>, TrainError> {
        let started = Instant::now();
        let Some(Prefetched { micro_batches, waited }) = batches.next_batch()? else { return Ok(None) };
        let begun = self.learner.begin(self.plan, micro_batches, self.begun)?;
        self.begun += 1;
        Ok(Some(StepUnderWay { begun, number: self.begun, started, waited }))
    }

    /// Whether the next step may begin before this one is finished: nothing looks at the model between them.
    fn may_run_ahead_of(&self, step: &StepUnderWay) -> bool {
        let looked_at = [self.plan.checkpoint.every_steps, self.plan.eval.every_steps];
        self.learner.runs_ahead_of(&step.begun)
            && !looked_at.iter().any(|&every| self.is_due_at(step.number, every))
    }

    /// Waits for a step, moves the counters past it and makes its record.
    fn finish(&mut self, step: StepUnderWay) -> Result<StepRecord, TrainError> {
        let StepUnderWay { begun, started, waited, .. } = step;
        let outcome = self.learner.finish(self.plan, begun)?;
        // One that was begun before the last was finished has shared its time.
        self.step_s = self.finished.max(started).elapsed().as_secs_f64();
        self.finished = Instant::now();
        self.samples += self.plan.data.batch_rows as u64;
        let progress = &mut self.progress;
        progress.step += 1;
        progress.tokens += outcome.tokens;
        match &outcome.skipped {
            None => progress.skipped_in_a_row = 0,
            Some(at) => {
                progress.skipped_steps += 1;
                progress.skipped_in_a_row += 1;
                tracing::warn!(step = progress.step, place = %at.place, "step skipped: not finite");
                if progress.skipped_in_a_row >= self.plan.trainer.max_skipped_steps {
                    let (steps, place) = (progress.skipped_in_a_row, at.place.clone());
                    // Met by all ranks alike, as every skip.
                    return agreed(self.mesh, Err(TrainError::NotFinite { steps, place }));
                }
            }
        }
        let mut record = StepRecord::new(progress.step, &outcome, progress.tokens, progress.skipped_steps);
        record.step_ms = self.step_s * 1e3;
        record.data_wait_ms = waited.as_secs_f64() * 1e3;
        record.tokens_per_second = outcome.tokens as f64 / self.step_s;
        Ok(record)
    }

    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<(), TrainError> {
        if self.held_out.is_empty() {
            return Ok(());
        }
        let over = |mismatched_inputs| {
            let rules = EvaluationRules { first_sentinel: self.first_sentinel, mismatched_inputs };
            let (model, plan) = (self.learner.model(), self.plan);
            let rows = plan.data.micro_batch_rows;
            evaluate(model, &plan.model, &plan.routing, &self.held_out, rows, rules, self.mesh)
        };
        let record = EvalRecord {
            step: self.progress.step,
            eval: over(false)?,
            mismatched_word_loss: over(true)?.word_loss,
        };
        self.write(&record)?;
        observer.evaluation(&record);
        self.evaluation = Some(record);
        Ok(())
    }

    /// Writes a record, on the rank that does.
    fn write(&mut self, record: &impl Serialize) -> Result<(), TrainError> {
        self.metrics.as_mut().map_or(Ok(()), |metrics| metrics.write(record))?;
        Ok(())
    }

    /// Begins a checkpoint; the last one of a process is waited for.
    fn save(&mut self, last: bool, observer: &mut dyn Observer) -> Result<(), TrainError> {
        let started = Instant::now();
        let synced = self.metrics.as_ref().map_or(Ok(()), MetricsFile::sync);
        agreed(self.mesh, synced.map_err(TrainError::from))?;
        let earlier = self.checkpoints.finish()?;
        self.note(earlier, observer);
        let steps = if last { 0 } else { self.plan.checkpoint.every_steps };
        let until_next_s = self.step_s * steps as f64;
        let ended =
            self.checkpoints.begin(&mut self.learner, &self.progress, self.samples, until_next_s, last)?;
        self.note(ended, observer);
        if last {
            let ended = self.checkpoints.finish()?;
            self.note(ended, observer);
        } else {
            let held_ms = started.elapsed().as_secs_f64() * 1e3;
            tracing::info!(step = self.progress.step, held_ms, "training goes on beside a save");
        }
        Ok(())
    }

    /// Takes note of how a save ended.
    fn note(&mut self, ended: Option<Saved>, observer: &mut dyn Observer) {
        match ended {
            Some(Saved::Complete(path)) => {
                observer.saved(&path);
                self.saved = Some(path);
            }
            Some(Saved::Failed(error)) => {
                tracing::warn!(step = self.progress.step, %error, "checkpoint not written");
            }
            None => {}
        }
    }

    fn outcome(self, interrupted: bool) -> TrainOutcome {
        TrainOutcome {
            step: self.progress.step,
            interrupted,
            checkpoint: self.saved,
            evaluation: self.evaluation,
        }
    }
}

/// The run's files besides checkpoints, as the first rank opens them; whether the last evaluation
/// that was due is in them.
fn open_files(data: &DataSet, options: &TrainOptions, step: u64) -> Result<(MetricsFile, bool), TrainError> {
    let (metrics, last) = MetricsFile::open_after(&options.directory.metrics(), step)?;
    options.directory.write_config(&options.config)?;
    data.tokenizer().save(&options.directory.tokenizer()).map_err(LoadError::from)?;
    Ok((metrics, last.step.is_none() || last.evaluation == Some(step)))
}
