//! Documents of Parquet files: one column, one row group at a time.

use std::path::Path;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef};
use arrow_schema::{ArrowError, DataType};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::errors::ParquetError;

use super::format::ParquetFile;
use super::reader::{After, Document, Record, RecordError};
use super::stream::decode;
use crate::error::{DataError, Place, Position};

const BATCH_ROWS: usize = 1024;

/// Documents of the text column of a Parquet file.
pub(super) struct ParquetDocuments {
    source: ParquetFile,
    metadata: ArrowReaderMetadata,
    column: usize,
    /// Row group after the one being read.
    next_row_group: usize,
    batches: Option<ParquetRecordBatchReader>,
    texts: Option<TextColumn>,
    /// Row of `texts` to hand out next, and of its row group.
    next_row: usize,
    next_row_in_group: usize,
}

impl ParquetDocuments {
    /// Reads the footer and finds the column.
    pub(super) fn new(source: ParquetFile, column: &str) -> Result<Self, DataError> {
        let metadata = ArrowReaderMetadata::load(&source.input, ArrowReaderOptions::new())
            .map_err(|error| parquet_error(&source.file, "footer".to_owned(), error))?;
        let fields = metadata.schema().fields();
        let place = source.file.display().to_string();
        let Some((index, field)) = fields.find(column) else {
            let existing = fields.iter().map(|field| field.name().clone()).collect();
            return Err(DataError::MissingColumn { place, column: column.to_owned(), existing });
        };
        if !is_text(field.data_type()) {
            let found = format!("values of type {}", field.data_type());
            return Err(DataError::NotText { place, column: column.to_owned(), found });
        }
        Ok(Self {
            source,
            metadata,
            column: index,
            next_row_group: 0,
            batches: None,
            texts: None,
            next_row: 0,
            next_row_in_group: 0,
        })
    }

    fn open_row_group(&self, row_group: usize) -> Result<ParquetRecordBatchReader, DataError> {
        let input =
            self.source.input.try_clone().map_err(DataError::io("read", self.source.file.as_ref()))?;
        let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(input, self.metadata.clone());
        let projection = ProjectionMask::roots(builder.parquet_schema(), [self.column]);
        builder
            .with_projection(projection)
            .with_row_groups(vec![row_group])
            .with_batch_size(BATCH_ROWS)
            .build()
            .map_err(|error| self.group_error(error))
    }

    /// Loads the next batch of rows; false at the end of the file.
    fn load_batch(&mut self) -> Result<bool, RecordError> {
        loop {
            if let Some(batches) = self.batches.as_mut() {
                match batches.next() {
                    Some(Ok(batch)) => {
                        self.texts = Some(TextColumn::new(Arc::clone(batch.column(0))));
                        self.next_row = 0;
                        return Ok(true);
                    }
                    Some(Err(error)) => {
                        self.batches = None;
                        let error = self.group_error(from_arrow(error));
                        return Err(RecordError::new(error, After::Continue));
                    }
                    None => self.batches = None,
                }
            }
            if self.next_row_group == self.metadata.metadata().num_row_groups() {
                return Ok(false);
            }
            self.next_row_group += 1;
            self.next_row_in_group = 0;
            let batches = self.open_row_group(self.next_row_group - 1);
            self.batches = Some(batches.map_err(|error| RecordError::new(error, After::Continue))?);
        }
    }

    fn next_record(&mut self) -> Result<Option<Record>, RecordError> {
        loop {
            if let Some(texts) = self.texts.as_ref().filter(|texts| self.next_row < texts.len()) {
                let bytes = texts.bytes(self.next_row).map(<[u8]>::to_vec);
                let position = self.row_position();
                self.next_row += 1;
                self.next_row_in_group += 1;
                let Some(bytes) = bytes else { return Ok(Some(Record::Null)) };
                let text = decode(bytes, &position).map_err(|e| RecordError::new(e, After::Continue))?;
                return Ok(Some(Record::Text(Document { text, position })));
            }
            self.texts = None;
            if !self.load_batch()? {
                return Ok(None);
            }
        }
    }

    fn row_position(&self) -> Position {
        let row_group = self.next_row_group.saturating_sub(1);
        Position {
            file: Arc::clone(&self.source.file),
            compressed_offset: self.row_group_end(row_group),
            byte_offset: 0,
            place: Place::Row { row_group, row: self.next_row_in_group },
        }
    }

    /// Byte of the file behind the text column of a row group.
    fn row_group_end(&self, row_group: usize) -> u64 {
        let columns = self.metadata.metadata().row_group(row_group).columns();
        let root = |index| self.metadata.parquet_schema().get_column_root_idx(index);
        let column = columns.iter().enumerate().find(|(index, _)| root(*index) == self.column);
        column.map_or(0, |(_, column)| {
            let (start, length) = column.byte_range();
            start + length
        })
    }

    fn group_error(&self, error: ParquetError) -> DataError {
        let row_group = self.next_row_group.saturating_sub(1);
        parquet_error(&self.source.file, format!("row group {row_group}"), error)
    }
}

impl Iterator for ParquetDocuments {
    type Item = Result<Record, RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_record().transpose()
    }
}

fn parquet_error(file: &Path, part: String, source: ParquetError) -> DataError {
    DataError::Parquet { path: file.to_owned(), part, source }
}

fn from_arrow(error: ArrowError) -> ParquetError {
    match error {
        ArrowError::ParquetError(message) => ParquetError::General(message),
        other => ParquetError::External(Box::new(other)),
    }
}

fn is_text(data_type: &DataType) -> bool {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => true,
        DataType::Dictionary(_, values) => is_text(values),
        _ => false,
    }
}

/// A batch of the text column, whatever its encoding.
struct TextColumn {
    values: ArrayRef,
    /// Of a dictionary: index into `values` for each row; `None` for null.
    keys: Option<Vec<Option<usize>>>,
}

impl TextColumn {
    fn new(array: ArrayRef) -> Self {
        let Some(dictionary) = array.as_any_dictionary_opt() else {
            return Self { values: array, keys: None };
        };
        let values = Arc::clone(dictionary.values());
        let keys = if values.is_empty() {
            vec![None; array.len()]
        } else {
            let keys = dictionary.normalized_keys();
            keys.into_iter().enumerate().map(|(row, key)| array.is_valid(row).then_some(key)).collect()
        };
        Self { values, keys: Some(keys) }
    }

    fn len(&self) -> usize {
        self.keys.as_ref().map_or(self.values.len(), Vec::len)
    }

    /// Bytes of a row; `None` for null.
    fn bytes(&self, row: usize) -> Option<&[u8]> {
        let index = match &self.keys {
            Some(keys) => keys[row]?,
            None => row,
        };
        let values = self.values.as_ref();
        values.is_valid(index).then(|| match values.data_type() {
            DataType::Utf8 => values.as_string::<i32>().value(index).as_bytes(),
            DataType::LargeUtf8 => values.as_string::<i64>().value(index).as_bytes(),
            DataType::Utf8View => values.as_string_view().value(index).as_bytes(),
            DataType::Binary => values.as_binary::<i32>().value(index),
            DataType::LargeBinary => values.as_binary::<i64>().value(index),
            DataType::BinaryView => values.as_binary_view().value(index),
            other => unreachable!("`is_text` admitted {other}"),
        })
    }
}
