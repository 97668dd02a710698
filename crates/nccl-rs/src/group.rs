//! Operations that start together.

use std::cell::{Cell, RefCell};
use std::ffi::c_int;
use std::ops::Range;
use std::ptr;

use crate::communicator::Communicator;
use crate::deadline::Deadline;
use crate::error::{Error, Mismatch};
use crate::ffi::{Fault, Handle, Progress};
use crate::library::Library;
use crate::memory::{DeviceSlice, DeviceSliceMut, Stream};
use crate::types::ReduceOp;
use crate::version::Feature;

thread_local! {
    /// Whether the thread has a group open: the library counts by thread, too.
    static OPEN: Cell<bool> = const { Cell::new(false) };
}

/// Refuses what cannot be done while the thread has a group open.
pub(crate) fn refuse_inside(operation: &'static str) -> Result<(), Error> {
    if OPEN.get() { Err(Error::InsideGroup { operation }) } else { Ok(()) }
}

/// A group that is open: see [`Library::group`].
///
/// Its operations are those of [`Communicator`]. They are on their streams when the group has ended, not
/// before, so what they use stays lent for `'env`, until after the group:
///
/// ```compile_fail
/// # use nccl_rs::{Communicator, DataType, DeviceSlice, Error, Stream};
/// # struct Tensor;
/// # impl Tensor {
/// #     fn lend(&self) -> DeviceSlice<'_> {
/// #         unsafe { DeviceSlice::from_raw_parts(0, 0, DataType::U8, 0) }
/// #     }
/// # }
/// fn too_short(communicator: &Communicator) -> Result<(), Error> {
///     communicator.library().group(|group| {
///         let tensor = Tensor;
///         group.send(communicator, tensor.lend(), 0, Stream::DEFAULT)
///     })
/// }
/// ```
#[derive(Debug)]
pub struct Group<'env> {
    library: Library,
    /// Communicators that were used, each with its last operation.
    used: RefCell<Vec<Use<'env>>>,
}

#[derive(Debug)]
struct Use<'env> {
    communicator: &'env Communicator,
    operation: &'static str,
    /// Whether there were others.
    many: bool,
    /// Whether the library said that it goes on with one in the background.
    running: bool,
}

impl Library {
    /// Calls `body` with an open group, and ends the group whatever becomes of it: when it returns, when it
    /// fails and when it panics. All operations of the group then start as one.
    ///
    /// The communicators are those of this library. This is how several ranks of one thread act together, how
    /// sends and receives to each other do not wait for each other in turn, and how many small operations
    /// cost one launch.
    ///
    /// ```no_run
    /// # use nccl_rs::{Communicator, DeviceSlice, DeviceSliceMut, Error, Library, Stream};
    /// /// Hands values on to the next rank.
    /// fn rotate(
    ///     library: &Library,
    ///     ring: &Communicator,
    ///     from: DeviceSlice<'_>,
    ///     to: DeviceSliceMut<'_>,
    ///     stream: Stream,
    /// ) -> Result<(), Error> {
    ///     let (rank, count) = (ring.rank(), ring.count());
    ///     library.group(|group| {
    ///         group.send(ring, from, (rank + 1) % count, stream)?;
    ///         group.recv(ring, to, (rank + count - 1) % count, stream)
    ///     })
    /// }
    /// ```
    ///
    /// # Errors
    /// What `body` returns; else that a non-blocking communicator's patience ended, see
    /// [`Config::non_blocking`](crate::Config::non_blocking), or that it met a fault; else what the library
    /// says at the end, where most of its errors come up, in the name of the first communicator that was
    /// used. After any error some of the operations may have started: the communicators are out of step with
    /// the other ranks', and aborting them is all that is left. [`Error::InsideGroup`] in a group: there are
    /// no groups in groups.
    pub fn group<'env, T>(&self, body: impl FnOnce(&Group<'env>) -> Result<T, Error>) -> Result<T, Error> {
        refuse_inside("group")?;
        self.api().group_start().map_err(Error::Library)?;
        OPEN.set(true);
        let end = End(Group { library: self.clone(), used: RefCell::default() });
        let value = body(&end.0);
        let ended = end.finish();
        let value = value?;
        ended.map(|()| value)
    }
}

/// Ends its group when it goes.
struct End<'env>(Group<'env>);

impl End<'_> {
    fn finish(self) -> Result<(), Error> {
        let ended = self.0.end();
        std::mem::forget(self);
        ended
    }
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        // The panic that brought us here says more.
        let _ = self.0.end();
    }
}

