//! Ranks that are processes which find each other over TCP: started by torchrun, or by anything else that
//! sets `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`. Needs no library.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::cards::{Cards, ENDING};
use crate::communicator::Communicator;
use crate::error::CommError;
use crate::exit::end_process;
use crate::group::{Group, Shared};
use crate::launcher::Meeting;
use crate::tcp::connections::Connections;
use crate::watchdog::Watchdog;
use crate::world::{StartError, StartOptions};

mod connections;
mod rendezvous;

/// This process's part in a job over TCP.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) world: Arc<Group<Connections>>,
    shared: Arc<Shared>,
    watchdog: Option<Watchdog>,
}

impl Job {
    /// Meets the other ranks and starts the watchdog.
    pub(crate) fn start(meeting: &Meeting, options: StartOptions) -> Result<Self, StartError> {
        let shared = Arc::new(Shared { timeout: options.timeout, ..Shared::default() });
        let connections = rendezvous::meet(meeting).map_err(StartError::Rendezvous)?;
        let world = Group::world(Arc::clone(&shared), connections);
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let cards = Cards::exchange(&world, &host, options.address.as_deref())?;
        let world = Arc::new(world.on_machines(cards.machines()));
        let watchdog = cards.watch(&*world, &shared.activity, options, end)?;
        Ok(Self { world, shared, watchdog })
    }

    pub(crate) fn activity(&self) -> &crate::Activity {
        &self.shared.activity
    }

    /// Waits for all ranks; does nothing the second time.
    pub(crate) fn leave(&mut self) -> Result<(), CommError> {
        if self.shared.ended.load(Ordering::Acquire) {
            return Ok(());
        }
        if let Err(error) = self.world.barrier() {
            self.abandon();
            return Err(error);
        }
        self.shared.ended.store(true, Ordering::Release);
        self.watchdog = None;
        Ok(())
    }

    /// Leaves without waiting, and without a farewell that the other ranks would take for good order.
    pub(crate) fn abandon(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        if let Some(watchdog) = self.watchdog.take() {
            std::mem::forget(watchdog);
        }
    }
}

/// Ends this process; its connections end with it, which ends the others.
fn end(code: i32) -> ! {
    ENDING.store(true, Ordering::Release);
    end_process(code)
}
