//! Tokens to the ranks of their experts and back, by all-to-all.

use std::sync::Arc;

use burn::tensor::Tensor;
use rayon::prelude::*;
use switchyard_comm::{CommError, Communicator, Element, ReduceOp};
use switchyard_kernels::{
    DispatchPlan, ExpertRows, LinearMap, TokenNoise, TokenPlace, WeightGradients, combine, dispatch,
    integers, linear_map,
};
use switchyard_model::{Dispatched, TokenDispatcher};

use crate::failure::Failure;

/// Experts spread evenly over a group: rank `r` has experts `r * l .. (r + 1) * l` of `l * size`.
///
/// Capacity is fixed, so every message has the same size on every rank whatever the router does.
///
/// # Source
/// Lepikhin et al. 2020, "GShard" (arXiv:2006.16668), section 3; Switch Transformer, section 2.2.
#[derive(Debug)]
pub struct AllToAllDispatcher {
    group: Arc<dyn Communicator>,
    failure: Failure,
    weight_gradients: WeightGradients,
}

impl AllToAllDispatcher {
    /// Over `group`; errors go to `failure`. `deterministic` keeps weight gradients apart by sender.
    pub fn new(group: Arc<dyn Communicator>, failure: Failure, deterministic: bool) -> Self {
        let weight_gradients =
            if deterministic { WeightGradients::PerSegment } else { WeightGradients::Summed };
        Self { group, failure, weight_gradients }
    }

    /// What every sender says of its slots at this rank's experts, expert-major:
    /// `[size * l * each] -> [l * size * each]`.
    fn exchange<T: Element>(&self, sent: &[T], each: usize) -> Vec<T>
    where
        for<'a> &'a [T]: Into<switchyard_comm::Buffer<'a>>,
        for<'a> &'a mut [T]: Into<switchyard_comm::BufferMut<'a>>,
    {
        let mut received = vec![T::default(); sent.len()];
        let outcome = self.group.all_to_all(sent.into(), received.as_mut_slice().into());
        self.failure.keep(outcome, || ());
        let senders = self.group.size();
        swap_axes(&received, senders, sent.len() / each / senders, each)
    }
}

impl TokenDispatcher for AllToAllDispatcher {
    fn slots(&self, plan: &DispatchPlan) -> usize {
        self.largest(plan.slots_per_expert)
    }

    fn any(&self, here: bool) -> bool {
        self.largest(usize::from(here)) > 0
    }

    fn dispatch(&self, tokens_nd: Tensor<2>, plan: &DispatchPlan, noise: Option<TokenNoise>) -> Dispatched {
        let [_, d] = tokens_nd.dims();
        let (senders, slots) = (self.group.size(), plan.slots_per_expert);
        let local = plan.num_experts / senders;
        let slots_ecd = dispatch(tokens_nd, plan);
        let there = self.travel(Direction::ToExperts, local, slots * d);
        let slots_lcd = linear_map(slots_ecd, there, [local, senders * slots, d]);
        let used = self.exchange(&integers(&plan.rows_used), 1);
        let places = noise.map(|noise| {
            let tokens = integers(&plan.token_of_slot);
            let words = tokens.into_iter().flat_map(|token| {
                let TokenPlace { row, token } = noise.place(token.max(0) as usize);
                [row as i32, token as i32]
            });
            let words = self.exchange(&words.collect::<Vec<_>>(), 2 * slots);
            let place = |pair: &[i32]| TokenPlace { row: pair[0] as u32, token: pair[1] as u32 };
            Arc::new(words.chunks_exact(2).map(place).collect())
        });
        let rows = ExpertRows {
            first_expert: self.group.rank() * local,
            segments: senders,
            used: used.into_iter().map(|rows| rows as usize).collect(),
            places,
            weight_gradients: self.weight_gradients,
        };
        Dispatched { slots_lcd, rows }
    }