impl<'env> Group<'env> {
    fn end(&self) -> Result<(), Error> {
        OPEN.set(false);
        let ended = self.library.api().group_end();
        // What was lent may go when this returns: no communicator may still be about to use it.
        let used = self.used.take();
        let all_done = matches!(ended, Ok(Progress::Done));
        let deadlines: Vec<_> = used.iter().map(|used| used.deadline(all_done)).collect();
        let settled = used.iter().zip(deadlines);
        let settled = settled.filter_map(|(used, deadline)| deadline.map(|deadline| used.settle(deadline)));
        let settled = settled.fold(Ok(()), Result::and);
        let ended = ended.map(|_| ()).map_err(|failure| match used.first() {
            // Operations are only queued before, so this is where they fail.
            Some(first) => Error::Communicator { who: first.communicator.who(), failure },
            None => Error::Library(failure),
        });
        settled.and(ended)
    }

    /// [`Communicator::all_reduce`].
    ///
    /// # Errors
    /// As there.
    pub fn all_reduce(
        &self,
        communicator: &'env Communicator,
        from: DeviceSlice<'env>,
        to: DeviceSliceMut<'env>,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        let call = self.call(communicator, "all_reduce", &[from, to.as_slice()])?;
        call.same_type(from, &to)?;
        call.length("output", to.len(), from.len())?;
        call.run(|handle| handle.all_reduce(from, &to, op, stream))
    }

    /// [`Communicator::all_reduce_in_place`].
    ///
    /// # Errors
    /// As there.
    pub fn all_reduce_in_place(
        &self,
        communicator: &'env Communicator,
        buffer: DeviceSliceMut<'env>,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        let call = self.call(communicator, "all_reduce", &[buffer.as_slice()])?;
        call.run(|handle| handle.all_reduce(buffer.as_slice(), &buffer, op, stream))
    }

    /// [`Communicator::reduce_scatter`].
    ///
    /// # Errors
    /// As there.
    pub fn reduce_scatter(
        &self,
        communicator: &'env Communicator,
        from: DeviceSlice<'env>,
        to: DeviceSliceMut<'env>,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        let call = self.call(communicator, "reduce_scatter", &[from, to.as_slice()])?;
        call.same_type(from, &to)?;
        call.length("output", to.len(), call.part_of(from.len())?)?;
        call.run(|handle| handle.reduce_scatter(from, &to, op, stream))
    }

    /// [`Communicator::reduce_scatter_in_place`].
    ///
    /// # Errors
    /// As there.
    pub fn reduce_scatter_in_place(
        &self,
        communicator: &'env Communicator,
        buffer: DeviceSliceMut<'env>,
        op: ReduceOp,
        stream: Stream,
    ) -> Result<(), Error> {
        let call = self.call(communicator, "reduce_scatter", &[buffer.as_slice()])?;
        let own = buffer.alias(call.own_part(buffer.len())?);
        call.run(|handle| handle.reduce_scatter(buffer.as_slice(), &own, op, stream))
    }

    /// [`Communicator::all_gather`].
    ///
    /// # Errors
    /// As there.
    pub fn all_gather(
        &self,
        communicator: &'env Communicator,
        from: DeviceSlice<'env>,
        to: DeviceSliceMut<'env>,
        stream: Stream,
    ) -> Result<(), Error> {
        let call = self.call(communicator, "all_gather", &[from, to.as_slice()])?;
        call.same_type(from, &to)?;
        call.length("input", from.len(), call.part_of(to.len())?)?;
        call.run(|handle| handle.all_gather(from, &to, stream))
    }

    /// [`Communicator::all_gather_in_place`].
    ///
    /// # Errors
    /// As there.
    pub fn all_gather_in_place(
        &self,
        communicator: &'env Communicator,
        buffer: DeviceSliceMut<'env>,
        stream: Stream,
    ) -> Result<(), Error> {
        let call = self.call(communicator, "all_gather", &[buffer.as_slice()])?;
        let own = buffer.alias(call.own_part(buffer.len())?);
        call.run(|handle| handle.all_gather(own.as_slice(), &buffer, stream))
    }

    /// [`Communicator::broadcast`].
    ///
    /// # Errors
    /// As there.
    pub fn broadcast(
        &self,
        communicator: &'env Communicator,
        buffer: DeviceSliceMut<'env>,
        root: usize,
        stream: Stream,
    ) -> Result<(), Error> {
        let call = self.call(communicator, "broadcast", &[buffer.as_slice()])?;
        let root = call.rank(root)?;
        call.run(|handle| handle.broadcast(&buffer, root, stream))
    }

