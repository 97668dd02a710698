//! Checkpoints of a run: what goes into one, which to resume from, and whether it fits.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use switchyard_checkpoint::{
    Checkpoint, CheckpointError, Manifest, Snapshot, clear_leftovers, complete_checkpoints, latest_complete,
    prune, save,
};
use switchyard_config::{RunPlan, branch_conflicts, resume_conflicts};
use switchyard_data::{DataSet, DataState};

use crate::error::TrainError;
use crate::parameters::ParameterSource;
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

    /// The checkpoint to continue from; `None` for a fresh start. What interrupted saves left is cleared.
    pub(crate) fn to_resume(&self) -> Result<Option<PathBuf>, TrainError> {
        clear_leftovers(&self.directory)?;
        match &self.options.resume {
            Resume::Never => Ok(None),
            Resume::Auto => Ok(latest_complete(&self.directory)?),
            Resume::From(path) => Ok(Some(path.clone())),
        }
    }

    /// Puts the checkpoint at `path` into `learner`; returns the run's counters and the samples consumed.
    pub(crate) fn load(&self, path: &Path, learner: &mut Learner) -> Result<(Progress, u64), TrainError> {
        let checkpoint = Checkpoint::open(path)?;
        let TrainerState { progress, data, plan } = trainer_state(&checkpoint)?;
        self.refuse_newer_ones(path, progress.step)?;
        self.refuse_other_run(path, &plan)?;
        self.data
            .check_state(&data)
            .map_err(|difference| TrainError::OtherData { checkpoint: path.to_owned(), difference })?;
        learner.load_parameters(&checkpoint)?;
        let updates = progress.step - progress.skipped_steps;
        let mut loader = learner.optimizer_mut().loader(updates);
        checkpoint.load_optimizer(&mut loader)?;
        loader.finish()?;
        Ok((progress, data.samples_consumed))
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

    /// Writes a checkpoint, then removes the ones that are no longer kept.
    pub(crate) fn save(
        &self,
        learner: &Learner,
        progress: &Progress,
        samples: u64,
    ) -> Result<PathBuf, TrainError> {
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
        if let Err(error) = prune(&self.directory, self.plan.checkpoint.keep_last) {
            tracing::warn!(%error, "an old checkpoint stays");
        }
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
