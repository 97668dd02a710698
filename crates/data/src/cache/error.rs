//! What can go wrong with a token cache.

use std::io;
use std::path::PathBuf;

use crate::durable::Refusal;
use crate::error::DataError;
use crate::tokenizer::TokenizerError;

/// A token cache that cannot be built, opened or read.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
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

    /// The text cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),

    /// The text cannot be encoded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),

    /// A source without text.
    #[error(
        "source `{name}` holds no text in its {files} file(s), {first} first; \
         check data.sources, data.text_column and data.text_document"
    )]
    Empty {
        /// Name of the source.
        name: String,
        /// Files of the source.
        files: usize,
        /// The first of them.
        first: String,
    },

    /// A cache whose files contradict its manifest.
    #[error(
        "{}: {message}; the token cache is damaged: remove the directory {} and it will be built again",
        path.display(),
        path.parent().unwrap_or(path).display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
}

impl From<Refusal> for CacheError {
    fn from(refusal: Refusal) -> Self {
        let Refusal { action, path, source } = refusal;
        Self::Io { action, path, source }
    }
}

impl CacheError {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    pub(super) fn corrupt(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::Corrupt { path: path.into(), message: message.into() }
    }
}
