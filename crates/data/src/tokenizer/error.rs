//! What can go wrong with a tokenizer.

use std::io;
use std::path::PathBuf;

use crate::durable::Refusal;

/// A tokenizer that cannot be loaded, trained, used or saved.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },

    /// No file where the configuration says.
    #[error(
        "no tokenizer at {}; put a tokenizer.json there, point data.tokenizer at one, or set \
         data.train_tokenizer_vocab_size (for example 8192) to train one on data.sources",
        path.display()
    )]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },

    /// A file that the tokenizers library cannot read.
    #[error(
        "{} is not a tokenizer.json: {message}; a SentencePiece .model has to be converted first \
         (transformers: AutoTokenizer.from_pretrained(..).save_pretrained(..))",
        path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the library found.
        message: String,
    },

    /// A special token with another id than T5's.
    #[error(
        "{}: id {id} must be `{expected}` and is `{found}`; Switchyard needs a tokenizer of the T5 family, \
         with <pad>, </s> and <unk> as ids 0, 1 and 2",
        path.display()
    )]
    SpecialToken {
        /// The file.
        path: PathBuf,
        /// The id.
        id: u32,
        /// What T5 has there.
        expected: &'static str,
        /// What the file has there.
        found: String,
    },

    /// Fewer sentinels than the objective uses.
    #[error(
        "{}: the tokenizer ends in {found} sentinels (<extra_id_0> must be the last id, {last}) and {needed} are \
         needed; shorten data.inputs_length, raise data.mean_noise_span_length, or use a tokenizer with more",
        path.display()
    )]
    TooFewSentinels {
        /// The file.
        path: PathBuf,
        /// Sentinels at the end of the vocabulary.
        found: usize,
        /// Sentinels the objective uses.
        needed: usize,
        /// Last id of the vocabulary.
        last: usize,
    },

    /// Nothing to train on.
    #[error("there is no text to train a tokenizer on; check data.sources and data.text_column")]
    NoText,

    /// A vocabulary without room for the characters of the text.
    #[error(
        "a vocabulary of {vocab_size} pieces has no room for the {characters} characters of the text; \
         set data.train_tokenizer_vocab_size to at least {least}"
    )]
    VocabularyTooSmall {
        /// Pieces asked for.
        vocab_size: usize,
        /// Characters that have to be pieces.
        characters: usize,
        /// Size that is accepted.
        least: usize,
    },

    /// The training algorithm failed.
    #[error("the tokenizer cannot be trained: {message}")]
    Training {
        /// What the library found.
        message: String,
    },

    /// Text that cannot be encoded, or ids that cannot be decoded.
    #[error("{}: the tokenizer failed: {message}", path.display())]
    Failed {
        /// File of the tokenizer.
        path: PathBuf,
        /// What the library found.
        message: String,
    },
}

impl From<Refusal> for TokenizerError {
    fn from(refusal: Refusal) -> Self {
        let Refusal { action, path, source } = refusal;
        Self::Io { action, path, source }
    }
}

impl TokenizerError {
    pub(super) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
