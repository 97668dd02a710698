//! A group of ranks that are processes: the trait over what carries values between them.
//!
//! Before each operation the ranks compare what they are about to call, so that a disagreement is
//! an error on all of them instead of a hang or wrong values. A transport has no deadlines: the
//! watchdog ends the job when one passes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use crate::activity::{Activity, GroupName};
use crate::buffer::{Buffer, BufferMut, Element, with_values};
use crate::call::{self, Call, Words};
use crate::communicator::{Communicator, ReduceOp};
use crate::error::CommError;
use crate::poll::poll;
use crate::reduce::Reduce;
use crate::scratch::{Pooled, Scratch};
use crate::transport::{Fault, Parts, Transport};

/// Bytes of a buffer up to which a sum is cheapest as one all-gather and a local sum.
const SMALL: usize = 8 << 10;

/// Bytes that a sum takes at a time: bounds the working memory, and stays in the caches.
const PIECE: usize = 4 << 20;

/// What all groups of the process share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) activity: Arc<Activity>,
    pub(crate) scratch: Scratch,
    /// How long the watchdog lets an operation take.
    pub(crate) timeout: Option<Duration>,
    /// Set before the job is left.
    pub(crate) ended: AtomicBool,
}

/// One rank's place in a group of processes.
#[derive(Debug)]
pub(crate) struct Group<T> {
    shared: Arc<Shared>,
    transport: T,
    name: GroupName,
    machines: Arc<[usize]>,
    /// Calls made so far; held during a call, since a transport wants them one by one.
    calls: Mutex<u64>,
    /// Waits for devices so far.
    waits: AtomicU64,
    broken: Arc<Broken>,
}

/// The error that ended a group, or a group that it was split from.
#[derive(Debug, Default)]
struct Broken {
    error: OnceLock<CommError>,
    parent: Option<Arc<Self>>,
}

impl Broken {
    fn error(&self) -> Option<&CommError> {
        self.error.get().or_else(|| self.parent.as_ref()?.error())
    }
}

/// Why an operation failed, before it is put into words for the caller.
enum Failure {
    Transport(Fault),
    Disagreement(String),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Transport(fault)
    }
}

