//! The fast path beside the masks and einsums of the paper's appendix F.

use burn::tensor::activation;

use super::*;
use crate::test_device;

/// One slot of the reference: position `position` of `expert` in the token's group.
#[derive(Debug, Clone, Copy)]
struct Slot {
    token: usize,
    expert: usize,
    position: usize,
}

/// Sorted values that lie relatively closer than this may be ordered by the last bits of a softmax.
const DECISIVE: f64 = 1e-6;

impl Case {
    fn leaves(&self, device: &Device) -> [Tensor<2>; 3] {
        [
            random([self.len(), D], self.seed, device).require_grad(),
            self.logits(device).require_grad(),
            random([self.experts, D], self.seed + 2, device).require_grad(),
        ]
    }

    /// Slots in use, ordered by expert, group and position; `None` when rounding decides an order.
    fn slots(&self, logits: &[f32]) -> Option<Vec<Slot>> {
        let mut slots = Vec::new();
        for group in 0..self.groups {
            let tokens = group * self.tokens..(group + 1) * self.tokens;
            let counted: Vec<usize> = tokens.filter(|&token| self.mask[token] == 1).collect();
            match self.router {
                Kind::Top1 => self.serve(&counted, &[0], logits, &mut slots),
                Kind::Top2 => self.serve(&counted, &[0, 1], logits, &mut slots),
                Kind::ExpertChoice => self.pick(&counted, logits, &mut slots)?,
            }
        }
        slots.sort_by_key(|slot| (slot.expert, slot.token / self.tokens, slot.position));
        Some(slots)
    }

    /// Experts of a token from the likeliest on; the lowest index first on ties.
    fn ranking(&self, logits: &[f32], token: usize) -> Vec<usize> {
        let row = &logits[token * self.experts..][..self.experts];
        let mut ranking: Vec<usize> = (0..self.experts).collect();
        ranking.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        ranking
    }

    /// All first choices in token order, then all second choices.
    fn serve(&self, counted: &[usize], ranks: &[usize], logits: &[f32], slots: &mut Vec<Slot>) {
        let mut next = vec![0; self.experts];
        for &rank in ranks {
            for &token in counted {
                let expert = self.ranking(logits, token)[rank];
                if next[expert] < self.capacity {
                    slots.push(Slot { token, expert, position: next[expert] });
                    next[expert] += 1;
                }
            }
        }
    }

    /// Every expert takes its likeliest tokens.
    fn pick(&self, counted: &[usize], logits: &[f32], slots: &mut Vec<Slot>) -> Option<()> {
        let probability = |token: usize, expert: usize| {
            let row = &logits[token * self.experts..][..self.experts];
            let total: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            f64::from(row[expert]).exp() / total
        };
        for expert in 0..self.experts {
            let mut tokens: Vec<(f64, usize)> =
                counted.iter().map(|&token| (probability(token, expert), token)).collect();
            tokens.sort_by(|a, b| b.0.total_cmp(&a.0));
            if tokens.windows(2).any(|pair| pair[0].0 - pair[1].0 < DECISIVE * pair[0].0) {
                return None;
            }
            let taken = tokens.into_iter().take(self.capacity).enumerate();
            slots.extend(taken.map(|(position, (_, token))| Slot { token, expert, position }));
        }
        Some(())
    }

    /// Appendix F's dispatch mask, a capacity axis for each group. `[tokens, experts * groups * capacity]`
    fn mask_tensor(&self, slots: &[Slot], device: &Device) -> Tensor<2> {
        let width = self.experts * self.groups * self.capacity;
        let mut mask = vec![0.0_f32; self.len() * width];
        for slot in slots {
            let group = slot.token / self.tokens;
            let column = (slot.expert * self.groups + group) * self.capacity + slot.position;
            mask[slot.token * width + column] = 1.0;
        }
        Tensor::<1>::from_data(mask.as_slice(), device).reshape([self.len(), width])
    }

    /// Gate of every token for every expert, from tensor operations. `[tokens, experts]`
    fn gates(&self, logits: Tensor<2>, values: &[f32], device: &Device) -> Tensor<2> {
        let p = activation::softmax(logits, 1);
        if self.router != Kind::Top2 {
            return p;
        }
        let mut chosen = vec![0.0_f32; values.len()];
        for token in 0..self.len() {
            for &expert in &self.ranking(values, token)[..2] {
                chosen[token * self.experts + expert] = 1.0;
            }
        }
        let chosen = Tensor::<1>::from_data(chosen.as_slice(), device).reshape([self.len(), self.experts]);
        let p = p * chosen;
        p.clone() / p.sum_dim(1)
    }

