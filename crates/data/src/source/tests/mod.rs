//! Readers against small generated files.

#![allow(clippy::unwrap_used)]

mod broken;
mod columnar;
mod lines;
mod pattern;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use switchyard_config::plan::{OnCorrupt, TextDocument};
use tempfile::TempDir;

use super::{DocumentReader, ReadCounts, ReadOptions};
use crate::error::{DataError, Place};

/// A file in a directory of its own.
struct TestFile {
    path: PathBuf,
    _directory: TempDir,
}

impl TestFile {
    fn new(name: &str, bytes: impl AsRef<[u8]>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        fs::write(&path, bytes).unwrap();
        Self { path, _directory: directory }
    }

    fn read(&self, options: &ReadOptions) -> Result<(Vec<String>, ReadCounts), DataError> {
        let mut reader = DocumentReader::open(&self.path, options)?;
        let texts = reader.by_ref().map(|document| document.map(|document| document.text));
        let texts = texts.collect::<Result<Vec<_>, _>>()?;
        Ok((texts, reader.counts().clone()))
    }

    fn texts(&self) -> Vec<String> {
        self.read(&fail()).unwrap().0
    }

    fn error(&self) -> String {
        self.read(&fail()).unwrap_err().to_string()
    }

    /// Asserts that the error names the file and contains every part.
    #[track_caller]
    fn assert_error(&self, parts: &[&str]) {
        let error = self.error();
        assert!(error.contains(self.path.to_str().unwrap()), "{error}");
        for part in parts {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
    }
}

fn fail() -> ReadOptions {
    ReadOptions {
        text_column: "text".to_owned(),
        text_document: TextDocument::Line,
        on_corrupt: OnCorrupt::Fail,
    }
}

fn skip() -> ReadOptions {
    ReadOptions { on_corrupt: OnCorrupt::Skip, ..fail() }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Lines as C4 has them, with texts that do not compress to nothing.
fn c4_lines(count: u64) -> (Vec<u8>, Vec<String>) {
    let mut lines = Vec::new();
    let texts: Vec<String> = (0..count)
        .map(|index| format!("text {index} {:x}", index.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
        .collect();
    for text in &texts {
        writeln!(
            lines,
            r#"{{"text":"{text}","timestamp":"2019-04-25T12:57:54Z","url":"https://example.org/{{x}}"}}"#
        )
        .unwrap();
    }
    (lines, texts)
}
