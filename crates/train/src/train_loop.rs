//! The order of events of a run: batch, step, log, evaluate, save.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::tensor::Device;
use serde::{Deserialize, Serialize};
use switchyard_config::RunPlan;
use switchyard_config::plan::OnCheckpointError;
use switchyard_data::loader::Prefetched;
use switchyard_data::{DataSet, HostBatch, LoadError, Prefetcher};

use crate::checkpointing::Checkpoints;
use crate::error::TrainError;
use crate::evaluate::{EvaluationRules, evaluate};
use crate::metrics::{EvalRecord, MetricsFile, StepRecord};
use crate::run_directory::{Resume, RunDirectory};
use crate::step::{Learner, StepOutcome};

/// What a run needs beside its plan and its data.
#[derive(Debug)]
pub struct TrainOptions {
    /// Where to compute.
    pub device: Device,
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
    let mut interrupted = options.stop.load(Ordering::Relaxed);
    while !interrupted {
        let started = Instant::now();
        let Some(Prefetched { batch, waited }) = batches.next_batch()? else { break };
        let outcome = run.learner.step(plan, &batch, run.progress.step);
        let record = run.count(&outcome, &batch, started, waited.as_secs_f64())?;
        interrupted = options.stop.load(Ordering::Relaxed);
        if run.is_due(plan.trainer.log_every_steps) {
            run.metrics.write(&record)?;
        }
        observer.step(&record, end);
        // Whoever asked to stop may not wait long: what is due besides is made up for on resume.
        if interrupted || record.step == end || run.is_due(plan.checkpoint.every_steps) {
            let must_succeed = interrupted || record.step == end;
            run.save(must_succeed, observer)?;
        }
        if !interrupted && run.is_due(plan.eval.every_steps) {
            run.evaluate(observer)?;
        }
    }
    let interrupted = run.progress.step < end;
    Ok(run.outcome(interrupted))
}

/// A run under way.
struct Run<'a> {
    plan: &'a RunPlan,
    learner: Learner,
    progress: Progress,
    /// Rows of text learned from.
    samples: u64,
    metrics: MetricsFile,
    checkpoints: Checkpoints<'a>,
    held_out: Vec<HostBatch>,
    first_sentinel: i32,
    saved: Option<PathBuf>,
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
        if tokenizer > model {
            return Err(TrainError::VocabularyTooSmall { tokenizer, model });
        }
        let checkpoints = Checkpoints::new(plan, data, options);
        let mut learner = Learner::new(plan, &options.device.clone().autodiff());
        let (mut progress, mut samples) = (Progress::default(), 0);
        let mut saved = None;
        if let Some(path) = checkpoints.to_resume()? {
            (progress, samples) = checkpoints.load(&path, &mut learner)?;
            observer.resumed(progress.step, &path);
            saved = Some(path);
        }
        let (metrics, last) = MetricsFile::open_after(&options.directory.metrics(), progress.step)?;
        options.directory.write_config(&options.config)?;
        data.tokenizer().save(&options.directory.tokenizer()).map_err(LoadError::from)?;
        let mut run = Self {
            plan,
            learner,
            metrics,
            progress,
            samples,
            checkpoints,
            held_out: data.evaluation_batches(plan.eval.batches).collect::<Result<_, _>>()?,
            first_sentinel: data.tokenizer().first_sentinel_id() as i32,
            saved,
            evaluation: None,
        };
        // An interrupted run saves first: the evaluation that was due is made up for.
        let evaluated = last.step.is_none() || last.evaluation == Some(run.progress.step);
        if !evaluated && run.is_due(plan.eval.every_steps) {
            run.evaluate(observer)?;
        }
        Ok(run)
    }

    /// Whether something that happens every so many steps, 0 for never, and at the end of the schedule
    /// happens now.
    fn is_due(&self, every: u64) -> bool {
        let step = self.progress.step;
        step == self.plan.schedule.total_steps || (every > 0 && step.is_multiple_of(every))
    }

    /// Makes the batches from here to step `end` in the background.
    fn prefetch(&self, data: &Arc<DataSet>, end: u64) -> Result<Prefetcher, TrainError> {
        let steps = end.saturating_sub(self.progress.step);
        let ahead = self.plan.data.prefetch_batches;
        Ok(Prefetcher::start(Arc::clone(data), self.samples, steps, ahead)?)
    }

    /// Moves the counters past a step and makes its record.
    fn count(
        &mut self,
        outcome: &StepOutcome,
        batch: &HostBatch,
        started: Instant,
        waited_s: f64,
    ) -> Result<StepRecord, TrainError> {
        self.samples += batch.rows as u64;
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
                    return Err(TrainError::NotFinite { steps, place });
                }
            }
        }
        let mut record = StepRecord::new(progress.step, outcome, progress.tokens, progress.skipped_steps);
        let elapsed_s = started.elapsed().as_secs_f64();
        record.step_ms = elapsed_s * 1e3;
        record.data_wait_ms = waited_s * 1e3;
        record.tokens_per_second = outcome.tokens as f64 / elapsed_s;
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
            evaluate(model, &plan.model, &plan.routing, &self.held_out, rows, rules)
        };
        let record = EvalRecord {
            step: self.progress.step,
            eval: over(false),
            mismatched_word_loss: over(true).word_loss,
        };
        self.metrics.write(&record)?;
        observer.evaluation(&record);
        self.evaluation = Some(record);
        Ok(())
    }

    fn save(&mut self, must_succeed: bool, observer: &mut dyn Observer) -> Result<(), TrainError> {
        self.metrics.sync()?;
        let warns = self.plan.checkpoint.on_error == OnCheckpointError::Warn && !must_succeed;
        match self.checkpoints.save(&self.learner, &self.progress, self.samples) {
            Ok(path) => {
                observer.saved(&path);
                self.saved = Some(path);
                Ok(())
            }
            Err(error) if warns => {
                tracing::warn!(step = self.progress.step, %error, "checkpoint not written");
                Ok(())
            }
            Err(error) => Err(error),
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
