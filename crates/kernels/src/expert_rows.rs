//! Which slots of the experts on a device hold a token, and which token.

use std::ops::Range;
use std::sync::Arc;

use crate::DeviceValues;
use crate::host::Held;
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
    pub used: SlotsInUse,
    /// Place of the token in each slot, any where none is: what dropout is keyed by. Needed for
    /// dropout alone. `[experts * slots]`
    pub places: Option<TokenPlaces>,
    /// What the backward pass makes of the weights.
    pub weight_gradients: WeightGradients,
}

/// Numbers of slots in use, in main memory or where the experts are.
#[derive(Debug, Clone)]
pub struct SlotsInUse(pub(crate) Held<i32>);

impl From<Vec<usize>> for SlotsInUse {
    fn from(used: Vec<usize>) -> Self {
        Self(Held::Host(Arc::new(used.into_iter().map(|used| used as i32).collect())))
    }
}

#[cfg(feature = "libtorch")]
impl From<DeviceValues> for SlotsInUse {
    fn from(used: DeviceValues) -> Self {
        Self(Held::Torch(used.into_tensor()))
    }
}

/// Places of the tokens in slots.
#[derive(Debug, Clone)]
pub struct TokenPlaces(pub(crate) Places);

#[derive(Debug, Clone)]
pub(crate) enum Places {
    /// Slot `s` holds token `s`.
    InOrder(TokenNoise),
    /// Pairs of batch row and position, where the experts are on a GPU.
    Listed(Held<TokenPlace>),
}

impl From<Vec<TokenPlace>> for TokenPlaces {
    fn from(places: Vec<TokenPlace>) -> Self {
        Self(Places::Listed(Held::Host(Arc::new(places))))
    }
}

#[cfg(feature = "libtorch")]
impl From<DeviceValues> for TokenPlaces {
    fn from(places: DeviceValues) -> Self {
        Self(Places::Listed(Held::Torch(places.into_tensor())))
    }
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
        let token_of_slot = noise.map(|noise| (noise, Held::integers(&plan.token_of_slot)));
        let places = token_of_slot.map(|(noise, token_of_slot)| {
            TokenPlaces(Places::Listed(match token_of_slot {
                Held::Host(tokens) => Held::Host(Arc::new(
                    tokens.iter().map(|&token| noise.place(token.max(0) as usize)).collect(),
                )),
                #[cfg(feature = "libtorch")]
                Held::Torch(tokens) => Held::Torch(crate::torch::places(&tokens, noise)),
            }))
        });
        Self {
            first_expert: 0,
            segments: 1,
            used: SlotsInUse(Held::integers(&plan.rows_used)),
            places,
            weight_gradients: WeightGradients::Summed,
        }
    }

    /// Slots in use and places, both int32, if LibTorch has them.
    pub fn on_devices(&self) -> Option<(DeviceValues, Option<DeviceValues>)> {
        #[cfg(feature = "libtorch")]
        if let Held::Torch(used) = &self.used.0 {
            let places = self.places.as_ref().map(|places| match &places.0 {
                Places::Listed(Held::Torch(places)) => crate::torch::int32(places),
                _ => panic!("places are where the slots in use are"),
            });
            return Some((crate::torch::int32(used), places));
        }
        None
    }

    /// One expert that all of `tokens` tokens visit.
    pub(crate) fn dense(tokens: usize, noise: Option<TokenNoise>) -> Self {
        Self {
            first_expert: 0,
            segments: 1,
            used: vec![tokens].into(),
            places: noise.map(|noise| TokenPlaces(Places::InOrder(noise))),
            weight_gradients: WeightGradients::Summed,
        }
    }

    /// Place of the token in a slot, counted over all experts.
    pub(crate) fn place(&self, slot: usize) -> TokenPlace {
        match &self.places.as_ref().expect("rows come with places where dropout needs them").0 {
            Places::InOrder(noise) => noise.place(slot),
            Places::Listed(places) => places.on_host()[slot],
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
        let used = &self.used.0.on_host()[expert * self.segments..][..self.segments];
        let runs = used.iter().map(|&used| used as usize).enumerate().filter(|&(_, used)| used > 0);
        runs.map(move |(segment, used)| segment * length..segment * length + used)
    }

    /// Panics unless these are rows of `experts` experts with `slots` slots each. What lies on a GPU is
    /// not looked at.
    pub(crate) fn check(&self, experts: usize, slots: usize) {
        let segments = self.segments;
        assert!(segments > 0 && slots.is_multiple_of(segments), "segments divide the slots of an expert");
        let counts = match &self.used.0 {
            Held::Host(used) => {
                let most = (slots / segments) as i32;
                assert!(used.iter().all(|&used| used <= most), "a segment holds no more than its slots");
                used.len()
            }
            #[cfg(feature = "libtorch")]
            Held::Torch(used) => used.tensor.numel(),
        };
        assert!(counts == experts * segments, "a count for every segment");
    }
}
