//! Ranks that are threads of one process, for tests of parallel code.
//!
//! Ranks meet once per call: each leaves a copy of its values, and when all have come each takes
//! what it needs from the copies. Owns no threads.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::buffer::{Buffer, BufferMut, Element, Values, with_values};
use crate::call::{self, Call, Operation, name_ranks};
use crate::communicator::{Communicator, ReduceOp};
use crate::error::CommError;
use crate::poll::poll;
use crate::reduce::Reduce;

/// Makes the ranks of a group called `world`, one for each thread.
///
/// A rank whose communicator is dropped counts as lost. A call ends at the latest `timeout` after
/// it began.
pub fn threads(size: usize, timeout: Duration) -> Vec<Arc<dyn Communicator>> {
    threads_on(&vec![0; size], timeout)
}

/// As [`threads`], with a rank for each of `machines` that takes itself to be on that machine.
pub fn threads_on(machines: &[usize], timeout: Duration) -> Vec<Arc<dyn Communicator>> {
    let group = Arc::new(Group::new((0..machines.len()).collect(), machines.to_vec(), timeout));
    (0..machines.len()).map(|rank| Rank::member(&group, rank, "world")).collect()
}

/// One rank's place in a group.
#[derive(Debug)]
struct Rank {
    group: Arc<Group>,
    rank: usize,
    label: String,
    /// Calls made so far; held during a call, so that calls of several threads come one by one.
    calls: Mutex<u64>,
}

/// What the ranks of a group share.
#[derive(Debug)]
struct Group {
    /// The ranks' numbers in the whole job, for messages.
    members: Vec<usize>,
    /// The ranks' machines.
    machines: Vec<usize>,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// What the ranks that have come to the current call left.
    came: Vec<Option<Deposit>>,
    /// The number and result of the last call to which all came. Nobody can come to the call after
    /// the next before all have seen it.
    met: Option<(u64, Arc<Meeting>)>,
    gone: Vec<bool>,
    broken: Option<CommError>,
    children: Vec<Weak<Group>>,
}

/// What one rank brings to a call.
#[derive(Debug)]
struct Deposit {
    call: Call,
    values: Option<Values>,
    sends: Vec<usize>,
    receives: Vec<usize>,
    color: usize,
}

/// A call to which all came.
#[derive(Debug)]
struct Meeting {
    deposits: Vec<Deposit>,
    /// After a split: the new group of each color.
    groups: BTreeMap<usize, Arc<Group>>,
}

impl Deposit {
    fn new(call: Call) -> Self {
        Self { call, values: None, sends: Vec::new(), receives: Vec::new(), color: 0 }
    }

    fn with(call: Call, values: Buffer<'_>) -> Self {
        Self { values: Some(Values::of(values)), ..Self::new(call) }
    }
}

impl Meeting {
    /// The values of every rank, in rank order.
    fn parts<T: Element>(&self) -> Vec<&[T]> {
        self.deposits.iter().map(|deposit| values(deposit)).collect()
    }
}

fn values<T: Element>(deposit: &Deposit) -> &[T] {
    deposit
        .values
        .as_ref()
        .and_then(|values| T::values(values.buffer()))
        .expect("calls that agree bring values of one type")
}

impl Group {
    fn new(members: Vec<usize>, machines: Vec<usize>, timeout: Duration) -> Self {
        let size = members.len();
        let state = State {
            came: (0..size).map(|_| None).collect(),
            met: None,
            gone: vec![false; size],
            broken: None,
            children: Vec::new(),
        };
        Self { members, machines, timeout, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// The state; if a rank panicked while it held it, the group is broken.
    fn lock(&self, label: &str, operation: &'static str) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| {
            let mut state = poisoned.into_inner();
            state.broken.get_or_insert_with(|| CommError::PeerLost {
                operation,
                group: label.to_owned(),
                blame: "a rank panicked in the midst of a call".to_owned(),
            });
            state
        })
    }

