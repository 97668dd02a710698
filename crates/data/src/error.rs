//! What can go wrong between a path in the configuration and a document in memory.
//!
//! Owns the errors of `source` and `corpus`. The tokenizer, the token cache and the loader have
//! their own, which carry these where they read text.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Place of a record inside a source file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// The file.
    pub file: Arc<Path>,
    /// Bytes of the file read so far; runs ahead of the record by what the reader buffers.
    pub compressed_offset: u64,
    /// Byte at which the record starts once decompressed; for Parquet 0.
    pub byte_offset: u64,
    /// Line or row.
    pub place: Place,
}

/// Line or row of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Line of a text file, from 1.
    Line(u64),
    /// Row of a columnar file.
    Row {
        /// Row group, from 0.
        row_group: usize,
        /// Row inside the row group, from 0.
        row: usize,
    },
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Place::Line(line) => write!(f, "{}:{line}", self.file.display()),
            Place::Row { row_group, row } => {
                write!(f, "{}, row group {row_group}, row {row}", self.file.display())
            }
        }
    }
}

/// A source of text that cannot be found, opened or read, or a sample corpus that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "open", "read", "write", ...
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },

    /// A pattern that no file matches.
    #[error("no file matches `{pattern}`{}", note(detail))]
    NoMatch {
        /// As the user wrote it.
        pattern: String,
        /// Which part does not exist, where that is known.
        detail: String,
    },

    /// A glob or brace list that cannot be parsed.
    #[error("`{pattern}` is not a valid file pattern: {reason}")]
    BadPattern {
        /// As the user wrote it.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A file without content.
    #[error("{} is empty; an interrupted download leaves such files: fetch it again or remove it", path.display())]
    EmptyFile {
        /// The file.
        path: PathBuf,
    },

    /// A file that is recognised but not readable as a source of text.
    #[error("{} is {found}; {mend}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What to do.
        mend: &'static str,
    },

    /// A file that breaks off.
    #[error(
        "{position}: truncated {format}: the file breaks off at byte {} of {size} \
         (decompressed byte {}); download it again, or set data.on_corrupt = \"skip\" to keep what is whole",
        position.compressed_offset,
        position.byte_offset
    )]
    Truncated {
        /// Last record begun.
        position: Position,
        /// "gzip", "zstd" or "Parquet".
        format: &'static str,
        /// Bytes of the file.
        size: u64,
    },

    /// A compressed file whose content contradicts itself.
    #[error(
        "{position}: corrupt {format} at byte {} of {size}: {source}; test the file with `{}` and download it again",
        position.compressed_offset,
        test_command(format)
    )]
    CorruptArchive {
        /// Last record begun.
        position: Position,
        /// "gzip" or "zstd".
        format: &'static str,
        /// Bytes of the file.
        size: u64,
        /// What the decompressor found.
        source: io::Error,
    },

    /// A line that is not a JSON object.
    #[error(
        "{position}:{column}: {message}: `{excerpt}`{}; mend the record, or set data.on_corrupt = \"skip\" to leave it out",
        note(hint)
    )]
    BadJson {
        /// The line.
        position: Position,
        /// Byte inside the line, from 1.
        column: usize,
        /// What the parser expected.
        message: String,
        /// First 120 characters of the line.
        excerpt: String,
        /// Advice that depends on the kind of file; may be empty.
        hint: &'static str,
    },

    /// Bytes that are not UTF-8.
    #[error(
        "{position}: byte {byte} of the record is not valid UTF-8; convert the file (for example with iconv), \
         or set data.on_corrupt = \"skip\""
    )]
    BadUtf8 {
        /// The record.
        position: Position,
        /// First offending byte inside the record, from 0.
        byte: usize,
    },

    /// Text asked from a column or key that the file does not have.
    #[error(
        "{place} has no column `{column}`; it has {}: set data.text_column to the one that holds the text",
        listed(existing)
    )]
    MissingColumn {
        /// File, with the line in JSON lines.
        place: String,
        /// The column asked for.
        column: String,
        /// The columns that exist.
        existing: Vec<String>,
    },

    /// A text column that does not hold text.
    #[error("{place}: column `{column}` holds {found}, not text; set data.text_column to the one that does")]
    NotText {
        /// File, with the line in JSON lines.
        place: String,
        /// The column asked for.
        column: String,
        /// What it holds.
        found: String,
    },

    /// A record longer than the reader will hold in memory.
    #[error(
        "{position}: a record is longer than {limit} bytes; is this one document a line? \
         Split it, or set data.on_corrupt = \"skip\" to leave it out"
    )]
    RecordTooLong {
        /// Where it starts.
        position: Position,
        /// The limit.
        limit: usize,
    },

    /// A Parquet file whose footer or pages cannot be decoded.
    #[error("{}, {part}: {source}; download the file again", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// "footer" or the row group.
        part: String,
        /// What the decoder found.
        source: parquet::errors::ParquetError,
    },

    /// More unreadable records than `data.on_corrupt = "skip"` tolerates.
    #[error("{}: more than {limit} records cannot be read; the last one: {last}", path.display())]
    TooManySkipped {
        /// The file.
        path: PathBuf,
        /// The limit.
        limit: u64,
        /// Why the last one was not read.
        last: Box<DataError>,
    },

    /// No sample corpus: the list of packages was not known when this program was built.
    #[error(
        "this program was built without the list of its packages ({reason}), so there is no sample corpus; \
         point data.sources at text files (JSON lines, Parquet or plain text), or build from the repository"
    )]
    NoPackageList {
        /// Why.
        reason: String,
    },

    /// No sample corpus: the sources of the packages are not on this machine.
    #[error(
        "the sample corpus is made from the sources of the {total} packages this program was built from, \
         and {missing} of them are not on this machine (for example {example}; looked in {looked_in}); run \
         `cargo fetch --locked` in the repository, or point data.sources at text files \
         (JSON lines, Parquet or plain text)"
    )]
    NoPackageSources {
        /// Packages of the build.
        total: usize,
        /// How many are missing.
        missing: usize,
        /// First missing package.
        example: String,
        /// Directories searched.
        looked_in: String,
    },
}

impl DataError {
    /// Wraps a refusal of the operating system.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    /// Short name of the kind, for counters.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Io { .. } => "io",
            Self::NoMatch { .. } => "no_match",
            Self::BadPattern { .. } => "bad_pattern",
            Self::EmptyFile { .. } => "empty_file",
            Self::Unsupported { .. } => "unsupported",
            Self::Truncated { .. } => "truncated",
            Self::CorruptArchive { .. } => "corrupt_archive",
            Self::BadJson { .. } => "bad_json",
            Self::BadUtf8 { .. } => "bad_utf8",
            Self::MissingColumn { .. } => "missing_column",
            Self::NotText { .. } => "not_text",
            Self::RecordTooLong { .. } => "record_too_long",
            Self::Parquet { .. } => "parquet",
            Self::TooManySkipped { .. } => "too_many_skipped",
            Self::NoPackageList { .. } => "no_package_list",
            Self::NoPackageSources { .. } => "no_package_sources",
        }
    }
}

fn note(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("; {text}") }
}

fn test_command(format: &str) -> String {
    format!("{format} -t")
}

fn listed(names: &[String]) -> String {
    match names {
        [] => "none".to_owned(),
        names => names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "),
    }
}
