use std::cell::RefCell;
use std::fs;

use switchyard_config::plan::{OnCorrupt, TextDocument};

use super::*;
use crate::durable;
use crate::progress::Progress;
use crate::test_vectors::fixture;

const SMALL: Layout = Layout { tokens_per_file: 1000, segment_tokens: 700, document_order_seed: 0 };

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&fixture("parity/tokenizer_t5")).expect("a T5 tokenizer")
}

fn options() -> ReadOptions {
    ReadOptions {
        text_column: "text".to_owned(),
        text_document: TextDocument::Line,
        on_corrupt: OnCorrupt::Fail,
    }
}

/// Plain-text files of numbered sentences, one document a line.
fn text_files(directory: &Path, files: usize, lines: usize) -> Vec<PathBuf> {
    let write = |file| {
        let path = directory.join(format!("part-{file}.txt"));
        let line = |i| format!("document {i} of file {file} tells of {} things and more\n", i * 7 % 13);
        fs::write(&path, (0..lines).map(line).collect::<String>()).expect("writable");
        path
    };
    (0..files).map(write).collect()
}

fn build(cache_dir: &Path, files: &[PathBuf], layout: Layout) -> Result<TokenCache, CacheError> {
    let options = options();
    let source = CacheSource { name: "test", files, options: &options };
    TokenCache::open_or_build_with(cache_dir, &source, &tokenizer(), layout, &|_| {})
}

fn all_tokens(cache: &TokenCache) -> Vec<u32> {
    let mut tokens = vec![0; cache.manifest().tokens as usize];
    cache.read(0, &mut tokens, &mut Vec::new()).expect("readable");
    tokens
}

/// Every file of a cache, by name.
fn contents(cache: &TokenCache) -> Vec<(String, Vec<u8>)> {
    let names =
        cache.manifest().files.iter().map(|file| file.name.clone()).chain(["manifest.json".to_owned()]);
    names.map(|name| (name.clone(), fs::read(cache.directory().join(name)).expect("readable"))).collect()
}

/// Cuts a list of tokens wherever `beginning` stands.
fn split(tokens: &[u32], beginning: &[u32]) -> Vec<Vec<u32>> {
    let starts: Vec<usize> =
        (0..tokens.len()).filter(|&at| tokens[at..].starts_with(beginning)).chain([tokens.len()]).collect();
    starts.windows(2).map(|pair| tokens[pair[0]..pair[1]].to_vec()).collect()
}

fn sorted(mut documents: Vec<Vec<u32>>) -> Vec<Vec<u32>> {
    documents.sort();
    documents
}

#[test]
fn every_document_is_in_the_cache_once_in_another_order() {
    let directory = tempfile::tempdir().expect("a directory");
    let files = text_files(directory.path(), 3, 40);
    let cache = build(&directory.path().join("cache"), &files, SMALL).expect("it builds");

    let texts: Vec<String> = files.iter().map(|file| fs::read_to_string(file).expect("readable")).collect();
    let lines: Vec<String> = texts.iter().flat_map(|text| text.lines().map(str::to_owned)).collect();
    let (documents, counts) = tokenizer().encode_documents(&lines).expect("it encodes");
    let in_order: Vec<u32> = documents.concat();
    let cached = all_tokens(&cache);
    assert_ne!(cached, in_order);
    assert_eq!((cache.manifest().documents, cache.manifest().counts), (120, counts));
    assert_eq!(sorted(split(&cached, &documents[0][..4])), sorted(documents));
    assert!(cache.manifest().files.len() > 1);
}

#[test]
fn the_same_bytes_come_out_of_any_number_of_threads() {
    let directory = tempfile::tempdir().expect("a directory");
    let files = text_files(directory.path(), 5, 60);
    let built = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        let cache_dir = directory.path().join(format!("cache-{threads}"));
        contents(&pool.install(|| build(&cache_dir, &files, SMALL)).expect("it builds"))
    };
    let one = built(1);
    assert_eq!(built(2), one);
    assert_eq!(built(4), one);
}

#[test]
fn a_second_run_opens_what_the_first_built() {
    let directory = tempfile::tempdir().expect("a directory");
    let files = text_files(directory.path(), 1, 30);
    let options = options();
    let source = CacheSource { name: "test", files: &files, options: &options };
    let reports = RefCell::new(Vec::new());
    let open = || {
        let report = |progress: Progress<'_>| reports.borrow_mut().push(format!("{progress:?}"));
        TokenCache::open_or_build(directory.path(), &source, &tokenizer(), &report).expect("it opens")
    };
    let first = all_tokens(&open());
    let reported = reports.borrow().len();
    assert!(reports.borrow()[reported - 1].contains("documents: 30"), "{:?}", reports.borrow());
    assert_eq!(all_tokens(&open()), first);
    assert_eq!(reports.borrow().len(), reported);

    fs::write(&files[0], "another text altogether\n").expect("writable");
    assert_ne!(all_tokens(&open()), first);
}