    /// Balance and z-loss of every group, from tensor operations.
    fn losses(&self, logits: Tensor<2>, values: &[f32], device: &Device) -> Tensor<1> {
        let p = activation::softmax(logits.clone(), 1);
        let log_z = logits.exp().sum_dim(1).log();
        let mut total = Tensor::<1>::zeros([1], device);
        for group in 0..self.groups {
            let counts = |token: usize| token / self.tokens == group && self.mask[token] == 1;
            let count = (0..self.len()).filter(|&token| counts(token)).count().max(1) as f64;
            let mut f = vec![0.0_f32; self.experts];
            for token in (0..self.len()).filter(|&token| counts(token)) {
                f[self.ranking(values, token)[0]] += 1.0 / count as f32;
            }
            let rows: Vec<f32> = (0..self.len()).map(|token| if counts(token) { 1.0 } else { 0.0 }).collect();
            let rows = Tensor::<1>::from_data(rows.as_slice(), device).reshape([self.len(), 1]) / count;
            let f = Tensor::<1>::from_data(f.as_slice(), device).reshape([1, self.experts]);
            total = total + ((p.clone() * rows.clone()).sum_dim(0) * f).sum() * self.experts as f64;
            total = total + (log_z.clone().square() * rows).sum();
        }
        total
    }
}

/// Output of a layer whose expert `e` multiplies by `scale[e]`, and gradients of the three leaves.
struct Outcome {
    out: Tensor<2>,
    gradients: [Tensor<2>; 3],
}

fn outcome(out: Tensor<2>, losses: Tensor<1>, leaves: &[Tensor<2>; 3]) -> Outcome {
    let weights = random(out.dims(), 99, &out.device());
    let gradients = ((out.clone() * weights).sum() + losses).backward();
    Outcome {
        out: out.inner(),
        gradients: leaves.each_ref().map(|leaf| leaf.grad(&gradients).expect("leaf")),
    }
}

fn fast(case: &Case, leaves: &[Tensor<2>; 3]) -> Outcome {
    let [x, logits, scale] = leaves.clone();
    let routing = case.route(logits);
    let expert_out = dispatch(x, &routing.plan) * scale.unsqueeze_dim(1);
    let out = combine(expert_out, routing.gates, &routing.plan, None);
    let balance =
        (routing.mean_probability * Tensor::from_inner(routing.fraction)).sum() * case.experts as f64;
    outcome(out, balance + routing.z.sum(), leaves)
}

fn einsum(case: &Case, slots: &[Slot], leaves: &[Tensor<2>; 3], device: &Device) -> Outcome {
    let [x, logits, scale] = leaves.clone();
    let values = host::with_values(logits.clone(), <[f32]>::to_vec);
    let (n, slots_per_expert) = (case.len(), case.groups * case.capacity);
    let mask = case.mask_tensor(slots, device);
    let dispatched = mask.clone().transpose().matmul(x).reshape([case.experts, slots_per_expert, D]);
    let expert_out = (dispatched * scale.unsqueeze_dim(1)).reshape([case.experts * slots_per_expert, D]);
    let gates = case.gates(logits.clone(), &values, device).unsqueeze_dim::<3>(2);
    let combine = mask.reshape([n, case.experts, slots_per_expert]) * gates;
    let out = combine.reshape([n, case.experts * slots_per_expert]).matmul(expert_out);
    outcome(out, case.losses(logits, &values, device), leaves)
}

