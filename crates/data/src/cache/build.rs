//! Building a token cache: documents in, shuffled token files out.
//!
//! One thread reads while the others encode. What is written depends on the documents alone, not
//! on threads or interruptions: an interrupted build goes on at its last whole segment.

use std::collections::BTreeMap;
use std::fs;
use std::mem;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use serde::{Deserialize, Serialize};

use super::manifest::{Layout, Manifest, SourceFile, VERSION, write_json};
use super::writer::TokenWriter;
use super::{CacheError, CacheSource};
use crate::durable::Claim;
use crate::error::DataError;
use crate::permutation::{Permutation, StreamTag};
use crate::progress::{Progress, ProgressFn};
use crate::source::{DocumentReader, ReadCounts};
use crate::tokenizer::{EncodeCounts, Tokenizer};

const JOURNAL: &str = "journal.json";

/// Text encoded at once: so much that threads waiting for the last document of a batch do not matter.
const BATCH_BYTES: usize = 16 << 20;
const BATCH_DOCUMENTS: usize = 1 << 15;

/// Batches read ahead of the encoder.
const BATCHES_AHEAD: usize = 2;

/// Share of `<unk>` above which a tokenizer does not suit the text.
const MAX_UNKNOWN_SHARE: f64 = 0.01;

/// A cache to build.
pub(super) struct Build<'a> {
    pub(super) source: &'a CacheSource<'a>,
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) layout: Layout,
    pub(super) files: Vec<SourceFile>,
    pub(super) fingerprint: String,
}

/// Place between two documents.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Cursor {
    file: usize,
    document: u64,
}

/// Where an interrupted build goes on.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Journal {
    fingerprint: String,
    cursor: Cursor,
    segments: u64,
    tokens: u64,
    documents: u64,
    counts: EncodeCounts,
    skipped: BTreeMap<String, u64>,
}

/// Documents read together.
#[derive(Default)]
struct Batch {
    texts: Vec<String>,
    text_bytes: usize,
    /// Behind the last document.
    end: Cursor,
    /// Bytes of the source's files up to there.
    file_bytes: u64,
    /// Records left out of the files that ended in this batch.
    skipped: BTreeMap<String, u64>,
}

/// Documents waiting to be shuffled and written.
#[derive(Default)]
struct Segment {
    tokens: Vec<u32>,
    /// End of each document in `tokens`.
    ends: Vec<usize>,
}

