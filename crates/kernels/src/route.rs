//! From router logits to a dispatch plan, gates and the quantities of the router losses.
//!
//! The plan is built by counting, once over the tokens of a group: no `[tokens, experts, capacity]`
//! tensor exists. Sums are float32; probabilities are float32 too unless the logits are bfloat16, as
//! they are where not even the router keeps float32.

use std::ops::Range;

use burn::backend::Flex;
use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::element::{Element, bf16};
use crate::host;
use crate::math::{dot, exp, max, sum};
use crate::operation::{Operand, Operation, apply};
use crate::plan::DispatchPlan;

/// What routing needs beside the logits.
#[derive(Debug, Clone)]
pub struct RouteOptions {
    /// Routing groups; the tokens are cut into this many equal runs.
    pub groups: usize,
    /// Slots of an expert in each group. `None` drops nothing and makes as many slots as the fullest
    /// expert needs: a size that depends on the tokens, so experts behind an all-to-all need the
    /// [`widened`](Routing::widened) routing.
    pub expert_capacity: Option<usize>,
    /// 1 for tokens that are routed and counted, 0 for padding; all when absent. `[tokens]`
    pub token_mask: Option<Tensor<1, Int>>,
    /// Ignore the logits' order and assign tokens round robin (for benchmarks). Padding keeps its turn,
    /// so loads differ where there is any. Expert choice, balanced by itself, ignores this.
    pub force_balanced: bool,
}

/// A routed layer: where tokens go, with what weight, and how evenly.
#[derive(Debug, Clone)]
pub struct Routing {
    /// Assignment of tokens to slots.
    pub plan: DispatchPlan,
    /// Weight of each slot's expert output, 0 for empty slots; differentiable. `[slots]`
    pub gates: Tensor<1>,
    /// `P`: mean probability of each expert over a group's counted tokens; differentiable. `[groups, num_experts]`
    pub mean_probability: Tensor<2>,
    /// `f`: share of a group's counted tokens whose first choice is the expert, before the capacity cut. `[groups, num_experts]`
    pub fraction: Tensor<2>,
    /// Mean over a group's counted tokens of `logsumexp(logits)^2`; differentiable. `[groups]`
    pub z: Tensor<1>,
    /// First choice of each token before the cut, -1 for padding. `[tokens]`
    pub choice: Tensor<1, Int>,
    /// Entropy of each token's probabilities in nats, 0 for padding. `[tokens]`
    pub entropy: Tensor<1>,
}

impl Routing {
    /// The same routing with at least `slots` slots an expert; the new ones are empty, their gates 0.
    #[must_use]
    pub fn widened(self, slots: usize) -> Self {
        let (experts, narrow) = (self.plan.num_experts, self.plan.slots_per_expert);
        if slots <= narrow {
            return self;
        }
        let empty = Tensor::zeros([experts, slots - narrow], &self.gates.device());
        let gates = Tensor::cat(vec![self.gates.reshape([experts, narrow]), empty], 1);
        Self { plan: self.plan.widened(slots), gates: gates.reshape([experts * slots]), ..self }
    }
}

/// Each token to its likeliest expert, in token order until the expert is full.
///
/// `logits` is `[groups * tokens, num_experts]`. Ties go to the lowest index.
///
/// # Source
/// Switch Transformer, section 2.1 (arXiv:2101.03961).
pub fn route_top1(logits: Tensor<2>, options: RouteOptions) -> Routing {
    #[cfg(feature = "libtorch")]
    if let Some(routing) = crate::torch::route(&logits, &options, 1) {
        return routing;
    }
    let scores = Scores::new(&logits, options);
    let assignment = scores.assign(&[&scores.best]);
    scores.finish(logits, assignment, GateRule::Probability)
}

