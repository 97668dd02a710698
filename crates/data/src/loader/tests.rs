use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use switchyard_config::plan::{Objective, OnCorrupt, TextDocument};

use super::*;
use crate::cache::CacheError;
use crate::durable;
use crate::progress::Progress;
use crate::test_vectors::fixture;
use crate::tokenizer::{EOS_ID, TokenizerError};

const SEED: u64 = 42;

fn write_text(path: &Path, lines: usize, topic: &str) {
    let line = |i: usize| format!("line {i} about {topic}: {} and {} are numbers\n", i * i, i * 31 % 101);
    fs::write(path, (0..lines).map(line).collect::<String>()).expect("writable");
}

fn source(directory: &Path, name: &str, weight: f64) -> SourcePlan {
    let path = directory.join(format!("{name}.txt")).display().to_string();
    SourcePlan { path, name: name.to_owned(), weight }
}

/// A plan over generated text: sources `one` and `two`, held-out `held-out`.
fn plan(directory: &Path) -> DataPlan {
    write_text(&directory.join("one.txt"), 300, "trains");
    write_text(&directory.join("two.txt"), 200, "ships");
    write_text(&directory.join("held-out.txt"), 60, "planes");
    DataPlan {
        sources: vec![source(directory, "one", 1.0)],
        eval_sources: vec![source(directory, "held-out", 1.0)],
        mixture_temperature: 1.0,
        tokenizer: fixture("parity/tokenizer_t5"),
        train_tokenizer_vocab_size: 0,
        text_column: "text".to_owned(),
        text_document: TextDocument::Line,
        objective: Objective::SpanCorruption,
        noise_density: 0.15,
        mean_noise_span_length: 3.0,
        inputs_length: 64,
        targets_length: 14,
        batch_rows: 8,
        micro_batch_rows: 8,
        on_corrupt: OnCorrupt::Fail,
        cache_dir: directory.join("cache"),
        prefetch_batches: 2,
    }
}

fn open(plan: &DataPlan) -> DataSet {
    DataSet::open(plan, SEED, &|_| {}).expect("it opens")
}

/// Training rows of one pass over every source.
fn num_chunks(data: &DataSet) -> u64 {
    data.train.iter().map(|source| source.chunks).sum()
}

#[test]
fn batches_are_a_function_of_the_step() {
    let directory = tempfile::tempdir().expect("a directory");
    let plan = plan(directory.path());
    let (one, other) = (open(&plan), open(&plan));
    let later: Vec<_> = (0..20).rev().map(|step| other.batch(step).expect("a batch")).collect();
    for (step, later) in (0..20).zip(later.into_iter().rev()) {
        let batch = one.batch(step).expect("a batch");
        assert_eq!(batch, later);
        assert_eq!((batch.rows, batch.inputs_length, batch.targets_length), (8, 64, 14));
        for row in batch.input_ids.chunks(64).chain(batch.target_ids.chunks(14)) {
            assert_eq!(row.last(), Some(&(EOS_ID as i32)), "rows are full");
        }
    }
    assert_ne!(one.batch(0).expect("a batch"), one.batch(1).expect("a batch"));
    let reseeded = DataSet::open(&plan, SEED + 1, &|_| {}).expect("it opens");
    assert_ne!(reseeded.batch(0).expect("a batch"), one.batch(0).expect("a batch"));
}

#[test]
fn an_epoch_shows_every_chunk_once_and_the_next_in_another_order() {
    let directory = tempfile::tempdir().expect("a directory");
    let data = open(&plan(directory.path()));
    let epoch = |number: u64| -> Vec<u64> {
        let samples = number * num_chunks(&data)..(number + 1) * num_chunks(&data);
        samples.map(|sample| data.example(0, sample as usize).expect("a row").first_token).collect()
    };
    let (first, second) = (epoch(0), epoch(1));
    assert_ne!(first, second);
    for mut order in [first, second] {
        order.sort_unstable();
        let tokens_length = data.objective().tokens_length() as u64;
        assert_eq!(order, (0..num_chunks(&data)).map(|chunk| chunk * tokens_length).collect::<Vec<_>>());
    }
}

