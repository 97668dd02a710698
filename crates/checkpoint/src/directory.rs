//! One way to open a model, whoever wrote it.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde_json::Value;
use switchyard_config::ModelConfig;
use switchyard_config::partition::Part;
use switchyard_config::plan::RoutingConfig;

use crate::error::CheckpointError;
use crate::hf::HuggingFaceModel;
use crate::manifest::Manifest;
use crate::read::Checkpoint;
use crate::resume::latest_complete;
use crate::tensors::{TensorSource, parameter_specs};

/// Tokenizer files that may lie beside a model.
const TOKENIZER_FILES: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model"];

/// Who wrote a model directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelKind {
    /// A run of this program.
    Checkpoint,
    /// Hugging Face transformers, or an export.
    HuggingFace,
}

/// An opened model; its parameters are read one at a time.
#[derive(Debug)]
pub struct ModelDirectory {
    contents: Contents,
    /// The trainer's state, null where there is none.
    trainer: Value,
}

#[derive(Debug)]
enum Contents {
    Checkpoint(Checkpoint),
    HuggingFace(HuggingFaceModel),
}

/// Opens a checkpoint, the newest complete checkpoint of a run, or a Hugging Face directory.
///
/// # Errors
/// [`CheckpointError::NoModel`] when `path` is none of these, [`CheckpointError::NoCheckpoint`] for a
/// run without a complete one, [`CheckpointError::Mismatch`] with all tensors that do not fit, and
/// errors that name the file which cannot be read.
pub fn open_model(path: &Path) -> Result<ModelDirectory, CheckpointError> {
    std::fs::metadata(path).map_err(CheckpointError::io("open", path))?;
    let checkpoints = path.join("checkpoints");
    if path.join(Manifest::NAME).exists() {
        ModelDirectory::checkpoint(path)
    } else if checkpoints.is_dir() {
        match latest_complete(&checkpoints)? {
            Some(newest) => ModelDirectory::checkpoint(&newest),
            None => Err(CheckpointError::NoCheckpoint { path: path.to_owned() }),
        }
    } else if path.join("config.json").exists() {
        let contents = Contents::HuggingFace(HuggingFaceModel::open(path)?);
        Ok(ModelDirectory { contents, trainer: Value::Null })
    } else {
        Err(CheckpointError::NoModel { path: path.to_owned() })
    }
}

impl ModelDirectory {
    fn checkpoint(path: &Path) -> Result<Self, CheckpointError> {
        let checkpoint = Checkpoint::open_parameters(path)?;
        let trainer = checkpoint.trainer()?;
        Ok(Self { contents: Contents::Checkpoint(checkpoint), trainer })
    }

    /// Who wrote it.
    pub fn kind(&self) -> ModelKind {
        match &self.contents {
            Contents::Checkpoint(_) => ModelKind::Checkpoint,
            Contents::HuggingFace(_) => ModelKind::HuggingFace,
        }
    }

    /// The directory that holds the model: of a run, the checkpoint chosen.
    pub fn path(&self) -> &Path {
        match &self.contents {
            Contents::Checkpoint(checkpoint) => checkpoint.path(),
            Contents::HuggingFace(model) => model.path(),
        }
    }

    /// Architecture.
    pub fn model(&self) -> &ModelConfig {
        match &self.contents {
            Contents::Checkpoint(checkpoint) => checkpoint.model(),
            Contents::HuggingFace(model) => model.model(),
        }
    }

    /// Routing.
    pub fn routing(&self) -> &RoutingConfig {
        match &self.contents {
            Contents::Checkpoint(checkpoint) => checkpoint.routing(),
            Contents::HuggingFace(model) => model.routing(),
        }
    }

    /// `tokenizer.json`, if the directory has one.
    pub fn tokenizer(&self) -> Option<PathBuf> {
        let path = self.path().join("tokenizer.json");
        path.exists().then_some(path)
    }

    /// The tokenizer files that the directory has, `tokenizer.json` first.
    pub fn tokenizer_files(&self) -> Vec<PathBuf> {
        TOKENIZER_FILES.iter().map(|name| self.path().join(name)).filter(|path| path.exists()).collect()
    }

    /// Encoder length that the model was trained with, in tokens; `None` where nothing tells.
    pub fn inputs_length(&self) -> Option<usize> {
        let place = |pointer| self.trainer.pointer(pointer).and_then(Value::as_u64);
        let length = place("/data/inputs_length").or_else(|| place("/plan/data/inputs_length"))?;
        usize::try_from(length).ok()
    }

    /// What the trainer kept, which is the trainer's to shape; null for a model without a run.
    pub fn trainer(&self) -> &Value {
        &self.trainer
    }
}

/// The parameters, in the order of the parameter table.
impl TensorSource for ModelDirectory {
    fn specs(&self) -> Vec<(String, Vec<usize>)> {
        parameter_specs(self.model())
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [f32]>, CheckpointError> {
        match &self.contents {
            Contents::Checkpoint(checkpoint) => checkpoint.read(name),
            Contents::HuggingFace(model) => model.read(name).map(Cow::Owned),
        }
    }

    fn read_part(&self, name: &str, part: &Part) -> Result<Vec<f32>, CheckpointError> {
        match &self.contents {
            Contents::Checkpoint(checkpoint) => checkpoint.read_part(name, part),
            Contents::HuggingFace(model) => model.read_part(name, part),
        }
    }
}
