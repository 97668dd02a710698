//! What one rank asks of its group: checked against its own buffers and against the other ranks' calls.

use std::fmt;

use crate::buffer::{Buffer, BufferMut, ElementType};
use crate::communicator::ReduceOp;
use crate::error::CommError;

/// A collective operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Barrier,
    Broadcast,
    AllReduce,
    ReduceScatter,
    AllGather,
    AllGatherV,
    AllToAll,
    AllToAllV,
    Split,
}

impl Operation {
    const ALL: [Self; 9] = [
        Self::Barrier,
        Self::Broadcast,
        Self::AllReduce,
        Self::ReduceScatter,
        Self::AllGather,
        Self::AllGatherV,
        Self::AllToAll,
        Self::AllToAllV,
        Self::Split,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Barrier => "barrier",
            Self::Broadcast => "broadcast",
            Self::AllReduce => "all_reduce",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllGather => "all_gather",
            Self::AllGatherV => "all_gather_v",
            Self::AllToAll => "all_to_all",
            Self::AllToAllV => "all_to_all_v",
            Self::Split => "split",
        }
    }
}

const TYPES: [ElementType; 6] = [
    ElementType::F32,
    ElementType::F64,
    ElementType::Bf16,
    ElementType::I32,
    ElementType::U64,
    ElementType::U8,
];

const REDUCE_OPS: [ReduceOp; 3] = [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min];

/// One rank's call: all that must be the same on every rank, and what is wrong with it already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) operation: Operation,
    element_type: Option<ElementType>,
    reduce: Option<ReduceOp>,
    root: usize,
    /// Values, where every rank must have as many.
    length: usize,
    /// Hash of the counts that every rank must have alike.
    counts: u64,
    /// Why this rank's own buffers do not fit; a peer learns only that they do not.
    problem: Option<String>,
}

impl Call {
    fn new(operation: Operation) -> Self {
        Self { operation, element_type: None, reduce: None, root: 0, length: 0, counts: 0, problem: None }
    }

    fn of(operation: Operation, buffer: Buffer<'_>) -> Self {
        Self { element_type: Some(buffer.element_type()), length: buffer.len(), ..Self::new(operation) }
    }

    pub(crate) fn barrier() -> Self {
        Self::new(Operation::Barrier)
    }

    pub(crate) fn split() -> Self {
        Self::new(Operation::Split)
    }

    pub(crate) fn broadcast(size: usize, buffer: Buffer<'_>, root: usize) -> Self {
        let call = Self { root, ..Self::of(Operation::Broadcast, buffer) };
        call.require(root < size, || format!("rank {root} is not one of {size}"))
    }

    pub(crate) fn all_reduce(buffer: Buffer<'_>, op: ReduceOp) -> Self {
        Self { reduce: Some(op), ..Self::of(Operation::AllReduce, buffer) }
    }

    pub(crate) fn reduce_scatter(
        size: usize,
        input: Buffer<'_>,
        output: &BufferMut<'_>,
        op: ReduceOp,
    ) -> Self {
        let call = Self { reduce: Some(op), ..Self::of(Operation::ReduceScatter, input) };
        let parts = output.len().checked_mul(size);
        call.same_type(output).require(parts == Some(input.len()), || {
            format!("{} values are not {size} parts of {}", input.len(), output.len())
        })
    }

    pub(crate) fn all_gather(size: usize, input: Buffer<'_>, output: &BufferMut<'_>) -> Self {
        let parts = input.len().checked_mul(size);
        Self::of(Operation::AllGather, input).same_type(output).require(parts == Some(output.len()), || {
            format!("{size} times {} values do not fill room for {}", input.len(), output.len())
        })
    }

    pub(crate) fn all_gather_v(
        (rank, size): (usize, usize),
        input: Buffer<'_>,
        output: &BufferMut<'_>,
        counts: &[usize],
    ) -> Self {
        let call =
            Self { length: output.len(), counts: hash(counts), ..Self::of(Operation::AllGatherV, input) };
        call.same_type(output)
            .counts("counts", counts, size, output.len())
            .require(counts.get(rank).is_none_or(|&count| count == input.len()), || {
                format!("{} values to send, {} announced", input.len(), counts[rank])
            })
    }

    pub(crate) fn all_to_all(size: usize, input: Buffer<'_>, output: &BufferMut<'_>) -> Self {
        Self::of(Operation::AllToAll, input)
            .same_type(output)
            .require(input.len().is_multiple_of(size), || {
                format!("{} values cannot be cut into {size} equal parts", input.len())
            })
            .require(input.len() == output.len(), || {
                format!("{} values do not fill room for {}", input.len(), output.len())
            })
    }

