//! Which slots of the experts on a device hold a token, and which token.

use std::ops::Range;
use std::sync::Arc;

use crate::host;
use crate::noise::{TokenNoise, TokenPlace};
use crate::plan::DispatchPlan;

/// Slots in use of the experts on one device, whoever filled them.
///
/// An expert's slots are cut into equal segments, one for each sender; a segment holds its tokens
/// first, then nothing.
#[derive(Debug, Clone)]
pub struct ExpertRows {
    /// Number of the first expert within the whole layer.
    pub first_expert: usize,
    /// Segments of every expert's slots.
    pub segments: usize,
    /// Slots in use of each segment. `[experts * segments]`
    pub used: Vec<usize>,
    /// Place of the token in each slot, any where none is: what dropout is keyed by. Needed for
    /// dropout alone. `[experts * slots]`
    pub places: Option<Arc<Vec<TokenPlace>>>,
    /// What the backward pass makes of the weights.
    pub weight_gradients: WeightGradients,
}

/// How the gradients of an expert's weights come out of the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightGradients {
    /// Over all segments, shaped as the weights.
    Summed,
    /// One for each segment: of weights `[l, a, b]` a gradient `[l * segments, a, b]`, the segments of
    /// an expert side by side, an unused one 0.
    ///
    /// Each has the bits that it would have if its segment were the only one. So a sum over senders in
    /// an order of the caller's has the same bits wherever experts and senders live.
    PerSegment,
}

impl ExpertRows {
    /// The slots of a plan whose experts all live on this device; `noise`, if given, places its tokens.
    pub fn local(plan: &DispatchPlan, noise: Option<TokenNoise>) -> Self {
        let place = |noise: TokenNoise| {
            let tokens = host::integers(&plan.token_of_slot);
            Arc::new(tokens.into_iter().map(|token| noise.place(token.max(0) as usize)).collect())
        };
        Self {
            first_expert: 0,
            segments: 1,
            used: host::integers(&plan.rows_used).into_iter().map(|rows| rows as usize).collect(),
            places: noise.map(place),
            weight_gradients: WeightGradients::Summed,
        }
    }

    /// One expert that all of `tokens` tokens visit.
    pub(crate) fn dense(tokens: usize, noise: Option<TokenNoise>) -> Self {
        let place = |noise: TokenNoise| Arc::new((0..tokens).map(|token| noise.place(token)).collect());
        Self {
            first_expert: 0,
            segments: 1,
            used: vec![tokens],
            places: noise.map(place),
            weight_gradients: WeightGradients::Summed,
        }
    }

    /// Gradients of every weight matrix of an expert.
    pub(crate) fn gradients(&self) -> usize {
        match self.weight_gradients {
            WeightGradients::Summed => 1,
            WeightGradients::PerSegment => self.segments,
        }
    }

    /// To which of them a run belongs, that begins at slot `start` of the `slots` of its expert.
    pub(crate) fn gradient_of(&self, start: usize, slots: usize) -> usize {
        match self.weight_gradients {
            WeightGradients::Summed => 0,
            WeightGradients::PerSegment => start / (slots / self.segments),
        }
    }

    /// Runs of slots in use of `expert`, which has `slots` of them; none is empty.
    pub(crate) fn runs(&self, expert: usize, slots: usize) -> impl Iterator<Item = Range<usize>> + '_ {
        let length = slots / self.segments;
        let used = &self.used[expert * self.segments..][..self.segments];
        let runs = used.iter().enumerate().filter(|&(_, &used)| used > 0);
        runs.map(move |(segment, &used)| segment * length..segment * length + used)
    }

    /// Panics unless these are rows of `experts` experts with `slots` slots each.
    pub(crate) fn check(&self, experts: usize, slots: usize) {
        let (segments, used) = (self.segments, &self.used);
        assert!(segments > 0 && slots.is_multiple_of(segments), "segments divide the slots of an expert");
        assert!(used.len() == experts * segments, "a count for every segment");
        assert!(used.iter().all(|&used| used <= slots / segments), "a segment holds no more than its slots");
    }
}
