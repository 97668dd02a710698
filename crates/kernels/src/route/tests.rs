//! Routing and dispatch against a mask-and-einsum reference.

use burn::tensor::{Device, activation};
use proptest::prelude::*;

use super::*;
use crate::dispatch::{combine, dispatch};

#[derive(Debug, Clone, Copy)]
struct Case {
    groups: usize,
    tokens: usize,
    experts: usize,
    capacity: usize,
    seed: u64,
}

const D: usize = 6;

fn random(shape: [usize; 2], seed: u64, device: &Device) -> Tensor<2> {
    let philox = switchyard_random::Philox::new(seed);
    let values: Vec<f32> = (0..shape[0] * shape[1])
        .map(|i| switchyard_random::unit_f32(philox.block([i as u32, 1, 2, 3])[0]) * 4.0 - 2.0)
        .collect();
    Tensor::<1>::from_data(values.as_slice(), device).reshape(shape)
}

/// Dispatch mask `[groups * tokens, experts, capacity]` of the paper's appendix F.
fn reference_mask(probabilities: &[f32], mask: &[i32], case: Case) -> Vec<f32> {
    let Case { groups, tokens, experts, capacity, .. } = case;
    let mut out = vec![0.0; groups * tokens * experts * capacity];
    for group in 0..groups {
        let mut position = vec![0; experts];
        for token in group * tokens..(group + 1) * tokens {
            let row = &probabilities[token * experts..][..experts];
            let best = (0..experts).fold(0, |best, e| if row[e] > row[best] { e } else { best });
            if mask[token] == 1 && position[best] < capacity {
                out[(token * experts + best) * capacity + position[best]] = 1.0;
            }
            position[best] += mask[token] as usize;
        }
    }
    out
}

/// Output and gradients of a layer whose expert `e` multiplies its input by `scale[e]`.
struct Outcome {
    out: Tensor<2>,
    x: Tensor<2>,
    logits: Tensor<2>,
    scale: Tensor<2>,
}

fn leaves(case: Case, device: &Device) -> [Tensor<2>; 3] {
    let n = case.groups * case.tokens;
    [
        random([n, D], case.seed, device).require_grad(),
        random([n, case.experts], case.seed + 1, device).require_grad(),
        random([case.experts, D], case.seed + 2, device).require_grad(),
    ]
}

fn outcome(out: Tensor<2>, losses: Tensor<1>, [x, logits, scale]: [Tensor<2>; 3]) -> Outcome {
    let weights = random(out.dims(), 99, &out.device());
    let gradients = ((out.clone() * weights).sum() + losses.sum()).backward();
    Outcome {
        out: out.inner(),
        x: x.grad(&gradients).expect("leaf"),
        logits: logits.grad(&gradients).expect("leaf"),
        scale: scale.grad(&gradients).expect("leaf"),
    }
}

fn fast(case: Case, mask: &[i32], device: &Device) -> Outcome {
    let leaves = leaves(case, device);
    let [x, logits, scale] = leaves.clone();
    let n = mask.len();
    let routing = route_top1(
        logits,
        RouteOptions {
            groups: case.groups,
            expert_capacity: case.capacity,
            token_mask: Some(host::int_tensor(mask.to_vec(), [n], device)),
            force_balanced: false,
        },
    );
    let dispatched = dispatch(x, &routing.plan);
    let expert_out = dispatched * scale.unsqueeze_dim(1);
    let out = combine(expert_out, routing.gates, &routing.plan);
    let balance = (routing.mean_probability * Tensor::from_inner(routing.fraction)).sum() * case.experts as f64;
    outcome(out, balance + routing.z.sum(), leaves)
}

