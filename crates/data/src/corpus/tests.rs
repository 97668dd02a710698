#![allow(clippy::unwrap_used)]

use std::fs;

use switchyard_config::plan::{OnCorrupt, TextDocument};

use super::*;
use crate::source::{DocumentReader, ReadOptions};

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

fn text(path: &str, paragraphs: &[&str]) -> SourceText {
    SourceText { path: path.to_owned(), paragraphs: paragraphs.iter().map(|&p| p.to_owned()).collect() }
}

#[test]
fn equal_paragraphs_are_kept_once_over_all_packages() {
    let mut texts = vec![
        vec![text("a", &["Adds 1 to it.", "Other."]), text("b", &["adds 2 to it!"])],
        vec![text("c", &["Adds 3 to it.", "Third."])],
    ];
    remove_duplicates(&mut texts);
    assert_eq!(texts, [vec![text("a", &["Adds 1 to it.", "Other."])], vec![text("c", &["Third."])]]);
}

#[test]
fn packages_are_held_out_by_name() {
    // md5("either") mod 20 is 0; md5("serde") mod 20 is not.
    assert!(is_validation("either"));
    assert!(!is_validation("serde"));
}

/// A package directory with one README of `sentences` different sentences.
fn package_of(directory: &Path, name: &str, sentences: usize) -> PathBuf {
    let package = directory.join(name);
    fs::create_dir(&package).unwrap();
    let letters = |mut number: usize| {
        let mut word = String::new();
        for _ in 0..5 {
            word.push(char::from(b'a' + (number % 26) as u8));
            number /= 26;
        }
        word
    };
    for index in 0..sentences {
        let sentence = format!("In {name} this is the {} sentence of all of them.\n", letters(index));
        fs::write(package.join(format!("{index:04}.md")), sentence).unwrap();
    }
    package
}

#[test]
fn no_package_is_more_than_a_twentieth() {
    let directory = tempfile::tempdir().unwrap();
    let names = ["large", "small"];
    let packages: Vec<_> = names
        .iter()
        .zip([400, 10])
        .map(|(name, sentences)| {
            let package = Package { name, version: "1.0.0", license: "MIT" };
            (package, package_of(directory.path(), name, sentences))
        })
        .collect();
    let splits = build(&packages).unwrap();
    let of = |name: &str| {
        let start = format!("https://docs.rs/crate/{name}/1.0.0/source/");
        splits
            .train
            .iter()
            .chain(&splits.validation)
            .filter(|document| document.url.starts_with(&start))
            .count()
    };
    // 410 documents of about equal size: a twentieth is 20 of them.
    assert_eq!((of("large"), of("small"), splits.packages), (20, 10, 2));
}

#[test]
fn a_corpus_is_found_again_unless_it_was_damaged_or_the_list_differs() {
    let directory = tempfile::tempdir().unwrap();
    let document = |text: &str| CorpusDocument { text: text.to_owned(), url: "https://docs.rs".to_owned() };
    let splits = Splits {
        train: vec![document("one"), document("two")],
        validation: vec![document("three")],
        packages: 2,
    };
    assert_eq!(write::find(directory.path(), "list"), None);
    let corpus = write::write(directory.path(), &splits, "list".to_owned()).unwrap();
    assert_eq!(write::find(directory.path(), "list"), Some(corpus.clone()));
    assert_eq!(write::find(directory.path(), "other list"), None);
    assert_eq!(read(&corpus.train), ["one", "two"]);
    assert_eq!(read(&corpus.validation), ["three"]);
    let left: Vec<_> =
        fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
    fs::write(&corpus.train, "cut off").unwrap();
    assert_eq!(write::find(directory.path(), "list"), None);
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "in the way").unwrap();
    let error =
        write::write(&file.join("sample"), &Splits::default(), String::new()).unwrap_err().to_string();
    assert!(error.starts_with("cannot create") && error.contains("file/sample"), "{error}");
}