/// Each token to its two likeliest experts, gates normalised to sum 1 before any drop.
///
/// All first choices of a group take their slots before any second choice.
///
/// # Source
/// GShard, section 2.2 (arXiv:2006.16668); second choices are always sent, as Mesh's policy "all".
pub fn route_top2(logits: Tensor<2>, options: RouteOptions) -> Routing {
    #[cfg(feature = "libtorch")]
    if let Some(routing) = crate::torch::route(&logits, &options, 2) {
        return routing;
    }
    let scores = Scores::new(&logits, options);
    let second = scores.second_best();
    let assignment = scores.assign(&[&scores.best, &second]);
    scores.finish(logits, assignment, GateRule::Normalized { second })
}

/// Each expert takes its likeliest tokens of every group, `expert_capacity` of them.
///
/// A token may be taken by any number of experts. The choice looks at the whole group, so in a
/// decoder it is not causal.
///
/// # Source
/// Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing" (arXiv:2202.09368).
pub fn route_expert_choice(logits: Tensor<2>, options: RouteOptions) -> Routing {
    let scores = Scores::new(&logits, options);
    let assignment = scores.assign_by_expert();
    scores.finish(logits, assignment, GateRule::Probability)
}

/// Tokens that one task adds up.
const BLOCK_TOKENS: usize = 256;

/// How probabilities become gates.
#[derive(Debug)]
pub(crate) enum GateRule {
    /// The expert's probability.
    Probability,
    /// Divided by the sum over the first and the second choice of the token.
    Normalized { second: Vec<i32> },
}

/// Probabilities of a layer and what follows from them alone.
pub(crate) struct Scores {
    pub(crate) experts: usize,
    /// Of the logits, to which probabilities and gates are rounded; they lie in float32.
    format: DType,
    pub(crate) options: RouteOptions,
    pub(crate) mask: Vec<bool>,
    probabilities: Vec<f32>,
    log_z: Vec<f32>,
    /// Entropy of each token's probabilities in nats.
    entropy: Vec<f32>,
    /// First choice of each token; -1 for padding.
    pub(crate) best: Vec<i32>,
}

impl Scores {
    fn new(logits: &Tensor<2>, options: RouteOptions) -> Self {
        let [tokens, experts] = logits.dims();
        assert!(tokens.is_multiple_of(options.groups), "groups divide the tokens");
        let mask = match &options.token_mask {
            Some(mask) => host::integers(mask).into_iter().map(|m| m != 0).collect(),
            None => vec![true; tokens],
        };
        let format = logits.dtype();
        let (mut log_z, mut entropy) = (vec![0.0; tokens], vec![0.0; tokens]);
        let probabilities = host::with_values(logits.clone(), |logits| {
            let mut probabilities = logits.to_vec();
            (probabilities.par_chunks_mut(experts * 64).zip(logits.par_chunks(experts * 64)))
                .zip(log_z.par_chunks_mut(64).zip(entropy.par_chunks_mut(64)))
                .for_each(|((rows, logits), (log_z, entropy))| {
                    softmax_rows(rows, logits, experts, log_z, entropy);
                    if format == DType::BF16 {
                        rows.iter_mut().for_each(|p| *p = bf16::round(*p).widen());
                    }
                });
            probabilities
        });
        let best = (probabilities.par_chunks(experts).zip(&mask).enumerate().with_min_len(64))
            .map(|(token, (row, &counted))| match (counted, options.force_balanced) {
                (false, _) => -1,
                (true, true) => (token % experts) as i32,
                (true, false) => first_largest(row),
            })
            .collect();
        Self { experts, format, options, mask, probabilities, log_z, entropy, best }
    }

    fn tokens(&self) -> usize {
        self.mask.len()
    }

    fn group_tokens(&self) -> usize {
        self.tokens() / self.options.groups
    }

    /// Slots that hold every choice of the expert that is chosen most; one at least.
    fn largest_load(&self, choices: &[&[i32]]) -> usize {
        let mut loads = vec![0; self.experts];
        for expert in choices.iter().copied().flatten().filter_map(|&expert| usize::try_from(expert).ok()) {
            loads[expert] += 1;
        }
        loads.into_iter().fold(1, usize::max)
    }

