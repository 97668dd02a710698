//! Tokens to the ranks of their experts and back, by all-to-all.

use std::sync::Arc;

use burn::tensor::Tensor;
use rayon::prelude::*;
use switchyard_comm::{Buffer, BufferMut, CommError, Communicator, Element, ReduceOp};
use switchyard_config::HierarchicalAllToAll;
use switchyard_config::plan::CommPlan;
use switchyard_kernels::{
    DeviceMap, DeviceValues, DispatchPlan, ExpertRows, LinearMap, SlotChunk, SlotTravel, SlotWay, TokenNoise,
    TokenPlace, WeightGradients, bf16, combine, dispatch, integers, linear_map,
};
use switchyard_model::{Dispatched, SenderCounts, TokenDispatcher};

use crate::all_to_all::{AllToAll, Direction, Grid};
use crate::failure::Failure;
use crate::on_devices::{slice, stream};

/// Experts spread evenly over a group: rank `r` has experts `r * l .. (r + 1) * l` of `l * size`.
///
/// Capacity is fixed, so every message has the same size on every rank whatever the router does. Where the
/// host moves the tokens, those of all senders stand one after the other at an expert, so that its matrices
/// are read once; from device to device every sender keeps its slots, so that nothing waits for the host.
///
/// # Source
/// Lepikhin et al. 2020, "GShard" (arXiv:2006.16668), section 3; Switch Transformer, section 2.2.
#[derive(Debug)]
pub struct AllToAllDispatcher {
    all_to_all: Arc<AllToAll>,
    failure: Failure,
    deterministic: bool,
    chunks: usize,
}

/// How tokens travel to their experts.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenTravel {
    /// Tokens of each sender stay apart at the experts, and so do their gradients of the weights, for sums in the
    /// order of the global batch.
    pub deterministic: bool,
    /// Whether they travel machine by machine where the ranks stand so; who insists on it asks
    /// [`MeshShape::check_machines`](switchyard_config::MeshShape::check_machines) first.
    pub hierarchical: HierarchicalAllToAll,
    /// Chunks that travel from device to device while the experts compute others; 0 for all at once, before and after
    /// the experts.
    pub chunks: usize,
}

impl From<&CommPlan> for TokenTravel {
    fn from(plan: &CommPlan) -> Self {
        let CommPlan {
            deterministic, hierarchical_all_to_all: hierarchical, dispatch_chunks: chunks, ..
        } = *plan;
        Self { deterministic, hierarchical, chunks }
    }
}

impl AllToAllDispatcher {
    /// Over `group`; errors of what is dispatched go to `failure`.
    ///
    /// # Collective
    /// Over `group`.
    /// # Errors
    /// When the ranks cannot agree.
    pub fn new(
        group: Arc<dyn Communicator>,
        failure: Failure,
        travel: TokenTravel,
    ) -> Result<Self, CommError> {
        let TokenTravel { deterministic, hierarchical, chunks } = travel;
        let all_to_all = Arc::new(AllToAll::new(group, hierarchical)?);
        Ok(Self { all_to_all, failure, deterministic, chunks })
    }

    /// Whether tokens travel machine by machine.
    pub fn is_hierarchical(&self) -> bool {
        self.all_to_all.is_hierarchical()
    }

    fn group(&self) -> &dyn Communicator {
        self.all_to_all.group()
    }

    /// The largest value of any rank of the group.
    fn largest(&self, here: usize) -> usize {
        let mut values = [here as u64];
        let outcome = self.group().all_reduce(values.as_mut_slice().into(), ReduceOp::Max);
        self.failure.keep(outcome, || ());
        values[0] as usize
    }

    /// What every sender says of its slots at this rank's experts: sent by expert, received by sender,
    /// then expert.
    fn exchange<T: Element>(&self, sent: &[T]) -> Vec<T>
    where
        for<'a> &'a [T]: Into<Buffer<'a>>,
        for<'a> &'a mut [T]: Into<BufferMut<'a>>,
    {
        self.failure.keep(self.all_to_all.exchange(sent), || vec![T::default(); sent.len()])
    }

