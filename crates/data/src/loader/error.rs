//! What can go wrong between a data plan and a batch.

use crate::cache::CacheError;
use crate::error::DataError;
use crate::span_corruption::SpanCorruptionError;
use crate::tokenizer::TokenizerError;

/// A data set that cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A source cannot be found or read.
    #[error(transparent)]
    Data(#[from] DataError),

    /// The tokenizer cannot be loaded or trained.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),

    /// Tokenised text cannot be built, opened or read.
    #[error(transparent)]
    Cache(#[from] CacheError),

    /// Lengths and noise do not fit each other.
    #[error(transparent)]
    SpanCorruption(#[from] SpanCorruptionError),

    /// Batches asked of a data set without training text.
    #[error("data.sources is empty, so there is nothing to train on; name at least one source")]
    NoSources,

    /// A mixture whose sources would share random streams.
    #[error("two sources are named `{name}`; give each its own data.sources.name")]
    DuplicateName {
        /// The name.
        name: String,
    },

    /// Files without a word to train a tokenizer on.
    #[error(
        "there is no text in {first} ({files} file(s) in all); check data.sources, data.text_column and data.text_document"
    )]
    NoText {
        /// The first file.
        first: String,
        /// Files looked into.
        files: usize,
    },

    /// Training text that is also held out.
    #[error("{file} is in data.sources and in data.eval_sources; held-out text must not be trained on")]
    HeldOutFile {
        /// The file.
        file: String,
    },

    /// A source shorter than one row.
    #[error(
        "source `{name}` has {tokens} tokens and one row takes {needed}; \
         add text to it or lower data.inputs_length"
    )]
    TooSmall {
        /// Name of the source.
        name: String,
        /// Tokens it has.
        tokens: u64,
        /// Tokens of a chunk.
        needed: usize,
    },

    /// A step whose samples cannot be numbered.
    #[error(
        "step {step} lies beyond the last one whose samples can be counted, {last}, with data.batch_rows = {batch_rows}"
    )]
    StepTooLarge {
        /// The step, from 0.
        step: u64,
        /// `data.batch_rows`.
        batch_rows: usize,
        /// Last step that can be had.
        last: u64,
    },

    /// The thread that prepares batches could not be started or has ended without a word.
    #[error("the thread that prepares batches {message}")]
    Thread {
        /// What happened to it.
        message: String,
    },
}

/// A checkpoint made with other data than the configuration names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the checkpoint was made with {what} = {saved} and the configuration gives {found}, so training would go on \
     with other data; restore the setting or the text, or start a new run"
)]
pub struct StateMismatch {
    /// What differs.
    pub what: String,
    /// In the checkpoint.
    pub saved: String,
    /// In the configuration.
    pub found: String,
}
