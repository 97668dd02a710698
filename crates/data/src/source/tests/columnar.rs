//! Parquet files.

use std::sync::Arc;

use arrow_array::types::Int32Type;
use arrow_array::{
    Array, ArrayRef, BinaryArray, DictionaryArray, Int64Array, LargeStringArray, RecordBatch, StringArray,
    StringViewArray, TimestampSecondArray,
};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use super::*;

/// A Parquet file with the given columns and row groups of `group_rows`.
fn parquet(columns: Vec<(&str, ArrayRef)>, group_rows: usize) -> Vec<u8> {
    let columns = columns.into_iter().map(|(name, array)| (name, array, true));
    let batch = RecordBatch::try_from_iter_with_nullable(columns).unwrap();
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::default()))
        .set_max_row_group_row_count(Some(group_rows))
        .build();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

#[test]
fn every_encoding_of_text_is_read() {
    let values = [Some("one"), None, Some("two"), Some(""), Some("one")];
    let bytes = values.map(|value| value.map(str::as_bytes));
    let columns: [ArrayRef; 5] = [
        Arc::new(StringArray::from_iter(values)),
        Arc::new(LargeStringArray::from_iter(values)),
        Arc::new(StringViewArray::from_iter(values)),
        Arc::new(DictionaryArray::<Int32Type>::from_iter(values)),
        Arc::new(BinaryArray::from_iter(bytes)),
    ];
    for column in columns {
        let data_type = column.data_type().clone();
        let url: ArrayRef = Arc::new(StringArray::from(vec!["https://example.org"; 5]));
        let time: ArrayRef = Arc::new(TimestampSecondArray::from(vec![0; 5]));
        let file =
            TestFile::new("a.parquet", parquet(vec![("url", url), ("timestamp", time), ("text", column)], 2));
        let (texts, counts) = file.read(&fail()).unwrap();
        assert_eq!(texts, ["one", "two", "one"], "{data_type}");
        assert_eq!((counts.documents, counts.empty), (3, 2), "{data_type}");
    }
}

#[test]
fn nothing_but_nulls_is_no_document() {
    let nulls: ArrayRef = Arc::new(DictionaryArray::<Int32Type>::from_iter([None::<&str>, None]));
    let (texts, counts) =
        TestFile::new("a.parquet", parquet(vec![("text", nulls)], 10)).read(&fail()).unwrap();
    assert_eq!((texts.len(), counts.empty), (0, 2));
}

#[test]
fn rows_are_numbered_in_their_row_group() {
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values((0..5000).map(|row| format!("row {row}"))));
    let file = TestFile::new("rows.parquet", parquet(vec![("text", texts)], 3000));
    let documents: Vec<_> =
        DocumentReader::open(&file.path, &fail()).unwrap().collect::<Result<Vec<_>, _>>().unwrap();
    assert_eq!(documents.len(), 5000);
    let place = |row: usize| (documents[row].text.as_str(), documents[row].position.place);
    assert_eq!(place(2999), ("row 2999", Place::Row { row_group: 0, row: 2999 }));
    assert_eq!(place(4999), ("row 4999", Place::Row { row_group: 1, row: 1999 }));
    assert!(documents[4999].position.to_string().ends_with("rows.parquet, row group 1, row 1999"));
    assert!(documents[0].position.compressed_offset < documents[4999].position.compressed_offset);
}

#[test]
fn a_missing_or_wrong_column_is_refused_on_opening() {
    let column = || -> ArrayRef { Arc::new(Int64Array::from(vec![1])) };
    let file = TestFile::new("a.parquet", parquet(vec![("id", column()), ("content", column())], 1));
    file.assert_error(&["has no column `text`", "`id`, `content`", "data.text_column"]);
    let file = TestFile::new("a.parquet", parquet(vec![("text", column())], 1));
    file.assert_error(&["column `text` holds values of type Int64, not text"]);
    assert!(matches!(file.read(&skip()), Err(DataError::NotText { .. })));
}

#[test]
fn bad_utf8_names_the_row() {
    let column: ArrayRef = Arc::new(BinaryArray::from_iter_values([&b"one"[..], b"a\xff", b"three"]));
    let file = TestFile::new("a.parquet", parquet(vec![("text", column)], 2));
    file.assert_error(&["row group 0, row 1: byte 2 ", "not valid UTF-8"]);
    let (texts, counts) = file.read(&skip()).unwrap();
    assert_eq!((texts, counts.skipped["bad_utf8"]), (vec!["one".to_owned(), "three".to_owned()], 1));
}

#[test]
fn a_file_that_was_cut_off_is_truncated() {
    let column: ArrayRef = Arc::new(StringArray::from(vec!["text"]));
    let bytes = parquet(vec![("text", column)], 1);
    let cut = bytes.len() - 10;
    TestFile::new("a.parquet", &bytes[..cut]).assert_error(&["truncated Parquet", &format!("of {cut}")]);
    TestFile::new("a.parquet", &bytes[..6]).assert_error(&["truncated Parquet", "of 6"]);
}

#[test]
fn broken_footers_and_pages_are_named() {
    let rows = (0..4000).map(|row: u64| format!("{row} {:x}", row.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    let column: ArrayRef = Arc::new(StringArray::from_iter_values(rows));
    let bytes = parquet(vec![("text", column)], 1000);
    let mut broken_footer = bytes.clone();
    let footer = bytes.len() - 100;
    broken_footer[footer..footer + 80].fill(0xff);
    TestFile::new("a.parquet", broken_footer)
        .assert_error(&["a.parquet, footer: ", "download the file again"]);
    let mut broken_page = bytes;
    broken_page[200..2000].fill(0xff);
    let file = TestFile::new("a.parquet", broken_page);
    file.assert_error(&["a.parquet, row group 0: "]);
    let (texts, counts) = file.read(&skip()).unwrap();
    assert_eq!((texts.len(), counts.skipped["parquet"]), (3000, 1));
}