    /// Tokens of every sender at every expert of this rank, by expert.
    fn counts(&self, plan: &DispatchPlan) -> SenderCounts {
        let received = self.exchange(&integers(&plan.rows_used));
        let senders = self.group().size();
        let local = plan.num_experts / senders;
        let of_expert = |expert| (0..senders).map(move |sender| sender * local + expert);
        // No peer sends more than its slots, but what arrives becomes an index.
        let count = |at: usize| usize::try_from(received[at]).unwrap_or(0).min(plan.slots_per_expert);
        Arc::new((0..local).flat_map(of_expert).map(count).collect())
    }

    /// Where tokens stand at the experts, `width` values each.
    fn layout(&self, counts: &SenderCounts, slots: usize, width: usize) -> Layout {
        let packed = !self.deterministic;
        Layout { counts: Arc::clone(counts), senders: self.group().size(), slots, width, packed }
    }

    fn travel(&self, direction: Direction, layout: Layout) -> Arc<Travel> {
        let (all_to_all, failure) = (Arc::clone(&self.all_to_all), self.failure.clone());
        Arc::new(Travel { all_to_all, failure, direction, layout })
    }

    /// One way of the slots of `plan` from device to device, if the ranks have some and LibTorch the plan.
    fn on_devices(&self, plan: &DispatchPlan, direction: Direction) -> Option<Arc<DeviceTravel>> {
        self.group().on_devices()?;
        plan.is_on_devices().then(|| {
            let (all_to_all, failure) = (Arc::clone(&self.all_to_all), self.failure.clone());
            let local = plan.num_experts / all_to_all.group().size();
            let slots = plan.slots_per_expert;
            Arc::new(DeviceTravel { all_to_all, failure, direction, local, slots })
        })
    }

    /// The rows at this rank's experts, `slots` a sender; `own` are this rank's tokens at the experts of all.
    fn rows_on_devices(&self, there: &DeviceTravel, own: &ExpertRows, slots: usize) -> ExpertRows {
        let (used, places) = own.on_devices().expect("the plan is there");
        let weight_gradients =
            if self.deterministic { WeightGradients::PerSegment } else { WeightGradients::Summed };
        ExpertRows {
            first_expert: self.group().rank() * there.local,
            segments: self.group().size(),
            // No peer sends more than its slots, but what arrives becomes an index.
            used: there.told(&used).clamped(0, slots).into(),
            places: places.map(|places| there.told(&places).into()),
            weight_gradients,
        }
    }

    /// Where the tokens at this rank's experts come from.
    fn places(&self, plan: &DispatchPlan, noise: TokenNoise, counts: &SenderCounts) -> Vec<TokenPlace> {
        let words = integers(&plan.token_of_slot).into_iter().flat_map(|token| {
            let TokenPlace { row, token } = noise.place(token.max(0) as usize);
            [row as i32, token as i32]
        });
        let received = self.exchange(&words.collect::<Vec<_>>());
        let words = self.layout(counts, plan.slots_per_expert, 2).gather(&received);
        words.chunks_exact(2).map(|pair| TokenPlace { row: pair[0] as u32, token: pair[1] as u32 }).collect()
    }
}

impl TokenDispatcher for AllToAllDispatcher {
    fn slots(&self, plan: &DispatchPlan) -> usize {
        if plan.fixed_capacity { plan.slots_per_expert } else { self.largest(plan.slots_per_expert) }
    }

    fn any(&self, here: bool) -> bool {
        self.largest(usize::from(here)) > 0
    }