    pub(crate) fn all_to_all_v(
        size: usize,
        input: Buffer<'_>,
        sends: &[usize],
        output: &BufferMut<'_>,
        receives: &[usize],
    ) -> Self {
        // Every rank may have another number of values.
        let call = Self { length: 0, ..Self::of(Operation::AllToAllV, input) };
        call.same_type(output).counts("sends", sends, size, input.len()).counts(
            "receives",
            receives,
            size,
            output.len(),
        )
    }

    /// Refuses more values than a library can count.
    pub(crate) fn at_most(self, limit: usize, values: usize) -> Self {
        self.require(values <= limit, || {
            format!("{values} values, but MPI counts to {limit}; split them over several calls")
        })
    }

    fn require(mut self, fits: bool, problem: impl FnOnce() -> String) -> Self {
        if !fits && self.problem.is_none() {
            self.problem = Some(problem());
        }
        self
    }

    fn same_type(self, output: &BufferMut<'_>) -> Self {
        let (from, to) = (self.element_type, output.element_type());
        self.require(from == Some(to), || {
            format!("{:?} cannot be received as {to:?}", from.expect("made of a buffer"))
        })
    }

    fn counts(self, name: &str, counts: &[usize], size: usize, values: usize) -> Self {
        let sum = counts.iter().try_fold(0_usize, |sum, &count| sum.checked_add(count));
        self.require(counts.len() == size, || format!("{} {name} for {size} ranks", counts.len())).require(
            sum == Some(values),
            || match sum {
                Some(sum) => format!("{name} add up to {sum}, the buffer has {values}"),
                None => format!("{name} add up to more than a buffer can have"),
            },
        )
    }

    /// The error of this rank's own buffers, if they do not fit.
    pub(crate) fn wrong_buffer(&self, group: &str) -> Option<CommError> {
        self.problem.as_ref().map(|problem| CommError::WrongBuffer {
            operation: self.operation.name(),
            group: group.to_owned(),
            problem: problem.clone(),
        })
    }
}

/// A call as numbers, for peers in other processes.
pub(crate) type Words = [u64; 3];

impl Call {
    pub(crate) fn to_words(&self) -> Words {
        let position = |found: Option<usize>| found.map_or(0, |index| index as u64 + 1);
        let operation = position(Operation::ALL.iter().position(|o| *o == self.operation));
        let element_type = position(self.element_type.and_then(|t| TYPES.iter().position(|o| *o == t)));
        let reduce = position(self.reduce.and_then(|r| REDUCE_OPS.iter().position(|o| *o == r)));
        let problem = u64::from(self.problem.is_some());
        let first = operation | element_type << 8 | reduce << 16 | problem << 24 | (self.root as u64) << 32;
        [first, self.length as u64, self.counts]
    }

    /// `None` if a peer speaks another language.
    pub(crate) fn from_words([first, length, counts]: Words) -> Option<Self> {
        let byte = |shift: u32| (first >> shift & 0xff) as usize;
        Some(Self {
            operation: *Operation::ALL.get(byte(0).checked_sub(1)?)?,
            element_type: byte(8).checked_sub(1).and_then(|i| TYPES.get(i)).copied(),
            reduce: byte(16).checked_sub(1).and_then(|i| REDUCE_OPS.get(i)).copied(),
            root: (first >> 32) as usize,
            length: length as usize,
            counts,
            problem: (byte(24) != 0).then(String::new),
        })
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.operation.name())?;
        if let Some(reduce) = self.reduce {
            write!(f, " ({reduce:?})")?;
        }
        match self.element_type {
            Some(element) if self.operation == Operation::AllToAllV => write!(f, " of {element:?} values")?,
            Some(element) => write!(f, " of {} {element:?} values", self.length)?,
            None => {}
        }
        if self.operation == Operation::Broadcast {
            write!(f, " from its rank {}", self.root)?;
        }
        if self.problem.is_some() {
            f.write_str(" with buffers that do not fit")?;
        }
        Ok(())
    }
}