fn einsum(case: Case, mask: &[i32], device: &Device) -> Outcome {
    let leaves = leaves(case, device);
    let [x, logits, scale] = leaves.clone();
    let Case { groups, tokens, experts, capacity, .. } = case;
    let n = groups * tokens;
    let p = activation::softmax(logits.clone(), 1);
    let values = p.clone().inner().into_data().try_to_vec::<f32>().unwrap();
    let slots = reference_mask(&values, mask, case);
    let slots = Tensor::<1>::from_data(slots.as_slice(), device).reshape([n, experts, capacity]);
    // Each group has slots of its own: spread the capacity axis over groups.
    let group_of = |g: usize| {
        let rows: Vec<f32> = (0..n).map(|t| if t / tokens == g { 1.0 } else { 0.0 }).collect();
        Tensor::<1>::from_data(rows.as_slice(), device).reshape([n, 1, 1])
    };
    let slots = Tensor::cat((0..groups).map(|g| slots.clone() * group_of(g)).collect(), 2);
    let flat = slots.clone().reshape([n, experts * groups * capacity]);
    let dispatched = flat.clone().transpose().matmul(x).reshape([experts, groups * capacity, D]);
    let expert_out = (dispatched * scale.unsqueeze_dim(1)).reshape([experts * groups * capacity, D]);
    let combine = (slots * p.clone().unsqueeze_dim(2)).reshape([n, experts * groups * capacity]);
    let out = combine.matmul(expert_out);

    let mut losses = Tensor::<1>::zeros([1], device);
    for g in 0..groups {
        let counted: Vec<f32> =
            (0..n).map(|t| if t / tokens == g && mask[t] == 1 { 1.0 } else { 0.0 }).collect();
        let total = counted.iter().sum::<f32>().max(1.0);
        let mut f = vec![0.0_f32; experts];
        for t in (0..n).filter(|&t| counted[t] == 1.0) {
            let row = &values[t * experts..][..experts];
            let best = (0..experts).fold(0, |best, e| if row[e] > row[best] { e } else { best });
            f[best] += 1.0 / total;
        }
        let counted = Tensor::<1>::from_data(counted.as_slice(), device).reshape([n, 1]) / total;
        let mean = (p.clone() * counted.clone()).sum_dim(0);
        let f = Tensor::<1>::from_data(f.as_slice(), device).reshape([1, experts]);
        losses = losses + (mean * f).sum() * experts as f64;
        let log_z = logits.clone().exp().sum_dim(1).log();
        losses = losses + (log_z.square() * counted).sum();
    }
    outcome(out, losses, leaves)
}

fn assert_equal(case: Case, mask: &[i32]) {
    let device = Device::flex().autodiff();
    let (fast, plain) = (fast(case, mask, &device), einsum(case, mask, &device));
    let difference = |a: Tensor<2>, b: Tensor<2>| (a - b).abs().max().into_scalar::<f32>();
    assert!(difference(fast.out, plain.out) <= 1e-6, "output of {case:?}");
    assert!(difference(fast.x, plain.x) <= 1e-6, "gradient of x in {case:?}");
    assert!(difference(fast.logits, plain.logits) <= 2e-6, "gradient of logits in {case:?}");
    assert!(difference(fast.scale, plain.scale) <= 1e-5, "gradient of experts in {case:?}");
}

#[test]
fn equals_the_einsum_reference_for_many_seeds() {
    for seed in 0..20 {
        let case = Case { groups: 2, tokens: 12, experts: 4, capacity: 4, seed };
        assert_equal(case, &vec![1; 24]);
        let mask: Vec<i32> = (0..24).map(|t| i32::from(t % 5 != seed as usize % 5)).collect();
        assert_equal(case, &mask);
    }
}

#[test]
fn capacity_one_idle_experts_and_empty_groups() {
    assert_equal(Case { groups: 1, tokens: 16, experts: 4, capacity: 1, seed: 5 }, &vec![1; 16]);
    assert_equal(Case { groups: 1, tokens: 3, experts: 8, capacity: 2, seed: 6 }, &vec![1; 3]);
    let mask: Vec<i32> = (0..16).map(|t| i32::from(t >= 8)).collect();
    assert_equal(Case { groups: 2, tokens: 8, experts: 3, capacity: 3, seed: 7 }, &mask);
}

fn options(groups: usize, expert_capacity: usize) -> RouteOptions {
    RouteOptions { groups, expert_capacity, token_mask: None, force_balanced: false }
}

