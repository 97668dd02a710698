//! The tokenizer of a plan: loaded from its file, or trained on the sources and kept in the cache.

use std::path::{Path, PathBuf};

use serde_json::json;
use switchyard_config::plan::DataPlan;

use super::LoadError;
use crate::cache::{CacheError, identify};
use crate::durable::{self, Claim};
use crate::progress::{Progress, ProgressFn};
use crate::source::{DocumentReader, ReadOptions};
use crate::tokenizer::{Tokenizer, TokenizerError, TrainOptions, WordCounts, train};

/// Most text that a tokenizer is trained on, in bytes; more changes the vocabulary little.
const TRAINING_BYTES: u64 = 1 << 30;

/// Reports while counting words come once in this many bytes of text.
const REPORT_BYTES: u64 = 4 << 20;

/// Raised whenever the same text would give another vocabulary.
const TRAINING_VERSION: u32 = 1;

/// Files of one source and its share in the text a tokenizer is trained on.
#[derive(Debug, Clone)]
pub struct TrainingText {
    /// The files.
    pub files: Vec<PathBuf>,
    /// Share, relative to the other texts.
    pub weight: f64,
}

/// The tokenizer at `plan.tokenizer`; where there is none and the plan allows, one trained on `texts`.
///
/// A trained tokenizer is kept below `plan.cache_dir`, keyed by its text and size, and nothing is
/// written to `plan.tokenizer`: a file there always wins, so one that a run left behind would
/// outlive a change of the configuration.
///
/// # Errors
/// No tokenizer and none to be trained, one that cannot be loaded, or text that cannot be read.
pub(super) fn load_or_train(
    plan: &DataPlan,
    texts: &[TrainingText],
    progress: ProgressFn<'_>,
) -> Result<Tokenizer, LoadError> {
    if plan.tokenizer.exists() || plan.train_tokenizer_vocab_size == 0 {
        return Ok(Tokenizer::load(&plan.tokenizer)?);
    }
    let options = TrainOptions::new(plan.train_tokenizer_vocab_size);
    let read = ReadOptions::from(plan);
    let directory = plan.cache_dir.join("tokenizers").join(&key(texts, &read, &options)?[..16]);
    if !Tokenizer::is_saved_in(&directory) {
        let waiting = || progress(Progress::Waiting { what: "the tokenizer" });
        let claim = Claim::take(&directory, Tokenizer::is_saved_in, waiting).map_err(TokenizerError::from)?;
        if let Some(claim) = claim {
            let trained = train_on_texts(texts, &read, &options, progress)?;
            claim.clear().map_err(TokenizerError::from)?;
            trained.save(claim.partial())?;
            claim.finish().map_err(TokenizerError::from)?;
        }
    }
    Ok(Tokenizer::load(&directory)?)
}

/// Trains a tokenizer on files, on at most 1 GiB of text shared out by weight.
///
/// # Errors
/// Text that cannot be read, that is empty, or that has too many characters for the vocabulary.
pub fn train_on_texts(
    texts: &[TrainingText],
    read: &ReadOptions,
    options: &TrainOptions,
    progress: ProgressFn<'_>,
) -> Result<Tokenizer, LoadError> {
    let total_weight: f64 = texts.iter().map(|text| text.weight).sum();
    let mut words = WordCounts::default();
    for text in texts {
        let share = text.weight / total_weight / text.files.len() as f64;
        for file in &text.files {
            count_words(file, read, (share * TRAINING_BYTES as f64) as u64, &mut words, progress)?;
        }
    }
    if words.bytes() == 0 {
        let mut files = texts.iter().flat_map(|text| &text.files);
        let first = files.next().map_or_else(String::new, |file| file.display().to_string());
        return Err(LoadError::NoText { first, files: 1 + files.count() });
    }
    progress(Progress::TrainingTokenizer { vocab_size: options.vocab_size });
    Ok(train(&words, options)?)
}

/// Counts the words of the first `limit` bytes of text in a file.
fn count_words(
    file: &Path,
    read: &ReadOptions,
    limit: u64,
    words: &mut WordCounts,
    progress: ProgressFn<'_>,
) -> Result<(), LoadError> {
    let start = words.bytes();
    let mut reported = start;
    for document in DocumentReader::open(file, read)? {
        words.add(&document?.text);
        if words.bytes() - reported >= REPORT_BYTES {
            reported = words.bytes();
            progress(Progress::CountingWords { bytes: reported });
        }
        if words.bytes() - start >= limit {
            break;
        }
    }
    Ok(())
}

fn key(texts: &[TrainingText], read: &ReadOptions, options: &TrainOptions) -> Result<String, CacheError> {
    let mut identities = Vec::with_capacity(texts.len());
    for text in texts {
        identities.push(json!({ "files": identify(&text.files)?, "weight": text.weight }));
    }
    let identity = json!({
        "version": TRAINING_VERSION,
        "texts": identities,
        "text_column": read.text_column,
        "text_document": read.text_document,
        "on_corrupt": read.on_corrupt,
        "vocab_size": options.vocab_size,
        "num_sentinels": options.num_sentinels,
        "character_coverage": options.character_coverage,
        "bytes": TRAINING_BYTES,
    });
    Ok(durable::sha256_hex(identity.to_string().as_bytes()))
}