#[test]
fn builds_of_one_cache_wait_for_each_other_and_say_so() {
    let directory = tempfile::tempdir().expect("a directory");
    let files = text_files(directory.path(), 1, 30);
    let cache_dir = directory.path().join("cache");
    let whole = build(&cache_dir, &files, SMALL).expect("it builds");
    let (target, spare) = (whole.directory().to_path_buf(), directory.path().join("spare"));
    fs::rename(&target, &spare).expect("writable");
    let lock = File::create(durable::with_suffix(&target, ".lock")).expect("writable");
    lock.lock().expect("nobody holds it");
    let lock = RefCell::new(Some(lock));
    let reports = RefCell::new(Vec::new());
    let report = |progress: Progress<'_>| {
        reports.borrow_mut().push(format!("{progress:?}"));
        fs::rename(&spare, &target).expect("writable");
        lock.borrow_mut().take();
    };
    let options = options();
    let source = CacheSource { name: "test", files: &files, options: &options };
    TokenCache::open_or_build_with(&cache_dir, &source, &tokenizer(), SMALL, &report).expect("it opens");
    assert_eq!(*reports.borrow(), ["Waiting { what: \"the tokens of test\" }"], "nothing was built");
}

/// A build that fails behind several segments, then goes on once the text is repaired.
#[test]
fn an_interrupted_build_goes_on_and_gives_the_same_bytes() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut files = text_files(directory.path(), 3, 3000);
    let whole = build(&directory.path().join("whole"), &files, SMALL).expect("it builds");

    let tokenizer = tokenizer();
    let options = options();
    let identities = identify(&files).expect("readable");
    let fingerprint = fingerprint(&identities, &options, &tokenizer, &SMALL);
    let target = directory.path().join("resumed");
    let run = |files: &[PathBuf], documents_read: &RefCell<u64>| {
        let source = CacheSource { name: "test", files, options: &options };
        let (files, fingerprint) = (identities.clone(), fingerprint.clone());
        let build = Build { source: &source, tokenizer: &tokenizer, layout: SMALL, files, fingerprint };
        let first = RefCell::new(None);
        let result = build.run(&target, &|progress| {
            if let Progress::Tokenizing { documents, .. } = progress {
                first.borrow_mut().get_or_insert(documents);
            }
        });
        *documents_read.borrow_mut() = first.into_inner().unwrap_or(0);
        result
    };
    let first_report = RefCell::new(0);
    let third = std::mem::replace(&mut files[2], directory.path().join("missing.txt"));
    assert!(matches!(run(&files, &first_report), Err(CacheError::Data(_))));
    assert!(!target.exists());
    files[2] = third;
    run(&files, &first_report).expect("it goes on");
    assert!(*first_report.borrow() > 3000, "it started anew: {first_report:?}");
    assert_eq!(contents(&TokenCache::open(&target).expect("it opens")), contents(&whole));
}

#[test]
fn reads_cross_files() {
    let directory = tempfile::tempdir().expect("a directory");
    let files = text_files(directory.path(), 2, 60);
    let cache = build(directory.path(), &files, SMALL).expect("it builds");
    let all = all_tokens(&cache);
    let mut across = vec![0; 100];
    cache.read(950, &mut across, &mut Vec::new()).expect("readable");
    assert_eq!(across, all[950..1050]);
    let behind = cache.read(all.len() as u64 - 50, &mut across, &mut Vec::new());
    assert!(behind.is_err());
}

#[test]
fn damage_is_found_and_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let files = text_files(directory.path(), 1, 30);
    let cache = build(directory.path(), &files, SMALL).expect("it builds");
    let path = cache.directory().join("tokens-00000.bin");
    let good = fs::read(&path).expect("readable");
    let refused = |message: &str| {
        let error = TokenCache::open(cache.directory()).expect_err("it is damaged").to_string();
        assert!(error.contains(message) && error.contains("remove the directory"), "{error}");
    };

    fs::write(&path, &good[..good.len() - 2]).expect("writable");
    refused("bytes where the manifest says");

    let mut flipped = good.clone();
    flipped[10] ^= 1;
    fs::write(&path, &flipped).expect("writable");
    refused("hash");

    flipped[0..2].copy_from_slice(&[0, 0]);
    fs::write(&path, &flipped).expect("writable");
    let error = cache.read(0, &mut [0; 8], &mut Vec::new()).expect_err("id 0 is no text").to_string();
    assert!(error.contains("token 0 is 0"), "{error}");

    fs::write(&path, &good).expect("writable");
    fs::write(cache.directory().join("manifest.json"), "{}").expect("writable");
    refused("manifest.json");
}

#[test]
fn sources_without_text_are_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("blank.txt");
    fs::write(&path, "\n  \n\n").expect("writable");
    let error = build(directory.path(), &[path], SMALL).expect_err("no text").to_string();
    assert!(error.contains("source `test` holds no text") && error.contains("blank.txt"), "{error}");
}
