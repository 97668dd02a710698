//! Checkpoints of a run: what goes into one, which to resume from, and whether it fits.
//!
//! Every rank writes the matrices that it owns, beside training; the first rank makes a checkpoint
//! of them when all have.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use serde::{Deserialize, Serialize};
use switchyard_checkpoint::{
    Checkpoint, CheckpointError, Contents, Manifest, Pace, PendingCheckpoint, ShardReport, clear_leftovers,
    complete_checkpoints, latest_complete, prune, write_shards,
};
use switchyard_config::{RunPlan, branch_conflicts, resume_conflicts};
use switchyard_data::{DataSet, DataState};
use switchyard_parallel::Mesh;

use crate::agreement::{agreed, agreed_texts, decided_by_first};
use crate::error::TrainError;
use crate::parameters::{Snapshot, load_parts};
use crate::run_directory::Resume;
use crate::step::Learner;
use crate::train_loop::{Progress, TrainOptions};

/// `trainer.json`: everything of a run that is not a tensor.
#[derive(Debug, Serialize, Deserialize)]
struct TrainerState {
    progress: Progress,
    data: DataState,
    plan: RunPlan,
}

/// Part of a core that a save takes from training beside it: while it computes, the threads of a step wait
/// for the one that it has pushed aside.
///
/// More if it would not be done half-way to the next save.
const CORES: f64 = 0.02;

/// Bytes that a busy core hashes and hands to the system in a second: the least that was seen.
const BYTES_PER_CORE_SECOND: f64 = 5e8;

/// The checkpoints of one run.
pub(crate) struct Checkpoints<'a> {
    plan: &'a RunPlan,
    data: &'a DataSet,
    options: &'a TrainOptions,
    directory: PathBuf,
    writing: Option<Writing>,
    /// The last snapshot, for its memory.
    written: Snapshot,
}

/// A save under way, at the same stage on all ranks.
struct Writing {
    stage: Stage,
    /// How fast this rank's shards are written.
    pace: Arc<Pace>,
    /// Whether the run may not go on without it.
    must_succeed: bool,
}

enum Stage {
    /// Every rank writes its shards; the first has what it needs to finish.
    Shards(JoinHandle<(Snapshot, Result<ShardReport, CheckpointError>)>, Option<Box<Finish>>),
    /// The first rank finishes, the others wait.
    Commit(Option<JoinHandle<Result<PathBuf, CheckpointError>>>),
}

/// What makes a checkpoint of shards.
struct Finish {
    pending: PendingCheckpoint,
    checkpoints: PathBuf,
    plan: RunPlan,
    trainer: serde_json::Value,
    tokenizer_files: Vec<PathBuf>,
}

/// How a save ended.
pub(crate) enum Saved {
    /// It is on the disk.
    Complete(PathBuf),
    /// It failed, and the run goes on without it.
    Failed(TrainError),
}

impl<'a> Checkpoints<'a> {
    pub(crate) fn new(plan: &'a RunPlan, data: &'a DataSet, options: &'a TrainOptions) -> Self {
        let directory = options.directory.checkpoints();
        Self { plan, data, options, directory, writing: None, written: Snapshot::default() }
    }

