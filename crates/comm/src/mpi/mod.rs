//! Ranks that are processes started by an MPI launcher.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mpi::Threading;
use mpi::environment::Universe;

use crate::cards::{Cards, ENDING};
use crate::communicator::Communicator;
use crate::error::CommError;
use crate::exit::end_process;
use crate::group::{Group, Shared};
use crate::mpi::raw::Handle;
use crate::watchdog::Watchdog;
use crate::world::{StartError, StartOptions};

pub(crate) mod raw;

/// This process's part in an MPI job.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) world: Arc<Group<Handle>>,
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
        let shared = Arc::new(Shared { timeout: options.timeout, ..Shared::default() });
        let world = Group::world(Arc::clone(&shared), handle);
        check_size(world.size())?;
        let host = mpi::environment::processor_name().unwrap_or_else(|_| "unknown".to_owned());
        let cards = Cards::exchange(&world, &host, options.address.as_deref())?;
        let world = Arc::new(world.on_machines(cards.machines()));
        let watchdog = cards.watch(&*world, &shared.activity, options, end_all)?;
        let universe = Some(Mutex::new(OnceUniverse(universe)));
        Ok(Self { world, shared, watchdog, universe })
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
            end_process(code);
        });
        raw::abort(code);
    }
    end_process(code)
}
