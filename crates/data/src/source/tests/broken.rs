//! What failed downloads, broken disks and wrong paths leave, and the message for each.

use super::*;

#[test]
fn truncated_archives_name_the_place_and_skip_keeps_whole_lines() {
    let (lines, texts) = c4_lines(5000);
    for (name, bytes) in [("cut.json.gz", gzip(&lines)), ("cut.json.zst", zstd(&lines))] {
        let half = bytes.len() / 2;
        let file = TestFile::new(name, &bytes[..half]);
        file.assert_error(&["truncated", &format!("at byte {half} of {half}"), "download it again"]);
        let (read, counts) = file.read(&skip()).unwrap();
        assert!(!read.is_empty() && texts.starts_with(&read), "{name}");
        assert_eq!(counts.skipped.into_iter().collect::<Vec<_>>(), [("truncated", 1)], "{name}");
    }
}

#[test]
fn a_wrong_checksum_is_found_behind_the_last_line() {
    let (lines, texts) = c4_lines(10);
    let mut bytes = gzip(&lines);
    let crc = bytes.len() - 8;
    bytes[crc] ^= 1;
    let file = TestFile::new("crc.json.gz", bytes);
    file.assert_error(&["corrupt gzip", "gzip -t"]);
    let (read, counts) = file.read(&skip()).unwrap();
    assert_eq!((read, counts.skipped["corrupt_archive"]), (texts.clone(), 1));
    let mut bytes = zstd(&lines);
    *bytes.last_mut().unwrap() ^= 1;
    TestFile::new("checksum.json.zst", bytes).assert_error(&["corrupt zstd", "zstd -t"]);
}

#[test]
fn broken_json_names_line_column_and_excerpt() {
    let long = "x".repeat(200);
    let text = format!("{{\"text\":\"one\"}}\n{{\"text\":\"{long}\n{{\"text\":\"three\"}}\n");
    let file = TestFile::new("a.jsonl", &text);
    let excerpt = format!("`{{\"text\":\"{}`", &long[..111]);
    file.assert_error(&["a.jsonl:2:209: EOF while parsing a string: ", &excerpt, "one JSON object"]);
    let (texts, counts) = file.read(&skip()).unwrap();
    assert_eq!((texts, counts.skipped["bad_json"]), (vec!["one".to_owned(), "three".to_owned()], 1));
    TestFile::new("a.json.gz", gzip(text.as_bytes())).assert_error(&["a.json.gz:2:209", "gzip -t"]);
    TestFile::new("a.jsonl", "{\"text\":\"a\"} {}\n").assert_error(&["a.jsonl:1:14: trailing characters"]);
    TestFile::new("a.jsonl", "{\"text\":\"\\ud800\"}\n")
        .assert_error(&["a.jsonl:1:16: unexpected end of hex escape"]);
    TestFile::new("a.jsonl", "text\n").assert_error(&["a.jsonl:1:", "expected ident"]);
    TestFile::new("a.jsonl", "7\n").assert_error(&["a.jsonl:1:", "expected a JSON object"]);
}

#[test]
fn after_an_error_the_reader_is_exhausted() {
    let file = TestFile::new("a.jsonl", "{\n{\"text\":\"two\"}\n");
    let mut reader = DocumentReader::open(&file.path, &fail()).unwrap();
    assert!(matches!(reader.next(), Some(Err(DataError::BadJson { .. }))));
    assert!(reader.next().is_none());
}

#[test]
fn bad_utf8_names_line_and_byte() {
    let file = TestFile::new("a.jsonl", b"{\"text\":\"one\"}\n{\"text\":\"a\xff\"}\n{\"text\":\"three\"}\n");
    file.assert_error(&["a.jsonl:2: byte 11 ", "not valid UTF-8", "iconv"]);
    let (texts, counts) = file.read(&skip()).unwrap();
    assert_eq!((texts, counts.skipped["bad_utf8"]), (vec!["one".to_owned(), "three".to_owned()], 1));
    let file = TestFile::new("a.txt", b"first\nsecond \xc3\n");
    file.assert_error(&["a.txt:2: byte 8 "]);
    let whole = ReadOptions { text_document: TextDocument::File, ..fail() };
    let error = file.read(&whole).unwrap_err().to_string();
    assert!(error.contains("a.txt:2: byte 8 "), "{error}");
}

#[test]
fn a_wrong_column_lists_the_right_ones_and_is_never_skipped() {
    let file = TestFile::new("a.jsonl", "{\"content\":\"a\",\"id\":7}\n");
    file.assert_error(&["a.jsonl:1 has no column `text`", "`content`, `id`", "data.text_column"]);
    assert!(matches!(file.read(&skip()), Err(DataError::MissingColumn { .. })));
    for (value, found) in
        [("7", "a number"), ("[1]", "an array"), ("{\"a\":1}", "an object"), ("true", "a boolean")]
    {
        let file = TestFile::new("a.jsonl", format!("{{\"text\":{value}}}\n"));
        file.assert_error(&[&format!("column `text` holds {found}, not text")]);
    }
}

