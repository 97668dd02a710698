//! As many values from each rank of a group to each other: straight, or machine by machine.
//!
//! Owns which way they take; knows of experts only that each rank has as many.

use std::ops::Range;
use std::sync::Arc;

use switchyard_comm::{
    Buffer, BufferMut, CommError, Communicator, DeviceCommunicator, DeviceSlice, DeviceStream, Element, Piece,
};
use switchyard_config::{HierarchicalAllToAll, ranks_of_each_machine};
use switchyard_kernels::SlotChunk;

#[cfg(test)]
mod tests;

/// Where slots go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    ToExperts,
    ToTokens,
}

impl Direction {
    pub(crate) fn reverse(self) -> Self {
        match self {
            Self::ToExperts => Self::ToTokens,
            Self::ToTokens => Self::ToExperts,
        }
    }
}

/// The all-to-all of a group. Which way it takes changes no bit of what arrives.
#[derive(Debug)]
pub(crate) struct AllToAll {
    group: Arc<dyn Communicator>,
    by_machine: Option<ByMachine>,
}

impl AllToAll {
    /// Over `group`, machine by machine if `choice` allows it and the ranks stand so.
    ///
    /// # Collective
    /// Over `group`.
    pub(crate) fn new(group: Arc<dyn Communicator>, choice: HierarchicalAllToAll) -> Result<Self, CommError> {
        let ranks = match choice {
            HierarchicalAllToAll::Auto | HierarchicalAllToAll::Always => {
                ranks_of_each_machine(group.machines())
            }
            HierarchicalAllToAll::Never => None,
        };
        let by_machine = ranks.map(|ranks| ByMachine::split(&*group, ranks)).transpose()?;
        Ok(Self { group, by_machine })
    }

    /// The group.
    pub(crate) fn group(&self) -> &dyn Communicator {
        &*self.group
    }

    /// Whether it goes machine by machine.
    pub(crate) fn is_hierarchical(&self) -> bool {
        self.by_machine.is_some()
    }

    /// Sends the `i`-th of equal parts to rank `i`; parts arrive in rank order.
    pub(crate) fn exchange<T: Element>(&self, sent: &[T]) -> Result<Vec<T>, CommError>
    where
        for<'a> &'a [T]: Into<Buffer<'a>>,
        for<'a> &'a mut [T]: Into<BufferMut<'a>>,
    {
        match &self.by_machine {
            Some(by_machine) => by_machine.exchange(sent),
            None => exchange(&*self.group, sent),
        }
    }

    /// Values that [`exchange_on_devices`](Self::exchange_on_devices) wants room for on the way of `len` values.
    pub(crate) fn staged(&self, len: usize) -> usize {
        self.by_machine.as_ref().map_or(0, |by_machine| by_machine.staged(len))
    }

    /// Brings as many values for every rank and each of its experts from device to device, from the grid of one
    /// side to that of the other. `staging` has room for the values on the way.
    ///
    /// # Panics
    /// When the group has no devices, or the grids have not as much room for every rank and expert.
    pub(crate) fn exchange_on_devices(
        &self,
        direction: Direction,
        at_tokens: Grid,
        staging: DeviceSlice,
        at_experts: Grid,
        stream: DeviceStream,
    ) -> Result<(), CommError> {
        let (ranks, experts) = (self.group.size(), at_tokens.experts);
        assert_eq!(at_tokens.room(), [ranks, experts, at_tokens.len], "a place for every rank");
        assert_eq!(at_tokens.room(), at_experts.room(), "as many come as go");
        if let Some(by_machine) = &self.by_machine {
            return by_machine.exchange_on_devices(direction, at_tokens, staging, at_experts, stream);
        }
        let pieces = |grid: Grid| -> Vec<Piece> {
            let of_rank =
                |peer| (0..experts).map(move |expert| Piece { peer, values: grid.of(peer, expert) });
            (0..ranks).flat_map(of_rank).collect()
        };
        let (at_tokens, at_experts) = (pieces(at_tokens), pieces(at_experts));
        let device = on_devices(&*self.group);
        match direction {
            Direction::ToExperts => device.exchange(&at_tokens, &at_experts, stream),
            Direction::ToTokens => device.exchange(&at_experts, &at_tokens, stream),
        }
    }
}