/// Rows are copied and zeros stay zeros, so with equal gates nothing may differ by a bit; only a
/// token of several slots has a sum whose order is the matrix product's own affair.
fn assert_exact(case: &Case, slots: &[Slot], [x, logits, _]: &[Tensor<2>; 3]) {
    let device = test_device();
    let routing = case.route(logits.clone().inner());
    let token_of_slot = host::integers(&routing.plan.token_of_slot);
    let in_use: Vec<i32> = token_of_slot.into_iter().filter(|&token| token >= 0).collect();
    assert_eq!(in_use, slots.iter().map(|slot| slot.token as i32).collect::<Vec<_>>(), "{case:?}");

    let mask = case.mask_tensor(slots, &device);
    let by_einsum = mask.clone().transpose().matmul(x.clone().inner());
    let dispatched = dispatch(x.clone().inner(), &routing.plan);
    let width = case.experts * case.groups * case.capacity;
    let fast_rows = rows_in_use(dispatched.clone().reshape([width, D]));
    assert_eq!(fast_rows, rows_in_use(by_einsum.clone()), "dispatch of {case:?}");

    // The gates of the fast path, laid out as the reference has its slots.
    let gates = host::with_values(routing.gates.clone(), |gates| {
        gates.iter().copied().filter(|&gate| gate != 0.0).collect::<Vec<f32>>()
    });
    let mut spread = vec![0.0_f32; width];
    for (slot, gate) in slots.iter().zip(gates) {
        let group = slot.token / case.tokens;
        spread[(slot.expert * case.groups + group) * case.capacity + slot.position] = gate;
    }
    let spread = Tensor::<1>::from_data(spread.as_slice(), &device).unsqueeze::<2>();
    let plain = (mask * spread).matmul(by_einsum);
    let fused = combine(dispatched, routing.gates, &routing.plan, None);
    if case.router == Kind::Top1 {
        assert_eq!(fused.into_data(), plain.into_data(), "combine of {case:?}");
    } else {
        assert!(difference(fused, plain) < 1e-6, "combine of {case:?}");
    }
}

/// Values of the rows that are not all zero.
fn rows_in_use(rows: Tensor<2>) -> Vec<Vec<f32>> {
    let rows = host::with_values(rows, |values| values.chunks(D).map(<[f32]>::to_vec).collect::<Vec<_>>());
    rows.into_iter().filter(|row| row.iter().any(|&value| value != 0.0)).collect()
}

fn difference(a: Tensor<2>, b: Tensor<2>) -> f32 {
    (a - b).abs().max().into_scalar()
}

/// Whether the case was compared: rounding may not decide the reference's order.
fn compare(case: &Case) -> bool {
    let device = test_device().autodiff();
    let leaves = case.leaves(&device);
    let logits = host::with_values(leaves[1].clone(), <[f32]>::to_vec);
    let Some(slots) = case.slots(&logits) else { return false };
    assert_exact(case, &slots, &leaves);
    let (fast, plain) = (fast(case, &leaves), einsum(case, &slots, &leaves, &device));
    assert!(difference(fast.out, plain.out) < 1e-6, "output of {case:?}");
    for (name, (a, b)) in
        ["x", "logits", "experts"].iter().zip(fast.gradients.into_iter().zip(plain.gradients))
    {
        let scale: f32 = b.clone().abs().max().into_scalar();
        let found = difference(a, b);
        assert!(found < 1e-6 * scale.max(1.0), "gradient of {name} in {case:?}: {found}");
    }
    true
}

#[test]
fn every_router_equals_the_einsum_reference() {
    for router in ROUTERS {
        let mut compared = 0;
        for seed in 0..60 {
            let shape = |salt: u64, below: u64| (seed * 2_654_435_761 + salt * 40_503) / 7 % below;
            let (groups, tokens) = (1 + shape(1, 3) as usize, 1 + shape(2, 14) as usize);
            let padding = shape(3, 4);
            let mask =
                (0..groups * tokens).map(|t| i32::from(padding == 0 || t as u64 % 4 != padding)).collect();
            let case = Case {
                router,
                groups,
                tokens,
                experts: 2 + shape(4, 7) as usize,
                capacity: 1 + shape(5, 5) as usize,
                seed: seed * 10,
                mask,
                idle_expert: seed % 3 == 0,
            };
            compared += usize::from(compare(&case));
        }
        assert!(compared >= 55, "{router:?}: {compared} cases compared");
    }
}

#[test]
fn corner_cases_equal_the_einsum_reference() {
    for router in ROUTERS {
        let case = |groups, tokens, experts, capacity, seed| Case {
            router,
            groups,
            tokens,
            experts,
            capacity,
            seed,
            mask: vec![1; groups * tokens],
            idle_expert: false,
        };
        assert!(compare(&case(1, 16, 4, 1, 5)), "capacity 1");
        assert!(compare(&case(1, 1, 2, 1, 6)), "one token");
        assert!(compare(&case(1, 3, 8, 2, 7)), "more experts than tokens");
        assert!(compare(&Case { idle_expert: true, ..case(2, 12, 4, 12, 8) }), "an expert that none prefers");
        assert!(compare(&Case { mask: vec![0; 12], ..case(2, 6, 3, 2, 9) }), "all padding");
        let half = (0..16).map(|token| i32::from(token >= 8)).collect();
        assert!(compare(&Case { mask: half, ..case(2, 8, 3, 3, 10) }), "one group all padding");
    }
}