#[test]
fn examples_are_the_rows_of_the_batch_and_hold_the_text() {
    let directory = tempfile::tempdir().expect("a directory");
    let data = open(&plan(directory.path()));
    let batch = data.batch(3).expect("a batch");
    let example = data.example(3, 5).expect("a row");
    assert_eq!(batch.slice(5, 1).input_ids, example.input_ids);
    assert_eq!(batch.slice(5, 1).target_ids, example.target_ids);
    let text = data.tokenizer().decode(&example.tokens, false).expect("it decodes");
    assert!(text.contains("about trains"), "{text}");
    assert_eq!(example.tokens.len(), data.objective().tokens_length());
}

#[test]
fn mixtures_follow_their_weights_and_keep_the_order_of_a_source() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut plan = plan(directory.path());
    plan.sources = vec![source(directory.path(), "one", 3.0), source(directory.path(), "two", 1.0)];
    let data = open(&plan);
    let origins: Vec<Example> = (0..4000).map(|row| data.example(0, row).expect("a row")).collect();
    let from_two = origins.iter().filter(|example| example.source == "two").count();
    assert!((900..1100).contains(&from_two), "{from_two}");

    plan.sources[0].name = "renamed".to_owned();
    let order = |data: &DataSet| -> Vec<u64> {
        let rows = (0..4000).map(|row| data.example(0, row).expect("a row"));
        rows.filter(|example| example.source == "two").map(|example| example.first_token).collect()
    };
    assert_eq!(order(&open(&plan)), order(&data), "another source's name does not matter");

    plan.sources[1].name = "renamed".to_owned();
    let error = DataSet::open(&plan, SEED, &|_| {}).expect_err("equal names").to_string();
    assert!(error.contains("two sources are named `renamed`"), "{error}");
}

#[test]
fn temperature_brings_the_shares_of_sources_together() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut plan = plan(directory.path());
    plan.sources = vec![source(directory.path(), "one", 9.0), source(directory.path(), "two", 1.0)];
    let from_two = |plan: &DataPlan| {
        let data = open(plan);
        (0..4000).filter(|&row| data.example(0, row).expect("a row").source == "two").count()
    };
    assert!((350..450).contains(&from_two(&plan)), "one in ten");
    plan.mixture_temperature = 2.0;
    assert!((900..1100).contains(&from_two(&plan)), "the roots of the weights are three to one");
    plan.mixture_temperature = 1e9;
    assert!((1900..2100).contains(&from_two(&plan)), "all alike");
}

#[test]
fn steps_that_cannot_be_counted_are_refused_by_name() {
    let directory = tempfile::tempdir().expect("a directory");
    let data = Arc::new(open(&plan(directory.path())));
    let last = u64::MAX / 8 - 1;
    data.batch(last).expect("the last step");
    for step in [last + 1, last + 2, u64::MAX] {
        let expected = format!("step {step} lies beyond the last one whose samples can be counted, {last},");
        let batch = data.batch(step).expect_err("too large").to_string();
        assert!(batch.contains(&expected), "{batch}");
    }
    let example = data.example(u64::MAX, 0).expect_err("too large");
    assert!(matches!(example, LoadError::StepTooLarge { step: u64::MAX, batch_rows: 8, .. }), "{example}");
    assert!(matches!(data.example(last + 1, 8), Err(LoadError::StepTooLarge { .. })));

    let mut prefetcher = Prefetcher::start(data, Share::whole(8), last * 8, u64::MAX, 1).expect("a thread");
    prefetcher.next_batch().expect("the last step");
    assert!(matches!(prefetcher.next_batch(), Err(LoadError::StepTooLarge { .. })));
}