/// A group whose ranks stand machine after machine, as many on each.
///
/// Only ranks of one place in their machines exchange across. A message crosses together with others: those of
/// one sender for all ranks of a machine, or those of all ranks of a machine for one receiver. With `m` machines of
/// `n` ranks a rank sends `m - 1` messages of `n` parts over the network, where straight it would send `(m - 1) * n`
/// of one.
///
/// # Source
/// Hwang et al. 2022, "Tutel" (arXiv:2206.03382), section 3.4: two-dimensional hierarchical all-to-all;
/// Rajbhandari et al. 2022, "DeepSpeed-MoE" (arXiv:2201.05596), section 5.
#[derive(Debug)]
struct ByMachine {
    /// The ranks of this machine.
    inside: Arc<dyn Communicator>,
    /// The ranks of all machines that have this one's place inside.
    across: Arc<dyn Communicator>,
}

impl ByMachine {
    fn split(group: &dyn Communicator, ranks: usize) -> Result<Self, CommError> {
        let part = |color, name| group.split(color, &format!("{}-{name}", group.label()));
        let (machine, place) = (group.rank() / ranks, group.rank() % ranks);
        Ok(Self { inside: part(machine, "inside")?, across: part(place, "across")? })
    }

    /// First inside each machine, to the rank that has the receiver's place there, then across.
    fn exchange<T: Element>(&self, sent: &[T]) -> Result<Vec<T>, CommError>
    where
        for<'a> &'a [T]: Into<Buffer<'a>>,
        for<'a> &'a mut [T]: Into<BufferMut<'a>>,
    {
        let (machines, ranks) = (self.across.size(), self.inside.size());
        let collected = exchange(&*self.inside, &swapped(sent, [machines, ranks]));
        // Those across wait for this rank, whatever became of it inside.
        let handed_on = match &collected {
            Ok(values) => swapped(values, [ranks, machines]),
            Err(_) => vec![T::default(); sent.len()],
        };
        let received = exchange(&*self.across, &handed_on);
        collected.and(received)
    }

    fn staged(&self, len: usize) -> usize {
        len - len / self.across.size()
    }

    /// Nothing is copied, and what goes to or comes from another machine is one piece, unless it is a chunk, whose
    /// values lie apart. That takes the order that suits the side of the tokens, where all values of a machine's ranks
    /// lie together: from there first across, as DeepSeek-V3 does it (arXiv:2412.19437, section 3.2.2), and to there
    /// last.
    fn exchange_on_devices(
        &self,
        direction: Direction,
        at_tokens: Grid,
        staging: DeviceSlice,
        at_experts: Grid,
        stream: DeviceStream,
    ) -> Result<(), CommError> {
        let (machines, ranks, here) = (self.across.size(), self.inside.size(), self.across.rank());
        let others = || (0..machines).filter(move |&machine| machine != here);
        let sizes = [at_tokens.ranks - ranks, at_tokens.experts];
        let staged = Grid::by_rank(staging.part(0..sizes[0] * sizes[1] * at_tokens.len), sizes);
        // Ranks of a machine whose values lie apart at the tokens have a piece each.
        let together = if at_tokens.is_dense() { ranks } else { 1 };
        let of_machine = |grid: Grid, peer: usize, number: usize| {
            let starts = (number * ranks..(number + 1) * ranks).step_by(together);
            starts.map(move |rank| Piece { peer, values: grid.of_ranks(rank..rank + together) })
        };
        let of_machines: Vec<Piece> = others().flat_map(|peer| of_machine(at_tokens, peer, peer)).collect();
        let of_staging: Vec<Piece> =
            others().enumerate().flat_map(|(number, peer)| of_machine(staged, peer, number)).collect();
        let handed = |place: usize, machine: usize, expert: usize| {
            if machine == here {
                return at_tokens.of(here * ranks + place, expert);
            }
            staged.of((machine - usize::from(machine > here)) * ranks + place, expert)
        };
        let at_expert =
            |place: usize, machine: usize, expert: usize| at_experts.of(machine * ranks + place, expert);
        let of_handed = self.pieces_inside(at_experts.experts, handed);
        let of_experts = self.pieces_inside(at_experts.experts, at_expert);
        let (inside, across) = (on_devices(&*self.inside), on_devices(&*self.across));
        match direction {
            Direction::ToExperts => {
                across.exchange(&of_machines, &of_staging, stream)?;
                inside.exchange(&of_handed, &of_experts, stream)
            }
            Direction::ToTokens => {
                inside.exchange(&of_experts, &of_handed, stream)?;
                across.exchange(&of_staging, &of_machines, stream)
            }
        }
    }