    fn dispatch(&self, tokens_nd: Tensor<2>, plan: &DispatchPlan, noise: Option<TokenNoise>) -> Dispatched {
        let [_, d] = tokens_nd.dims();
        let (senders, slots) = (self.group().size(), plan.slots_per_expert);
        let local = plan.num_experts / senders;
        if let Some(there) = self.on_devices(plan, Direction::ToExperts) {
            let rows = self.rows_on_devices(&there, &ExpertRows::local(plan, noise), slots);
            let (sent_ecd, counts) = (dispatch(tokens_nd, plan), SenderCounts::default());
            if self.chunks == 0 {
                let slots_lcd = linear_map(sent_ecd, there, [local, senders * slots, d]);
                return Dispatched { slots_lcd, rows, way: None, counts };
            }
            let way = SlotWay::new(there, self.chunks, [local, slots], rows.weight_gradients);
            return Dispatched { slots_lcd: sent_ecd, rows, way: Some(way), counts };
        }
        let counts = self.counts(plan);
        let there = self.travel(Direction::ToExperts, self.layout(&counts, slots, d));
        let slots_lcd = linear_map(dispatch(tokens_nd, plan), there, [local, senders * slots, d]);
        let (segments, used, weight_gradients) = if self.deterministic {
            (senders, counts.to_vec(), WeightGradients::PerSegment)
        } else {
            (1, counts.chunks(senders).map(|counts| counts.iter().sum()).collect(), WeightGradients::Summed)
        };
        let rows = ExpertRows {
            first_expert: self.group().rank() * local,
            segments,
            used: used.into(),
            places: noise.map(|noise| self.places(plan, noise, &counts).into()),
            weight_gradients,
        };
        Dispatched { slots_lcd, rows, way: None, counts }
    }

    fn combine(
        &self,
        outputs_lcd: Tensor<3>,
        gates: Tensor<1>,
        plan: &DispatchPlan,
        counts: &SenderCounts,
        residual_nd: Option<Tensor<2>>,
    ) -> Tensor<2> {
        let [_, _, d] = outputs_lcd.dims();
        let slots = plan.slots_per_expert;
        let back: Arc<dyn LinearMap> = match self.on_devices(plan, Direction::ToTokens) {
            Some(_) if self.chunks > 0 => return combine(outputs_lcd, gates, plan, residual_nd),
            Some(back) => back,
            None => self.travel(Direction::ToTokens, self.layout(counts, slots, d)),
        };
        let outputs_ecd = linear_map(outputs_lcd, back, [plan.num_experts, slots, d]);
        combine(outputs_ecd, gates, plan, residual_nd)
    }
}

/// Where the tokens of every sender stand at the experts of a rank.
#[derive(Debug)]
struct Layout {
    counts: SenderCounts,
    senders: usize,
    /// Slots of one sender at one expert.
    slots: usize,
    /// Values of a slot.
    width: usize,
    /// Whether the tokens of an expert follow each other; else every sender has slots of its own.
    packed: bool,
}

impl Layout {
    /// Slots in use of one sender at one expert: their first in the message, their first among the
    /// expert's slots, their number.
    fn runs_of_expert(&self, expert: usize) -> impl Iterator<Item = [usize; 3]> + '_ {
        let local = self.counts.len() / self.senders;
        let counts = &self.counts[expert * self.senders..][..self.senders];
        let mut before = 0;
        counts.iter().enumerate().map(move |(sender, &count)| {
            let first = if self.packed { before } else { sender * self.slots };
            before += count;
            [(sender * local + expert) * self.slots, first, count]
        })
    }

    /// `[senders, l, slots]`, a message, to `[l, senders * slots]`, the experts' slots.
    fn gather<T: Element>(&self, message: &[T]) -> Vec<T> {
        let (width, of_expert) = (self.width, self.senders * self.slots * self.width);
        let mut out = vec![T::default(); message.len()];
        out.par_chunks_mut(of_expert.max(1)).enumerate().for_each(|(expert, out)| {
            for [from, to, count] in self.runs_of_expert(expert) {
                out[to * width..][..count * width].copy_from_slice(&message[from * width..][..count * width]);
            }
        });
        out
    }

    /// The way back.
    fn scatter<T: Element>(&self, held: &[T]) -> Vec<T> {
        let (width, of_expert) = (self.width, self.senders * self.slots * self.width);
        let mut message = vec![T::default(); held.len()];
        for (expert, held) in held.chunks(of_expert.max(1)).enumerate() {
            for [to, from, count] in self.runs_of_expert(expert) {
                message[to * width..][..count * width]
                    .copy_from_slice(&held[from * width..][..count * width]);
            }
        }
        message
    }
}