    /// Leaves `deposit` and waits until all ranks have come to call `number`.
    fn meet(
        &self,
        (rank, label): (usize, &str),
        number: u64,
        deposit: Deposit,
    ) -> Result<Arc<Meeting>, CommError> {
        let (began, operation) = (Instant::now(), deposit.call.operation.name());
        let mut state = self.lock(label, operation);
        if let Some(error) = &state.broken {
            return Err(error.clone());
        }
        if let Some(error) = deposit.call.wrong_buffer(label) {
            return Err(self.fail(state, error));
        }
        state.came[rank] = Some(deposit);
        if state.came.iter().all(Option::is_some) {
            match self.conclude(&mut state, label) {
                Ok(meeting) => state.met = Some((number, Arc::new(meeting))),
                Err(error) => return Err(self.fail(state, error)),
            }
            self.changed.notify_all();
        }
        loop {
            if let Some((met, meeting)) = &state.met
                && *met == number
            {
                return Ok(Arc::clone(meeting));
            }
            if let Some(error) = &state.broken {
                return Err(error.clone());
            }
            let group = label.to_owned();
            let gone = self.missing(&state, |rank| state.gone[rank]);
            if !gone.is_empty() {
                let blame = format!("{} ended or gave up", name_ranks(&gone));
                return Err(self.fail(state, CommError::PeerLost { operation, group, blame }));
            }
            let Some(left) = self.timeout.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) else {
                let blame = format!("{} did not come", name_ranks(&self.missing(&state, |_| true)));
                let after = self.timeout;
                return Err(self.fail(state, CommError::Timeout { operation, group, after, blame }));
            };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The ranks that have not come and fulfil `condition`, by their numbers in the job.
    fn missing(&self, state: &State, condition: impl Fn(usize) -> bool) -> Vec<usize> {
        let absent = (0..self.members.len()).filter(|&rank| state.came[rank].is_none() && condition(rank));
        absent.map(|rank| self.members[rank]).collect()
    }

    /// Takes the deposits of all ranks and checks that they fit each other.
    fn conclude(&self, state: &mut State, label: &str) -> Result<Meeting, CommError> {
        let deposits: Vec<Deposit> = state.came.iter_mut().filter_map(Option::take).collect();
        let calls: Vec<Call> = deposits.iter().map(|deposit| deposit.call.clone()).collect();
        let difference = call::difference(&calls, &self.members).or_else(|| {
            (calls[0].operation == Operation::AllToAllV)
                .then(|| call::unexpected(|i| &deposits[i].sends, |i| &deposits[i].receives, &self.members))
                .flatten()
        });
        if let Some(difference) = difference {
            return Err(CommError::Disagreement { group: label.to_owned(), difference });
        }
        let mut groups = BTreeMap::new();
        if calls[0].operation == Operation::Split {
            let mut ranks: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
            for (rank, deposit) in deposits.iter().enumerate() {
                ranks.entry(deposit.color).or_default().push(rank);
            }
            let part = |(color, ranks): (usize, Vec<usize>)| {
                let of = |all: &[usize]| ranks.iter().map(|&rank| all[rank]).collect();
                (color, Arc::new(Self::new(of(&self.members), of(&self.machines), self.timeout)))
            };
            groups = ranks.into_iter().map(part).collect();
            state.children.extend(groups.values().map(Arc::downgrade));
        }
        Ok(Meeting { deposits, groups })
    }

    /// Breaks this group and all that were split from it; returns the error that broke it first.
    fn fail(&self, mut state: MutexGuard<'_, State>, error: CommError) -> CommError {
        let error = state.broken.get_or_insert(error).clone();
        let children = std::mem::take(&mut state.children);
        drop(state);
        self.changed.notify_all();
        for child in children.iter().filter_map(Weak::upgrade) {
            let state = child.state.lock().unwrap_or_else(PoisonError::into_inner);
            child.fail(state, error.clone());
        }
        error
    }
}

impl Rank {
    fn member(group: &Arc<Group>, rank: usize, label: &str) -> Arc<dyn Communicator> {
        Arc::new(Self { group: Arc::clone(group), rank, label: label.to_owned(), calls: Mutex::new(0) })
    }

    fn meet(&self, deposit: Deposit) -> Result<Arc<Meeting>, CommError> {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        *calls += 1;
        self.group.meet((self.rank, &self.label), *calls, deposit)
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        self.group.lock(&self.label, "drop").gone[self.rank] = true;
        self.group.changed.notify_all();
    }
}

impl Communicator for Rank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.members.len()
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn machines(&self) -> &[usize] {
        &self.group.machines
    }

    fn timeout(&self) -> Option<Duration> {
        Some(self.group.timeout)
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.meet(Deposit::new(Call::barrier())).map(drop)
    }

