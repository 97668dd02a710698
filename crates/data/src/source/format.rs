//! What a file holds, judged by its first bytes and then by its name.
//!
//! Users rename files and downloads fail: the bytes win over the extension, and what cannot be
//! read is refused by its name rather than as a broken line.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use super::stream::{Compression, Stream};
use crate::error::{DataError, Place, Position};

/// Bytes looked at in front of a file.
const HEAD_BYTES: usize = 512;
const PARQUET_MAGIC: &[u8] = b"PAR1";

/// Content of a file of lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    JsonLines,
    Text,
}

/// An opened file.
pub(super) enum Source {
    Stream { stream: Stream, content: Content },
    Parquet(ParquetFile),
}

/// An opened Parquet file.
pub(super) struct ParquetFile {
    pub(super) input: File,
    pub(super) file: Arc<Path>,
}

impl Source {
    pub(super) fn file(&self) -> Arc<Path> {
        match self {
            Self::Stream { stream, .. } => Arc::clone(stream.file()),
            Self::Parquet(parquet) => Arc::clone(&parquet.file),
        }
    }
}

/// Opens `path` and detects compression and content.
pub(super) fn open(path: &Path, max_record_bytes: usize) -> Result<Source, DataError> {
    let mut input = File::open(path).map_err(DataError::io("open", path))?;
    let size = input.metadata().map_err(DataError::io("open", path))?.len();
    if size == 0 {
        return Err(DataError::EmptyFile { path: path.to_owned() });
    }
    let mut head = Vec::with_capacity(HEAD_BYTES);
    (&mut input).take(HEAD_BYTES as u64).read_to_end(&mut head).map_err(DataError::io("read", path))?;
    refuse_unreadable(path, &head)?;
    let file: Arc<Path> = path.into();
    if head.starts_with(PARQUET_MAGIC) {
        check_parquet_end(&mut input, &file, size)?;
        warn_if_misnamed(path, Compression::None, true);
        return Ok(Source::Parquet(ParquetFile { input, file }));
    }
    input.seek(SeekFrom::Start(0)).map_err(DataError::io("read", path))?;
    let compression = Compression::detect(&head);
    let mut stream =
        Stream::new(input, file, size, compression, max_record_bytes).map_err(DataError::io("read", path))?;
    let content = detect_content(path, stream.head()?)?;
    if compression != Compression::None {
        refuse_unreadable(path, stream.head()?)?;
        if stream.head()?.starts_with(PARQUET_MAGIC) {
            return Err(unsupported(path, "a compressed Parquet file", "decompress it first"));
        }
    }
    warn_if_misnamed(path, compression, false);
    Ok(Source::Stream { stream, content })
}

/// What the mend of a file in another format begins with.
macro_rules! formats_read {
    () => {
        "Switchyard reads JSON lines and plain text, bare or compressed with gzip or zstd, and Parquet: "
    };
}

/// Files of kinds that are not sources of text, with the way out of each.
const UNREADABLE: [(&[u8], &str, &str); 7] = [
    (b"ARROW1\0\0", "an Arrow file", ARROW_MEND),
    (b"\xff\xff\xff\xff", "an Arrow stream", ARROW_MEND),
    (
        b"BZh",
        "compressed with bzip2",
        concat!(formats_read!(), "recompress it with `bunzip2 -c FILE | zstd > FILE.zst`"),
    ),
    (
        b"\xfd7zXZ\0",
        "compressed with xz",
        concat!(formats_read!(), "recompress it with `xz -dc FILE | zstd > FILE.zst`"),
    ),
    (b"PK\x03\x04", "a zip archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "run `git lfs pull` where it was cloned"),
];
const ARROW_MEND: &str = concat!(
    formats_read!(),
    "write it as Parquet with `datasets.Dataset.from_file(FILE).to_parquet(NEW_FILE)`"
);
const UNPACK: &str = concat!(formats_read!(), "unpack it and name the files inside");

fn refuse_unreadable(path: &Path, head: &[u8]) -> Result<(), DataError> {
    for (magic, found, mend) in UNREADABLE {
        if head.starts_with(magic) {
            return Err(unsupported(path, found, mend));
        }
    }
    if head.get(257..262) == Some(b"ustar") {
        return Err(unsupported(path, "a tar archive", UNPACK));
    }
    let start = head.trim_ascii_start().to_ascii_lowercase();
    if start.starts_with(b"<!doctype html") || start.starts_with(b"<html") {
        return Err(unsupported(
            path,
            "a web page, as a failed download leaves it",
            "download the file again, or turn the page into plain text",
        ));
    }
    Ok(())
}

fn unsupported(path: &Path, found: &'static str, mend: &'static str) -> DataError {
    DataError::Unsupported { path: path.to_owned(), found, mend }
}

/// A Parquet file ends as it begins; one that does not was cut off.
fn check_parquet_end(input: &mut File, file: &Arc<Path>, size: u64) -> Result<(), DataError> {
    let mut tail = [0; 4];
    if size >= 12 {
        input.seek(SeekFrom::End(-4)).map_err(DataError::io("read", file.as_ref()))?;
        input.read_exact(&mut tail).map_err(DataError::io("read", file.as_ref()))?;
    }
    if tail == PARQUET_MAGIC {
        return Ok(());
    }
    let place = Place::Row { row_group: 0, row: 0 };
    let position = Position { file: Arc::clone(file), compressed_offset: size, byte_offset: 0, place };
    Err(DataError::Truncated { position, format: "Parquet", size })
}

/// Content from the first decompressed bytes; the extension decides where those leave it open.
fn detect_content(path: &Path, head: &[u8]) -> Result<Content, DataError> {
    if head.is_empty() {
        return Err(DataError::EmptyFile { path: path.to_owned() });
    }
    let head = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    match (Extension::of(path), head.first()) {
        (Extension::Text, _) => Ok(Content::Text),
        (Extension::Json, Some(b'[')) => Err(unsupported(
            path,
            "a JSON array, not JSON lines",
            "write one object per line: jq -c '.[]' FILE > FILE.jsonl",
        )),
        // A broken first line of a `.jsonl` must not turn it into plain text.
        (Extension::Json, _) | (_, Some(b'{')) => Ok(Content::JsonLines),
        _ => Ok(Content::Text),
    }
}

/// What the name of a file promises, compression aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extension {
    Json,
    Text,
    Parquet,
    Other,
}

impl Extension {
    fn of(path: &Path) -> Self {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        let (name, _) = split_compression(&name);
        match name.rsplit_once('.').map(|(_, extension)| extension) {
            Some("json" | "jsonl" | "ndjson") => Self::Json,
            Some("txt" | "text" | "md") => Self::Text,
            Some("parquet") => Self::Parquet,
            _ => Self::Other,
        }
    }
}

/// A lower-case file name without its compression's extension, and that compression.
pub(super) fn split_compression(name: &str) -> (&str, Compression) {
    let gzip = name.strip_suffix(".gz").map(|stem| (stem, Compression::Gzip));
    let zstd = || name.strip_suffix(".zst").or_else(|| name.strip_suffix(".zstd"));
    gzip.or_else(|| zstd().map(|stem| (stem, Compression::Zstd))).unwrap_or((name, Compression::None))
}

/// Says so when a file is not what its name promises.
fn warn_if_misnamed(path: &Path, compression: Compression, is_parquet: bool) {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    let (_, promised) = split_compression(&name);
    if promised != compression || (Extension::of(path) == Extension::Parquet) != is_parquet {
        let found = if is_parquet { "Parquet" } else { compression.name() };
        tracing::warn!(file = %path.display(), found, "the content of the file contradicts its name; reading by content");
    }
}