/// How the calls of a group's ranks differ, if they do; `members` are the ranks' numbers in the job.
pub(crate) fn difference(calls: &[Call], members: &[usize]) -> Option<String> {
    let first = calls.first()?;
    if calls.iter().all(|call| call == first && call.problem.is_none()) {
        return None;
    }
    let mut kinds: Vec<(String, Vec<usize>)> = Vec::new();
    for (call, member) in calls.iter().zip(members) {
        let text = call.to_string();
        match kinds.iter_mut().find(|(kind, _)| *kind == text) {
            Some((_, ranks)) => ranks.push(*member),
            None => kinds.push((text, vec![*member])),
        }
    }
    let texts: Vec<String> =
        kinds.iter().map(|(kind, ranks)| format!("{} called {kind}", name_ranks(ranks))).collect();
    let counts = if kinds.len() == 1 { ", with other counts" } else { "" };
    Some(texts.join("; ") + counts)
}

/// How what ranks send differs from what their peers expect, if it does.
///
/// `sends[i][j]` and `receives[j][i]` speak of what rank `i` sends rank `j`.
pub(crate) fn unexpected<'a>(
    sends: impl Fn(usize) -> &'a [usize],
    receives: impl Fn(usize) -> &'a [usize],
    members: &[usize],
) -> Option<String> {
    (0..members.len()).flat_map(|from| (0..members.len()).map(move |to| (from, to))).find_map(|(from, to)| {
        let (sent, expected) = (sends(from)[to], receives(to)[from]);
        (sent != expected).then(|| mismatch(members[from], sent, members[to], expected))
    })
}

/// Says that `from` sends another number of values than `to` expects.
pub(crate) fn mismatch(from: usize, sent: usize, to: usize, expected: usize) -> String {
    format!("rank {from} sends rank {to} {sent} values, rank {to} expects {expected}")
}

/// `rank 3`, `ranks 0, 2 and 5`.
pub(crate) fn name_ranks(ranks: &[usize]) -> String {
    let texts: Vec<String> = ranks.iter().map(usize::to_string).collect();
    match texts.split_last() {
        None => "no rank".to_owned(),
        Some((only, [])) => format!("rank {only}"),
        Some((last, others)) => format!("ranks {} and {last}", others.join(", ")),
    }
}

/// FNV-1a over the counts.
fn hash(counts: &[usize]) -> u64 {
    counts.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &count| {
        (hash ^ count as u64).wrapping_mul(0x0100_0000_01b3).rotate_left(23)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_survive_the_way_to_a_peer() {
        let values = [1.0_f32; 12];
        let mut room = [0.0_f32; 6];
        for call in [
            Call::barrier(),
            Call::broadcast(2, Buffer::U8(&[1, 2]), 1),
            Call::all_reduce(Buffer::F32(&values), ReduceOp::Min),
            Call::reduce_scatter(2, Buffer::F32(&values), &BufferMut::F32(&mut room), ReduceOp::Max),
        ] {
            assert_eq!(Call::from_words(call.to_words()), Some(call));
        }
        assert_eq!(Call::from_words([0, 0, 0]), None);
        assert_eq!(Call::from_words([200, 0, 0]), None);
        let wrong = Call::all_to_all(5, Buffer::F32(&values), &BufferMut::F32(&mut room));
        assert!(wrong.wrong_buffer("x").is_some());
        let heard = Call::from_words(wrong.to_words()).expect("known");
        assert_eq!(heard.to_string(), "all_to_all of 12 F32 values with buffers that do not fit");
    }

    #[test]
    fn differences_name_who_called_what() {
        let sum = Call::all_reduce(Buffer::F32(&[0.0; 3]), ReduceOp::Sum);
        let longer = Call::all_reduce(Buffer::F32(&[0.0; 4]), ReduceOp::Sum);
        assert_eq!(difference(&[sum.clone(), sum.clone()], &[0, 1]), None);
        assert_eq!(
            difference(&[sum.clone(), Call::barrier(), sum, longer], &[0, 2, 4, 6]).expect("they differ"),
            "ranks 0 and 4 called all_reduce (Sum) of 3 F32 values; rank 2 called barrier; \
             rank 6 called all_reduce (Sum) of 4 F32 values"
        );
        let gather = |counts: &[usize]| {
            Call::all_gather_v((0, 2), Buffer::U8(&[0; 1]), &BufferMut::U8(&mut [0; 3]), counts)
        };
        assert_eq!(
            difference(&[gather(&[1, 2]), gather(&[1, 2])], &[0, 1])
                .or(difference(&[gather(&[1, 2]), Call { problem: None, ..gather(&[2, 1]) }], &[0, 1])),
            Some("ranks 0 and 1 called all_gather_v of 3 U8 values, with other counts".to_owned())
        );
    }
}