    fn row(&self, token: usize) -> &[f32] {
        &self.probabilities[token * self.experts..][..self.experts]
    }

    fn second_best(&self) -> Vec<i32> {
        (self.best.par_iter().enumerate().with_min_len(64))
            .map(|(token, &best)| match (best, self.options.force_balanced) {
                (-1, _) => -1,
                (best, true) => (best + 1) % self.experts as i32,
                (best, false) => argmax(self.row(token), best),
            })
            .collect()
    }

    /// Tokens of every slot when each list of choices is served in turn, in token order.
    fn assign(&self, choices: &[&[i32]]) -> Vec<i32> {
        let (capacity, slots) = match self.options.expert_capacity {
            Some(capacity) => (capacity, self.options.groups * capacity),
            None => (usize::MAX, self.largest_load(choices)),
        };
        let mut token_of_slot = vec![-1; self.experts * slots];
        let mut used = vec![0; self.experts];
        let mut in_group = vec![0; self.experts];
        for group in 0..self.options.groups {
            in_group.fill(0);
            let range = group * self.group_tokens()..(group + 1) * self.group_tokens();
            for choice in choices {
                for token in range.clone() {
                    let Ok(expert) = usize::try_from(choice[token]) else { continue };
                    if in_group[expert] < capacity {
                        token_of_slot[expert * slots + used[expert]] = token as i32;
                        in_group[expert] += 1;
                        used[expert] += 1;
                    }
                }
            }
        }
        token_of_slot
    }

    /// Tokens of every slot when each expert picks its likeliest, lowest token first on ties.
    fn assign_by_expert(&self) -> Vec<i32> {
        let (capacity, slots) = match self.options.expert_capacity {
            Some(capacity) => (capacity, self.options.groups * capacity),
            None => (usize::MAX, self.mask.iter().filter(|&&counted| counted).count().max(1)),
        };
        let mut token_of_slot = vec![-1; self.experts * slots];
        token_of_slot.par_chunks_mut(slots.max(1)).enumerate().for_each(|(expert, slots)| {
            let mut used = 0;
            for group in 0..self.options.groups {
                let range = group * self.group_tokens()..(group + 1) * self.group_tokens();
                let mut tokens: Vec<usize> = range.filter(|&token| self.mask[token]).collect();
                let likelier = |&a: &usize, &b: &usize| {
                    self.row(b)[expert].total_cmp(&self.row(a)[expert]).then(a.cmp(&b))
                };
                if tokens.len() > capacity {
                    tokens.select_nth_unstable_by(capacity, likelier);
                    tokens.truncate(capacity);
                }
                tokens.sort_unstable_by(likelier);
                for token in tokens {
                    slots[used] = token as i32;
                    used += 1;
                }
            }
        });
        token_of_slot
    }

    fn finish(self, logits: Tensor<2>, token_of_slot: Vec<i32>, rule: GateRule) -> Routing {
        let device = logits.device().inner();
        let float = |values: Vec<f32>| {
            let count = values.len();
            Tensor::<1>::from_data(TensorData::new(values, [count]), (&device, DType::F32))
        };
        let (groups, experts) = (self.options.groups, self.experts);
        let slots = token_of_slot.len() / experts;
        let mut fraction = vec![0.0; groups * experts];
        let mut counted = vec![0_usize; groups];
        for (token, &best) in self.best.iter().enumerate() {
            if let Ok(best) = usize::try_from(best) {
                counted[token / self.group_tokens()] += 1;
                fraction[token / self.group_tokens() * experts + best] += 1.0;
            }
        }
        for (fractions, &counted) in fraction.chunks_mut(experts).zip(&counted) {
            fractions.iter_mut().for_each(|f| *f /= counted.max(1) as f32);
        }
        let counted_entropy = |(&entropy, &counted): (&f32, &bool)| if counted { entropy } else { 0.0 };
        let entropy = self.entropy.iter().zip(&self.mask).map(counted_entropy).collect();
        let fixed = self.options.expert_capacity.is_some();
        let plan = DispatchPlan::new(token_of_slot.clone(), experts, slots, fixed, self.tokens(), &device);
        let choice = host::int_tensor(self.best.clone(), [self.tokens()], &device);
        let gate = Gate { scores: self, token_of_slot, rule, counted };
        let [gates, mean_probability, z] = apply(gate, [Operand::from(logits)]);
        Routing {
            plan,
            gates: gates.into_tensor(),
            mean_probability: mean_probability.into_tensor(),
            fraction: float(fraction).reshape([groups, experts]),
            z: z.into_tensor(),
            choice,
            entropy: float(entropy),
        }
    }
}

