//! `metrics.jsonl`: one line a logged step or evaluation, and the names in it.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use switchyard_model::moe::LayerMetrics;

use crate::evaluate::Evaluation;
use crate::step::StepOutcome;

/// One logged step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Updates done, this one included.
    pub step: u64,
    /// Mean cross-entropy of the targets in nats.
    pub loss: f64,
    /// Cross-entropy, z-loss and router losses together.
    pub total_loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens seen since the start of the run, padding not counted.
    pub tokens: u64,
    /// Steps left out because loss or gradient was not finite, since the start of the run.
    pub skipped_steps: u64,
    /// Tokens of this step a second.
    pub tokens_per_second: f64,
    /// Duration of the step, waiting for data included.
    pub step_ms: f64,
    /// Time the step waited for its batch.
    pub data_wait_ms: f64,
    /// Metrics of every sparse layer, by `encoder.LAYER` and `decoder.LAYER`.
    pub moe: Map<String, Value>,
}

impl StepRecord {
    /// The record of `outcome`; times are filled in by the caller.
    pub fn new(step: u64, outcome: &StepOutcome, tokens: u64, skipped_steps: u64) -> Self {
        Self {
            step,
            loss: outcome.loss,
            total_loss: outcome.total_loss,
            learning_rate: outcome.learning_rate,
            grad_norm: outcome.grad_norm,
            tokens,
            skipped_steps,
            tokens_per_second: 0.0,
            step_ms: 0.0,
            data_wait_ms: 0.0,
            moe: layer_metrics(&outcome.moe),
        }
    }

    /// Share of routed tokens without a slot, over all sparse layers; 0 for a dense model.
    pub fn fraction_tokens_dropped(&self) -> f64 {
        let values = self.moe.values().filter_map(|layer| layer.get(FRACTION_TOKENS_DROPPED)?.as_f64());
        values.sum::<f64>() / self.moe.len().max(1) as f64
    }
}

const FRACTION_TOKENS_DROPPED: &str = "fraction_tokens_dropped";

/// Metrics of sparse layers by their names, as the file holds them.
pub(crate) fn layer_metrics(layers: &[(String, LayerMetrics)]) -> Map<String, Value> {
    layers.iter().map(|(name, layer)| (name.clone(), layer_values(layer))).collect()
}

fn layer_values(layer: &LayerMetrics) -> Value {
    let groups = layer.groups.max(1) as f64;
    serde_json::json!({
        "tokens_per_expert": layer.tokens_per_expert,
        FRACTION_TOKENS_DROPPED: layer.fraction_tokens_dropped(),
        "expert_usage": layer.expert_usage(),
        "load_cv": layer.load_cv(),
        "router_entropy": layer.router_entropy(),
        "router_confidence": layer.router_confidence(),
        "load_balancing_loss": layer.load_balancing_loss / groups,
        "router_z_loss": layer.router_z_loss / groups,
    })
}

/// One logged evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Updates done.
    pub step: u64,
    /// The evaluation.
    pub eval: Evaluation,
    /// Loss over words when every row reads another document's inputs.
    pub mismatched_word_loss: f64,
}

/// The file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {source}", path.display())]
pub struct MetricsError {
    action: &'static str,
    path: PathBuf,
    source: std::io::Error,
}

/// Appends lines; each is on its way to the disk when `write` returns.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
}

impl MetricsFile {
    /// Opens `path` for the steps after `step`, dropping lines of later steps and torn lines; tells what
    /// the last lines left are of.
    ///
    /// # Errors
    /// When the file cannot be read, cut or opened.
    pub fn open_after(path: &Path, step: u64) -> Result<(Self, LastRecords), MetricsError> {
        let error = |action| move |source| MetricsError { action, path: path.to_owned(), source };
        let kept = match File::open(path) {
            Ok(file) => kept_lines(BufReader::new(file), step).map_err(error("read"))?,
            Err(missing) if missing.kind() == std::io::ErrorKind::NotFound => Kept::default(),
            Err(other) => return Err(error("open")(other)),
        };
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(error("open"))?;
        file.set_len(kept.bytes).map_err(error("cut"))?;
        Ok((Self { path: path.to_owned(), file }, kept.last))
    }

    /// Writes one record as a line.
    ///
    /// # Errors
    /// When the disk refuses it.
    pub fn write(&mut self, record: &impl Serialize) -> Result<(), MetricsError> {
        let error = |source| MetricsError { action: "write to", path: self.path.clone(), source };
        let mut line = serde_json::to_string(record).map_err(|e| error(e.into()))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(error)
    }

    /// Brings all lines to the disk, so that none is missing before a checkpoint that follows.
    ///
    /// # Errors
    /// When the disk refuses it.
    pub fn sync(&self) -> Result<(), MetricsError> {
        let error = |source| MetricsError { action: "sync", path: self.path.clone(), source };
        self.file.sync_data().map_err(error)
    }
}

/// Steps of the last lines of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LastRecords {
    /// Of any line.
    pub step: Option<u64>,
    /// Of an evaluation.
    pub evaluation: Option<u64>,
}

/// The leading lines that are whole and not after a step.
#[derive(Default)]
struct Kept {
    bytes: u64,
    last: LastRecords,
}

fn kept_lines(mut reader: impl BufRead, step: u64) -> std::io::Result<Kept> {
    let mut kept = Kept::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.read_until(b'\n', &mut line)?;
        let record = serde_json::from_slice::<Value>(&line).ok().filter(|_| line.ends_with(b"\n"));
        let at = record.as_ref().and_then(|record| record.get("step")?.as_u64());
        let Some(at) = at.filter(|&at| at <= step) else { return Ok(kept) };
        kept.bytes += read as u64;
        kept.last.step = Some(at);
        if record.is_some_and(|record| record.get("eval").is_some()) {
            kept.last.evaluation = Some(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_drops_later_and_torn_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\":1}\n{\"step\":2,\"eval\":{}}\n{\"step\":3}\n{\"ste").unwrap();
        let (mut file, last) = MetricsFile::open_after(&path, 2).unwrap();
        assert_eq!(last, LastRecords { step: Some(2), evaluation: Some(2) });
        file.write(&serde_json::json!({"step": 3, "again": true})).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"step\":1}\n{\"step\":2,\"eval\":{}}\n{\"step\":3,\"again\":true}\n");
        MetricsFile::open_after(&path, 0).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    }
}