    /// What ranks of a machine have for each other: by place, machine and expert, in this order at both ends.
    fn pieces_inside(
        &self,
        experts: usize,
        values: impl Fn(usize, usize, usize) -> DeviceSlice,
    ) -> Vec<Piece> {
        let mut pieces = Vec::with_capacity(self.inside.size() * self.across.size() * experts);
        for peer in 0..self.inside.size() {
            for machine in 0..self.across.size() {
                pieces
                    .extend((0..experts).map(|expert| Piece { peer, values: values(peer, machine, expert) }));
            }
        }
        pieces
    }
}

/// As many values for every rank and each of some experts, at equal distances.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    values: DeviceSlice,
    ranks: usize,
    /// Experts of a rank.
    experts: usize,
    /// Values for one expert of one rank.
    len: usize,
    /// Where the first are.
    first: usize,
    /// From a rank to the next.
    of_rank: usize,
    /// From an expert to the next.
    of_expert: usize,
}

impl Grid {
    /// `[ranks, experts, len]`
    pub(crate) fn by_rank(values: DeviceSlice, [ranks, experts]: [usize; 2]) -> Self {
        let len = values.len() / (ranks * experts);
        Self { values, ranks, experts, len, first: 0, of_rank: experts * len, of_expert: len }
    }

    /// `[experts, ranks, len]`
    pub(crate) fn by_expert(values: DeviceSlice, [ranks, experts]: [usize; 2]) -> Self {
        let len = values.len() / (ranks * experts);
        Self { values, ranks, experts, len, first: 0, of_rank: len, of_expert: ranks * len }
    }

    /// Those of a chunk in `[ranks, experts, slots, width]`.
    pub(crate) fn chunk_by_rank(
        values: DeviceSlice,
        [ranks, experts, slots]: [usize; 3],
        chunk: &SlotChunk,
    ) -> Self {
        let of_slot = values.len() / (ranks * experts * slots).max(1);
        Self {
            values,
            ranks,
            experts: chunk.experts.len(),
            len: chunk.slots.len() * of_slot,
            first: (chunk.experts.start * slots + chunk.slots.start) * of_slot,
            of_rank: experts * slots * of_slot,
            of_expert: slots * of_slot,
        }
    }

    /// The experts of a rank, whose values lie together, as one.
    pub(crate) fn as_one_expert(self) -> Self {
        assert_eq!(self.of_expert, self.len, "the values of a rank lie together");
        let len = self.experts * self.len;
        Self { experts: 1, len, of_expert: len, ..self }
    }

    fn room(&self) -> [usize; 3] {
        [self.ranks, self.experts, self.len]
    }

    fn of(&self, rank: usize, expert: usize) -> DeviceSlice {
        let start = self.first + rank * self.of_rank + expert * self.of_expert;
        self.values.part(start..start + self.len)
    }

    /// Whether the values of a rank follow those of the one before.
    fn is_dense(&self) -> bool {
        self.of_expert == self.len && self.of_rank == self.experts * self.len
    }

    /// Those of some ranks, one behind the other.
    fn of_ranks(&self, ranks: Range<usize>) -> DeviceSlice {
        assert!(self.of_expert == self.len || self.experts == 1, "the values of a rank lie together");
        let start = self.first + ranks.start * self.of_rank;
        self.values.part(start..start + ranks.len() * self.experts * self.len)
    }
}

fn on_devices(group: &dyn Communicator) -> &dyn DeviceCommunicator {
    group.on_devices().expect("groups split from one with devices have some too, but for those of one rank")
}

fn exchange<T: Element>(group: &dyn Communicator, sent: &[T]) -> Result<Vec<T>, CommError>
where
    for<'a> &'a [T]: Into<Buffer<'a>>,
    for<'a> &'a mut [T]: Into<BufferMut<'a>>,
{
    let mut received = vec![T::default(); sent.len()];
    group.all_to_all(sent.into(), received.as_mut_slice().into())?;
    Ok(received)
}

/// Blocks of equally many values, `[a, b]`, as `[b, a]`.
fn swapped<T: Element>(blocks: &[T], [a, b]: [usize; 2]) -> Vec<T> {
    let length = blocks.len() / (a * b);
    assert_eq!(length * a * b, blocks.len(), "parts of one size");
    let mut swapped = Vec::with_capacity(blocks.len());
    for column in 0..b {
        for row in 0..a {
            swapped.extend_from_slice(&blocks[(row * b + column) * length..][..length]);
        }
    }
    swapped
}