    fn mesh(&self) -> &'a Mesh {
        &self.options.mesh
    }

    /// The checkpoint to continue from; `None` for a fresh start. What interrupted saves left is cleared.
    pub(crate) fn to_resume(&self) -> Result<Option<PathBuf>, TrainError> {
        let chosen = decided_by_first(self.mesh(), || {
            clear_leftovers(&self.directory)?;
            let path = match &self.options.resume {
                Resume::Never => None,
                Resume::Auto => latest_complete(&self.directory)?,
                Resume::From(path) => Some(path.clone()),
            };
            Ok(path.map_or(String::new(), |path| path.to_string_lossy().into_owned()))
        })?;
        Ok((!chosen.is_empty()).then(|| PathBuf::from(chosen)))
    }

    /// Puts the checkpoint at `path` into `learner`, whatever mesh wrote it; returns the run's counters
    /// and the samples consumed.
    pub(crate) fn load(&self, path: &Path, learner: &mut Learner) -> Result<(Progress, u64), TrainError> {
        // No rank reads a tensor before every file has been checked by one of them.
        let (checkpoint, state) = agreed(self.mesh(), self.open(path))?;
        let TrainerState { progress, data, .. } = state;
        let updates = progress.step - progress.skipped_steps;
        agreed(self.mesh(), load_parts(&checkpoint, learner, self.plan, updates))?;
        Ok((progress, data.samples_consumed))
    }

    fn open(&self, path: &Path) -> Result<(Checkpoint, TrainerState), TrainError> {
        let world = self.mesh().world();
        let checkpoint = Checkpoint::open_share(path, world.rank(), world.size())?;
        let state = trainer_state(&checkpoint)?;
        self.refuse_newer_ones(path, state.progress.step)?;
        self.refuse_other_run(path, &state.plan)?;
        self.data
            .check_state(&state.data)
            .map_err(|difference| TrainError::OtherData { checkpoint: path.to_owned(), difference })?;
        Ok((checkpoint, state))
    }

    /// Steps that this directory has been through already must not be mixed with others.
    fn refuse_newer_ones(&self, path: &Path, step: u64) -> Result<(), TrainError> {
        let newest = complete_checkpoints(&self.directory)?.pop();
        match newest {
            Some(newest) if Manifest::read(&newest)?.step > step => {
                Err(TrainError::NewerCheckpoint { checkpoint: path.to_owned(), newest })
            }
            _ => Ok(()),
        }
    }

    /// The same run may change what no step computes; a new one that starts here, all but the model.
    fn refuse_other_run(&self, path: &Path, saved: &RunPlan) -> Result<(), TrainError> {
        let within = self.directory.canonicalize().ok();
        let own = path.canonicalize().is_ok_and(|path| path.parent() == within.as_deref());
        let conflicts =
            if own { resume_conflicts(saved, self.plan) } else { branch_conflicts(saved, self.plan) };
        if conflicts.is_empty() {
            return Ok(());
        }
        let lines = conflicts.iter().map(|d| format!("\n  {} was {}, is now {}", d.key, d.before, d.after));
        Err(TrainError::OtherRun { checkpoint: path.to_owned(), differences: lines.collect() })
    }

    fn tokenizer_files(&self) -> Vec<PathBuf> {
        let folder = self.options.directory.tokenizer();
        let names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];
        names.map(|name| folder.join(name)).to_vec()
    }

    /// Copies what this rank owns and begins to write it beside training; no other save may be under
    /// way, and the next is expected in `until_next_s` seconds. What is returned is how it failed, where that is tolerated.
    pub(crate) fn begin(
        &mut self,
        learner: &mut Learner,
        progress: &Progress,
        samples: u64,
        until_next_s: f64,
        must_succeed: bool,
    ) -> Result<Option<Saved>, TrainError> {
        let mut finish = None;
        let begun = decided_by_first(self.mesh(), || {
            let state = TrainerState {
                progress: progress.clone(),
                data: self.data.state(samples),
                plan: self.plan.clone(),
            };
            let ready = finish.insert(Box::new(Finish {
                pending: PendingCheckpoint::begin(&self.directory, progress.step)?,
                checkpoints: self.directory.clone(),
                plan: self.plan.clone(),
                trainer: serde_json::to_value(&state).map_err(TrainError::NoJson)?,
                tokenizer_files: self.tokenizer_files(),
            }));
            Ok(ready.pending.path().to_string_lossy().into_owned())
        });
        let directory = match self.tolerated(begun, must_succeed)? {
            Ok(path) => PathBuf::from(path),
            Err(failed) => return Ok(Some(failed)),
        };
        let rank = self.mesh().world().rank();
        let snapshot = Snapshot::take(learner, std::mem::take(&mut self.written));
        let work_s = snapshot.bytes() as f64 / BYTES_PER_CORE_SECOND;
        let cores = CORES.max(work_s / (until_next_s / 2.0));
        let pace = Arc::new(Pace::of_cores(cores));
        let thread = thread::Builder::new().name("checkpoint".to_owned()).spawn({
            let pace = Arc::clone(&pace);
            move || {
                let Snapshot { parameters, moments } = &snapshot;
                let report = write_shards(&directory, rank, parameters, moments, &pace);
                (snapshot, report)
            }
        });
        let stage = Stage::Shards(thread.map_err(TrainError::Thread)?, finish);
        self.writing = Some(Writing { stage, pace, must_succeed });
        Ok(None)
    }

    /// Whether this rank's part of a save under way is not done yet.
    pub(crate) fn is_busy(&self) -> bool {
        match self.writing.as_ref().map(|writing| &writing.stage) {
            Some(Stage::Shards(thread, _)) => !thread.is_finished(),
            Some(Stage::Commit(Some(thread))) => !thread.is_finished(),
            Some(Stage::Commit(None)) | None => false,
        }
    }

    /// Takes a save under way to its next stage, for which no rank may be busy, or waits until none is.
    pub(crate) fn advance(&mut self) -> Result<Option<Saved>, TrainError> {
        let Some(Writing { stage, pace, must_succeed }) = self.writing.take() else { return Ok(None) };
        match stage {
            Stage::Shards(thread, finish) => {
                let written = joined(thread).and_then(|(snapshot, report)| {
                    self.written = snapshot;
                    serde_json::to_string(&report?).map_err(TrainError::NoJson)
                });
                let reports = match self.tolerated(agreed_texts(self.mesh(), written), must_succeed)? {
                    Ok(reports) => reports,
                    Err(failed) => return Ok(Some(failed)),
                };
                let commit = finish.map(|finish| {
                    let keep = (self.plan.checkpoint.keep_last, self.plan.checkpoint.keep_every);
                    thread::Builder::new()
                        .name("checkpoint".to_owned())
                        .spawn(move || finish.commit(&reports, keep))
                });
                let stage = Stage::Commit(commit.transpose().map_err(TrainError::Thread)?);
                self.writing = Some(Writing { stage, pace, must_succeed });
                Ok(None)
            }
            Stage::Commit(thread) => {
                let path = decided_by_first(self.mesh(), || {
                    let path = joined(thread.expect("the first rank commits"))??;
                    Ok(path.to_string_lossy().into_owned())
                });
                Ok(Some(match self.tolerated(path, must_succeed)? {
                    Ok(path) => Saved::Complete(PathBuf::from(path)),
                    Err(failed) => failed,
                }))
            }
        }
    }

    /// Waits for a save under way, if there is one.
    pub(crate) fn finish(&mut self) -> Result<Option<Saved>, TrainError> {
        let mut ended = None;
        while let Some(writing) = &self.writing {
            writing.pace.hurry();
            ended = self.advance()?;
        }
        Ok(ended)
    }

    /// The outcome of a part of a save; an error is one of the run unless it may go on without the save.
    fn tolerated<T>(
        &self,
        outcome: Result<T, TrainError>,
        must_succeed: bool,
    ) -> Result<Result<T, Saved>, TrainError> {
        use switchyard_config::plan::OnCheckpointError::Warn;
        let may_fail = self.plan.checkpoint.on_error == Warn && !must_succeed;
        match outcome {
            Ok(value) => Ok(Ok(value)),
            Err(error) if may_fail && error.is_about_saving() => Ok(Err(Saved::Failed(error))),
            Err(error) => Err(error),
        }
    }
}

