//! The iterator of documents over one file.
//!
//! Owns the policy for records that cannot be read and the counts. The formats themselves are
//! read by `json`, `text` and `columnar`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use switchyard_config::plan::{DataPlan, OnCorrupt, TextDocument};

use super::columnar::ParquetDocuments;
use super::format::{self, Content};
use super::json::JsonDocuments;
use super::text::TextDocuments;
use crate::error::{DataError, Position};

/// Longest record held in memory, in bytes.
pub const MAX_RECORD_BYTES: usize = 64 << 20;

/// Most unreadable records of one file under `OnCorrupt::Skip`.
pub const MAX_SKIPPED: u64 = 1000;

/// How to read a source.
#[derive(Debug, Clone, PartialEq)]
pub struct ReadOptions {
    /// Column or JSON key that holds the text.
    pub text_column: String,
    /// How plain text splits into documents.
    pub text_document: TextDocument,
    /// Unreadable records.
    pub on_corrupt: OnCorrupt,
}

impl ReadOptions {
    /// One document a line of plain text, `text_column` of the other formats; broken records are errors.
    pub fn of_column(text_column: &str) -> Self {
        Self {
            text_column: text_column.to_owned(),
            text_document: TextDocument::Line,
            on_corrupt: OnCorrupt::Fail,
        }
    }
}

impl From<&DataPlan> for ReadOptions {
    fn from(plan: &DataPlan) -> Self {
        Self {
            text_column: plan.text_column.clone(),
            text_document: plan.text_document,
            on_corrupt: plan.on_corrupt,
        }
    }
}

/// One text and where it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// The text as stored, never blank.
    pub text: String,
    /// Its place.
    pub position: Position,
}

/// What a reader has met so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReadCounts {
    /// Documents handed out.
    pub documents: u64,
    /// Records whose text is null or blank; left out.
    pub empty: u64,
    /// Records left out under `OnCorrupt::Skip`, by [`DataError::kind`].
    pub skipped: BTreeMap<&'static str, u64>,
}

/// A record as a format yields it.
pub(super) enum Record {
    /// A text, blank or not.
    Text(Document),
    /// A null instead of a text.
    Null,
}

/// A record that could not be read, and whether the format can go on behind it.
pub(super) struct RecordError {
    pub(super) error: DataError,
    pub(super) after: After,
}

/// What remains readable behind an unreadable record.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// The next record.
    Continue,
    /// Nothing.
    Stop,
    /// The mistake is of the whole file or of the configuration: skipping would hide it.
    Refuse,
}

impl RecordError {
    pub(super) fn new(error: DataError, after: After) -> Self {
        Self { error, after }
    }
}

/// A format: yields records until the file ends.
pub(super) type Records = Box<dyn Iterator<Item = Result<Record, RecordError>> + Send>;

/// Iterator over the documents of one file.
///
/// Compression and format are detected from the first bytes. After an error it is exhausted.
pub struct DocumentReader {
    file: Arc<Path>,
    records: Option<Records>,
    on_corrupt: OnCorrupt,
    counts: ReadCounts,
}

impl DocumentReader {
    /// Opens `path` and detects what it holds.
    ///
    /// # Errors
    /// The file cannot be opened, is empty, is of a kind that cannot be read (each named, with
    /// the mend), or is Parquet without the text column.
    pub fn open(path: &Path, options: &ReadOptions) -> Result<Self, DataError> {
        Self::open_with_limit(path, options, MAX_RECORD_BYTES)
    }

    pub(super) fn open_with_limit(
        path: &Path,
        options: &ReadOptions,
        max_record_bytes: usize,
    ) -> Result<Self, DataError> {
        let source = format::open(path, max_record_bytes)?;
        let file = source.file();
        let records: Records = match source {
            format::Source::Parquet(parquet) => {
                Box::new(ParquetDocuments::new(parquet, &options.text_column)?)
            }
            format::Source::Stream { stream, content: Content::JsonLines } => {
                Box::new(JsonDocuments::new(stream, options.text_column.clone()))
            }
            format::Source::Stream { stream, .. } => {
                Box::new(TextDocuments::new(stream, options.text_document))
            }
        };
        Ok(Self {
            file,
            records: Some(records),
            on_corrupt: options.on_corrupt,
            counts: ReadCounts::default(),
        })
    }

    /// What was read, found empty and skipped so far.
    pub fn counts(&self) -> &ReadCounts {
        &self.counts
    }

    /// Counts an unreadable record, or returns the error that ends the file.
    fn skip(&mut self, failed: RecordError) -> Result<(), DataError> {
        let RecordError { error, after } = failed;
        if self.on_corrupt == OnCorrupt::Fail || after == After::Refuse {
            return Err(error);
        }
        if self.counts.skipped.is_empty() {
            tracing::warn!(%error, "record left out");
        }
        *self.counts.skipped.entry(error.kind()).or_default() += 1;
        if self.counts.skipped.values().sum::<u64>() > MAX_SKIPPED {
            let path = self.file.to_path_buf();
            return Err(DataError::TooManySkipped { path, limit: MAX_SKIPPED, last: Box::new(error) });
        }
        if after == After::Stop {
            self.records = None;
        }
        Ok(())
    }

    fn finish(&mut self) {
        self.records = None;
        if !self.counts.skipped.is_empty() {
            tracing::warn!(
                file = %self.file.display(),
                documents = self.counts.documents,
                skipped = ?self.counts.skipped,
                "records were left out because they cannot be read"
            );
        }
    }
}

impl Iterator for DocumentReader {
    type Item = Result<Document, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        while let Some(records) = self.records.as_mut() {
            match records.next() {
                None => self.finish(),
                Some(Ok(Record::Text(document))) if !document.text.trim().is_empty() => {
                    self.counts.documents += 1;
                    return Some(Ok(document));
                }
                Some(Ok(_)) => self.counts.empty += 1,
                Some(Err(failed)) => {
                    if let Err(error) = self.skip(failed) {
                        self.records = None;
                        return Some(Err(error));
                    }
                    if self.records.is_none() {
                        self.finish();
                    }
                }
            }
        }
        None
    }
}
