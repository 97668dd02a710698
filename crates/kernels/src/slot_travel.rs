//! Slots whose experts live elsewhere, on their way there and back while others are computed.
//!
//! Owns how slots are cut into chunks; who brings them is behind [`SlotTravel`].

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::DeviceValues;
use crate::expert_rows::WeightGradients;

/// Brings chunks of slots to the ranks of their experts and back, from device to device.
///
/// # Collective
/// Every rank of the group makes the same calls in the same order.
pub trait SlotTravel: Debug + Send + Sync + 'static {
    /// Brings a chunk to the experts: from `sent`, `[senders, l, slots]`, this rank's slots at the experts of all,
    /// to `there`, the chunk of all senders at this rank's experts, `[chunk experts, senders, chunk slots]`.
    fn to_experts(&self, chunk: &SlotChunk, sent: &DeviceValues, there: &DeviceValues);

    /// The way back.
    fn to_tokens(&self, chunk: &SlotChunk, there: &DeviceValues, sent: &DeviceValues);
}

/// Slots of every rank that travel together: those of some of its experts, or some of those of its only one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotChunk {
    /// Experts, of those of each rank.
    pub experts: Range<usize>,
    /// Slots of each sender at each of these experts.
    pub slots: Range<usize>,
}

impl SlotChunk {
    /// Slots of `senders` senders.
    pub fn len(&self, senders: usize) -> usize {
        self.experts.len() * self.slots.len() * senders
    }
}

/// How the slots of one layer reach their experts and come back.
#[derive(Debug, Clone)]
pub struct SlotWay {
    /// Who brings them.
    pub travel: Arc<dyn SlotTravel>,
    /// What goes together, one after the other; together all slots. Only one expert alone has its slots cut.
    pub chunks: Vec<SlotChunk>,
}

impl SlotWay {
    /// Brings slots at `experts` experts of every rank in `chunks` chunks or as many as there can be: each has whole
    /// experts. One expert alone has its slots cut, `slots` of each sender, so that its gradients are summed in another
    /// order. Gradients of single senders, whose bits depend on nothing else, want all slots in one.
    pub fn new(
        travel: Arc<dyn SlotTravel>,
        chunks: usize,
        [experts, slots]: [usize; 2],
        weight_gradients: WeightGradients,
    ) -> Self {
        let chunks = if weight_gradients == WeightGradients::PerSegment { 1 } else { chunks };
        let cut = |length: usize| {
            let parts = chunks.clamp(1, length.max(1));
            (0..parts).map(move |part| part * length / parts..(part + 1) * length / parts)
        };
        let chunks = if experts == 1 {
            cut(slots).map(|slots| SlotChunk { experts: 0..1, slots }).collect()
        } else {
            cut(experts).map(|experts| SlotChunk { experts, slots: 0..slots }).collect()
        };
        Self { travel, chunks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Nobody;

    impl SlotTravel for Nobody {
        fn to_experts(&self, _: &SlotChunk, _: &DeviceValues, _: &DeviceValues) {}
        fn to_tokens(&self, _: &SlotChunk, _: &DeviceValues, _: &DeviceValues) {}
    }

    #[test]
    fn chunks_are_whole_experts_or_parts_of_the_only_one() {
        let chunks = |count, sizes, weight_gradients| {
            let chunks = SlotWay::new(Arc::new(Nobody), count, sizes, weight_gradients).chunks;
            chunks.into_iter().map(|SlotChunk { experts, slots }| (experts, slots)).collect::<Vec<_>>()
        };
        let summed = WeightGradients::Summed;
        assert_eq!(chunks(1, [4, 10], summed), [(0..4, 0..10)]);
        assert_eq!(chunks(3, [4, 10], summed), [(0..1, 0..10), (1..2, 0..10), (2..4, 0..10)]);
        assert_eq!(chunks(8, [2, 10], summed), [(0..1, 0..10), (1..2, 0..10)]);
        assert_eq!(chunks(2, [1, 5], summed), [(0..1, 0..2), (0..1, 2..5)]);
        assert_eq!(chunks(4, [1, 2], summed), [(0..1, 0..1), (0..1, 1..2)]);
        assert_eq!(chunks(2, [1, 5], WeightGradients::PerSegment), [(0..1, 0..5)]);
        assert_eq!(chunks(2, [4, 10], WeightGradients::PerSegment), [(0..4, 0..10)]);
        assert_eq!(chunks(2, [1, 0], summed), [(0..1, 0..0)]);
    }
}