#[test]
fn a_column_missing_from_one_line_is_that_lines_fault() {
    let file = TestFile::new("a.jsonl", "{\"text\":\"a\"}\n{\"id\":1}\n{\"text\":2}\n{\"text\":\"b\"}\n");
    file.assert_error(&["a.jsonl:2 has no column `text`"]);
    let (texts, counts) = file.read(&skip()).unwrap();
    assert_eq!(texts, ["a", "b"]);
    assert_eq!((counts.skipped["missing_column"], counts.skipped["not_text"]), (1, 1));
}

#[test]
fn long_records_are_refused_without_reading_them() {
    let text = format!("short\n{}\n\nend of it\nlast\n", "x".repeat(100));
    let file = TestFile::new("a.txt", text);
    let read = |options: &ReadOptions| {
        let reader = DocumentReader::open_with_limit(&file.path, options, 50).unwrap();
        reader.map(|document| document.map(|document| document.text)).collect::<Result<Vec<_>, _>>()
    };
    let error = read(&fail()).unwrap_err().to_string();
    assert!(error.contains("a.txt:2: a record is longer than 50 bytes"), "{error}");
    assert_eq!(read(&skip()).unwrap(), ["short", "end of it", "last"]);
    let text = "word\n".repeat(20) + "\nend\n";
    let file = TestFile::new("b.txt", text);
    let options = ReadOptions { text_document: TextDocument::Paragraph, ..skip() };
    let mut reader = DocumentReader::open_with_limit(&file.path, &options, 50).unwrap();
    assert_eq!(reader.next().unwrap().unwrap().text, "end");
    assert_eq!(reader.counts().skipped["record_too_long"], 1);
}

#[test]
fn skipping_has_an_end() {
    let text = "{\"text\":\"a\"}\n".to_owned() + &"broken\n".repeat(1001);
    let error = TestFile::new("a.jsonl", text).read(&skip()).unwrap_err().to_string();
    assert!(error.contains("more than 1000 records cannot be read; the last one: "), "{error}");
    assert!(error.contains("a.jsonl:1002:"), "{error}");
}

#[test]
fn files_that_are_no_text_are_refused_by_name() {
    let mut tar = vec![b'a'; 257];
    tar.extend(b"ustar\0");
    let page = "\n<!DOCTYPE html>\n<html><body>404</body></html>";
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n";
    for (name, bytes, parts) in [
        ("a.json.gz", Vec::new(), ["is empty", "fetch it again"]),
        ("a.json.gz", gzip(b""), ["is empty", "fetch it again"]),
        ("a.json.gz", pointer.into(), ["a Git LFS pointer", "git lfs pull"]),
        ("a.json.gz", page.into(), ["a web page", "download the file again"]),
        ("a.json.gz", gzip(page.as_bytes()), ["a web page", "download the file again"]),
        ("a.json", "[{\"text\":\"a\"}]".into(), ["a JSON array", "jq -c"]),
        ("a.parquet.gz", gzip(b"PAR1rest"), ["a compressed Parquet file", "decompress"]),
    ] {
        TestFile::new(name, bytes).assert_error(&parts);
    }
    for (name, bytes, parts) in [
        ("a.arrow", b"ARROW1\0\0rest".to_vec(), ["an Arrow file", "to_parquet"]),
        ("a.arrow", b"\xff\xff\xff\xff\x10\0\0\0".to_vec(), ["an Arrow stream", "to_parquet"]),
        ("a.json.bz2", b"BZh91AY".to_vec(), ["compressed with bzip2", "bunzip2"]),
        ("a.json.xz", b"\xfd7zXZ\0rest".to_vec(), ["compressed with xz", "xz -dc"]),
        ("a.zip", b"PK\x03\x04rest".to_vec(), ["a zip archive", "unpack"]),
        ("a.tar", tar.clone(), ["a tar archive", "unpack"]),
        ("a.tar.gz", gzip(&tar), ["a tar archive", "unpack"]),
    ] {
        let formats = "reads JSON lines and plain text, bare or compressed with gzip or zstd, and Parquet";
        TestFile::new(name, bytes).assert_error(&[parts[0], parts[1], formats]);
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = DocumentReader::open(Path::new("/no/such/file.json"), &fail()).err().unwrap().to_string();
    assert!(error.starts_with("cannot open /no/such/file.json: "), "{error}");
}