/// The differentiable part: logits to gates, mean probabilities and z.
pub(crate) struct Gate {
    pub(crate) scores: Scores,
    pub(crate) token_of_slot: Vec<i32>,
    pub(crate) rule: GateRule,
    /// Counted tokens of each group.
    pub(crate) counted: Vec<usize>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gate({:?})", self.scores.options)
    }
}

impl Gate {
    /// Token and expert of every slot in use.
    fn assigned(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let slots = self.token_of_slot.len() / self.scores.experts;
        self.token_of_slot
            .iter()
            .enumerate()
            .filter_map(move |(slot, &token)| usize::try_from(token).ok().map(|t| (slot, t, slot / slots)))
    }

    fn divisor(&self, token: usize) -> f32 {
        let row = self.scores.row(token);
        match &self.rule {
            GateRule::Probability => 1.0,
            GateRule::Normalized { second } => {
                row[self.scores.best[token] as usize] + row[second[token] as usize]
            }
        }
    }

    /// Means over each group's counted tokens: probabilities, `[groups, num_experts]`, and `log_z^2`.
    ///
    /// Summed by blocks of fixed size, so that the result does not depend on the number of threads.
    fn group_means(&self) -> (Vec<f32>, Vec<f32>) {
        let (scores, experts) = (&self.scores, self.scores.experts);
        let (groups, tokens) = (scores.options.groups, scores.group_tokens());
        let blocks: Vec<(usize, Range<usize>)> = (0..groups)
            .flat_map(|group| {
                let end = (group + 1) * tokens;
                let starts = (group * tokens..end).step_by(BLOCK_TOKENS);
                starts.map(move |start| (group, start..end.min(start + BLOCK_TOKENS)))
            })
            .collect();
        let sums: Vec<(Vec<f32>, f32)> = blocks
            .par_iter()
            .map(|(_, tokens)| {
                let (mut sums, mut z) = (vec![0.0; experts], 0.0);
                for token in tokens.clone().filter(|&token| scores.mask[token]) {
                    sums.iter_mut().zip(scores.row(token)).for_each(|(sum, p)| *sum += p);
                    z += scores.log_z[token].powi(2);
                }
                (sums, z)
            })
            .collect();
        let (mut mean, mut z) = (vec![0.0; groups * experts], vec![0.0; groups]);
        for (&(group, _), (sums, z_sum)) in blocks.iter().zip(&sums) {
            let share = 1.0 / self.counted[group].max(1) as f32;
            let mean = &mut mean[group * experts..][..experts];
            mean.iter_mut().zip(sums).for_each(|(mean, sum)| *mean += sum * share);
            z[group] += z_sum * share;
        }
        (mean, z)
    }

    /// Gradient of the probabilities from that of the gates, `[tokens, num_experts]`.
    fn through_gates(&self, gradient: &[f32]) -> Vec<f32> {
        let experts = self.scores.experts;
        let mut gp = vec![0.0; self.scores.probabilities.len()];
        for (slot, token, expert) in self.assigned() {
            gp[token * experts + expert] += gradient[slot];
        }
        if let GateRule::Normalized { second } = &self.rule {
            for (token, gp) in gp.chunks_exact_mut(experts).enumerate() {
                let (Ok(a), Ok(b)) =
                    (usize::try_from(self.scores.best[token]), usize::try_from(second[token]))
                else {
                    continue;
                };
                let (pa, pb) = (self.scores.row(token)[a], self.scores.row(token)[b]);
                let common = (gp[a] - gp[b]) / ((pa + pb) * (pa + pb));
                (gp[a], gp[b]) = (common * pb, -common * pa);
            }
        }
        gp
    }
}