impl<T: Transport + 'static> Group<T> {
    /// The group of all ranks, which do not know yet on which machines the others are.
    pub(crate) fn world(shared: Arc<Shared>, transport: T) -> Self {
        let members = (0..transport.size()).collect();
        let name = GroupName { label: "world".into(), id: 1, members };
        Self {
            shared,
            transport,
            name,
            machines: Arc::default(),
            calls: Mutex::default(),
            waits: AtomicU64::default(),
            broken: Arc::default(),
        }
    }

    /// The same group, with the machine of every rank.
    pub(crate) fn on_machines(self, machines: Vec<usize>) -> Self {
        Self { machines: machines.into(), ..self }
    }

    #[cfg(feature = "mpi")]
    pub(crate) fn transport(&self) -> &T {
        &self.transport
    }

    /// Whether operations are still possible.
    fn check(&self, operation: &'static str) -> Result<(), CommError> {
        if let Some(error) = self.broken.error() {
            return Err(error.clone());
        }
        if self.shared.ended.load(Ordering::Acquire) {
            let blame = "this rank has left the job".to_owned();
            return Err(CommError::PeerLost { operation, group: self.name.label.to_string(), blame });
        }
        Ok(())
    }

    /// Makes the transport's part of a call, once all ranks are known to call alike.
    fn run<R>(&self, call: &Call, work: impl FnOnce(u64) -> Result<R, Failure>) -> Result<R, CommError> {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        let (operation, group) = (call.operation.name(), self.name.label.to_string());
        self.check(operation)?;
        *calls += 1;
        let _waiting = self.shared.activity.enter(operation, &self.name, *calls);
        let done = self.agree(call).and_then(|()| match call.wrong_buffer(&self.name.label) {
            Some(error) => Ok(Err(error)),
            None => work(*calls).map(Ok),
        });
        let result = done.unwrap_or_else(|failure| {
            Err(match failure {
                Failure::Transport(message) => CommError::Library { operation, group, message },
                Failure::Disagreement(difference) => CommError::Disagreement { group, difference },
            })
        });
        result.map_err(|error| self.broken.error.get_or_init(|| error).clone())
    }

    /// Compares the calls of all ranks. A rank with a wrong buffer of its own goes on, to say so.
    fn agree(&self, call: &Call) -> Result<(), Failure> {
        let mine = call.to_words();
        self.shared.scratch.lend(mine.len() * self.size(), |all: &mut [u64]| {
            self.transport.all_gather(&mine, all)?;
            let (words, _) = all.as_chunks::<{ size_of::<Words>() / size_of::<u64>() }>();
            if words.iter().all(|words| *words == mine) {
                return Ok(());
            }
            let calls: Option<Vec<Call>> = words.iter().map(|words| Call::from_words(*words)).collect();
            let calls = calls.ok_or_else(|| "a rank runs another version of this program".to_owned())?;
            let own_problem = self.own_problem(&calls);
            match call::difference(&calls, &self.name.members) {
                Some(difference) if !own_problem => Err(Failure::Disagreement(difference)),
                _ => Ok(()),
            }
        })
    }

    fn own_problem(&self, calls: &[Call]) -> bool {
        calls[self.rank()].wrong_buffer("").is_some()
    }

    /// As [`run`](Self::run) for operations whose work is one fallible call of the transport.
    fn simple(&self, call: &Call, work: impl FnOnce() -> Result<(), Fault>) -> Result<(), CommError> {
        self.run(call, |_| work().map_err(Failure::from))
    }

    /// Combines in rank order, which MPI promises for no type; Open MPI 4.1 also lets sums of bytes
    /// saturate where they should wrap around.
    fn all_reduce_values<V: Work>(&self, values: &mut [V], op: ReduceOp) -> Result<(), Fault> {
        if self.size() == 1 {
            return Ok(());
        }
        for piece in values.chunks_mut(PIECE / size_of::<V>()) {
            if size_of_val(piece) <= SMALL {
                self.gather_and_combine(piece, op)?;
            } else {
                let equal = piece.len() - piece.len() % self.size();
                let (shards, rest) = piece.split_at_mut(equal);
                self.combine_shards(shards, op)?;
                if !rest.is_empty() {
                    self.gather_and_combine(rest, op)?;
                }
            }
        }
        Ok(())
    }

    fn gather_and_combine<V: Work>(&self, values: &mut [V], op: ReduceOp) -> Result<(), Fault> {
        self.shared.scratch.lend(values.len() * self.size(), |all: &mut [V]| {
            self.transport.all_gather(values, all)?;
            combine(op, all, values);
            Ok(())
        })
    }

    /// Rank `i` combines the `i`-th shard of all, then all gather the results.
    fn combine_shards<V: Work>(&self, values: &mut [V], op: ReduceOp) -> Result<(), Fault> {
        let shard = values.len() / self.size();
        self.shared.scratch.lend(values.len() + shard, |memory: &mut [V]| {
            let (all, result) = memory.split_at_mut(values.len());
            self.transport.all_to_all(values, all)?;
            combine(op, all, result);
            self.transport.all_gather(result, values)
        })
    }

    fn reduce_scatter_values<V: Work>(&self, input: &[V], to: &mut [V], op: ReduceOp) -> Result<(), Fault> {
        let (size, length) = (self.size(), to.len());
        let step = (PIECE / size_of::<V>() / size).max(1);
        for start in (0..length).step_by(step) {
            let piece = &mut to[start..length.min(start + step)];
            let sends = Parts::new((0..size).map(|rank| (rank * length + start, piece.len())));
            let receives = Parts::new((0..size).map(|rank| (rank * piece.len(), piece.len())));
            self.shared.scratch.lend(piece.len() * size, |all: &mut [V]| {
                self.transport.all_to_all_v((input, &sends), (all, &receives))?;
                combine(op, all, piece);
                Ok::<(), Fault>(())
            })?;
        }
        Ok(())
    }

    /// Compares what ranks send with what their peers expect.
    fn agree_on_counts(&self, sends: &[usize], receives: &[usize]) -> Result<(), Failure> {
        let sends: Vec<u64> = sends.iter().map(|&count| count as u64).collect();
        let mut sent = vec![0; sends.len()];
        self.transport.all_to_all(&sends, &mut sent)?;
        let members = &self.name.members;
        let wrong = sent.iter().zip(receives).position(|(sent, expected)| *sent != *expected as u64);
        // All must know, or those whose counts fit would wait for the others.
        let mut report = [u64::MAX; 3];
        if let Some(from) = wrong {
            report = [from as u64, sent[from], receives[from] as u64];
        }
        self.shared.scratch.lend(report.len() * self.size(), |all: &mut [u64]| {
            self.transport.all_gather(&report, all)?;
            let (reports, _) = all.as_chunks::<3>();
            // The pair that the order of (sender, receiver) names first, as in every backend.
            let first = reports.iter().enumerate().filter(|(_, report)| report[0] != u64::MAX);
            match first.min_by_key(|(to, report)| (report[0], *to)) {
                Some((to, &[from, sent, expected])) => Err(Failure::Disagreement(call::mismatch(
                    members[from as usize],
                    sent as usize,
                    members[to],
                    expected as usize,
                ))),
                None => Ok(()),
            }
        })
    }

    fn split_group(&self, color: usize, label: &str, call: u64) -> Result<Self, Fault> {
        let mut colors = vec![0; self.size()];
        self.transport.all_gather(&[color as u64], &mut colors)?;
        let mut distinct = colors.clone();
        distinct.sort_unstable();
        distinct.dedup();
        // A transport's colors are small; ours may be any number.
        let colors: Vec<usize> =
            colors.iter().map(|&color| distinct.partition_point(|&other| other < color)).collect();
        let own = colors[self.rank()];
        let id = [call, own as u64].iter().fold(self.name.id, |id, &value| mix(id ^ value));
        let of = |all: &[usize]| {
            all.iter().zip(&colors).filter(|&(_, &color)| color == own).map(|(&of_rank, _)| of_rank).collect()
        };
        Ok(Self {
            shared: Arc::clone(&self.shared),
            transport: self.transport.split(&colors, id)?,
            name: GroupName { label: label.into(), id, members: of(&self.name.members) },
            machines: of(&self.machines),
            calls: Mutex::default(),
            waits: AtomicU64::default(),
            broken: Arc::new(Broken { error: OnceLock::new(), parent: Some(Arc::clone(&self.broken)) }),
        })
    }
}