    fn broadcast(&self, buffer: BufferMut<'_>, root: usize) -> Result<(), CommError> {
        let call = Call::broadcast(self.size(), buffer.as_buffer(), root);
        let deposit =
            if self.rank == root { Deposit::with(call, buffer.as_buffer()) } else { Deposit::new(call) };
        let meeting = self.meet(deposit)?;
        if self.rank != root {
            with_values!(buffer, to => to.copy_from_slice(values(&meeting.deposits[root])));
        }
        Ok(())
    }

    fn all_reduce(&self, buffer: BufferMut<'_>, op: ReduceOp) -> Result<(), CommError> {
        let call = Call::all_reduce(buffer.as_buffer(), op);
        let meeting = self.meet(Deposit::with(call, buffer.as_buffer()))?;
        with_values!(buffer, to => Reduce::combine(op, &meeting.parts(), to));
        Ok(())
    }

    fn reduce_scatter(
        &self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        op: ReduceOp,
    ) -> Result<(), CommError> {
        let call = Call::reduce_scatter(self.size(), input, &output, op);
        let meeting = self.meet(Deposit::with(call, input))?;
        with_values!(output, to => {
            let range = self.rank * to.len()..(self.rank + 1) * to.len();
            let parts: Vec<_> = meeting.parts().into_iter().map(|part| &part[range.clone()]).collect();
            Reduce::combine(op, &parts, to);
        });
        Ok(())
    }

    fn all_gather(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError> {
        let call = Call::all_gather(self.size(), input, &output);
        let meeting = self.meet(Deposit::with(call, input))?;
        with_values!(output, to => concatenate(meeting.parts(), to));
        Ok(())
    }

    fn all_gather_v(
        &self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        counts: &[usize],
    ) -> Result<(), CommError> {
        let call = Call::all_gather_v((self.rank, self.size()), input, &output, counts);
        let meeting = self.meet(Deposit::with(call, input))?;
        with_values!(output, to => concatenate(meeting.parts(), to));
        Ok(())
    }

    fn all_to_all(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError> {
        let call = Call::all_to_all(self.size(), input, &output);
        let meeting = self.meet(Deposit::with(call, input))?;
        let part = input.len() / self.size();
        let range = self.rank * part..(self.rank + 1) * part;
        with_values!(output, to => {
            concatenate(meeting.parts().into_iter().map(|part| &part[range.clone()]), to);
        });
        Ok(())
    }

    fn all_to_all_v(
        &self,
        input: Buffer<'_>,
        sends: &[usize],
        output: BufferMut<'_>,
        receives: &[usize],
    ) -> Result<(), CommError> {
        let call = Call::all_to_all_v(self.size(), input, sends, &output, receives);
        let (sends, receives) = (sends.to_vec(), receives.to_vec());
        let meeting = self.meet(Deposit { sends, receives, ..Deposit::with(call, input) })?;
        with_values!(output, to => {
            let parts = meeting.deposits.iter().map(|deposit| {
                let start = deposit.sends[..self.rank].iter().sum::<usize>();
                &values(deposit)[start..start + deposit.sends[self.rank]]
            });
            concatenate(parts, to);
        });
        Ok(())
    }

    fn split(&self, color: usize, label: &str) -> Result<Arc<dyn Communicator>, CommError> {
        let meeting = self.meet(Deposit { color, ..Deposit::new(Call::split()) })?;
        let group = &meeting.groups[&color];
        let job_rank = self.group.members[self.rank];
        let rank = group.members.iter().position(|&member| member == job_rank);
        Ok(Self::member(group, rank.expect("a rank is in the group of its color"), label))
    }

    fn wait_for(&self, what: &'static str, done: &mut dyn FnMut() -> bool) -> Result<(), CommError> {
        let began = Instant::now();
        let after = self.group.timeout;
        poll(done, || {
            let state = self.group.lock(&self.label, what);
            if let Some(error) = &state.broken {
                return Err(error.clone());
            }
            if began.elapsed() < after {
                return Ok(());
            }
            let (group, blame) = (self.label.clone(), "this rank's device is not through".to_owned());
            Err(self.group.fail(state, CommError::Timeout { operation: what, group, after, blame }))
        })
    }
}

/// Fills `output` with `parts`, one after the other.
fn concatenate<'a, T: Element>(parts: impl IntoIterator<Item = &'a [T]>, mut output: &mut [T]) {
    for part in parts {
        let (room, rest) = output.split_at_mut(part.len());
        room.copy_from_slice(part);
        output = rest;
    }
}
