use std::fs;

use switchyard_config::plan::{OnCorrupt, TextDocument};

use super::*;
use crate::source::{DocumentReader, ReadOptions, resolve};

fn read(path: &Path) -> Vec<String> {
    let options = ReadOptions {
        text_column: "text".to_owned(),
        text_document: TextDocument::Line,
        on_corrupt: OnCorrupt::Fail,
    };
    DocumentReader::open(path, &options).unwrap().map(|document| document.unwrap().text).collect()
}

#[test]
fn the_corpus_is_large_clean_and_the_same_every_time() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let corpus = ensure(first.path()).unwrap();
    let again = ensure(second.path()).unwrap();
    assert_eq!(corpus.summary, again.summary);
    for (one, other) in [(&corpus.train, &again.train), (&corpus.validation, &again.validation)] {
        assert_eq!(fs::read(one).unwrap(), fs::read(other).unwrap());
    }
    let (train, validation) = (read(&corpus.train), read(&corpus.validation));
    let summary = &corpus.summary;
    assert_eq!((train.len(), validation.len()), (summary.train.documents, summary.validation.documents));
    assert!(summary.train.bytes > 1_000_000, "{summary:?}");
    assert!(summary.validation.bytes > 20_000, "{summary:?}");
    for paragraph in train.iter().chain(&validation).flat_map(|text| text.lines()) {
        assert!(prose::is_prose(paragraph), "{paragraph}");
    }
}
