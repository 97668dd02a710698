//! Documents of plain-text files.

use switchyard_config::plan::TextDocument;

use super::reader::{After, Document, Record, RecordError};
use super::stream::{Stream, decode};
use crate::error::{DataError, Position};

/// Documents of a plain-text file: lines, blocks between blank lines, or the whole file.
pub(super) struct TextDocuments {
    stream: Stream,
    split: TextDocument,
    line: Vec<u8>,
}

impl TextDocuments {
    pub(super) fn new(stream: Stream, split: TextDocument) -> Self {
        Self { stream, split, line: Vec::new() }
    }

    /// The next line that is not blank, and where it starts; `None` at the end of the file.
    fn next_filled_line(&mut self) -> Result<Option<Position>, RecordError> {
        loop {
            let start = self.stream.position();
            if !self.stream.next_line(&mut self.line)? {
                return Ok(None);
            }
            if !self.line.trim_ascii().is_empty() {
                return Ok(Some(start));
            }
        }
    }

    /// Adds the lines that belong to the record begun in `record`.
    fn extend(&mut self, record: &mut Vec<u8>, start: &Position) -> Result<(), RecordError> {
        let limit = self.stream.max_record_bytes();
        let mut too_long = false;
        while self.stream.next_line(&mut self.line)? {
            if self.split == TextDocument::Paragraph && self.line.trim_ascii().is_empty() {
                break;
            }
            too_long |= record.len() + self.line.len() > limit;
            if !too_long {
                record.push(b'\n');
                record.extend_from_slice(&self.line);
            }
        }
        if too_long {
            let error = DataError::RecordTooLong { position: start.clone(), limit };
            return Err(RecordError::new(error, After::Continue));
        }
        Ok(())
    }

    fn next_record(&mut self) -> Result<Option<Record>, RecordError> {
        let Some(start) = self.next_filled_line()? else { return Ok(None) };
        let mut record = std::mem::take(&mut self.line);
        if self.split != TextDocument::Line {
            self.extend(&mut record, &start)?;
        }
        let text = decode(record, &start).map_err(|error| RecordError::new(error, After::Continue))?;
        Ok(Some(Record::Text(Document { text, position: start })))
    }
}

impl Iterator for TextDocuments {
    type Item = Result<Record, RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_record().transpose()
    }
}
