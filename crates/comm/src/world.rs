//! The start and the end of this process's part in a job.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::activity::Activity;
use crate::communicator::Communicator;
use crate::error::CommError;
use crate::launcher::{Launch, LaunchError};
use crate::solo::Solo;
use crate::tcp;

/// Exit code of a job that may be started again from its newest checkpoint.
pub const RESTARTABLE: i32 = 75;

/// How to start.
pub struct StartOptions {
    /// How long a collective may take before the watchdog ends the job; `None` for no watchdog.
    pub timeout: Option<Duration>,
    /// A name or address by which other machines reach this one, if the host's name is not one.
    pub address: Option<String>,
    /// Tells the user why the watchdog ends the job; called on one rank, from the watchdog's thread.
    pub report: Box<dyn Fn(&str) + Send + Sync>,
}

impl fmt::Debug for StartOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { timeout, address, report: _ } = self;
        f.debug_struct("StartOptions").field("timeout", timeout).field("address", address).finish()
    }
}

/// A job that this process could not join.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// It was not started as it should have been.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A first word with the other ranks failed.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// MPI was started before in this process.
    #[error("MPI can be started once in a process")]
    StartedTwice,
    /// The MPI library allows calls from one thread only.
    #[error(
        "the MPI library was built without MPI_THREAD_MULTIPLE, which the watchdog needs to end a job; \
         use one built with it"
    )]
    NoThreads,
    /// The MPI library reports a fault.
    #[error("MPI did not start: {0}")]
    Library(String),
    /// The ranks do not find each other.
    #[error("the ranks did not meet: {0}")]
    Rendezvous(io::Error),
    /// The watchdogs do not find each other.
    #[error(
        "the watchdog did not start: {0}; the ranks need TCP connections to the machines of the first two ranks"
    )]
    Watchdog(io::Error),
    /// Other ranks run another program or another version of this one.
    #[error("other ranks run another version of this program")]
    OtherProgram,
}

/// This process's part in a job.
///
/// Dropping it waits for the other ranks and leaves the job in good order, unless this thread
/// panics or the world is broken; [`abort`] then ends the job.
#[derive(Debug)]
pub struct World {
    communicator: Arc<dyn Communicator>,
    part: Part,
    library: String,
}

#[derive(Debug)]
enum Part {
    Solo(Activity),
    Tcp(Box<tcp::Job>),
    #[cfg(feature = "mpi")]
    Mpi(Box<crate::mpi::Job>),
}

/// Joins the job that `launch` describes: over TCP or MPI if there are other ranks, else one rank alone.
///
/// # Collective
/// Every rank of the job must call it.
/// # Errors
/// [`StartError`].
pub fn start(launch: &Launch, options: StartOptions) -> Result<World, StartError> {
    if let Some(meeting) = launch.meeting() {
        let job = tcp::Job::start(&meeting, options)?;
        let communicator: Arc<dyn Communicator> = job.world.clone();
        return Ok(World { communicator, part: Part::Tcp(Box::new(job)), library: "none".to_owned() });
    }
    launch.require_mpi(cfg!(feature = "mpi"))?;
    if launch.is_one_of_several() {
        return start_mpi(launch, options);
    }
    let library = "none".to_owned();
    Ok(World { communicator: Arc::new(Solo::new("world")), part: Part::Solo(Activity::default()), library })
}

#[cfg(feature = "mpi")]
fn start_mpi(launch: &Launch, options: StartOptions) -> Result<World, StartError> {
    let job = crate::mpi::Job::start(options, |size| Ok(launch.require_world(size)?))?;
    let library = ::mpi::environment::library_version().unwrap_or_else(|_| "unknown".to_owned());
    // Open MPI adds when and by whom it was built, MPICH its compiler flags.
    let library = library.split([',', '\n', '\0']).next().unwrap_or_default().trim().to_owned();
    let communicator: Arc<dyn Communicator> = job.world.clone();
    Ok(World { communicator, part: Part::Mpi(Box::new(job)), library })
}

#[cfg(not(feature = "mpi"))]
fn start_mpi(launch: &Launch, _: StartOptions) -> Result<World, StartError> {
    Err(LaunchError::BuiltWithoutMpi { launcher: launch.launcher, size: launch.size }.into())
}

impl World {
    /// The group of all ranks, called `world`.
    pub fn communicator(&self) -> &Arc<dyn Communicator> {
        &self.communicator
    }

    /// This rank among those of its machine, from 0.
    pub fn local_rank(&self) -> usize {
        self.ranks_here(self.communicator.rank())
    }

    /// Ranks of this machine.
    pub fn local_size(&self) -> usize {
        self.ranks_here(self.communicator.size())
    }

    /// How many of the first `ranks` are on this machine.
    fn ranks_here(&self, ranks: usize) -> usize {
        let machines = self.communicator.machines();
        let here = machines[self.communicator.rank()];
        machines[..ranks].iter().filter(|&&machine| machine == here).count()
    }

    /// Name of the backend: `solo`, `tcp` or `mpi`.
    pub fn backend(&self) -> &'static str {
        match &self.part {
            Part::Solo(_) => "solo",
            Part::Tcp(_) => "tcp",
            #[cfg(feature = "mpi")]
            Part::Mpi(_) => "mpi",
        }
    }

    /// Name and version of the library beneath.
    pub fn library(&self) -> &str {
        &self.library
    }

    /// Where this process says what it is at.
    pub fn activity(&self) -> &Activity {
        match &self.part {
            Part::Solo(activity) => activity,
            Part::Tcp(job) => job.activity(),
            #[cfg(feature = "mpi")]
            Part::Mpi(job) => job.activity(),
        }
    }

    /// The MPI library's name of the group of all ranks.
    #[cfg(feature = "mpi")]
    pub(crate) fn mpi_handle(&self) -> Option<crate::mpi::raw::Handle> {
        match &self.part {
            Part::Solo(_) | Part::Tcp(_) => None,
            Part::Mpi(job) => Some(*job.world.transport()),
        }
    }

    /// Waits for all ranks and leaves the job in good order. Groups can no longer be used.
    ///
    /// # Collective
    /// Every rank must call it, or drop its world.
    /// # Errors
    /// [`CommError`] if the world is broken; the job is then not left.
    pub fn finish(mut self) -> Result<(), CommError> {
        self.leave()
    }

    fn leave(&mut self) -> Result<(), CommError> {
        match &mut self.part {
            Part::Solo(_) => Ok(()),
            Part::Tcp(job) => job.leave(),
            #[cfg(feature = "mpi")]
            Part::Mpi(job) => job.leave(),
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        match &mut self.part {
            Part::Tcp(job) if std::thread::panicking() => job.abandon(),
            #[cfg(feature = "mpi")]
            Part::Mpi(job) if std::thread::panicking() => job.abandon(),
            // A broken world is not left; its error has been returned by the call that broke it.
            _ => drop(self.leave()),
        }
    }
}

/// Ends all ranks of the job with exit code `code`, from any thread, also from a panic hook, and whatever other
/// threads are blocked in. What is registered for the end of a program does not run.
pub fn abort(code: i32) -> ! {
    #[cfg(feature = "mpi")]
    crate::mpi::abort(code);
    #[cfg(not(feature = "mpi"))]
    crate::exit::end_process(code)
}