impl Finish {
    /// Makes the checkpoint, then removes the ones that are no longer kept.
    fn commit(self, reports: &[String], keep: (usize, u64)) -> Result<PathBuf, CheckpointError> {
        let Self { pending, checkpoints, plan, trainer, tokenizer_files } = self;
        let parse = |report: &String| {
            serde_json::from_str(report).map_err(|error| CheckpointError::BadFile {
                path: pending.path().to_owned(),
                problem: format!("a rank reports its shards in another form: {error}"),
            })
        };
        let reports: Vec<ShardReport> = reports.iter().map(parse).collect::<Result<_, _>>()?;
        let contents =
            Contents { model: &plan.model, routing: &plan.routing, trainer, files: &tokenizer_files };
        let path = pending.commit(contents, reports)?;
        if let Err(error) = prune(&checkpoints, keep.0, keep.1) {
            tracing::warn!(%error, "an old checkpoint stays");
        }
        Ok(path)
    }
}

fn joined<T>(thread: JoinHandle<T>) -> Result<T, TrainError> {
    let panicked = |_| TrainError::Thread(std::io::Error::other("the writer of the checkpoint panicked"));
    thread.join().map_err(panicked)
}

fn trainer_state(checkpoint: &Checkpoint) -> Result<TrainerState, CheckpointError> {
    let path = checkpoint.path().join("trainer.json");
    serde_json::from_value(checkpoint.trainer()?).map_err(|error| CheckpointError::BadFile {
        path,
        problem: format!("{error}; it was written by another version, resume with that one"),
    })
}
