//! One rank's part in a communicator: how it begins, what state it is in, how it ends.

use std::cell::Cell;
use std::ffi::c_int;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::config::Config;
use crate::deadline::{Deadline, Pauses};
use crate::error::{Error, Mismatch, Who};
use crate::ffi::{Background, Fault, Handle, Progress};
use crate::group::refuse_inside;
use crate::library::Library;
use crate::memory::DeviceSlice;
use crate::unique_id::UniqueId;

/// One rank of a set of ranks that communicate, each with a GPU of its own.
///
/// # Collective
/// Every rank calls the same operations with the same types, sizes and roots in the same order. NCCL does not
/// compare what ranks ask for: where they differ it hangs, or leaves wrong values in the devices' memory.
///
/// # Threads
/// It can move between threads and be dropped on any, but is not [`Sync`]: NCCL wants one thread at a time.
/// Put it into a [`Mutex`](std::sync::Mutex) to let a watchdog abort it while the thread that uses it waits
/// for its stream. Up to NCCL 2.25 operations of several communicators on one device must not run at once;
/// later ones take the order in which one thread starts them.
///
/// ```compile_fail
/// fn shared(_: impl Sync) {}
/// fn needs(communicator: nccl_rs::Communicator) { shared(communicator) }
/// ```
///
/// # Ends
/// [`Communicator::close`] ends it in order, when all ranks do. When it is dropped without that, by an error
/// or a panic, it is aborted: that stops what its operations still do on the device and never waits for other
/// ranks, which is what a rank in trouble can do. What is finalized already is destroyed instead.
///
/// Where operations were captured in CUDA graphs, every end waits, and longer than any deadline: NCCL frees a
/// communicator when the last such graph has been destroyed. So graphs go before their communicators, also
/// when these are aborted or dropped.
pub struct Communicator {
    library: Library,
    handle: Handle,
    name: Option<Arc<str>>,
    rank: usize,
    count: usize,
    /// Known once the communicator is ready.
    device: Cell<Option<i32>>,
    /// How long operations wait; `None` where the library was asked to block.
    patience: Option<Duration>,
    /// What the library was last seen to work on in the background.
    pending: Cell<Option<&'static str>>,
    finalized: Cell<bool>,
}

/// Whether a communicator can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// All calls so far are through: what they started is on its streams, if not done.
    Ready,
    /// The library works on a call in the background.
    InProgress,
}

const INIT: &str = "joining the communicator";
const FINALIZE: &str = "finalize";

/// What is under way where nobody knows what.
const SOMETHING: &str = "an operation";

impl Communicator {
    /// Joins the communicator of `id` as rank `rank` of `count`, on the thread's current CUDA device.
    ///
    /// Blocks until all ranks have come; after [`Config::non_blocking`], or when the environment says so, it
    /// returns at once, and [`Communicator::wait`] says when they have.
    ///
    /// # Collective
    /// Each rank calls it once, from a process or thread of its own.
    /// # Errors
    /// [`Error::InsideGroup`], [`Error::NoSuchRank`], [`Error::Unsupported`] and [`Error::Setting`] before
    /// the library is asked; [`Error::Library`] when it fails.
    pub fn init(
        library: &Library,
        id: &UniqueId,
        rank: usize,
        count: usize,
        config: &Config,
    ) -> Result<Self, Error> {
        refuse_inside(INIT)?;
        let numbers = c_int::try_from(rank).ok().zip(c_int::try_from(count).ok());
        let numbers = numbers.filter(|_| rank < count);
        let numbers = numbers.ok_or(Error::NoSuchRank { operation: INIT, rank, count })?;
        let config_raw = config.raw(library)?;
        let (handle, progress) =
            Handle::init(library.api(), id, numbers, config_raw).map_err(Error::Library)?;
        let communicator = Self {
            library: library.clone(),
            handle,
            name: config.label(),
            rank,
            count,
            device: Cell::new(None),
            patience: config.patience(),
            pending: Cell::new(None),
            finalized: Cell::new(false),
        };
        communicator.note(progress, INIT);
        Ok(communicator)
    }