#[test]
fn dispatch_then_combine_is_the_identity_when_nothing_drops() {
    let device = Device::flex();
    let x = random([10, D], 3, &device);
    let mut routing = route_top1(random([10, 4], 4, &device), options(1, 10));
    routing.gates = routing.gates.ones_like();
    let back = combine(dispatch(x.clone(), &routing.plan), routing.gates, &routing.plan);
    assert_eq!(back.into_data(), x.into_data());
}

#[test]
fn top2_gates_sum_to_one_and_their_gradient_equals_finite_differences() {
    let device = Device::flex().autodiff();
    let logits = random([7, 5], 11, &device).require_grad();
    let routing = route_top2(logits.clone(), options(1, 7));
    let total: f32 = routing.gates.clone().sum().into_scalar();
    assert!((total - 7.0).abs() < 1e-5);
    let weights = random([1, 35], 12, &device).reshape([35]);
    let loss = |logits: Tensor<2>| (route_top2(logits, options(1, 7)).gates * weights.clone()).sum();
    let gradients = loss(logits.clone()).backward();
    let gradient = logits.grad(&gradients).expect("leaf").into_data().try_to_vec::<f32>().unwrap();
    let values = logits.clone().inner().into_data().try_to_vec::<f32>().unwrap();
    for at in 0..35 {
        let shifted = |delta: f32| {
            let mut values = values.clone();
            values[at] += delta;
            loss(Tensor::<1>::from_data(values.as_slice(), &device).reshape([7, 5])).into_scalar::<f32>()
        };
        let difference = (shifted(1e-2) - shifted(-1e-2)) / 2e-2;
        assert!((difference - gradient[at]).abs() < 2e-3, "{at}: {difference} {}", gradient[at]);
    }
}

#[test]
fn second_choices_wait_for_all_first_choices() {
    let device = Device::flex();
    // Tokens 0 and 1 prefer expert 0 and then 1; token 2 prefers expert 1 and then 0.
    let logits = Tensor::<2>::from_data([[3.0, 2.0, 0.0], [3.0, 2.0, 0.0], [2.0, 3.0, 0.0]], &device);
    let plan = route_top2(logits, options(1, 2)).plan;
    assert_eq!(host::integers(&plan.token_of_slot), [0, 1, 2, 0, -1, -1]);
}

#[test]
fn expert_choice_fills_every_expert_with_its_likeliest_tokens() {
    let device = Device::flex();
    let logits = Tensor::<2>::from_data([[0.0, 2.0], [1.0, 0.0], [3.0, 0.0], [0.5, 1.0]], &device);
    let routing = route_expert_choice(logits, options(1, 2));
    assert_eq!(host::integers(&routing.plan.token_of_slot), [2, 1, 0, 3]);
    assert_eq!(host::integers(&routing.plan.rows_used), [2, 2]);
}

#[test]
fn forced_balance_gives_every_expert_the_same_load() {
    let device = Device::flex();
    let balanced = RouteOptions { force_balanced: true, ..options(1, 16) };
    let plan = route_top1(random([16, 4], 1, &device), balanced).plan;
    assert_eq!(host::integers(&plan.rows_used), [4, 4, 4, 4]);
}

proptest! {
    #[test]
    fn no_slot_is_used_twice_and_capacity_holds(
        seed in 0_u64..1000, groups in 1_usize..4, tokens in 1_usize..20, experts in 2_usize..9, capacity in 1_usize..6,
    ) {
        let device = Device::flex();
        let logits = random([groups * tokens, experts], seed, &device);
        let routing = route_top1(logits, options(groups, capacity));
        let slots = host::integers(&routing.plan.token_of_slot);
        let mut seen = vec![false; groups * tokens];
        for &token in slots.iter().filter(|&&t| t >= 0) {
            prop_assert!(!std::mem::replace(&mut seen[token as usize], true));
        }
        for expert in slots.chunks(groups * capacity) {
            for group in 0..groups {
                let held = expert.iter().filter(|&&t| t >= 0 && t as usize / tokens == group).count();
                prop_assert!(held <= capacity);
            }
        }
        let kept = host::integers(&routing.plan.rows_used).iter().sum::<i32>() as usize;
        let dropped = seen.iter().filter(|seen| !**seen).count();
        prop_assert_eq!(kept + dropped, groups * tokens);
    }
}