impl Build<'_> {
    /// Builds the cache at `target` unless another process has done so meanwhile.
    pub(super) fn run(&self, target: &Path, progress: ProgressFn<'_>) -> Result<(), CacheError> {
        let what = format!("the tokens of {}", self.source.name);
        let waiting = || progress(Progress::Waiting { what: &what });
        let Some(claim) = Claim::take(target, Path::exists, waiting)? else {
            return Ok(());
        };
        let (mut journal, mut writer) = self.resume(&claim)?;

        let (sender, receiver) = sync_channel(BATCHES_AHEAD);
        let start = journal.cursor;
        thread::scope(|scope| {
            scope.spawn(move || self.read(start, &sender));
            self.encode(receiver, &mut journal, &mut writer, claim.partial(), progress)
        })?;
        self.finish(journal, writer, claim)
    }

    /// The journal and writer of an interrupted build, or fresh ones.
    fn resume(&self, claim: &Claim) -> Result<(Journal, TokenWriter), CacheError> {
        let partial = claim.partial();
        let saved = fs::read(partial.join(JOURNAL)).ok();
        let saved = saved.and_then(|bytes| serde_json::from_slice::<Journal>(&bytes).ok());
        if let Some(journal) = saved.filter(|journal| journal.fingerprint == self.fingerprint)
            && let Some(writer) = self.writer(partial, journal.tokens)?
        {
            return Ok((journal, writer));
        }
        claim.clear()?;
        let journal = Journal { fingerprint: self.fingerprint.clone(), ..Journal::default() };
        let writer =
            self.writer(partial, 0)?.ok_or_else(|| CacheError::corrupt(partial, "files appear in it"))?;
        Ok((journal, writer))
    }

    fn writer(&self, partial: &Path, written: u64) -> Result<Option<TokenWriter>, CacheError> {
        TokenWriter::resume(partial, token_bytes(self.tokenizer), self.layout.tokens_per_file, written)
    }

    /// Reads documents behind `start` and sends them in batches; ends when nobody receives.
    fn read(&self, start: Cursor, sender: &SyncSender<Result<Batch, DataError>>) {
        let mut batch = Batch { end: start, ..Batch::default() };
        let files = self.source.files;
        let mut bytes_before: u64 = self.files[..start.file].iter().map(|file| file.bytes).sum();
        for index in start.file..files.len() {
            let skip = if index == start.file { start.document } else { 0 };
            // The receiver is gone only when it has failed itself.
            match self.read_file(index, skip, bytes_before, &mut batch, sender) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return,
                Err(error) => {
                    let _ = sender.send(Err(error));
                    return;
                }
            }
            bytes_before += self.files[index].bytes;
            batch.end = Cursor { file: index + 1, document: 0 };
            batch.file_bytes = bytes_before;
        }
        let _ = sender.send(Ok(batch));
    }

    fn read_file(
        &self,
        index: usize,
        skip: u64,
        bytes_before: u64,
        batch: &mut Batch,
        sender: &SyncSender<Result<Batch, DataError>>,
    ) -> Result<ControlFlow<()>, DataError> {
        let mut reader = DocumentReader::open(&self.source.files[index], self.source.options)?;
        let mut document = 0;
        for read in reader.by_ref() {
            let read = read?;
            document += 1;
            if document <= skip {
                continue;
            }
            batch.text_bytes += read.text.len();
            batch.texts.push(read.text);
            if batch.text_bytes >= BATCH_BYTES || batch.texts.len() >= BATCH_DOCUMENTS {
                batch.end = Cursor { file: index, document };
                batch.file_bytes = bytes_before + read.position.compressed_offset;
                if sender.send(Ok(mem::take(batch))).is_err() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        let ReadCounts { empty, skipped, .. } = reader.counts();
        let kinds = skipped.iter().map(|(kind, count)| (*kind, *count)).chain([("empty", *empty)]);
        for (kind, count) in kinds.filter(|(_, count)| *count > 0) {
            *batch.skipped.entry(kind.to_owned()).or_default() += count;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Encodes batches in order and writes a segment whenever one is full.
    fn encode(
        &self,
        batches: Receiver<Result<Batch, DataError>>,
        journal: &mut Journal,
        writer: &mut TokenWriter,
        partial: &Path,
        progress: ProgressFn<'_>,
    ) -> Result<(), CacheError> {
        let total_bytes = self.files.iter().map(|file| file.bytes).sum();
        let mut segment = Segment::default();
        for batch in batches {
            let Batch { texts, end, file_bytes, skipped, .. } = batch?;
            let (documents, counts) = self.tokenizer.encode_documents(&texts)?;
            for ids in documents.iter().filter(|ids| !ids.is_empty()) {
                segment.tokens.extend_from_slice(ids);
                segment.ends.push(segment.tokens.len());
                journal.documents += 1;
            }
            journal.cursor = end;
            journal.counts = journal.counts.plus(counts);
            for (kind, count) in skipped {
                *journal.skipped.entry(kind).or_default() += count;
            }
            if segment.tokens.len() >= self.layout.segment_tokens {
                self.write_segment(&mut segment, journal, writer)?;
                writer.sync()?;
                write_json(&partial.join(JOURNAL), journal)?;
            }
            progress(Progress::Tokenizing {
                source: self.source.name,
                documents: journal.documents,
                tokens: journal.counts.tokens,
                bytes: file_bytes.min(total_bytes),
                total_bytes,
            });
        }
        self.write_segment(&mut segment, journal, writer)
    }

    /// Writes the documents of a segment in a random order, so that neighbours are unrelated.
    fn write_segment(
        &self,
        segment: &mut Segment,
        journal: &mut Journal,
        writer: &mut TokenWriter,
    ) -> Result<(), CacheError> {
        let Segment { tokens, ends } = segment;
        let seed = self.layout.document_order_seed;
        let order = Permutation::new(ends.len() as u64, seed, StreamTag::Documents, journal.segments);
        for position in 0..ends.len() as u64 {
            let document = order.apply(position) as usize;
            let start = if document == 0 { 0 } else { ends[document - 1] };
            writer.write(&tokens[start..ends[document]])?;
        }
        tokens.clear();
        ends.clear();
        journal.segments += 1;
        journal.tokens = writer.written();
        Ok(())
    }

    /// Writes the manifest and gives the cache its name.
    fn finish(&self, journal: Journal, writer: TokenWriter, claim: Claim) -> Result<(), CacheError> {
        let Journal { tokens, documents, counts, skipped, .. } = journal;
        if tokens == 0 {
            claim.abandon()?;
            let files = self.source.files;
            return Err(CacheError::Empty {
                name: self.source.name.to_owned(),
                files: files.len(),
                first: files.first().map_or_else(String::new, |path| path.display().to_string()),
            });
        }
        let unknown_share = counts.unknown as f64 / counts.tokens as f64;
        if unknown_share > MAX_UNKNOWN_SHARE {
            tracing::warn!(
                source = self.source.name,
                unknown_share,
                "more than 1 % of the tokens are <unk>: the tokenizer does not suit this text"
            );
        }
        let manifest = Manifest {
            version: VERSION,
            fingerprint: self.fingerprint.clone(),
            token_bytes: token_bytes(self.tokenizer),
            tokens,
            tokens_per_file: self.layout.tokens_per_file,
            documents,
            document_order_seed: self.layout.document_order_seed,
            tokenizer_size: self.tokenizer.size(),
            tokenizer_sha256: self.tokenizer.sha256().to_owned(),
            counts,
            skipped,
            sources: self.files.clone(),
            files: writer.finish()?,
        };
        let journal: PathBuf = claim.partial().join(JOURNAL);
        if journal.exists() {
            fs::remove_file(&journal).map_err(CacheError::io("remove", &journal))?;
        }
        manifest.write(claim.partial())?;
        Ok(claim.finish()?)
    }
}

/// Two bytes hold every id of a vocabulary of up to 65,536.
fn token_bytes(tokenizer: &Tokenizer) -> usize {
    if tokenizer.size() <= 1 << 16 { 2 } else { 4 }
}