    fn combine(&self, outputs_lcd: Tensor<3>, gates: Tensor<1>, plan: &DispatchPlan) -> Tensor<2> {
        let [local, slots, d] = outputs_lcd.dims();
        let each = slots / self.group.size();
        let back = self.travel(Direction::ToTokens, local, each * d);
        let outputs_ecd = linear_map(outputs_lcd, back, [plan.num_experts, each, d]);
        combine(outputs_ecd, gates, plan)
    }
}

impl AllToAllDispatcher {
    /// The largest value of any rank of the group.
    fn largest(&self, here: usize) -> usize {
        let mut values = [here as u64];
        let outcome = self.group.all_reduce(values.as_mut_slice().into(), ReduceOp::Max);
        self.failure.keep(outcome, || ());
        values[0] as usize
    }

    fn travel(&self, direction: Direction, local: usize, segment: usize) -> Arc<Travel> {
        Arc::new(Travel {
            group: Arc::clone(&self.group),
            failure: self.failure.clone(),
            direction,
            local,
            segment,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToExperts,
    ToTokens,
}

/// One way of the slots; the gradient takes the other.
#[derive(Debug)]
struct Travel {
    group: Arc<dyn Communicator>,
    failure: Failure,
    direction: Direction,
    /// Experts of a rank.
    local: usize,
    /// Values of one sender's slots at one expert.
    segment: usize,
}

impl Travel {
    /// `[size, l, segment]` by owner of the expert to `[l, size, segment]` by sender.
    fn to_experts(&self, sent: &[f32]) -> Result<Vec<f32>, CommError> {
        let mut received = vec![0.0; sent.len()];
        self.group.all_to_all(sent.into(), received.as_mut_slice().into())?;
        Ok(swapped(received, self.group.size(), self.local, self.segment))
    }

    /// The way back.
    fn to_tokens(&self, held: &[f32]) -> Result<Vec<f32>, CommError> {
        let mut received = vec![0.0; held.len()];
        if self.local == 1 {
            self.group.all_to_all(held.into(), received.as_mut_slice().into())?;
        } else {
            let by_sender = swap_axes(held, self.local, self.group.size(), self.segment);
            self.group.all_to_all(by_sender.as_slice().into(), received.as_mut_slice().into())?;
        }
        Ok(received)
    }

    fn go(&self, direction: Direction, values: &[f32]) -> Option<Vec<f32>> {
        let outcome = match direction {
            Direction::ToExperts => self.to_experts(values),
            Direction::ToTokens => self.to_tokens(values),
        };
        Some(self.failure.keep(outcome, || vec![0.0; values.len()]))
    }
}

impl LinearMap for Travel {
    fn forward(&self, x: &[f32]) -> Option<Vec<f32>> {
        self.go(self.direction, x)
    }

    fn backward(&self, gradient: &[f32]) -> Option<Vec<f32>> {
        let reverse = match self.direction {
            Direction::ToExperts => Direction::ToTokens,
            Direction::ToTokens => Direction::ToExperts,
        };
        self.go(reverse, gradient)
    }
}

fn swapped(values: Vec<f32>, rows: usize, columns: usize, each: usize) -> Vec<f32> {
    if rows == 1 || columns == 1 { values } else { swap_axes(&values, rows, columns, each) }
}

/// `[rows, columns, each]` to `[columns, rows, each]`.
fn swap_axes<T: Copy + Default + Send + Sync>(
    values: &[T],
    rows: usize,
    columns: usize,
    each: usize,
) -> Vec<T> {
    let mut out = vec![T::default(); values.len()];
    if each > 0 {
        out.par_chunks_mut(each).enumerate().with_min_len((1 << 14) / each.min(1 << 14)).for_each(
            |(at, to)| {
                let (column, row) = (at / rows, at % rows);
                to.copy_from_slice(&values[(row * columns + column) * each..][..each]);
            },
        );
    }
    out
}
