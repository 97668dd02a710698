//! The sample corpus on disk: two Parquet files of C4's shape and a summary.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;

use super::{CorpusDocument, CorpusSummary, EXTRACTOR_VERSION, SampleCorpus, SplitSummary, Splits};
use crate::durable;
use crate::error::DataError;

const TRAIN: &str = "train-00000-of-00001.parquet";
const VALIDATION: &str = "validation-00000-of-00001.parquet";
const SUMMARY: &str = "corpus.json";
const ROW_GROUP_ROWS: usize = 1024;

/// The corpus in `directory`, if it is whole and made from this list by this extractor.
pub(super) fn find(directory: &Path, packages_sha256: &str) -> Option<SampleCorpus> {
    let summary = fs::read(directory.join(SUMMARY)).ok()?;
    let summary: CorpusSummary = serde_json::from_slice(&summary).ok()?;
    let (train, validation) = (directory.join(TRAIN), directory.join(VALIDATION));
    let length = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.len());
    let is_current = summary.extractor_version == EXTRACTOR_VERSION
        && summary.packages_sha256 == packages_sha256
        && length(&train) == Some(summary.train.file_bytes)
        && length(&validation) == Some(summary.validation.file_bytes);
    is_current.then_some(SampleCorpus { train, validation, summary })
}

/// Writes the corpus; the summary comes last, so that a directory with one is complete.
pub(super) fn write(
    directory: &Path,
    splits: &Splits,
    packages_sha256: String,
) -> Result<SampleCorpus, DataError> {
    fs::create_dir_all(directory).map_err(DataError::io("create", directory))?;
    let stale = directory.join(SUMMARY);
    if stale.exists() {
        fs::remove_file(&stale).map_err(DataError::io("remove", stale))?;
    }
    let (train, train_summary) = write_split(directory, TRAIN, &splits.train)?;
    let (validation, validation_summary) = write_split(directory, VALIDATION, &splits.validation)?;
    let summary = CorpusSummary {
        extractor_version: EXTRACTOR_VERSION,
        packages_sha256,
        sha256: hash_of_texts(splits),
        packages: splits.packages,
        train: train_summary,
        validation: validation_summary,
    };
    let path = directory.join(SUMMARY);
    let mut json = serde_json::to_vec_pretty(&summary).map_err(|error| DataError::Io {
        action: "write",
        path: path.clone(),
        source: error.into(),
    })?;
    json.push(b'\n');
    replace(&path, &json)?;
    Ok(SampleCorpus { train, validation, summary })
}

fn hash_of_texts(splits: &Splits) -> String {
    let mut texts = Vec::new();
    for document in splits.train.iter().chain(&splits.validation) {
        texts.extend_from_slice(document.text.as_bytes());
        texts.push(0);
    }
    durable::sha256_hex(&texts)
}

fn write_split(
    directory: &Path,
    name: &str,
    documents: &[CorpusDocument],
) -> Result<(PathBuf, SplitSummary), DataError> {
    let path = directory.join(name);
    let bytes = encode(documents).map_err(|source| DataError::Parquet {
        path: path.clone(),
        part: "while it is written".to_owned(),
        source,
    })?;
    replace(&path, &bytes)?;
    let summary = SplitSummary {
        documents: documents.len(),
        bytes: documents.iter().map(|document| document.text.len()).sum(),
        file_bytes: bytes.len() as u64,
    };
    Ok((path, summary))
}

/// Parquet with C4's columns. The time of a text is not known, so `timestamp` is null.
fn encode(documents: &[CorpusDocument]) -> Result<Vec<u8>, ParquetError> {
    let schema = Arc::new(Schema::new(vec![
        Field::new("text", DataType::Utf8, false),
        Field::new("timestamp", DataType::Utf8, true),
        Field::new("url", DataType::Utf8, false),
    ]));
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?))
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .build();
    let texts = documents.iter().map(|document| Some(document.text.as_str()));
    let urls = documents.iter().map(|document| Some(document.url.as_str()));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(texts.collect::<StringArray>()),
        Arc::new(StringArray::new_null(documents.len())),
        Arc::new(urls.collect::<StringArray>()),
    ];
    let mut writer = ArrowWriter::try_new(Vec::new(), Arc::clone(&schema), Some(properties))?;
    writer.write(&RecordBatch::try_new(schema, columns)?)?;
    writer.into_inner()
}

/// Writes a file under a name of this process and renames it: several processes may build the
/// corpus at once, and none sees an unfinished file of another.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    let partial = durable::with_suffix(path, &format!(".{}.partial", std::process::id()));
    let written = write_whole(&partial, bytes).and_then(|()| durable::rename(&partial, path));
    written.map_err(|error| {
        // It may not exist; the error to report is the first one.
        let _ = fs::remove_file(&partial);
        DataError::io("write", path)(error)
    })
}

fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
