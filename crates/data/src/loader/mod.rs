//! Batches of a run: the batch of step N is a function of the configuration and N alone.
//!
//! Owns the addressing of samples: global sample number → source and index → epoch and chunk →
//! tokens → corrupted row. No state moves while batches are made, so nothing has to be replayed
//! on resume and any number of readers may ask for any step.

mod error;
mod prefetch;
mod state;
mod vocabulary;

#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use switchyard_config::plan::{DataPlan, SourcePlan};
use switchyard_random::{Philox, fnv1a64};

pub use error::{LoadError, StateMismatch};
pub use prefetch::{Prefetched, Prefetcher};
pub use state::{DataState, SourceState};
pub use vocabulary::{TrainingText, train_on_texts};

use crate::batch::{HostBatch, Share};
use crate::cache::{CacheSource, TokenCache};
use crate::mixture::{Mixture, rates};
use crate::permutation::{Permutation, StreamTag};
use crate::progress::ProgressFn;
use crate::source::{self, ReadOptions};
use crate::span_corruption::{Scratch, SpanCorruption};
use crate::tokenizer::Tokenizer;

/// Seed of held-out rows: evaluation is the same in every run.
const EVALUATION_SEED: u64 = 0;

/// The text of a run, tokenised and ready to be cut into batches.
#[derive(Debug)]
pub struct DataSet {
    tokenizer: Arc<Tokenizer>,
    objective: SpanCorruption,
    train: Vec<Source>,
    mixture: Mixture,
    evaluation: Vec<Source>,
    batch_rows: usize,
    initial_state: DataState,
}

/// One token cache, cut into chunks.
#[derive(Debug)]
struct Source {
    name: String,
    cache: TokenCache,
    chunks: u64,
    /// Key of its random streams.
    seed: u64,
}

/// One chunk of one source in one epoch: all there is to know about a row.
#[derive(Debug, Clone, Copy)]
struct Address<'a> {
    source: &'a Source,
    epoch: u64,
    chunk: u64,
}

/// One row with its origin, for looking at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Name of the source.
    pub source: String,
    /// Pass over the source, from 0.
    pub epoch: u64,
    /// First token of the row's text within the source.
    pub first_token: u64,
    /// The text before corruption, `[tokens_length]`.
    pub tokens: Vec<u32>,
    /// Encoder ids, `[inputs_length]`.
    pub input_ids: Vec<i32>,
    /// Target ids, `[targets_length]`.
    pub target_ids: Vec<i32>,
}

/// Buffers reused from row to row.
#[derive(Default)]
struct RowBuffers {
    tokens: Vec<u32>,
    bytes: Vec<u8>,
    scratch: Scratch,
}

