//! The way in: an experiment file and `--set` arguments to a validated plan, and back to a file.

use std::fmt::Write as _;
use std::path::Path;

use crate::decide::decide;
use crate::error::ConfigError;
use crate::layers::Layers;
use crate::plan::RunPlan;
use crate::provenance::{Origin, Provenance};
use crate::schema::RunConfig;
use crate::validate::validate;

/// A plan that passed every check, and where each of its values came from.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The run.
    pub plan: RunPlan,
    /// Origin of each key.
    pub provenance: Provenance,
}

/// Reads `file` with what it extends, then `sets` (`key=value`, later ones win).
///
/// # Errors
/// [`ConfigError`] names the file, line and key, and the mend.
pub fn resolve(file: &Path, sets: &[String]) -> Result<Resolved, ConfigError> {
    let mut layers = Layers::default();
    layers.add_file(file)?;
    finish(layers, sets)
}

/// As [`resolve`], of text in memory; files in `extends` are relative to the working directory.
///
/// # Errors
/// As [`resolve`]; places name the file `config.toml`.
pub fn resolve_str(text: &str, sets: &[String]) -> Result<Resolved, ConfigError> {
    let mut layers = Layers::default();
    layers.add_text(Path::new("config.toml"), text)?;
    finish(layers, sets)
}

fn finish(mut layers: Layers, sets: &[String]) -> Result<Resolved, ConfigError> {
    for set in sets {
        layers.add_set(set)?;
    }
    let (plan, provenance) = decide(layers)?;
    validate(&plan, &provenance)?;
    Ok(Resolved { plan, provenance })
}

impl Resolved {
    /// The run as an experiment file: every key, each with its origin as a comment.
    ///
    /// [`resolve`] of this text gives an equal plan.
    pub fn to_toml(&self) -> String {
        let mut text = String::from("# Every key of the run, with where its value came from.\n");
        let mut table = "";
        let entries = RunConfig::of(&self.plan).entries();
        for (key, value) in &entries {
            let (section, name) = key.split_once('.').unwrap_or(("", key));
            if section != table {
                let _ = write!(text, "\n[{section}]\n");
                table = section;
            }
            let _ = writeln!(text, "{name} = {value}  # {}", comment(self.provenance.origin(key)));
        }
        text
    }
}

/// An origin as a comment on one line.
fn comment(origin: &Origin) -> String {
    origin.to_string().replace(char::is_control, " ")
}

/// A key on which two plans differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The key, dotted.
    pub key: String,
    /// Its value in the first plan, as TOML.
    pub before: String,
    /// Its value in the second plan, as TOML.
    pub after: String,
}

/// Every key of `plan` with its value as TOML, in the order of the reference.
pub fn entries(plan: &RunPlan) -> Vec<(String, String)> {
    RunConfig::of(plan).entries()
}

/// Every key on which `before` and `after` differ, in the order of the reference.
pub fn differences(before: &RunPlan, after: &RunPlan) -> Vec<Difference> {
    let (before, after) = (RunConfig::of(before).entries(), RunConfig::of(after).entries());
    let pairs = before.into_iter().zip(after);
    pairs
        .filter(|(b, a)| b.1 != a.1)
        .map(|((key, before), (_, after))| Difference { key, before, after })
        .collect()
}

/// Keys that a resumed run may change: they do not touch what is computed in a step.
///
/// Of the keys that say where text and tokenizer are found, it is the content that matters: the data
/// set compares the hashes of both with the checkpoint's, and of a mixture also names and weights. So
/// data that has moved can be resumed, and data that has changed cannot.
const FREE_ON_RESUME: &[&str] = &[
    "name",
    "schedule.total_steps",
    "data.sources",
    "data.eval_sources",
    "data.tokenizer",
    "data.train_tokenizer_vocab_size",
    "data.text_column",
    "data.text_document",
    "data.on_corrupt",
    "data.cache_dir",
    "data.prefetch_batches",
    "trainer.recompute_activations",
    "trainer.cuda_graph",
    "trainer.log_every_steps",
    "trainer.max_skipped_steps",
    "parallel.data_parallel_size",
    "parallel.expert_parallel_size",
    "parallel.tensor_parallel_size",
    "comm.timeout_s",
    "comm.deterministic",
    "comm.hierarchical_all_to_all",
    "comm.dispatch_chunks",
    "comm.overlap",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "checkpoint.on_error",
    "checkpoint.export",
    "eval.every_steps",
    "eval.batches",
    "eval.prompts",
];

/// The differences that forbid resuming a run of `before` with `after`.
///
/// `schedule.total_steps` may change: the run is longer or shorter from there on, though `linear` and
/// `cosine` schedules then take another course than an uninterrupted run would have.
pub fn resume_conflicts(before: &RunPlan, after: &RunPlan) -> Vec<Difference> {
    let mut found = differences(before, after);
    found.retain(|difference| !FREE_ON_RESUME.contains(&difference.key.as_str()));
    found
}

/// Whether a new run that starts from another run's checkpoint must keep `key`: the tensors of the
/// model and the optimizer's state are taken over as they are.
fn is_fixed_by_a_checkpoint(key: &str) -> bool {
    key.starts_with("model.") || key == "optimizer.kind"
}

/// The differences that forbid a new run of `after` to start from a checkpoint of a run of `before`.
///
/// Text, schedule, batch and constants may all be other ones; it is another run.
pub fn branch_conflicts(before: &RunPlan, after: &RunPlan) -> Vec<Difference> {
    let mut found = differences(before, after);
    found.retain(|difference| is_fixed_by_a_checkpoint(&difference.key));
    found
}
