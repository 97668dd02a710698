//! Files of lines: formats, compression, positions.

use super::*;

#[test]
fn c4_reads_the_same_from_every_compression() {
    let (lines, texts) = c4_lines(1000);
    let (first, second) = lines.split_at(40_000);
    let mut skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc".to_vec();
    skippable.extend(zstd(&lines));
    for (name, bytes) in [
        ("c4.json", lines.clone()),
        ("c4.json.gz", gzip(&lines)),
        ("members.json.gz", [gzip(first), gzip(second)].concat()),
        ("zeros.json.gz", [gzip(&lines), vec![0; 5000]].concat()),
        ("trailing.json.gz", [gzip(&lines), b"garbage".to_vec()].concat()),
        ("c4.jsonl.zst", zstd(&lines)),
        ("frames.jsonl.zstd", [zstd(first), zstd(second)].concat()),
        ("skippable.jsonl.zst", skippable),
        ("renamed.json", gzip(&lines)),
        ("renamed.json.gz", zstd(&lines)),
        ("no_extension", gzip(&lines)),
    ] {
        let (read, counts) = TestFile::new(name, bytes).read(&fail()).unwrap();
        assert!(read == texts, "{name}");
        assert_eq!(counts, ReadCounts { documents: 1000, ..ReadCounts::default() }, "{name}");
    }
}

#[test]
fn zstd_with_a_wide_window_opens() {
    // One raw block in a frame whose header asks for a window of 2^28 bytes.
    let line = b"{\"text\":\"wide\"}\n";
    let mut frame = b"\x28\xb5\x2f\xfd\x00\x90".to_vec();
    frame.extend(&((line.len() as u32) << 3 | 1).to_le_bytes()[..3]);
    frame.extend(line);
    assert_eq!(TestFile::new("long.jsonl.zst", frame).texts(), ["wide"]);
}

#[test]
fn positions_are_those_of_the_file() {
    let text = b"{\"text\":\"one\"}\n\n{\"text\":\"two\"}\n".to_vec();
    let compressed = gzip(&text);
    let size = compressed.len() as u64;
    let file = TestFile::new("positions.json.gz", compressed);
    let reader = DocumentReader::open(&file.path, &fail()).unwrap();
    let positions: Vec<_> = reader.map(|document| document.unwrap().position).collect();
    let places: Vec<_> = positions.iter().map(|p| (p.place, p.byte_offset, p.compressed_offset)).collect();
    assert_eq!(places, [(Place::Line(1), 0, size), (Place::Line(3), 16, size)]);
    assert_eq!(positions[1].to_string(), format!("{}:3", file.path.display()));
}

#[test]
fn marks_blank_lines_and_line_ends_are_no_content() {
    let json = "\u{feff}{\"text\":\"one\"}\r\n\r\n   \n{\"text\":\"two\\n2\", \"n\":[1,{\"text\":0}]}\r\n";
    assert_eq!(TestFile::new("a.jsonl", json).texts(), ["one", "two\n2"]);
    assert_eq!(TestFile::new("a.txt", "\u{feff}one\r\n\r\n two \nthree").texts(), ["one", " two ", "three"]);
}

#[test]
fn null_and_blank_texts_are_counted_and_left_out() {
    let json = "{\"text\":null}\n{\"text\":\"\"}\n{\"text\":\" \\n\"}\n{\"text\":\"kept\"}\n";
    let (texts, counts) = TestFile::new("a.jsonl", json).read(&fail()).unwrap();
    assert_eq!(texts, ["kept"]);
    assert_eq!((counts.documents, counts.empty), (1, 3));
}

#[test]
fn another_column_can_be_the_text() {
    let options = ReadOptions { text_column: "content".to_owned(), ..fail() };
    let file = TestFile::new("a.jsonl", "{\"text\":\"no\",\"content\":\"yes\"}\n");
    assert_eq!(file.read(&options).unwrap().0, ["yes"]);
}

#[test]
fn plain_text_splits_by_line_paragraph_or_file() {
    let text = "\none\ntwo\r\n\n\n  \nthree\n\n";
    let of = |split| {
        let options = ReadOptions { text_document: split, ..fail() };
        TestFile::new("a.txt", text).read(&options).unwrap().0
    };
    assert_eq!(of(TextDocument::Line), ["one", "two", "three"]);
    assert_eq!(of(TextDocument::Paragraph), ["one\ntwo", "three"]);
    assert_eq!(of(TextDocument::File), ["one\ntwo\n\n\n  \nthree\n"]);
}

#[test]
fn paragraphs_keep_the_line_they_start_at() {
    let options = ReadOptions { text_document: TextDocument::Paragraph, ..fail() };
    let file = TestFile::new("a.txt", "one\n\n\ntwo\nlines\n");
    let reader = DocumentReader::open(&file.path, &options).unwrap();
    let places: Vec<_> = reader.map(|document| document.unwrap().position.place).collect();
    assert_eq!(places, [Place::Line(1), Place::Line(4)]);
}

#[test]
fn content_decides_where_the_name_does_not() {
    assert_eq!(TestFile::new("data", " {\"text\":\"json\"}\n").texts(), ["json"]);
    assert_eq!(TestFile::new("data", "plain text").texts(), ["plain text"]);
    assert_eq!(TestFile::new("set.txt", "{ a, b } is a set").texts(), ["{ a, b } is a set"]);
}