impl DataSet {
    /// Finds the text of a plan, loads or trains its tokenizer, and opens or builds its token caches.
    ///
    /// Lengths and sentinels are checked before any text is tokenised. A plan without training
    /// sources opens too: it can only be evaluated on.
    ///
    /// # Errors
    /// [`LoadError`] names the file or key and the mend.
    pub fn open(plan: &DataPlan, seed: u64, progress: ProgressFn<'_>) -> Result<Self, LoadError> {
        // Before a tokenizer is trained, which may take minutes.
        SpanCorruption::check(plan)?;
        let train_files = resolve(plan, &plan.sources)?;
        let evaluation_files = resolve(plan, &plan.eval_sources)?;
        refuse_held_out(&train_files, &evaluation_files)?;
        refuse_equal_names(&plan.sources)?;

        let weights: Vec<f64> = plan.sources.iter().map(|source| source.weight).collect();
        let rates = rates(&weights, plan.mixture_temperature);
        let texts = train_files.iter().zip(&rates);
        let texts: Vec<TrainingText> =
            texts.map(|(files, &weight)| TrainingText { files: files.clone(), weight }).collect();
        let tokenizer = vocabulary::load_or_train(plan, &texts, progress)?;
        let objective = SpanCorruption::new(plan, tokenizer.size())?;
        tokenizer.require_sentinels(objective.num_spans())?;

        let read = ReadOptions::from(plan);
        let open = |source: &SourcePlan, files: &[PathBuf], seed: u64| {
            let cache_source = CacheSource { name: &source.name, files, options: &read };
            let cache = TokenCache::open_or_build(&plan.cache_dir, &cache_source, &tokenizer, progress)?;
            Source::new(&source.name, cache, objective.tokens_length(), seed)
        };
        let open_all = |sources: &[SourcePlan], files: &[Vec<PathBuf>], seed: u64| {
            let key = |name: &str| if sources.len() == 1 { seed } else { seed ^ fnv1a64(name) };
            let opened = sources.iter().zip(files);
            let opened = opened.map(|(source, files)| open(source, files, key(&source.name)));
            opened.collect::<Result<Vec<_>, LoadError>>()
        };
        let train = open_all(&plan.sources, &train_files, seed)?;
        let evaluation = open_all(&plan.eval_sources, &evaluation_files, EVALUATION_SEED)?;

        let mixture = Mixture::new(&rates, Mixture::SLOTS, seed);
        let states = train.iter().zip(weights).map(|(source, weight)| source.state(weight)).collect();
        let initial_state = DataState::new(plan, seed, tokenizer.sha256().to_owned(), states);
        let (tokenizer, batch_rows) = (Arc::new(tokenizer), plan.batch_rows);
        Ok(Self { tokenizer, objective, train, mixture, evaluation, batch_rows, initial_state })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The objective with its lengths; its `targets_length` may exceed the plan's by a few tokens.
    pub fn objective(&self) -> &SpanCorruption {
        &self.objective
    }

    /// Rows of a batch.
    pub fn batch_rows(&self) -> usize {
        self.batch_rows
    }

    /// Training tokens of all sources.
    pub fn num_tokens(&self) -> u64 {
        self.train.iter().map(|source| source.cache.manifest().tokens).sum()
    }

    /// Held-out rows.
    fn num_evaluation_chunks(&self) -> u64 {
        self.evaluation.iter().map(|source| source.chunks).sum()
    }

    /// The global batch of `step` (from 0).
    ///
    /// # Errors
    /// The token cache cannot be read or is damaged, there is no training text, or
    /// [`LoadError::StepTooLarge`].
    pub fn batch(&self, step: u64) -> Result<HostBatch, LoadError> {
        self.batch_at(self.first_sample(step)?)
    }

    /// The global batch that begins with global sample `first_sample`.
    ///
    /// # Errors
    /// As [`Self::batch`].
    pub fn batch_at(&self, first_sample: u64) -> Result<HostBatch, LoadError> {
        let mut whole = self.micro_batches_at(first_sample, Share::whole(self.batch_rows))?;
        Ok(whole.remove(0))
    }

    /// The micro-batches that `share` takes of the global batch that begins with `first_sample`.
    ///
    /// # Errors
    /// As [`Self::batch`].
    pub fn micro_batches_at(&self, first_sample: u64, share: Share) -> Result<Vec<HostBatch>, LoadError> {
        let rows = self.batch_rows as u64;
        if first_sample.checked_add(rows).is_none() {
            return Err(self.step_too_large(first_sample / rows));
        }
        let micro_batch = |start: usize| {
            let end = self.batch_rows.min(start + share.micro_batch_rows);
            let samples = (start..end).map(|row| first_sample + row as u64);
            let addresses = samples.map(|sample| self.locate(sample)).collect::<Result<Vec<_>, _>>()?;
            Ok(HostBatch { first_row: start as u32, ..self.rows(&addresses)? })
        };
        share.starts(self.batch_rows).map(micro_batch).collect()
    }

    /// Held-out batches, at most `max_batches` and each row once; the last may be short.
    ///
    /// The same rows with the same masks in every run over the same text.
    pub fn evaluation_batches(
        &self,
        max_batches: usize,
    ) -> impl Iterator<Item = Result<HostBatch, LoadError>> {
        let total = self.num_evaluation_chunks();
        let rows = total.min((max_batches as u64).saturating_mul(self.batch_rows as u64));
        let order = Permutation::new(total, EVALUATION_SEED, StreamTag::Shuffle, 0);
        (0..rows).step_by(self.batch_rows).map(move |first| {
            let indices = first..rows.min(first + self.batch_rows as u64);
            let addresses: Vec<_> = indices.map(|index| self.locate_held_out(order.apply(index))).collect();
            self.rows(&addresses)
        })
    }

    /// One row of the batch of `step`, with its origin.
    ///
    /// # Errors
    /// As [`Self::batch`].
    pub fn example(&self, step: u64, row: usize) -> Result<Example, LoadError> {
        let sample = self.first_sample(step)?.checked_add(row as u64);
        let address = self.locate(sample.ok_or_else(|| self.step_too_large(step))?)?;
        let mut buffers = RowBuffers::default();
        let mut input_ids = vec![0; self.objective.inputs_length()];
        let mut target_ids = vec![0; self.objective.targets_length()];
        self.row(address, &mut buffers, &mut input_ids, &mut target_ids)?;
        Ok(Example {
            source: address.source.name.clone(),
            epoch: address.epoch,
            first_token: address.chunk * self.objective.tokens_length() as u64,
            tokens: buffers.tokens,
            input_ids,
            target_ids,
        })
    }

    /// What a checkpoint keeps after `samples_consumed` rows.
    pub fn state(&self, samples_consumed: u64) -> DataState {
        DataState { samples_consumed, ..self.initial_state.clone() }
    }

    /// Checks that a checkpoint's state belongs to this data set.
    ///
    /// # Errors
    /// [`StateMismatch`] names the first thing that differs.
    pub fn check_state(&self, saved: &DataState) -> Result<(), StateMismatch> {
        self.initial_state.check(saved)
    }

    /// Number of the first sample of a step.
    fn first_sample(&self, step: u64) -> Result<u64, LoadError> {
        step.checked_mul(self.batch_rows as u64).ok_or_else(|| self.step_too_large(step))
    }

    fn step_too_large(&self, step: u64) -> LoadError {
        let last = u64::MAX / self.batch_rows as u64 - 1;
        LoadError::StepTooLarge { step, batch_rows: self.batch_rows, last }
    }

    fn locate(&self, sample: u64) -> Result<Address<'_>, LoadError> {
        let (source, index) = match self.train.as_slice() {
            [] => return Err(LoadError::NoSources),
            [source] => (source, sample),
            sources => {
                let (source, index) = self.mixture.locate(sample);
                (&sources[source], index)
            }
        };
        let (epoch, position) = (index / source.chunks, index % source.chunks);
        let order = Permutation::new(source.chunks, source.seed, StreamTag::Shuffle, epoch);
        Ok(Address { source, epoch, chunk: order.apply(position) })
    }