impl Operation<Flex, 1, 3> for Gate {
    type Saved = ();

    fn forward(&self, _: &[FlexTensor; 1], _: bool) -> ([FlexTensor; 3], ()) {
        let (scores, experts) = (&self.scores, self.scores.experts);
        let mut gates = vec![0.0; self.token_of_slot.len()];
        for (slot, token, expert) in self.assigned() {
            let gate = scores.row(token)[expert] / self.divisor(token);
            gates[slot] = if scores.format == DType::BF16 { bf16::round(gate).widen() } else { gate };
        }
        let (groups, slots) = (scores.options.groups, gates.len());
        let (mean, z) = self.group_means();
        ([host::tensor(gates, [slots]), host::tensor(mean, [groups, experts]), host::tensor(z, [groups])], ())
    }

    fn backward(&self, (): &(), gradients: [Option<FlexTensor>; 3], _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let (scores, experts) = (&self.scores, self.scores.experts);
        let arrived = gradients.iter().enumerate().find_map(|(i, g)| g.as_ref().map(|g| (i, g)));
        let (output, gradient) = arrived.expect("a backward pass begins with a gradient");
        let gradient = host::values::<f32>(gradient);
        let through_gates = if output == 0 { self.through_gates(gradient) } else { Vec::new() };
        let mut logits = vec![0.0; scores.probabilities.len()];
        logits.par_chunks_mut(experts).enumerate().with_min_len(64).for_each(|(token, out)| {
            if !scores.mask[token] {
                return;
            }
            let (p, group) = (scores.row(token), token / scores.group_tokens());
            let share = 1.0 / self.counted[group] as f32;
            match output {
                0 => softmax_backward(p, &through_gates[token * experts..][..experts], 1.0, out),
                1 => softmax_backward(p, &gradient[group * experts..][..experts], share, out),
                _ => {
                    let factor = 2.0 * scores.log_z[token] * share * gradient[group];
                    for (out, p) in out.iter_mut().zip(p) {
                        *out = factor * p;
                    }
                }
            }
        });
        [Some(host::rounded(logits, [scores.tokens(), experts], scores.format))]
    }
}

/// Index of the largest value, the lowest on ties.
fn first_largest(row: &[f32]) -> i32 {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter().position(|&value| value == largest).unwrap_or(0) as i32
}

/// Index of the largest value other than at `except`, the lowest on ties.
fn argmax(row: &[f32], except: i32) -> i32 {
    let mut best = if except == 0 { 1 } else { 0 };
    for (i, value) in row.iter().enumerate() {
        if *value > row[best] && i as i32 != except {
            best = i;
        }
    }
    best as i32
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn softmax_rows(rows: &mut [f32], logits: &[f32], experts: usize, log_z: &mut [f32], entropy: &mut [f32]) {
    let outputs = log_z.iter_mut().zip(entropy);
    for ((row, logits), (log_z, entropy)) in
        rows.chunks_exact_mut(experts).zip(logits.chunks_exact(experts)).zip(outputs)
    {
        let largest = max(row);
        for value in row.iter_mut() {
            *value = exp(*value - largest);
        }
        let total = sum(row);
        for value in row.iter_mut() {
            *value /= total;
        }
        *log_z = largest + total.ln();
        // -sum p ln p, with ln p = logit - log_z; rounding may leave it just below 0.
        *entropy = (*log_z - dot(row, logits)).max(0.0);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn softmax_backward(p: &[f32], gradient: &[f32], factor: f32, out: &mut [f32]) {
    let total = dot(p, gradient);
    for ((out, p), g) in out.iter_mut().zip(p).zip(gradient) {
        *out = factor * p * (g - total);
    }
}

#[cfg(test)]
mod tests;
