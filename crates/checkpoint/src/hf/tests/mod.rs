//! Hugging Face directories, in and out.

mod config;
mod fixtures;
mod import;
mod round_trip;

use std::path::{Path, PathBuf};

use switchyard_config::ModelConfig;
use switchyard_config::plan::RoutingConfig;

use super::{ExportOptions, ExportSummary, StoredDtype, export};
use crate::testing::{filled, routing};
use crate::{CheckpointError, ModelDirectory, open_model};

fn options() -> ExportOptions {
    ExportOptions {
        dtype: StoredDtype::F32,
        max_shard_bytes: None,
        row_tokens: 32,
        tokenizer_files: Vec::new(),
    }
}

/// An export of [`filled`] under the routing of transformers; the directory, then what was written.
struct Exported {
    root: tempfile::TempDir,
    summary: ExportSummary,
}

impl Exported {
    fn new(model: &ModelConfig, options: &ExportOptions) -> Self {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        let summary = export(&filled(model), model, &routing(), options, &out).unwrap();
        Self { root, summary }
    }

    fn path(&self) -> PathBuf {
        self.root.path().join("out")
    }

    fn open(&self) -> Result<ModelDirectory, CheckpointError> {
        open_model(&self.path())
    }

    fn json(&self, file: &str) -> serde_json::Value {
        read_json(&self.path().join(file))
    }
}

fn read_json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The message with which an export is refused.
fn refusal(model: &ModelConfig, routing: &RoutingConfig) -> String {
    let root = tempfile::tempdir().unwrap();
    let error = export(&filled(model), model, routing, &options(), &root.path().join("out")).unwrap_err();
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "something was left behind");
    error.to_string()
}
