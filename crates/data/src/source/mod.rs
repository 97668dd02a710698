//! From a path in the configuration to documents.
//!
//! Owns file patterns, formats and readers. Does not clean, tokenise or shuffle text, and makes
//! no decision about a mixture of sources.

mod columnar;
mod format;
mod gzip;
mod json;
mod pattern;
mod reader;
mod stream;
mod text;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use pattern::expand;
pub use reader::{Document, DocumentReader, MAX_RECORD_BYTES, MAX_SKIPPED, ReadCounts, ReadOptions};

use crate::corpus;
use crate::error::DataError;

/// Files behind a source's path.
///
/// `sample` and `sample:validation` are the two halves of the sample corpus, built below
/// `cache_dir` on first use; anything else is a file pattern (see [`expand`]).
///
/// # Errors
/// Those of [`corpus::ensure`] and [`expand`].
pub fn resolve(path: &str, cache_dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    match path {
        "sample" => Ok(vec![corpus::ensure(cache_dir)?.train]),
        "sample:validation" => Ok(vec![corpus::ensure(cache_dir)?.validation]),
        pattern => expand(pattern),
    }
}