#[test]
fn evaluation_shows_every_held_out_row_once_whatever_the_seed() {
    let directory = tempfile::tempdir().expect("a directory");
    let plan = plan(directory.path());
    let data = open(&plan);
    let batches = |data: &DataSet, most: usize| -> Vec<HostBatch> {
        data.evaluation_batches(most).collect::<Result<_, _>>().expect("batches")
    };
    let all = batches(&data, usize::MAX >> 8);
    let rows: Vec<&[i32]> = all.iter().flat_map(|batch| batch.input_ids.chunks(64)).collect();
    assert_eq!(rows.len() as u64, data.num_evaluation_chunks());
    let distinct: HashSet<&[i32]> = rows.iter().copied().collect();
    assert_eq!(distinct.len(), rows.len());
    assert_eq!(batches(&data, 2), all[..2]);
    let reseeded = DataSet::open(&plan, SEED + 1, &|_| {}).expect("it opens");
    assert_eq!(batches(&reseeded, 2), all[..2]);

    let mut held_out_only = plan.clone();
    held_out_only.sources.clear();
    let held_out_only = open(&held_out_only);
    assert_eq!(batches(&held_out_only, 2), all[..2]);
    assert!(matches!(held_out_only.batch(0), Err(LoadError::NoSources)));

    let training_only = open(&DataPlan { eval_sources: Vec::new(), ..plan });
    assert_eq!(batches(&training_only, 5), []);
}

#[test]
fn prefetching_gives_the_same_batches_from_any_start() {
    let directory = tempfile::tempdir().expect("a directory");
    let data = Arc::new(open(&plan(directory.path())));
    for (first_step, ahead, share) in [
        (0, 1, Share::whole(8)),
        (7, 4, Share::whole(3)),
        (13, 0, Share { index: 1, of: 2, micro_batch_rows: 2 }),
    ] {
        let start = Prefetcher::start(Arc::clone(&data), share, first_step * 8, 5, ahead);
        let mut prefetcher = start.expect("a thread");
        for step in first_step..first_step + 5 {
            let prefetched = prefetcher.next_batch().expect("it works").expect("five batches");
            assert_eq!(prefetched.micro_batches, data.batch(step).expect("a batch").micro_batches(share));
        }
        assert!(prefetcher.next_batch().expect("it works").is_none());
    }
    drop(Prefetcher::start(Arc::clone(&data), Share::whole(8), 0, u64::MAX, 2).expect("a thread"));
    assert_eq!(Arc::strong_count(&data), 1, "the thread has ended");
}

#[test]
fn errors_of_the_thread_reach_the_trainer() {
    let directory = tempfile::tempdir().expect("a directory");
    let data = Arc::new(open(&plan(directory.path())));
    let path = data.train[0].cache.directory().join("tokens-00000.bin");
    let file = fs::File::options().write(true).open(path).expect("there");
    file.set_len(0).expect("it can be cut");
    let mut prefetcher = Prefetcher::start(data, Share::whole(8), 0, 10, 2).expect("a thread");
    let error = prefetcher.next_batch().expect_err("the file is cut");
    assert!(matches!(error, LoadError::Cache(CacheError::Io { .. })), "{error}");
    assert!(matches!(prefetcher.next_batch(), Err(LoadError::Thread { .. })));
}

#[test]
fn states_are_accepted_by_the_same_data_only() {
    let directory = tempfile::tempdir().expect("a directory");
    let plan = plan(directory.path());
    let data = open(&plan);
    let saved = serde_json::to_string(&data.state(80)).expect("JSON");
    let saved: DataState = serde_json::from_str(&saved).expect("JSON");
    assert_eq!(saved.samples_consumed, 80);
    data.check_state(&saved).expect("the same data");
    open(&DataPlan { batch_rows: 4, ..plan.clone() }).check_state(&saved).expect("only the batch differs");

    let reseeded = DataSet::open(&plan, SEED + 1, &|_| {}).expect("it opens");
    let mismatch = reseeded.check_state(&saved).expect_err("another seed");
    assert_eq!(
        (mismatch.what.as_str(), mismatch.saved.as_str(), mismatch.found.as_str()),
        ("seed", "42", "43")
    );

    let shorter = DataPlan { inputs_length: 32, ..plan.clone() };
    assert_eq!(open(&shorter).check_state(&saved).expect_err("other rows").what, "data.inputs_length");

    write_text(&directory.path().join("one.txt"), 301, "trains");
    let mismatch = open(&plan).check_state(&saved).expect_err("another text");
    assert_eq!(mismatch.what, "the fingerprint of the text of `one`");
}

