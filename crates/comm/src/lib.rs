//! Collective operations between the ranks of a job, behind one trait with several backends.
//!
//! Knows nothing of models: typed buffers in, typed buffers out. Sums are taken in rank order, so
//! that every backend gives the same bits, and no call hangs for ever: see [`Communicator`].
//!
//! | backend | ranks are | made by |
//! |---|---|---|
//! | solo | one process | [`Solo::new`] |
//! | threads | threads of one process, for tests of parallel code | [`threads`] |
//! | tcp | processes that are told where rank 0 is, as torchrun tells them | [`start`] |
//! | mpi | processes under mpirun or srun; cargo feature `mpi` | [`start`] |
//!
//! [`with_devices`] adds collectives on the memory of the ranks' devices to any of them: of GPUs, with NCCL
//! beneath (cargo feature `nccl`), or main memory as another library has it.
//!
//! A program calls [`Launch::detect`] to learn how it was started and [`start`] to join the job;
//! [`World::activity`] is where it says what it is at, for the watchdog's report; [`abort`] ends all
//! ranks from any thread. When a collective does not come about in time or a rank vanishes, the
//! watchdog ends the job with exit code [`RESTARTABLE`] and names the ranks that are missing. The
//! threads backend returns [`CommError::Timeout`] and [`CommError::PeerLost`] instead.
//!
//! ```
//! use std::time::Duration;
//! use switchyard_comm::{BufferMut, ReduceOp, threads};
//!
//! std::thread::scope(|scope| {
//!     for comm in threads(3, Duration::from_secs(10)) {
//!         scope.spawn(move || {
//!             let mut values = [comm.rank() as f32; 2];
//!             comm.all_reduce(BufferMut::F32(&mut values), ReduceOp::Sum).expect("all ranks come");
//!             assert_eq!(values, [3.0, 3.0]);
//!         });
//!     }
//! });
//! ```

mod activity;
pub mod bench;
mod buffer;
mod call;
mod cards;
mod communicator;
mod device;
mod error;
mod exit;
mod group;
mod launcher;
#[cfg(feature = "mpi")]
mod mpi;
mod poll;
mod reduce;
mod scratch;
mod solo;
mod tcp;
mod threads;
mod transport;
mod watchdog;
mod world;

pub use activity::Activity;
pub use buffer::{Buffer, BufferMut, Element, ElementType};
pub use communicator::{Communicator, ReduceOp};
pub use device::{
    Bind, DeviceCommunicator, DeviceSlice, DeviceStream, Devices, DevicesError, Piece, nccl_version,
    with_devices,
};
pub use error::CommError;
pub use launcher::{Choice, Launch, LaunchError, Launcher, Meeting};
pub use solo::Solo;
pub use threads::{threads, threads_on};
pub use world::{RESTARTABLE, StartError, StartOptions, World, abort, start};
