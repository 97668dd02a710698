//! Rates of the data pipeline on the sample corpus: `cargo bench --bench throughput`.
//!
//! Prints one line a figure; the machine should do nothing else meanwhile.

use std::error::Error;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use switchyard_config::plan::{DataPlan, Objective, OnCorrupt, SourcePlan, TextDocument};
use switchyard_data::cache::{CacheSource, TokenCache};
use switchyard_data::loader::{TrainingText, train_on_texts};
use switchyard_data::source::{self, DocumentReader, ReadOptions};
use switchyard_data::tokenizer::TrainOptions;
use switchyard_data::{DataSet, Prefetcher, Share, Tokenizer};

const BATCHES: u64 = 200;
const REPETITIONS: usize = 6;

fn main() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let mut plan = plan(directory.path());
    let read = ReadOptions::from(&plan);
    let mut out = io::stdout();

    let (files, seconds) = timed(|| source::resolve("sample", &plan.cache_dir))?;
    writeln!(out, "sample corpus:            {seconds:.2} s")?;

    let text = TrainingText { files: files.clone(), weight: 1.0 };
    let (trained, seconds) = timed(|| train_on_texts(&[text], &read, &TrainOptions::new(8192), &|_| {}))?;
    writeln!(out, "tokenizer training:       {seconds:.2} s for {} ids", trained.size())?;
    trained.save(&plan.tokenizer)?;

    tokenizing(&files, &read, &plan, &mut out)?;

    plan.cache_dir = directory.path().join("cache");
    let data = Arc::new(DataSet::open(&plan, 1, &|_| {})?);
    let tokens_per_batch = (data.batch_rows() * data.objective().tokens_length()) as f64;
    let mut step = 0;
    let seconds = best(|| {
        for _ in 0..BATCHES {
            data.batch(step)?;
            step += 1;
        }
        Ok(())
    })?;
    let rate = BATCHES as f64 * tokens_per_batch / seconds / 1e6;
    writeln!(out, "cached tokens to rows:    {rate:.1} M tokens/s on one core")?;

    let mut prefetcher = Prefetcher::start(Arc::clone(&data), Share::whole(plan.micro_batch_rows), 0, 50, 4)?;
    let mut waited = Duration::ZERO;
    let start = Instant::now();
    while let Some(prefetched) = prefetcher.next_batch()? {
        waited += prefetched.waited;
        std::thread::sleep(Duration::from_millis(20));
    }
    let share = waited.as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
    writeln!(out, "waiting for data:         {share:.2} % of 20 ms steps")?;
    Ok(())
}

/// Copies of the corpus that are tokenised in one go.
const COPIES: usize = 2;

/// Compares building the cache, reading included, with the bare encoder on text in memory.
fn tokenizing(
    files: &[std::path::PathBuf],
    read: &ReadOptions,
    plan: &DataPlan,
    out: &mut impl Write,
) -> Result<(), Box<dyn Error>> {
    // Several times the same text, so that opening and syncing files do not count as tokenising.
    let files = &[files; COPIES].concat();
    let tokenizer = Tokenizer::load(&plan.tokenizer)?;
    let bare = tokenizers::Tokenizer::from_file(tokenizer.path()).map_err(|error| error.to_string())?;
    let mut texts = Vec::new();
    for file in files {
        for document in DocumentReader::open(file, read)? {
            texts.push(document?.text);
        }
    }
    let megabytes = texts.iter().map(String::len).sum::<usize>() as f64 / 1e6;
    let encode = || -> Result<(), Box<dyn Error>> {
        for batch in texts.chunks(1000) {
            let batch: Vec<&str> = batch.iter().map(String::as_str).collect();
            bare.encode_batch_fast(batch, false).map_err(|error| error.to_string())?;
        }
        Ok(())
    };
    let mut built = 0;
    let build = || {
        built += 1;
        let cache_dir = plan.cache_dir.join(format!("build-{built}"));
        let source = CacheSource { name: "sample", files, options: read };
        TokenCache::open_or_build(&cache_dir, &source, &tokenizer, &|_| {})?;
        Ok(())
    };
    let [bare_seconds, build_seconds] = alternated(encode, build)?;
    let (bare_rate, build_rate) = (megabytes / bare_seconds, megabytes / build_seconds);
    writeln!(out, "bare encode_batch_fast:   {bare_rate:.2} MB/s")?;
    writeln!(
        out,
        "reading to cached tokens: {build_rate:.2} MB/s, {:.0} % of it",
        build_rate / bare_rate * 100.0
    )?;
    Ok(())
}

fn timed<T, E>(work: impl FnOnce() -> Result<T, E>) -> Result<(T, f64), E> {
    let start = Instant::now();
    let value = work()?;
    Ok((value, start.elapsed().as_secs_f64()))
}

/// Seconds of the fastest repetition.
fn best(mut work: impl FnMut() -> Result<(), Box<dyn Error>>) -> Result<f64, Box<dyn Error>> {
    let mut fastest = f64::INFINITY;
    for _ in 0..REPETITIONS {
        fastest = timed(&mut work)?.1.min(fastest);
    }
    Ok(fastest)
}

/// Seconds of the fastest repetition of each of two works, done in turn.
fn alternated(
    mut first: impl FnMut() -> Result<(), Box<dyn Error>>,
    mut second: impl FnMut() -> Result<(), Box<dyn Error>>,
) -> Result<[f64; 2], Box<dyn Error>> {
    let mut fastest = [f64::INFINITY; 2];
    for _ in 0..REPETITIONS {
        fastest[0] = timed(&mut first)?.1.min(fastest[0]);
        fastest[1] = timed(&mut second)?.1.min(fastest[1]);
    }
    Ok(fastest)
}

fn plan(directory: &Path) -> DataPlan {
    DataPlan {
        sources: vec![SourcePlan { path: "sample".to_owned(), name: "sample".to_owned(), weight: 1.0 }],
        eval_sources: Vec::new(),
        mixture_temperature: 1.0,
        tokenizer: directory.join("tokenizer"),
        train_tokenizer_vocab_size: 0,
        text_column: "text".to_owned(),
        text_document: TextDocument::Line,
        objective: Objective::SpanCorruption,
        noise_density: 0.15,
        mean_noise_span_length: 3.0,
        inputs_length: 512,
        targets_length: 114,
        batch_rows: 128,
        micro_batch_rows: 128,
        on_corrupt: OnCorrupt::Fail,
        cache_dir: directory.join("texts"),
        prefetch_batches: 4,
    }
}
