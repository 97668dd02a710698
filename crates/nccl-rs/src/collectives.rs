//! The operations of a communicator, each a group of its own.
//!
//! All put work on a stream and return: the result is there when the stream is through. Types, lengths, ranks
//! and devices are checked first, on this rank alone.

use crate::communicator::Communicator;
use crate::error::Error;
use crate::memory::{DeviceSlice, DeviceSliceMut, Stream};
use crate::types::ReduceOp;

/// # Errors of operations
/// - [`Error::Buffer`] when buffers do not fit and [`Error::NoSuchRank`] when a rank does not exist: nothing
///   was started;
/// - [`Error::InsideGroup`] in a group, which has these operations itself: [`Group`](crate::Group);
/// - [`Error::Busy`] and [`Error::Ended`] when the communicator is not ready;
/// - [`Error::Communicator`] when the library fails, and [`Error::Library`] when it does so before the
///   operation;
/// - [`Error::Asynchronous`] when it fails in the background, and [`Error::Timeout`] when a non-blocking
///   communicator's patience ends, before the operation is on its stream; the communicator is then aborted.
impl Communicator {
    /// Combines the inputs of all ranks value by value; every rank gets the result.
    ///
    /// # Errors
    /// See "Errors of operations".
    pub fn all_reduce(
        &self,
        from: DeviceSlice<'_>,
        to: DeviceSliceMut<'_>,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        self.library().group(|group| group.all_reduce(self, from, to, op, stream))
    }

    /// [`Communicator::all_reduce`] that replaces the values.
    ///
    /// # Errors
    /// See "Errors of operations".
    pub fn all_reduce_in_place(
        &self,
        buffer: DeviceSliceMut<'_>,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        self.library().group(|group| group.all_reduce_in_place(self, buffer, op, stream))
    }

    /// Combines the inputs of all ranks value by value; rank `r` gets the `r`-th of as many equal parts.
    ///
    /// # Errors
    /// See "Errors of operations".
    pub fn reduce_scatter(
        &self,
        from: DeviceSlice<'_>,
        to: DeviceSliceMut<'_>,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        self.library().group(|group| group.reduce_scatter(self, from, to, op, stream))
    }

    /// [`Communicator::reduce_scatter`] with the result in this rank's part of the input.
    ///
    /// # Errors
    /// See "Errors of operations".
    pub fn reduce_scatter_in_place(
        &self,
        buffer: DeviceSliceMut<'_>,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        self.library().group(|group| group.reduce_scatter_in_place(self, buffer, op, stream))
    }

    /// Gives every rank the inputs of all, in the order of ranks.
    ///
    /// # Errors
    /// See "Errors of operations".
    pub fn all_gather(
        &self,
        from: DeviceSlice<'_>,
        to: DeviceSliceMut<'_>,
        stream: Stream,
    ) -> Result<(), Error> {
        self.library().group(|group| group.all_gather(self, from, to, stream))
    }

    /// [`Communicator::all_gather`] with the input in this rank's part of the output.
    ///
    /// # Errors
    /// See "Errors of operations".
    pub fn all_gather_in_place(&self, buffer: DeviceSliceMut<'_>, stream: Stream) -> Result<(), Error> {
        self.library().group(|group| group.all_gather_in_place(self, buffer, stream))
    }

    /// Gives every rank the values of rank `root`.
    ///
    /// # Errors
    /// See "Errors of operations".
    pub fn broadcast(&self, buffer: DeviceSliceMut<'_>, root: usize, stream: Stream) -> Result<(), Error> {
        self.library().group(|group| group.broadcast(self, buffer, root, stream))
    }

    /// Combines the inputs of all ranks value by value; rank `root` gets the result, and only its `to` is
    /// used.
    ///
    /// # Errors
    /// See "Errors of operations".
    pub fn reduce(
        &self,
        from: DeviceSlice<'_>,
        to: Option<DeviceSliceMut<'_>>,
        (op, root): (ReduceOp, usize),
        stream: Stream,
    ) -> Result<(), Error> {
        self.library().group(|group| group.reduce(self, from, to, (op, root), stream))
    }

    /// [`Communicator::reduce`] that replaces the values of the root, and leaves those of other ranks.
    ///
    /// # Errors
    /// See "Errors of operations".
    pub fn reduce_in_place(
        &self,
        buffer: DeviceSliceMut<'_>,
        (op, root): (ReduceOp, usize),
        stream: Stream,
    ) -> Result<(), Error> {
        self.library().group(|group| group.reduce_in_place(self, buffer, (op, root), stream))
    }

    /// Sends values to rank `peer`, which receives as many of the same type. Two ranks that send to each
    /// other do so in [groups](crate::Library::group), or wait for each other.
    ///
    /// # Errors
    /// See "Errors of operations".
    pub fn send(&self, from: DeviceSlice<'_>, peer: usize, stream: Stream) -> Result<(), Error> {
        self.library().group(|group| group.send(self, from, peer, stream))
    }

    /// Receives values of rank `peer`, which sends as many of the same type.
    ///
    /// # Errors
    /// See "Errors of operations".
    pub fn recv(&self, to: DeviceSliceMut<'_>, peer: usize, stream: Stream) -> Result<(), Error> {
        self.library().group(|group| group.recv(self, to, peer, stream))
    }

    /// Sends the `r`-th of equal parts of the input to rank `r`, and receives rank `r`'s into the `r`-th part
    /// of the output.
    ///
    /// # Errors
    /// See "Errors of operations".
    pub fn all_to_all(
        &self,
        from: DeviceSlice<'_>,
        to: DeviceSliceMut<'_>,
        stream: Stream,
    ) -> Result<(), Error> {
        self.library().group(|group| group.all_to_all(self, from, to, stream))
    }

    /// [`Communicator::all_to_all`] with parts of any size: `sends[r]` values for rank `r`, `receives[r]` of
    /// rank `r`, one part after the other. What a rank sends another is what the other receives of it.
    ///
    /// # Errors
    /// See "Errors of operations".
    pub fn all_to_all_v(
        &self,
        (from, sends): (DeviceSlice<'_>, &[usize]),
        (to, receives): (DeviceSliceMut<'_>, &[usize]),
        stream: Stream,
    ) -> Result<(), Error> {
        self.library().group(|group| group.all_to_all_v(self, (from, sends), (to, receives), stream))
    }
}
