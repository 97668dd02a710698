//! What can be wrong with a model on disk.

use std::io;
use std::path::{Path, PathBuf};

use switchyard_config::partition::Part;

/// A checkpoint or Hugging Face directory that cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The system refused a file operation.
    #[error("cannot {action} {}: {source}{}", path.display(), mend(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Neither a checkpoint, nor a run with one, nor a Hugging Face directory.
    #[error(
        "{} holds no model: expected manifest.json (a checkpoint), checkpoints/step-* (a run) or config.json (Hugging Face)",
        path.display()
    )]
    NoModel {
        /// The directory.
        path: PathBuf,
    },
    /// A run without a complete checkpoint.
    #[error("{} holds no complete checkpoint; train until one is saved", path.display())]
    NoCheckpoint {
        /// The directory.
        path: PathBuf,
    },
    /// A file's text is not what it should be.
    #[error("{}: {problem}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the mend.
        problem: String,
    },
    /// A file differs from what its manifest says.
    #[error(
        "{} is damaged: {what} is {found}, its manifest says {expected}; use another checkpoint",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// `size` or `checksum`.
        what: &'static str,
        /// By the manifest.
        expected: String,
        /// On the disk.
        found: String,
    },
    /// Tensors that do not fit the model, all of them.
    #[error("{} does not fit the model:{}", path.display(), list(faults))]
    Mismatch {
        /// The file or directory.
        path: PathBuf,
        /// One line a tensor.
        faults: Vec<String>,
    },
    /// An index of shards that does not agree with the shards, all differences.
    #[error("{} does not fit its files; fetch them again:{}", path.display(), list(faults))]
    IncompleteIndex {
        /// The index.
        path: PathBuf,
        /// One line a file or tensor.
        faults: Vec<String>,
    },
    /// Tensors given to be stored that are not those of the model, each value once; all of them.
    #[error("the tensors do not fit the model:{}", list(faults))]
    WrongParameters {
        /// One line a tensor.
        faults: Vec<String>,
    },
    /// No tensor of this name.
    #[error("there is no tensor `{name}`")]
    NoTensor {
        /// The name.
        name: String,
    },
    /// A tensor was refused by its receiver.
    #[error("tensor `{name}` was refused: {reason}")]
    Refused {
        /// The name.
        name: String,
        /// Why.
        reason: String,
    },
    /// The model has no counterpart in transformers.
    #[error("transformers cannot represent {what}; {mend}")]
    NotRepresentable {
        /// The part.
        what: &'static str,
        /// What to do.
        mend: &'static str,
    },
    /// No length from which the fixed capacity of transformers could be computed.
    #[error("rows of 0 tokens leave `expert_capacity` undetermined; give the tokens of a row, such as 512")]
    NoRowTokens,
    /// An output directory that is already there.
    #[error("{} exists already and is not empty; choose another directory", path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
    },
}

impl CheckpointError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn bad(path: &Path, problem: impl Into<String>) -> Self {
        Self::BadFile { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn outside(name: &str, shape: &[usize], part: &Part) -> Self {
        let Part { start, shape: len } = part;
        Self::refused(name, format!("{len:?} values from {start:?} are not within its shape {shape:?}"))
    }

    pub(crate) fn refused(name: &str, reason: impl Into<String>) -> Self {
        Self::Refused { name: name.to_owned(), reason: reason.into() }
    }
}

/// Each fault on a line of its own.
fn list(faults: &[String]) -> String {
    faults.iter().map(|fault| format!("\n  {fault}")).collect()
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn mend(error: &io::Error) -> &'static str {
    if is_full(error) { "; free some space and run it again" } else { "" }
}