/// Types that a group works on.
trait Work: Pooled + Reduce {}
impl<T: Pooled + Reduce> Work for T {}

/// Combines equally long parts that lie one after the other.
fn combine<T: Reduce>(op: ReduceOp, parts: &[T], output: &mut [T]) {
    if !output.is_empty() {
        let parts: Vec<&[T]> = parts.chunks_exact(output.len()).collect();
        T::combine(op, &parts, output);
    }
}

fn values<T: Element>(input: Buffer<'_>) -> &[T] {
    T::values(input).expect("a checked call has buffers of one type")
}

/// The last step of splitmix64.
fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

impl<T: Transport + 'static> Communicator for Group<T> {
    fn rank(&self) -> usize {
        self.transport.rank()
    }

    fn size(&self) -> usize {
        self.name.members.len()
    }

    fn label(&self) -> &str {
        &self.name.label
    }

    fn machines(&self) -> &[usize] {
        &self.machines
    }

    fn timeout(&self) -> Option<Duration> {
        self.shared.timeout
    }

    fn barrier(&self) -> Result<(), CommError> {
        // Comparing the calls has made every rank wait for all others.
        self.run(&Call::barrier(), |_| Ok(()))
    }

    fn broadcast(&self, buffer: BufferMut<'_>, root: usize) -> Result<(), CommError> {
        let call = Call::broadcast(self.size(), buffer.as_buffer(), root);
        self.simple(&call, || {
            with_values!(buffer, to => to.chunks_mut(T::LIMIT).try_for_each(|piece| self.transport.broadcast(piece, root)))
        })
    }

    fn all_reduce(&self, buffer: BufferMut<'_>, op: ReduceOp) -> Result<(), CommError> {
        let call = Call::all_reduce(buffer.as_buffer(), op);
        self.simple(&call, || with_values!(buffer, to => self.all_reduce_values(to, op)))
    }

    fn reduce_scatter(
        &self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        op: ReduceOp,
    ) -> Result<(), CommError> {
        let call = Call::reduce_scatter(self.size(), input, &output, op).at_most(T::LIMIT, input.len());
        self.simple(&call, || with_values!(output, to => self.reduce_scatter_values(values(input), to, op)))
    }

    fn all_gather(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError> {
        let call = Call::all_gather(self.size(), input, &output).at_most(T::LIMIT, output.len());
        self.simple(&call, || with_values!(output, to => self.transport.all_gather(values(input), to)))
    }

    fn all_gather_v(
        &self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        counts: &[usize],
    ) -> Result<(), CommError> {
        let call = Call::all_gather_v((self.rank(), self.size()), input, &output, counts)
            .at_most(T::LIMIT, output.len());
        self.simple(&call, || {
            let parts = Parts::packed(counts);
            with_values!(output, to => self.transport.all_gather_v(values(input), to, &parts))
        })
    }

    fn all_to_all(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError> {
        let call = Call::all_to_all(self.size(), input, &output).at_most(T::LIMIT, input.len());
        self.simple(&call, || with_values!(output, to => self.transport.all_to_all(values(input), to)))
    }

    fn all_to_all_v(
        &self,
        input: Buffer<'_>,
        sends: &[usize],
        output: BufferMut<'_>,
        receives: &[usize],
    ) -> Result<(), CommError> {
        let call = Call::all_to_all_v(self.size(), input, sends, &output, receives)
            .at_most(T::LIMIT, input.len().max(output.len()));
        self.run(&call, |_| {
            self.agree_on_counts(sends, receives)?;
            let (sends, receives) = (Parts::packed(sends), Parts::packed(receives));
            let sent = with_values!(output, to => {
                self.transport.all_to_all_v((values(input), &sends), (to, &receives))
            });
            sent.map_err(Failure::from)
        })
    }

    fn split(&self, color: usize, label: &str) -> Result<Arc<dyn Communicator>, CommError> {
        let group =
            self.run(&Call::split(), |number| self.split_group(color, label, number).map_err(Failure::from))?;
        Ok(Arc::new(group))
    }

    fn wait_for(&self, what: &'static str, done: &mut dyn FnMut() -> bool) -> Result<(), CommError> {
        let number = self.waits.fetch_add(1, Ordering::Relaxed) + 1;
        let _waiting = self.shared.activity.enter(what, &self.name, number);
        poll(done, || self.check(what))
    }
}
