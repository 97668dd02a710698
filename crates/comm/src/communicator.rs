//! The trait that every backend implements.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use crate::buffer::{Buffer, BufferMut};
use crate::device::DeviceCommunicator;
use crate::error::CommError;
use crate::poll::poll;

/// How values of several ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReduceOp {
    /// The sum, added in rank order: `((x0 + x1) + x2) + …`, bf16 in float32 with one rounding at the end;
    /// integers wrap around.
    Sum,
    /// The largest; not a number if any is not.
    Max,
    /// The smallest; not a number if any is not.
    Min,
}

/// A group of ranks that call the same operations in the same order.
///
/// After an error a communicator is broken: the ranks no longer agree on what comes next, and every
/// later call fails at once with the same error.
///
/// # Errors
/// Every method: [`CommError`] when a peer is lost, the deadline passes, ranks call different
/// operations, or sizes do not fit.
pub trait Communicator: Debug + Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Ranks.
    fn size(&self) -> usize;

    /// What the group is for, such as `expert`; for messages.
    fn label(&self) -> &str;

    /// Number of every rank's machine, in rank order: the same numbers on all ranks and in all groups of the job.
    fn machines(&self) -> &[usize];

    /// How long an operation may take; `None` for as long as it takes.
    fn timeout(&self) -> Option<Duration> {
        None
    }

    /// Waits until every rank has come.
    fn barrier(&self) -> Result<(), CommError>;

    /// Gives every rank the values of rank `root`.
    fn broadcast(&self, buffer: BufferMut<'_>, root: usize) -> Result<(), CommError>;

    /// Combines the buffers of all ranks element by element; every rank gets the same bits.
    fn all_reduce(&self, buffer: BufferMut<'_>, op: ReduceOp) -> Result<(), CommError>;

    /// Combines the inputs and gives rank `i` the `i`-th of `size` equal parts of the result.
    fn reduce_scatter(&self, input: Buffer<'_>, output: BufferMut<'_>, op: ReduceOp)
    -> Result<(), CommError>;

    /// Concatenates the equally long inputs in rank order.
    fn all_gather(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError>;

    /// Concatenates inputs of any lengths in rank order; `counts[i]` values come from rank `i`.
    fn all_gather_v(
        &self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        counts: &[usize],
    ) -> Result<(), CommError>;

    /// Sends the `i`-th of `size` equal parts of `input` to rank `i`; parts arrive in rank order.
    fn all_to_all(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError>;

    /// As [`all_to_all`](Self::all_to_all) with parts of any lengths: `sends[i]` values go to rank `i`,
    /// `receives[i]` come from it. What one rank sends another must expect.
    fn all_to_all_v(
        &self,
        input: Buffer<'_>,
        sends: &[usize],
        output: BufferMut<'_>,
        receives: &[usize],
    ) -> Result<(), CommError>;

    /// Splits the group: ranks of one `color` form a group of their own, in this group's order.
    ///
    /// Collective over this group.
    fn split(&self, color: usize, label: &str) -> Result<Arc<dyn Communicator>, CommError>;

    /// Waits until `done` says so; meanwhile this rank is in an operation called `what`, in the eyes of the
    /// watchdog. It is for what the ranks do together on their devices, such as a step, of which the host
    /// only sees the end.
    ///
    /// The answer is known within some 50 us. Where the devices break in the meantime, they are given up, so that
    /// their streams end.
    ///
    /// # Collective
    /// Every rank of the group waits for the same things in the same order. They are counted by themselves: they
    /// may overlap with other operations of the group.
    fn wait_for(&self, what: &'static str, done: &mut dyn FnMut() -> bool) -> Result<(), CommError> {
        let _ = what;
        poll(done, || Ok(()))
    }

    /// The collectives of these ranks on their devices' memory, if they have any.
    fn on_devices(&self) -> Option<&dyn DeviceCommunicator> {
        None
    }
}