    /// Chunk `index` of the held-out sources laid end to end.
    fn locate_held_out(&self, mut index: u64) -> Address<'_> {
        let last = self.evaluation.len() - 1;
        for source in &self.evaluation[..last] {
            if index < source.chunks {
                return Address { source, epoch: 0, chunk: index };
            }
            index -= source.chunks;
        }
        Address { source: &self.evaluation[last], epoch: 0, chunk: index }
    }

    fn rows(&self, addresses: &[Address<'_>]) -> Result<HostBatch, LoadError> {
        let (inputs_length, targets_length) =
            (self.objective.inputs_length(), self.objective.targets_length());
        let mut batch = HostBatch {
            rows: addresses.len(),
            inputs_length,
            targets_length,
            input_ids: vec![0; addresses.len() * inputs_length],
            target_ids: vec![0; addresses.len() * targets_length],
            first_row: 0,
        };
        let inputs = batch.input_ids.chunks_mut(inputs_length);
        let targets = batch.target_ids.chunks_mut(targets_length);
        let mut buffers = RowBuffers::default();
        for ((&address, inputs), targets) in addresses.iter().zip(inputs).zip(targets) {
            self.row(address, &mut buffers, inputs, targets)?;
        }
        Ok(batch)
    }

    fn row(
        &self,
        address: Address<'_>,
        buffers: &mut RowBuffers,
        inputs: &mut [i32],
        targets: &mut [i32],
    ) -> Result<(), LoadError> {
        let Address { source, epoch, chunk } = address;
        let RowBuffers { tokens, bytes, scratch } = buffers;
        let length = self.objective.tokens_length();
        tokens.resize(length, 0);
        source.cache.read(chunk * length as u64, tokens, bytes)?;
        let tail = [StreamTag::Noise.epoch_word(epoch), chunk as u32, (chunk >> 32) as u32];
        let mut noise = Philox::new(source.seed).stream(tail);
        self.objective.corrupt(tokens, &mut noise, scratch, inputs, targets);
        Ok(())
    }
}

impl Source {
    fn new(name: &str, cache: TokenCache, tokens_length: usize, seed: u64) -> Result<Self, LoadError> {
        let tokens = cache.manifest().tokens;
        let chunks = tokens / tokens_length as u64;
        if chunks == 0 {
            return Err(LoadError::TooSmall { name: name.to_owned(), tokens, needed: tokens_length });
        }
        Ok(Self { name: name.to_owned(), cache, chunks, seed })
    }

    fn state(&self, weight: f64) -> SourceState {
        let fingerprint = self.cache.manifest().fingerprint.clone();
        SourceState { name: self.name.clone(), weight, fingerprint }
    }
}

fn resolve(plan: &DataPlan, sources: &[SourcePlan]) -> Result<Vec<Vec<PathBuf>>, LoadError> {
    let files = sources.iter().map(|source| source::resolve(&source.path, &plan.cache_dir));
    Ok(files.collect::<Result<_, _>>()?)
}

fn refuse_held_out(train: &[Vec<PathBuf>], evaluation: &[Vec<PathBuf>]) -> Result<(), LoadError> {
    let train: HashSet<&PathBuf> = train.iter().flatten().collect();
    match evaluation.iter().flatten().find(|file| train.contains(file)) {
        Some(file) => Err(LoadError::HeldOutFile { file: file.display().to_string() }),
        None => Ok(()),
    }
}

fn refuse_equal_names(sources: &[SourcePlan]) -> Result<(), LoadError> {
    let mut names = HashSet::new();
    match sources.iter().find(|source| !names.insert(&source.name)) {
        Some(source) => Err(LoadError::DuplicateName { name: source.name.clone() }),
        None => Ok(()),
    }
}