/// One way of the slots; the gradient takes the other.
#[derive(Debug)]
struct Travel {
    all_to_all: Arc<AllToAll>,
    failure: Failure,
    direction: Direction,
    layout: Layout,
}

impl Travel {
    fn go<T: Element>(&self, direction: Direction, values: &[T]) -> Option<Vec<T>>
    where
        for<'a> &'a [T]: Into<Buffer<'a>>,
        for<'a> &'a mut [T]: Into<BufferMut<'a>>,
    {
        let outcome = match direction {
            Direction::ToExperts => {
                self.all_to_all.exchange(values).map(|message| self.layout.gather(&message))
            }
            Direction::ToTokens => self.all_to_all.exchange(&self.layout.scatter(values)),
        };
        Some(self.failure.keep(outcome, || vec![T::default(); values.len()]))
    }
}

impl LinearMap for Travel {
    fn forward(&self, x: &[f32]) -> Option<Vec<f32>> {
        self.go(self.direction, x)
    }

    fn backward(&self, gradient: &[f32]) -> Option<Vec<f32>> {
        self.go(self.direction.reverse(), gradient)
    }

    fn forward_bf16(&self, x: &[bf16]) -> Option<Vec<bf16>> {
        self.go(self.direction, x)
    }

    fn backward_bf16(&self, gradient: &[bf16]) -> Option<Vec<bf16>> {
        self.go(self.direction.reverse(), gradient)
    }
}

/// The way of the slots from device to device.
///
/// What a rank has for its own tokens goes by expert of all ranks, `[senders, l]`; at the experts it stands by
/// expert, then sender, `[l, senders]`.
#[derive(Debug)]
struct DeviceTravel {
    all_to_all: Arc<AllToAll>,
    failure: Failure,
    /// That of the values, if all travel at once; their gradients take the other.
    direction: Direction,
    /// Experts of a rank.
    local: usize,
    /// Slots of a sender at an expert.
    slots: usize,
}

impl DeviceTravel {
    /// All values, brought to the others' places.
    fn go(&self, direction: Direction, values: &DeviceValues) -> DeviceValues {
        let moved = values.room(values.len());
        let (at_tokens, at_experts) = match direction {
            Direction::ToExperts => (values, &moved),
            Direction::ToTokens => (&moved, values),
        };
        self.bring(direction, self.slots, &self.all(self.slots), at_tokens, at_experts);
        moved
    }

    /// Integers that say something of the slots, as many for every expert, brought to the experts.
    fn told(&self, integers: &DeviceValues) -> DeviceValues {
        // What is lost on the way must not become an index.
        let told = integers.zeros(integers.len());
        let of_expert = integers.len() / (self.all_to_all.group().size() * self.local);
        self.bring(Direction::ToExperts, of_expert, &self.all(of_expert), integers, &told);
        told
    }

    fn all(&self, slots: usize) -> SlotChunk {
        SlotChunk { experts: 0..self.local, slots: 0..slots }
    }

