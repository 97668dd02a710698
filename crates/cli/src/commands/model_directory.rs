//! A model from disk, ready to run, with its tokenizer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use burn::tensor::Device;
use switchyard_checkpoint::{ModelDirectory, latest_complete, open_model};
use switchyard_config::ModelConfig;
use switchyard_config::plan::{PrecisionMode, RoutingConfig};
use switchyard_data::Tokenizer;
use switchyard_model::SwitchTransformer;
use switchyard_parallel::Mesh;
use switchyard_train::load_model;

use super::fill::Filler;

/// The checkpoint at `path`, or the newest one of the run there; `None` for anything else.
pub(crate) fn checkpoint_of(path: &Path) -> anyhow::Result<Option<PathBuf>> {
    if path.join("manifest.json").exists() {
        return Ok(Some(path.to_owned()));
    }
    Ok(latest_complete(&path.join("checkpoints"))?)
}

/// What `--model` names.
pub(crate) struct LoadedModel {
    pub model: SwitchTransformer,
    pub config: ModelConfig,
    pub routing: RoutingConfig,
    pub directory: ModelDirectory,
    /// The ranks that share the work, and this rank's part of the model.
    pub mesh: Arc<Mesh>,
}

impl LoadedModel {
    /// Opens a run, a checkpoint or a Hugging Face directory and loads its parameters.
    pub(crate) fn open(path: &Path, device: &Device) -> anyhow::Result<Self> {
        Self::of(open_model(path)?, device, Arc::new(Mesh::solo()))
    }

    /// Loads this rank's part of an opened model.
    pub(crate) fn of(directory: ModelDirectory, device: &Device, mesh: Arc<Mesh>) -> anyhow::Result<Self> {
        let model = load_model(&directory, device, &mesh, PrecisionMode::Fp32)?;
        let (config, routing) = (directory.model().clone(), directory.routing().clone());
        Ok(Self { model, config, routing, directory, mesh })
    }

    /// The model at work on text.
    pub(crate) fn filler<'a>(&'a self, tokenizer: &'a Tokenizer) -> Filler<'a> {
        Filler {
            model: &self.model,
            config: &self.config,
            routing: &self.routing,
            tokenizer,
            mesh: &self.mesh,
        }
    }

    /// The tokenizer beside the model.
    pub(crate) fn tokenizer(&self) -> anyhow::Result<Tokenizer> {
        let path = self.directory.tokenizer().with_context(|| {
            format!("{} holds no tokenizer.json; copy the model's into it", self.directory.path().display())
        })?;
        let tokenizer = Tokenizer::load(&path)?;
        anyhow::ensure!(
            tokenizer.size() <= self.config.vocab_size,
            "{} has {} ids and the model only {}; use the tokenizer that the model was trained with",
            path.display(),
            tokenizer.size(),
            self.config.vocab_size
        );
        Ok(tokenizer)
    }
}