#[test]
fn text_that_moved_is_the_same_text() {
    let directory = tempfile::tempdir().expect("a directory");
    let plan = plan(directory.path());
    let saved = open(&plan).state(80);
    let elsewhere = directory.path().join("elsewhere");
    fs::create_dir(&elsewhere).expect("writable");
    fs::copy(directory.path().join("one.txt"), elsewhere.join("one.txt")).expect("writable");
    let path = elsewhere.join("one.txt").display().to_string();
    let moved = SourcePlan { name: path.clone(), path, weight: 2.0 };
    let warm = DataPlan { sources: vec![moved], mixture_temperature: 2.0, ..plan };
    open(&warm).check_state(&saved).expect("of one source, name, weight and temperature decide nothing");
}

#[test]
fn mixtures_are_compared_by_all_that_decides_them() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut plan = plan(directory.path());
    plan.sources = vec![source(directory.path(), "one", 3.0), source(directory.path(), "two", 1.0)];
    let saved = open(&plan).state(8);
    let differs = |plan: &DataPlan| open(plan).check_state(&saved).expect_err("another mixture").what;
    assert_eq!(differs(&DataPlan { mixture_temperature: 3.33, ..plan.clone() }), "data.mixture_temperature");
    let mut other = plan.clone();
    other.sources[1].weight = 2.0;
    assert_eq!(differs(&other), "data.sources[1].weight");
    let mut other = plan.clone();
    other.sources[0].name = "renamed".to_owned();
    assert_eq!(differs(&other), "data.sources[0].name");
    plan.sources.pop();
    assert_eq!(differs(&plan), "the number of data.sources");
}

#[test]
fn tokenizers_are_trained_once_and_kept_in_the_cache() {
    let directory = tempfile::tempdir().expect("a directory");
    let tokenizer = directory.path().join("tokenizer.json");
    let plan = DataPlan { tokenizer, train_tokenizer_vocab_size: 80, ..plan(directory.path()) };
    let data = open(&plan);
    assert_eq!((data.tokenizer().size(), data.tokenizer().num_sentinels()), (180, 100));
    assert!(!plan.tokenizer.exists());
    let kept = data.tokenizer().path().to_path_buf();
    assert!(kept.starts_with(&plan.cache_dir), "{kept:?}");
    let written = fs::metadata(&kept).and_then(|file| file.modified()).expect("it is there");
    assert_eq!(open(&plan).batch(0).expect("a batch"), data.batch(0).expect("a batch"));
    assert_eq!(fs::metadata(&kept).and_then(|file| file.modified()).expect("it is there"), written);

    let larger = open(&DataPlan { train_tokenizer_vocab_size: 100, ..plan });
    assert_eq!(larger.tokenizer().size(), 200);
}

#[test]
fn interrupted_saves_of_a_tokenizer_do_not_block() {
    let directory = tempfile::tempdir().expect("a directory");
    let tokenizer = directory.path().join("tokenizer.json");
    let plan = DataPlan { tokenizer, train_tokenizer_vocab_size: 80, ..plan(directory.path()) };
    let whole = open(&plan).tokenizer().sha256().to_owned();
    let kept = plan.cache_dir.join("tokenizers");
    let entries = fs::read_dir(&kept).expect("readable").map(|entry| entry.expect("readable").path());
    let key = entries.into_iter().find(|path| path.is_dir()).expect("the tokenizer");

    fs::remove_file(key.join("special_tokens_map.json")).expect("it was written last");
    assert_eq!(open(&plan).tokenizer().sha256(), whole, "a partial directory");
    assert!(key.join("special_tokens_map.json").exists());
    fs::remove_dir_all(&key).expect("writable");
    fs::create_dir(&key).expect("writable");
    assert_eq!(open(&plan).tokenizer().sha256(), whole, "an empty directory");
    fs::rename(&key, durable::with_suffix(&key, ".partial")).expect("writable");
    fs::write(durable::with_suffix(&key, ".partial").join("tokenizer.json"), "{").expect("writable");
    assert_eq!(open(&plan).tokenizer().sha256(), whole, "an interrupted save");
}