    /// [`Communicator::reduce`].
    ///
    /// # Errors
    /// As there.
    pub fn reduce(
        &self,
        communicator: &'env Communicator,
        from: DeviceSlice<'env>,
        to: Option<DeviceSliceMut<'env>>,
        (op, root): (ReduceOp, usize),
        stream: Stream,
    ) -> Result<(), Error> {
        let call = self.call(communicator, "reduce", &[from])?;
        let to = to.filter(|_| root == communicator.rank());
        match &to {
            Some(to) => {
                call.buffer(to.as_slice())?;
                call.same_type(from, to)?;
                call.length("output", to.len(), from.len())?;
            }
            None if root == communicator.rank() => return Err(call.mismatch(Mismatch::NoOutput)),
            None => {}
        }
        let root = call.rank(root)?;
        call.run(|handle| handle.reduce(from, to.as_ref(), op, root, stream))
    }

    /// [`Communicator::reduce_in_place`].
    ///
    /// # Errors
    /// As there.
    pub fn reduce_in_place(
        &self,
        communicator: &'env Communicator,
        buffer: DeviceSliceMut<'env>,
        (op, root): (ReduceOp, usize),
        stream: Stream,
    ) -> Result<(), Error> {
        let call = self.call(communicator, "reduce", &[buffer.as_slice()])?;
        let to = (root == communicator.rank()).then_some(&buffer);
        let root = call.rank(root)?;
        call.run(|handle| handle.reduce(buffer.as_slice(), to, op, root, stream))
    }

    /// [`Communicator::send`].
    ///
    /// # Errors
    /// As there.
    pub fn send(
        &self,
        communicator: &'env Communicator,
        from: DeviceSlice<'env>,
        peer: usize,
        stream: Stream,
    ) -> Result<(), Error> {
        let call = self.call(communicator, "send", &[from])?;
        let peer = call.rank(peer)?;
        call.run(|handle| handle.send(from, peer, stream))
    }

    /// [`Communicator::recv`].
    ///
    /// # Errors
    /// As there.
    pub fn recv(
        &self,
        communicator: &'env Communicator,
        to: DeviceSliceMut<'env>,
        peer: usize,
        stream: Stream,
    ) -> Result<(), Error> {
        let call = self.call(communicator, "recv", &[to.as_slice()])?;
        let peer = call.rank(peer)?;
        call.run(|handle| handle.recv(&to, peer, stream))
    }

    /// [`Communicator::all_to_all`].
    ///
    /// # Errors
    /// As there.
    pub fn all_to_all(
        &self,
        communicator: &'env Communicator,
        from: DeviceSlice<'env>,
        to: DeviceSliceMut<'env>,
        stream: Stream,
    ) -> Result<(), Error> {
        let call = self.call(communicator, "all_to_all", &[from, to.as_slice()])?;
        call.length("output", to.len(), from.len())?;
        let counts = vec![call.part_of(from.len())?; communicator.count()];
        call.exchange((from, &counts), (to, &counts), stream)
    }

