//! What a group of processes needs beneath it: blocking exchanges among its ranks.
//!
//! Owns no policy: what is exchanged when, and in which pieces, is decided in `group.rs`, which has
//! also made sure that all ranks call alike.

use std::fmt::Debug;

use crate::buffer::Element;

/// Why an exchange failed, in words.
pub(crate) type Fault = String;

/// One rank's way to the others of its group.
pub(crate) trait Transport: Debug + Send + Sync + Sized {
    /// Values that it can count.
    const LIMIT: usize;

    /// This rank in the group.
    fn rank(&self) -> usize;

    /// Ranks of the group.
    fn size(&self) -> usize;

    /// Gives every rank the values of rank `root`.
    fn broadcast<T: Element>(&self, buffer: &mut [T], root: usize) -> Result<(), Fault>;

    /// `from` of every rank, in rank order.
    fn all_gather<T: Element>(&self, from: &[T], to: &mut [T]) -> Result<(), Fault>;

    /// `from` of every rank, which becomes its part of `to`.
    fn all_gather_v<T: Element>(&self, from: &[T], to: &mut [T], parts: &Parts) -> Result<(), Fault>;

    /// The `i`-th of equal parts goes to rank `i`.
    fn all_to_all<T: Element>(&self, from: &[T], to: &mut [T]) -> Result<(), Fault>;

    /// As `all_to_all`, with parts of any lengths.
    fn all_to_all_v<T: Element>(&self, from: (&[T], &Parts), to: (&mut [T], &Parts)) -> Result<(), Fault>;

    /// The group of the ranks that give the same `color`, in the order of this one. `colors` are those
    /// of all ranks, small numbers; `id` is new and the same on all ranks of the new group.
    fn split(&self, colors: &[usize], id: u64) -> Result<Self, Fault>;
}

/// Places and lengths of the parts of a buffer, one a rank.
#[derive(Debug, Clone, Default)]
pub(crate) struct Parts(Vec<(usize, usize)>);

impl Parts {
    /// Parts one after the other.
    pub(crate) fn packed(counts: &[usize]) -> Self {
        let mut start = 0;
        Self::new(counts.iter().map(|&count| {
            start += count;
            (start - count, count)
        }))
    }

    /// `size` equal parts of `length` values.
    pub(crate) fn equal(length: usize, size: usize) -> Self {
        let count = length / size;
        assert_eq!(count * size, length, "equal parts");
        Self::packed(&vec![count; size])
    }

    /// Parts given as place and length.
    pub(crate) fn new(parts: impl Iterator<Item = (usize, usize)>) -> Self {
        Self(parts.collect())
    }

    /// Place and length of every part.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.0.iter().copied()
    }

    /// Asserts that there is one part a rank, all within `values` values.
    pub(crate) fn check(&self, size: usize, values: usize) {
        assert_eq!(self.0.len(), size, "one part a rank");
        assert!(self.iter().all(|(place, count)| place + count <= values), "parts within");
    }
}