#[test]
fn a_second_run_waits_for_the_tokenizer_of_the_first() {
    let directory = tempfile::tempdir().expect("a directory");
    let tokenizer = directory.path().join("tokenizer.json");
    let plan = DataPlan { tokenizer, train_tokenizer_vocab_size: 80, ..plan(directory.path()) };
    let trained = open(&plan).tokenizer().path().to_path_buf();
    let key = trained.parent().expect("a directory").to_path_buf();
    let spare = directory.path().join("spare");
    fs::rename(&key, &spare).expect("writable");
    let lock = fs::File::create(durable::with_suffix(&key, ".lock")).expect("writable");
    lock.lock().expect("nobody holds it");
    let reports = RefCell::new(Vec::new());
    let lock = RefCell::new(Some(lock));
    let report = |progress: Progress<'_>| {
        reports.borrow_mut().push(format!("{progress:?}"));
        if let Progress::Waiting { .. } = progress {
            fs::rename(&spare, &key).expect("writable");
            lock.borrow_mut().take();
        }
    };
    DataSet::open(&plan, SEED, &report).expect("it opens");
    assert_eq!(*reports.borrow(), ["Waiting { what: \"the tokenizer\" }"], "nothing was trained");
}

#[test]
fn plans_that_cannot_work_are_refused_before_text_is_read() {
    let directory = tempfile::tempdir().expect("a directory");
    let good = plan(directory.path());
    let refused = |plan: &DataPlan| DataSet::open(plan, SEED, &|_| {}).expect_err("it cannot work");

    let long = DataPlan { inputs_length: 2048, targets_length: 456, ..good.clone() };
    let error = refused(&long);
    assert!(
        matches!(error, LoadError::Tokenizer(TokenizerError::TooFewSentinels { needed: 114, .. })),
        "{error}"
    );
    let missing = DataPlan { tokenizer: directory.path().join("absent.json"), ..good.clone() };
    assert!(matches!(refused(&missing), LoadError::Tokenizer(TokenizerError::Missing { .. })));
    let short = DataPlan { targets_length: 10, ..good.clone() };
    assert!(matches!(refused(&short), LoadError::SpanCorruption(_)));
    let trains =
        DataPlan { tokenizer: directory.path().join("absent.json"), train_tokenizer_vocab_size: 80, ..short };
    assert!(matches!(refused(&trains), LoadError::SpanCorruption(_)), "no tokenizer is trained before");
    let leaking = DataPlan { eval_sources: good.sources.clone(), ..good.clone() };
    assert!(refused(&leaking).to_string().contains("held-out text must not be trained on"));
    assert!(!good.cache_dir.exists());

    write_text(&directory.path().join("one.txt"), 2, "trains");
    let error = refused(&good).to_string();
    assert!(error.contains("source `one` has") && error.contains("one row takes 70"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn resuming_anywhere_repeats_the_batches(first_step in 0_u64..500, ahead in 1_usize..4) {
        let directory = tempfile::tempdir().expect("a directory");
        let data = Arc::new(open(&plan(directory.path())));
        let state = data.state(first_step * 8);
        let resumed = Arc::new(open(&plan(directory.path())));
        resumed.check_state(&state).expect("the same data");
        let mut prefetcher = Prefetcher::start(resumed, Share::whole(8), state.samples_consumed, 3, ahead)?;
        for step in first_step..first_step + 3 {
            let batch = prefetcher.next_batch()?.expect("three batches").micro_batches;
            prop_assert_eq!(batch, [data.batch(step)?]);
        }
    }
}