    /// [`Communicator::all_to_all_v`].
    ///
    /// # Errors
    /// As there.
    pub fn all_to_all_v(
        &self,
        communicator: &'env Communicator,
        (from, sends): (DeviceSlice<'env>, &[usize]),
        (to, receives): (DeviceSliceMut<'env>, &[usize]),
        stream: Stream,
    ) -> Result<(), Error> {
        let call = self.call(communicator, "all_to_all_v", &[from, to.as_slice()])?;
        call.parts("input", sends, from.len())?;
        call.parts("output", receives, to.len())?;
        call.exchange((from, sends), (to, receives), stream)
    }

    /// Begins a call: looks whether communicator and buffers can take part in it.
    fn call(
        &self,
        communicator: &'env Communicator,
        operation: &'static str,
        buffers: &[DeviceSlice<'_>],
    ) -> Result<Call<'_, 'env>, Error> {
        communicator.require_ready(operation)?;
        let call = Call { group: self, communicator, operation };
        buffers.iter().try_for_each(|buffer| call.buffer(*buffer))?;
        Ok(call)
    }

    fn note(&self, communicator: &'env Communicator, operation: &'static str, running: bool) {
        let mut used = self.used.borrow_mut();
        match used.iter_mut().find(|used| ptr::eq(used.communicator, communicator)) {
            Some(used) => {
                used.many |= used.operation != operation;
                used.running |= running;
            }
            None => used.push(Use { communicator, operation, many: false, running }),
        }
    }
}

impl Use<'_> {
    /// Until when to wait; `None` where the library has done so: it was asked to block, and its answers say
    /// that it did. In a group that failed, nobody knows.
    fn deadline(&self, all_done: bool) -> Option<Deadline> {
        let deadline = self.communicator.deadline();
        if all_done && !self.running { deadline } else { deadline.or_else(|| Some(Deadline::never())) }
    }

    fn settle(&self, deadline: Deadline) -> Result<(), Error> {
        let operation = if self.many { "a group of operations" } else { self.operation };
        self.communicator.settle(operation, deadline)
    }
}

/// One operation of a group, before the library knows of it.
struct Call<'group, 'env> {
    group: &'group Group<'env>,
    communicator: &'env Communicator,
    operation: &'static str,
}

impl Call<'_, '_> {
    /// Hands the operation to the library.
    fn run(&self, queue: impl FnOnce(&Handle) -> Result<Progress, Fault>) -> Result<(), Error> {
        let answer = queue(self.communicator.handle());
        self.group.note(self.communicator, self.operation, matches!(answer, Ok(Progress::Running)));
        self.communicator.explain(self.operation, answer).map(|_| ())
    }

    /// Sends every rank its part and receives one of each. All is checked before the first is queued: half an
    /// exchange would leave the other ranks waiting.
    fn exchange(
        &self,
        (from, sends): (DeviceSlice<'_>, &[usize]),
        (to, receives): (DeviceSliceMut<'_>, &[usize]),
        stream: Stream,
    ) -> Result<(), Error> {
        self.same_type(from, &to)?;
        for ((peer, sent), received) in (0..).zip(places(sends)).zip(places(receives)) {
            // Both sides know the number, so both leave out what is empty.
            if let Some(part) = from.get(sent).filter(|part| !part.is_empty()) {
                self.run(|handle| handle.send(part, peer, stream))?;
            }
            if !received.is_empty() {
                let part = to.alias(received);
                self.run(|handle| handle.recv(&part, peer, stream))?;
            }
        }
        Ok(())
    }

    fn mismatch(&self, mismatch: Mismatch) -> Error {
        Error::Buffer { who: self.communicator.who(), operation: self.operation, mismatch }
    }

    fn buffer(&self, buffer: DeviceSlice<'_>) -> Result<(), Error> {
        if buffer.data_type().is_float8() {
            self.communicator.library().require(Feature::Float8)?;
        }
        self.communicator.require_device(self.operation, buffer)
    }

    fn same_type(&self, from: DeviceSlice<'_>, to: &DeviceSliceMut<'_>) -> Result<(), Error> {
        let (sent, received) = (from.data_type(), to.data_type());
        if sent == received { Ok(()) } else { Err(self.mismatch(Mismatch::Types { sent, received })) }
    }

    fn length(&self, buffer: &'static str, found: usize, expected: usize) -> Result<(), Error> {
        let mismatch = Mismatch::Length { buffer, found, expected };
        if found == expected { Ok(()) } else { Err(self.mismatch(mismatch)) }
    }

    /// Values of one rank in a buffer of `len`.
    fn part_of(&self, len: usize) -> Result<usize, Error> {
        let count = self.communicator.count();
        // A count of zero, which no library should tell, makes no parts.
        let part = len.checked_div(count).filter(|part| part * count == len);
        part.ok_or_else(|| self.mismatch(Mismatch::Uneven { found: len, count }))
    }

    /// This rank's values in a buffer of `len`.
    fn own_part(&self, len: usize) -> Result<Range<usize>, Error> {
        let (part, rank) = (self.part_of(len)?, self.communicator.rank());
        Ok(rank * part..(rank + 1) * part)
    }

    fn parts(&self, buffer: &'static str, counts: &[usize], len: usize) -> Result<(), Error> {
        let (found, count) = (counts.len(), self.communicator.count());
        if found != count {
            return Err(self.mismatch(Mismatch::Parts { buffer, found, count }));
        }
        let expected = counts.iter().fold(0, |sum: usize, count| sum.saturating_add(*count));
        self.length(buffer, len, expected)
    }

    /// The library's number of a rank.
    fn rank(&self, rank: usize) -> Result<c_int, Error> {
        let (operation, count) = (self.operation, self.communicator.count());
        let number = c_int::try_from(rank).ok().filter(|_| rank < count);
        number.ok_or(Error::NoSuchRank { operation, rank, count })
    }
}

/// Where parts lie that follow each other.
fn places(counts: &[usize]) -> impl Iterator<Item = Range<usize>> {
    counts.iter().scan(0, |start, count| {
        let place = *start..*start + count;
        *start = place.end;
        Some(place)
    })
}
