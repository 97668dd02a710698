//! Batches made in the background while the trainer computes.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{DataSet, LoadError};
use crate::batch::{HostBatch, Share};

/// What one trainer learns from in a step, and how long it waited for it.
#[derive(Debug, Clone)]
pub struct Prefetched {
    /// Its micro-batches of the global batch.
    pub micro_batches: Vec<HostBatch>,
    /// Time between asking and having.
    pub waited: Duration,
}

/// A thread that makes consecutive batches ahead of whoever takes them.
///
/// The batches are those of [`DataSet::micro_batches_at`], in order. Dropping it ends the thread.
#[derive(Debug)]
pub struct Prefetcher {
    /// `None` once dropped, which tells the thread to end.
    batches: Option<Receiver<Result<Vec<HostBatch>, LoadError>>>,
    thread: Option<JoinHandle<()>>,
    remaining: u64,
}

impl Prefetcher {
    /// Starts with the batch at global sample `first_sample` and stops after `num_batches`; makes what
    /// `share` takes of each.
    ///
    /// At most `ahead` finished batches wait in memory, at least one.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        data: Arc<DataSet>,
        share: Share,
        first_sample: u64,
        num_batches: u64,
        ahead: usize,
    ) -> Result<Self, LoadError> {
        let (sender, batches) = sync_channel(ahead.max(1));
        let make = move || {
            let rows = data.batch_rows() as u64;
            for number in 0..num_batches {
                // Saturating ends in the error of a step too large.
                let at = first_sample.saturating_add(number.saturating_mul(rows));
                let made = data.micro_batches_at(at, share);
                let failed = made.is_err();
                if sender.send(made).is_err() || failed {
                    return;
                }
            }
        };
        let thread = thread::Builder::new()
            .name("prefetch".to_owned())
            .spawn(make)
            .map_err(|error| LoadError::Thread { message: format!("cannot be started: {error}") })?;
        Ok(Self { batches: Some(batches), thread: Some(thread), remaining: num_batches })
    }

    /// The next batch, or `None` after the last.
    ///
    /// # Errors
    /// What the thread met while making the batch. There are no batches after an error.
    pub fn next_batch(&mut self) -> Result<Option<Prefetched>, LoadError> {
        if self.remaining == 0 {
            return Ok(None);
        }
        let asked = Instant::now();
        let received = self.batches.as_ref().and_then(|batches| batches.recv().ok());
        let Some(micro_batches) = received else {
            return Err(LoadError::Thread { message: "ended before the last batch".to_owned() });
        };
        self.remaining -= 1;
        Ok(Some(Prefetched { micro_batches: micro_batches?, waited: asked.elapsed() }))
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        self.batches = None;
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has been reported by the panic hook already.
            let _ = thread.join();
        }
    }
}