    /// Cuts the communicator: ranks with the same `color` form a new one, in the order of `key` and then of
    /// their ranks here. A rank without a color has none. Without a configuration the new one has this one's.
    ///
    /// No operation may be under way on the communicator: wait for its streams before.
    ///
    /// # Collective
    /// All ranks call it, those without a color too.
    /// # Errors
    /// [`Error::InsideGroup`] in a group; [`Error::Busy`] and [`Error::Ended`] when the communicator is not
    /// ready; [`Error::Setting`] for a color above 2³¹ - 1, and as for [`Communicator::init`];
    /// [`Error::Communicator`] when the library fails; [`Error::Asynchronous`] when it does so in the
    /// background, and [`Error::Timeout`] after a non-blocking communicator's patience, which both abort it.
    pub fn split(
        &self,
        color: Option<u32>,
        key: i32,
        config: Option<&Config>,
    ) -> Result<Option<Self>, Error> {
        const SPLIT: &str = "split";
        self.require_ready(SPLIT)?;
        refuse_inside(SPLIT)?;
        let color = color.map(|color| {
            let (setting, reason) = ("color", "it has to fit 31 bits");
            c_int::try_from(color).map_err(|_| Error::Setting { setting, value: color.to_string(), reason })
        });
        let color = color.transpose()?;
        let raw = config.map(|config| config.raw(&self.library)).transpose()?;
        let handle = self.handle.split(color, key, raw, || {
            // The library goes on in the background, whether it was asked to or its environment said so.
            let deadline = self.deadline().unwrap_or_else(Deadline::never);
            self.settle(SPLIT, deadline).map_err(Refusal::Waited)
        });
        let handle = handle.map_err(|refusal| match refusal {
            Refusal::Waited(error) => error,
            Refusal::Fault(fault) => self.error(SPLIT, fault),
        })?;
        let Some(handle) = handle else { return Ok(None) };
        let number = |asked: Result<c_int, Fault>| {
            self.explain(SPLIT, asked).map(|number| usize::try_from(number).unwrap_or(0))
        };
        let (rank, count) = (number(handle.rank())?, number(handle.count())?);
        let (name, patience) = match config {
            Some(config) => (config.label(), config.patience()),
            None => (self.name.clone(), self.patience),
        };
        Ok(Some(Self {
            library: self.library.clone(),
            handle,
            name,
            rank,
            count,
            device: Cell::new(self.device.get()),
            patience,
            pending: Cell::new(None),
            finalized: Cell::new(false),
        }))
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Its name, see [`Config::name`].
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The library that it belongs to.
    pub fn library(&self) -> &Library {
        &self.library
    }

    /// Its device, by the CUDA runtime's number.
    ///
    /// # Errors
    /// [`Error::Busy`] before a non-blocking communicator has been waited for.
    pub fn device(&self) -> Result<i32, Error> {
        const DEVICE: &str = "asking for the device";
        if let Some(device) = self.device.get() {
            return Ok(device);
        }
        self.require_ready(DEVICE)?;
        let device = self.explain(DEVICE, self.handle.device())?;
        self.device.set(Some(device));
        Ok(device)
    }

    /// Asks how far the library is with calls that went on in the background, and whether a fault has been
    /// met since: ask now and then while waiting for a stream, as an operation that met one never ends.
    ///
    /// # Errors
    /// [`Error::Asynchronous`] for such a fault; the communicator is then to be aborted, on every rank.
    pub fn state(&self) -> Result<State, Error> {
        const STATE: &str = "asking for the state";
        match self.explain(STATE, self.handle.background())? {
            Background::Idle => {
                self.pending.set(None);
                Ok(State::Ready)
            }
            Background::Running => Ok(State::InProgress),
            Background::Broken(failure) => {
                let operation = self.pending.get().unwrap_or(SOMETHING);
                Err(Error::Asynchronous { who: self.who(), operation, failure })
            }
        }
    }

    /// Waits until the communicator is [`State::Ready`], for as long as `deadline` leaves.
    ///
    /// # Errors
    /// [`Error::Timeout`] says what was waited for; the communicator is as it was, and can be waited for
    /// again. [`Error::Asynchronous`] as [`Communicator::state`].
    pub fn wait(&self, deadline: Deadline) -> Result<(), Error> {
        refuse_inside("wait")?;
        let mut pauses = Pauses::new();
        while self.state()? == State::InProgress {
            if deadline.is_past() {
                let operation = self.pending.get().unwrap_or(SOMETHING);
                let after = deadline.elapsed();
                return Err(Error::Timeout { who: self.who(), operation, after, aborted: false });
            }
            pauses.pause(deadline);
        }
        Ok(())
    }

    /// Begins to end the communicator: completes its operations and frees what it shares with other ranks.
    /// After [`Config::non_blocking`] it returns at once, and [`Communicator::wait`] says when that is done.
    /// It is not done before all CUDA graphs are destroyed that captured operations.
    ///
    /// # Collective
    /// All ranks call it.
    /// # Errors
    /// [`Error::Communicator`] when the library fails, [`Error::Ended`] the second time.
    pub fn finalize(&self) -> Result<(), Error> {
        self.require_ready(FINALIZE)?;
        refuse_inside(FINALIZE)?;
        let progress = self.explain(FINALIZE, self.handle.finalize())?;
        self.finalized.set(true);
        self.note(progress, FINALIZE);
        Ok(())
    }

    /// Frees the communicator. Does not wait when it was finalized and waited for; otherwise it finalizes
    /// first, and blocks until all ranks of this machine do. Either way it waits until all CUDA graphs are
    /// destroyed that captured operations.
    ///
    /// # Errors
    /// [`Error::Busy`] before a non-blocking communicator has been waited for; it is aborted then.
    /// [`Error::Communicator`] when the library fails; nothing can be done about it.
    pub fn destroy(self) -> Result<(), Error> {
        const DESTROY: &str = "destroy";
        refuse_inside(DESTROY)?;
        self.require_idle(DESTROY)?;
        self.explain(DESTROY, self.handle.destroy()).map(|_| ())
    }

    /// Ends the communicator in order: finalizes it, waits and destroys it.
    ///
    /// # Collective
    /// All ranks call it.
    /// # Errors
    /// Those of [`Communicator::finalize`], [`Communicator::wait`] and [`Communicator::destroy`]; it is
    /// aborted then. A blocking communicator does not know the deadline.
    pub fn close(self, deadline: Deadline) -> Result<(), Error> {
        self.finalize()?;
        self.wait(deadline)?;
        self.destroy()
    }

    /// Stops what the communicator does, on the device too, and frees it. Every other call fails from then
    /// on. Waits until all CUDA graphs are destroyed that captured operations.
    ///
    /// # Collective
    /// The other ranks are not told: they abort their communicators as well, or wait for ever.
    /// # Errors
    /// [`Error::Ended`] the second time; [`Error::Communicator`] when the library fails, and nothing can be
    /// done about it.
    pub fn abort(&self) -> Result<(), Error> {
        const ABORT: &str = "abort";
        refuse_inside(ABORT)?;
        self.explain(ABORT, self.handle.abort()).map(|_| ())
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    pub(crate) fn who(&self) -> Who {
        Who { name: self.name.clone(), rank: self.rank, count: self.count }
    }

    /// Refuses an operation when the communicator is busy or has ended.
    pub(crate) fn require_ready(&self, operation: &'static str) -> Result<(), Error> {
        if self.handle.is_live() && self.finalized.get() {
            return Err(Error::Ended { who: self.who(), operation, end: "finalized" });
        }
        self.require_idle(operation)
    }

    /// Refuses memory that is not on the communicator's device.
    pub(crate) fn require_device(
        &self,
        operation: &'static str,
        memory: DeviceSlice<'_>,
    ) -> Result<(), Error> {
        let (found, expected) = (memory.device(), self.device()?);
        let mismatch = Mismatch::Device { found, expected };
        if found == expected { Ok(()) } else { Err(Error::Buffer { who: self.who(), operation, mismatch }) }
    }

    fn require_idle(&self, operation: &'static str) -> Result<(), Error> {
        if !self.handle.is_live() {
            return Err(self.error(operation, Fault::Gone));
        }
        match self.pending.get() {
            Some(pending) if self.state()? == State::InProgress => {
                Err(Error::Busy { who: self.who(), operation, pending })
            }
            _ => Ok(()),
        }
    }

    /// Until when an operation that starts now may take; `None` where the library was asked to block. Its
    /// environment can overrule that, so only what it answers says whether it has.
    pub(crate) fn deadline(&self) -> Option<Deadline> {
        self.patience.map(Deadline::after)
    }

    /// Waits until nothing uses what was lent to `operation` before it is on its stream, and aborts the
    /// communicator when that cannot be had.
    pub(crate) fn settle(&self, operation: &'static str, deadline: Deadline) -> Result<(), Error> {
        self.pending.set(Some(operation));
        // After a fault, too: the library has told of it, but its thread may not have ended yet.
        let Err(error) = self.wait(deadline) else { return Ok(()) };
        // Joins the library's thread; that it may fail besides changes nothing.
        let _ = self.handle.abort();
        Err(match error {
            Error::Timeout { who, operation, after, .. } => {
                Error::Timeout { who, operation, after, aborted: true }
            }
            other => other,
        })
    }

    pub(crate) fn explain<T>(&self, operation: &'static str, asked: Result<T, Fault>) -> Result<T, Error> {
        asked.map_err(|fault| self.error(operation, fault))
    }

    fn error(&self, operation: &'static str, fault: Fault) -> Error {
        let who = self.who();
        match fault {
            Fault::Gone => Error::Ended { who, operation, end: "aborted" },
            Fault::Missing(symbol) => Error::MissingSymbol { symbol, origin: self.library.origin().clone() },
            Fault::Failed(failure) => Error::Communicator { who, failure },
        }
    }

    fn note(&self, progress: Progress, operation: &'static str) {
        self.pending.set((progress == Progress::Running).then_some(operation));
    }
}

/// Why a split did not come about.
enum Refusal {
    Fault(Fault),
    Waited(Error),
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if self.finalized.get() && matches!(self.handle.background(), Ok(Background::Idle)) {
            // Nobody is there to tell when it fails.
            let _ = self.handle.destroy();
        }
        // Otherwise the handle aborts.
    }
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator")
            .field("name", &self.name)
            .field("rank", &self.rank)
            .field("count", &self.count)
            .field("pending", &self.pending.get())
            .finish_non_exhaustive()
    }
}
