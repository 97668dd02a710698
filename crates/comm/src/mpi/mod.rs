//! Ranks that are processes started by an MPI launcher.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mpi::Threading;
use mpi::environment::Universe;

use crate::buffer::{Buffer, BufferMut};
use crate::communicator::Communicator;
use crate::error::CommError;
use crate::mpi::group::{Group, Shared};
use crate::mpi::raw::Handle;
use crate::watchdog::message::Card;
use crate::watchdog::{Post, Watchdog};
use crate::world::{RESTARTABLE, StartError, StartOptions};

mod group;
pub(crate) mod raw;
mod scratch;

/// Set by the first that ends the job, so that nobody else reports what is its consequence.
static ENDING: AtomicBool = AtomicBool::new(false);

/// This process's part in an MPI job.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) world: Arc<Group>,
    pub(crate) local_rank: usize,
    pub(crate) local_size: usize,
    shared: Arc<Shared>,
    watchdog: Option<Watchdog>,
    universe: Option<Mutex<OnceUniverse>>,
}

/// The started library.
struct OnceUniverse(#[expect(dead_code, reason = "ends the library when dropped")] Universe);

impl std::fmt::Debug for OnceUniverse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Universe")
    }
}

impl Job {
    /// Starts the library and the watchdog. `check_size` may refuse the number of ranks.
    pub(crate) fn start(
        options: StartOptions,
        check_size: impl FnOnce(usize) -> Result<(), StartError>,
    ) -> Result<Self, StartError> {
        let (universe, threading) =
            mpi::initialize_with_threading(Threading::Multiple).ok_or(StartError::StartedTwice)?;
        // Open MPI sees the end of a process only when it has left in good order, which one that
        // refuses here does by dropping the universe.
        if threading != Threading::Multiple {
            return Err(StartError::NoThreads);
        }
        let handle = Handle::world().map_err(StartError::Library)?;
        let shared = Arc::new(Shared::default());
        let world = Arc::new(Group::world(Arc::clone(&shared), handle).map_err(StartError::Library)?);
        check_size(world.size())?;
        let cards = Cards::exchange(&world, options.address.as_deref())?;
        let (local_rank, local_size) = cards.local(world.rank());
        let watchdog = cards.watch(&world, &shared, options)?;
        let universe = Some(Mutex::new(OnceUniverse(universe)));
        Ok(Self { world, local_rank, local_size, shared, watchdog, universe })
    }

    pub(crate) fn activity(&self) -> &crate::Activity {
        &self.shared.activity
    }

    /// Waits for all ranks, then ends the library; does nothing the second time.
    pub(crate) fn leave(&mut self) -> Result<(), CommError> {
        if self.universe.is_none() {
            return Ok(());
        }
        if let Err(error) = self.world.barrier() {
            self.abandon();
            return Err(error);
        }
        self.shared.ended.store(true, Ordering::Release);
        self.watchdog = None;
        self.universe = None;
        Ok(())
    }

    /// Leaves the library as it is: ending it would wait for ranks that may never come.
    pub(crate) fn abandon(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        if let Some(universe) = self.universe.take() {
            std::mem::forget(universe);
        }
        if let Some(watchdog) = self.watchdog.take() {
            std::mem::forget(watchdog);
        }
    }
}

/// What each rank says of itself at the start.
struct Cards {
    post: Post,
    all: Vec<Card>,
}

impl Cards {
    fn exchange(world: &Group, address: Option<&str>) -> Result<Self, StartError> {
        let post = Post::new(world.rank(), world.size()).map_err(StartError::Watchdog)?;
        let host = mpi::environment::processor_name().unwrap_or_else(|_| "unknown".to_owned());
        let card = post.card(&host, address).map_err(StartError::Watchdog)?;
        let text = serde_json::to_vec(&card).expect("cards have a JSON form");
        let mut lengths = vec![0; world.size()];
        world.all_gather(Buffer::U64(&[text.len() as u64]), BufferMut::U64(&mut lengths))?;
        let counts: Vec<usize> = lengths.iter().map(|&length| length as usize).collect();
        let mut texts = vec![0; counts.iter().sum()];
        world.all_gather_v(Buffer::U8(&text), BufferMut::U8(&mut texts), &counts)?;
        let mut rest = &texts[..];
        let all = counts.iter().map(|&count| {
            let (text, later) = rest.split_at(count);
            rest = later;
            serde_json::from_slice(text).map_err(|_| StartError::OtherProgram)
        });
        let all = all.collect::<Result<_, _>>()?;
        Ok(Self { post, all })
    }

    /// Rank and number of ranks among those of the same machine.
    fn local(&self, rank: usize) -> (usize, usize) {
        let here = |card: &&Card| card.host == self.all[rank].host;
        (self.all[..rank].iter().filter(here).count(), self.all.iter().filter(here).count())
    }

    fn watch(
        self,
        world: &Group,
        shared: &Shared,
        options: StartOptions,
    ) -> Result<Option<Watchdog>, StartError> {
        let Some(timeout) = options.timeout.filter(|_| world.size() > 1) else { return Ok(None) };
        let report = options.report;
        let end = move |reason: String| {
            if !ENDING.swap(true, Ordering::AcqRel) {
                tracing::error!("{reason}");
                report(&reason);
                end_all(RESTARTABLE);
            }
        };
        let activity = Arc::clone(&shared.activity);
        let watchdog = self.post.start(&self.all, timeout, activity, end).map_err(StartError::Watchdog)?;
        // Nobody computes before all have connected: a connection is refused once the hub has ended.
        world.barrier()?;
        Ok(Some(watchdog))
    }
}

/// Ends all ranks with `code`, from any thread.
pub(crate) fn abort(code: i32) -> ! {
    ENDING.store(true, Ordering::Release);
    end_all(code)
}

fn end_all(code: i32) -> ! {
    if raw::is_running() {
        // Should the library hang, this process ends on its own, and the launcher ends the others.
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(5));
            std::process::exit(code);
        });
        raw::abort(code);
    }
    std::process::exit(code)
}
