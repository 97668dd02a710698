//! Checkpoints of a run: what goes into one, which to resume from, and whether it fits.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use switchyard_checkpoint::{Checkpoint, CheckpointError, Snapshot, latest_complete, prune, save};
use switchyard_config::{RunPlan, resume_conflicts};
use switchyard_data::{DataSet, DataState};

use crate::error::TrainError;
use crate::parameters::{ParameterSink, ParameterSource};
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

/// The checkpoints of one run.
pub(crate) struct Checkpoints<'a> {
    plan: &'a RunPlan,
    data: &'a DataSet,
    options: &'a TrainOptions,
    directory: PathBuf,
}

impl<'a> Checkpoints<'a> {
    pub(crate) fn new(plan: &'a RunPlan, data: &'a DataSet, options: &'a TrainOptions) -> Self {
        Self { plan, data, options, directory: options.directory.checkpoints() }
    }

    /// The checkpoint to continue from; `None` for a fresh start.
    pub(crate) fn to_resume(&self) -> Result<Option<PathBuf>, TrainError> {
        match &self.options.resume {
            Resume::Never => Ok(None),
            Resume::Auto => Ok(latest_complete(&self.directory)?),
            Resume::From(path) => Ok(Some(path.clone())),
        }
    }

    /// Puts the checkpoint at `path` into `learner` and returns its counters.
    pub(crate) fn load(&self, path: &Path, learner: &mut Learner) -> Result<Progress, TrainError> {
        let checkpoint = Checkpoint::open(path)?;
        let TrainerState { progress, data, plan } = trainer_state(&checkpoint)?;
        self.refuse_other_run(path, &plan)?;
        self.data
            .check_state(&data)
            .map_err(|difference| TrainError::OtherData { checkpoint: path.to_owned(), difference })?;
        checkpoint.load_parameters(&mut ParameterSink(learner.model_mut()))?;
        let mut loader = learner.optimizer_mut().loader();
        checkpoint.load_optimizer(&mut loader)?;
        loader.finish()?;
        Ok(progress)
    }

    fn refuse_other_run(&self, path: &Path, saved: &RunPlan) -> Result<(), TrainError> {
        let conflicts = resume_conflicts(saved, self.plan);
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

    /// Writes a checkpoint, then removes the ones that are no longer kept.
    pub(crate) fn save(&self, learner: &Learner, progress: &Progress) -> Result<PathBuf, TrainError> {
        let samples = progress.step * self.plan.data.batch_rows as u64;
        let state = TrainerState {
            progress: progress.clone(),
            data: self.data.state(samples),
            plan: self.plan.clone(),
        };
        let snapshot = Snapshot {
            step: progress.step,
            model: &self.plan.model,
            routing: &self.plan.routing,
            parameters: &ParameterSource { model: learner.model(), config: &self.plan.model },
            optimizer: learner.optimizer(),
            trainer: serde_json::to_value(&state).map_err(TrainError::NoJson)?,
            files: &self.tokenizer_files(),
        };
        let path = save(&self.directory, &snapshot)?;
        prune(&self.directory, self.plan.checkpoint.keep_last)?;
        Ok(path)
    }
}

fn trainer_state(checkpoint: &Checkpoint) -> Result<TrainerState, CheckpointError> {
    let path = checkpoint.path().join("trainer.json");
    serde_json::from_value(checkpoint.trainer()?).map_err(|error| CheckpointError::BadFile {
        path,
        problem: format!("{error}; it was written by another version, resume with that one"),
    })
}
