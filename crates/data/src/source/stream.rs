//! The decompressed bytes of a file, line by line, with the position on both sides of the
//! decompressor.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::gzip::GzipMembers;
use super::reader::{After, RecordError};
use crate::error::{DataError, Place, Position};

const BUFFER_BYTES: usize = 256 << 10;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Compression of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// From the first bytes of a file.
    pub(super) fn detect(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A zstd frame, or a skippable frame in front of one.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::None => "uncompressed",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

/// Lines of a file after decompression.
pub(super) struct Stream {
    reader: Box<dyn BufRead + Send>,
    file: Arc<Path>,
    size: u64,
    compression: Compression,
    compressed_offset: Arc<AtomicU64>,
    byte_offset: u64,
    line: u64,
    max_record_bytes: usize,
}

impl Stream {
    /// Starts reading `input` at its beginning; `size` is the length of the file.
    pub(super) fn new(
        input: File,
        file: Arc<Path>,
        size: u64,
        compression: Compression,
        max_record_bytes: usize,
    ) -> io::Result<Self> {
        let compressed_offset = Arc::new(AtomicU64::new(0));
        let counted = CountedRead { input, read: Arc::clone(&compressed_offset) };
        let input = BufReader::with_capacity(BUFFER_BYTES, counted);
        let reader: Box<dyn BufRead + Send> = match compression {
            Compression::None => Box::new(input),
            Compression::Gzip => {
                Box::new(BufReader::with_capacity(BUFFER_BYTES, GzipMembers::new(input, Arc::clone(&file))))
            }
            Compression::Zstd => {
                let mut frames = zstd::stream::read::Decoder::with_buffer(input)?;
                // `zstd --long=31` is the widest window that the format knows.
                frames.window_log_max(31)?;
                Box::new(BufReader::with_capacity(BUFFER_BYTES, frames))
            }
        };
        Ok(Self {
            reader,
            file,
            size,
            compression,
            compressed_offset,
            byte_offset: 0,
            line: 0,
            max_record_bytes,
        })
    }

    pub(super) fn file(&self) -> &Arc<Path> {
        &self.file
    }

    pub(super) fn compression(&self) -> Compression {
        self.compression
    }

    /// Longest record, in bytes.
    pub(super) fn max_record_bytes(&self) -> usize {
        self.max_record_bytes
    }

    /// The first decompressed bytes, not consumed; empty if there are none.
    pub(super) fn head(&mut self) -> Result<&[u8], DataError> {
        // Two calls, because a borrow returned from a fallible match would last for both arms.
        if let Err(error) = self.reader.fill_buf() {
            return Err(self.read_error(error));
        }
        self.reader.fill_buf().map_err(DataError::io("read", self.file.as_ref()))
    }

    /// Position of the line that the next call of `next_line` reads.
    pub(super) fn position(&self) -> Position {
        Position {
            file: Arc::clone(&self.file),
            compressed_offset: self.compressed_offset.load(Ordering::Relaxed),
            byte_offset: self.byte_offset,
            place: Place::Line(self.line + 1),
        }
    }

    /// Reads one line into `line` without its end; false at the end of the file.
    pub(super) fn next_line(&mut self, line: &mut Vec<u8>) -> Result<bool, RecordError> {
        line.clear();
        let start = self.position();
        let at_file_start = self.byte_offset == 0;
        let limit = self.max_record_bytes as u64 + 1;
        match (&mut self.reader).take(limit).read_until(b'\n', line) {
            Err(error) => return Err(RecordError::new(self.read_error(error), After::Stop)),
            Ok(0) => return Ok(false),
            Ok(length) => self.byte_offset += length as u64,
        }
        self.line += 1;
        if line.last() == Some(&b'\n') {
            line.pop();
            if line.last() == Some(&b'\r') {
                line.pop();
            }
        } else if line.len() > self.max_record_bytes {
            self.skip_line()?;
            let error = DataError::RecordTooLong { position: start, limit: self.max_record_bytes };
            return Err(RecordError::new(error, After::Continue));
        }
        if at_file_start && line.starts_with(BYTE_ORDER_MARK) {
            line.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(true)
    }

    /// Discards the rest of a line.
    fn skip_line(&mut self) -> Result<(), RecordError> {
        match self.reader.skip_until(b'\n') {
            Ok(length) => self.byte_offset += length as u64,
            Err(error) => return Err(RecordError::new(self.read_error(error), After::Stop)),
        }
        Ok(())
    }

    fn read_error(&self, error: io::Error) -> DataError {
        if self.compression == Compression::None || error.raw_os_error().is_some() {
            return DataError::Io { action: "read", path: self.file.to_path_buf(), source: error };
        }
        let (position, format, size) = (self.position(), self.compression.name(), self.size);
        match error.kind() {
            io::ErrorKind::UnexpectedEof => DataError::Truncated { position, format, size },
            _ => DataError::CorruptArchive { position, format, size, source: error },
        }
    }
}

/// A file that counts what was read of it.
struct CountedRead {
    input: File,
    read: Arc<AtomicU64>,
}

impl Read for CountedRead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.input.read(buffer)?;
        self.read.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }
}

/// A record as text.
///
/// # Errors
/// [`DataError::BadUtf8`] names the line and the byte inside that line.
pub(super) fn decode(record: Vec<u8>, start: &Position) -> Result<String, DataError> {
    String::from_utf8(record).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line_start = valid.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        let mut position = start.clone();
        if let Place::Line(line) = &mut position.place {
            *line += valid.iter().filter(|&&byte| byte == b'\n').count() as u64;
        }
        DataError::BadUtf8 { position, byte: valid.len() - line_start + 1 }
    })
}