    /// Brings a chunk of `slots` slots of every rank's experts to the other side.
    fn bring(
        &self,
        direction: Direction,
        slots: usize,
        chunk: &SlotChunk,
        at_tokens: &DeviceValues,
        at_experts: &DeviceValues,
    ) {
        let (senders, experts) = (self.all_to_all.group().size(), chunk.experts.len());
        let of_tokens = Grid::chunk_by_rank(slice(at_tokens), [senders, self.local, slots], chunk);
        if experts == 1 || slice(at_experts).bytes() >= senders * experts * PIECE_BYTES {
            let of_experts = Grid::by_expert(slice(at_experts), [senders, experts]);
            self.exchange(direction, of_tokens, of_experts, at_experts);
            return;
        }
        let of_expert = at_experts.len() / (senders * experts);
        let by_rank = match direction {
            Direction::ToExperts => at_experts.room(at_experts.len()),
            Direction::ToTokens => at_experts.swapped([experts, senders, of_expert]),
        };
        let as_one = Grid::by_rank(slice(&by_rank), [senders, 1]);
        let came = self.exchange(direction, of_tokens.as_one_expert(), as_one, at_experts);
        if came && direction == Direction::ToExperts {
            at_experts.write_swapped([senders, experts, of_expert], &by_rank);
        }
    }

    /// Whether it went well.
    fn exchange(&self, direction: Direction, at_tokens: Grid, at_experts: Grid, like: &DeviceValues) -> bool {
        let staging = like.room(self.all_to_all.staged(like.len()));
        let (staging, stream) = (slice(&staging), stream(like));
        let exchanged =
            self.all_to_all.exchange_on_devices(direction, at_tokens, staging, at_experts, stream);
        self.failure.keep(exchanged.map(|()| true), || false)
    }
}

impl SlotTravel for DeviceTravel {
    fn to_experts(&self, chunk: &SlotChunk, sent: &DeviceValues, there: &DeviceValues) {
        self.bring(Direction::ToExperts, self.slots, chunk, sent, there);
    }

    fn to_tokens(&self, chunk: &SlotChunk, there: &DeviceValues, sent: &DeviceValues) {
        self.bring(Direction::ToTokens, self.slots, chunk, sent, there);
    }
}

impl LinearMap for DeviceTravel {
    fn forward(&self, _: &[f32]) -> Option<Vec<f32>> {
        unreachable!("{ON_DEVICES}")
    }

    fn backward(&self, _: &[f32]) -> Option<Vec<f32>> {
        unreachable!("{ON_DEVICES}")
    }

    fn on_devices(&self) -> Option<&dyn DeviceMap> {
        Some(self)
    }
}

impl DeviceMap for DeviceTravel {
    fn forward(&self, x: &DeviceValues) -> Option<DeviceValues> {
        Some(self.go(self.direction, x))
    }

    fn backward(&self, gradient: &DeviceValues) -> Option<DeviceValues> {
        Some(self.go(self.direction.reverse(), gradient))
    }
}

/// What a sender has for one expert goes as a piece of its own if it has as many bytes, so that nothing is copied.
/// Smaller pieces take NCCL longer than it takes to bring those of all experts of a rank into one.
const PIECE_BYTES: usize = 4 << 20;

const ON_DEVICES: &str = "made for values that LibTorch has";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_packed_or_kept_apart_and_find_back() {
        // Two senders, two experts, three slots of one value; 0 where nothing is.
        let message = [1.0, 2.0, 0.0, 3.0, 0.0, 0.0, 4.0, 0.0, 0.0, 5.0, 6.0, 7.0];
        let layout =
            |packed| Layout { counts: Arc::new(vec![2, 1, 1, 3]), senders: 2, slots: 3, width: 1, packed };
        let packed = layout(true).gather(&message);
        assert_eq!(packed, [1.0, 2.0, 4.0, 0.0, 0.0, 0.0, 3.0, 5.0, 6.0, 7.0, 0.0, 0.0]);
        assert_eq!(layout(true).scatter(&packed), message);
        let apart = layout(false).gather(&message);
        assert_eq!(apart, [1.0, 2.0, 0.0, 4.0, 0.0, 0.0, 3.0, 0.0, 0.0, 5.0, 6.0, 7.0]);
        assert_eq!(layout(false).scatter(&apart), message);
    }
}
