//! Routing: properties of every plan, and the rules of each router on small examples.

use burn::tensor::Device;
use proptest::prelude::*;

use super::*;
use crate::dispatch::{combine, dispatch};
use crate::test_device;

mod einsum;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Top1,
    Top2,
    ExpertChoice,
}

const ROUTERS: [Kind; 3] = [Kind::Top1, Kind::Top2, Kind::ExpertChoice];

#[derive(Debug, Clone)]
struct Case {
    router: Kind,
    groups: usize,
    tokens: usize,
    experts: usize,
    capacity: usize,
    seed: u64,
    /// 1 for tokens that are routed.
    mask: Vec<i32>,
    /// Make expert 0 the last choice of every token.
    idle_expert: bool,
}

/// Width of a token.
const D: usize = 6;

fn random(shape: [usize; 2], seed: u64, device: &Device) -> Tensor<2> {
    let philox = switchyard_random::Philox::new(seed);
    let values: Vec<f32> = (0..shape[0] * shape[1])
        .map(|i| switchyard_random::unit_f32(philox.block([i as u32, 1, 2, 3])[0]) * 4.0 - 2.0)
        .collect();
    Tensor::<1>::from_data(values.as_slice(), device).reshape(shape)
}

impl Case {
    fn len(&self) -> usize {
        self.groups * self.tokens
    }

    fn logits(&self, device: &Device) -> Tensor<2> {
        let logits = random([self.len(), self.experts], self.seed + 1, device);
        let column: Vec<f32> =
            (0..self.experts).map(|e| if e == 0 && self.idle_expert { -8.0 } else { 0.0 }).collect();
        logits + Tensor::<1>::from_data(column.as_slice(), device).unsqueeze()
    }

    fn route(&self, logits: Tensor<2>) -> Routing {
        let mask = host::int_tensor(self.mask.clone(), [self.len()], &logits.device().inner());
        let options = RouteOptions { token_mask: Some(mask), ..options(self.groups, self.capacity) };
        match self.router {
            Kind::Top1 => route_top1(logits, options),
            Kind::Top2 => route_top2(logits, options),
            Kind::ExpertChoice => route_expert_choice(logits, options),
        }
    }
}

/// Whether two ways to the same numbers, on a GPU by different kernels, have found them.
fn alike<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> bool {
    a.dims() == b.dims() && (a - b).abs().max().into_scalar::<f32>() < 1e-6
}

fn options(groups: usize, expert_capacity: usize) -> RouteOptions {
    let expert_capacity = Some(expert_capacity);
    RouteOptions { groups, expert_capacity, token_mask: None, force_balanced: false }
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (1_usize..4, 1_usize..20, 2_usize..9, 1_usize..6);
    let others = (0..3_usize, 0_u64..1_000_000, 0..5_usize, any::<bool>());
    (sizes, others).prop_map(|((groups, tokens, experts, capacity), (router, seed, padding, idle_expert))| {
        let mask = (0..groups * tokens).map(|t| i32::from(padding == 0 || t % 5 != padding - 1)).collect();
        Case { router: ROUTERS[router], groups, tokens, experts, capacity, seed, mask, idle_expert }
    })
}

proptest! {
    #[test]
    fn plans_keep_their_promises(case in cases()) {
        let device = test_device();
        let routing = case.route(case.logits(&device));
        let slots = host::integers(&routing.plan.token_of_slot);
        let used = host::integers(&routing.plan.rows_used);
        let gates = host::with_values(routing.gates.clone(), <[f32]>::to_vec);
        let slots_per_expert = case.groups * case.capacity;
        let mut visits = vec![0; case.len()];
        for (expert, slots) in slots.chunks(slots_per_expert).enumerate() {
            let (held, free) = slots.split_at(used[expert] as usize);
            prop_assert!(free.iter().all(|&token| token == -1), "tokens stand before free slots");
            let mut tokens = held.to_vec();
            tokens.sort_unstable();
            tokens.dedup();
            prop_assert_eq!(tokens.len(), held.len(), "no token twice at one expert");
            for group in 0..case.groups {
                let in_group = held.iter().filter(|&&token| token as usize / case.tokens == group).count();
                prop_assert!(in_group <= case.capacity, "capacity holds in every group");
            }
            for &token in held {
                prop_assert_eq!(case.mask[token as usize], 1, "padding takes no slot");
                visits[token as usize] += 1;
            }
        }
        for (slot, &token) in slots.iter().enumerate() {
            prop_assert_eq!(gates[slot] > 0.0, token >= 0, "a gate for every token and none else");
        }
        let most = match case.router { Kind::Top1 => 1, Kind::Top2 => 2, Kind::ExpertChoice => case.experts };
        prop_assert!(visits.iter().all(|&visits| visits <= most));

        // The plan's two directions agree.
        for (token, own) in routing.plan.token_slots().iter().enumerate() {
            prop_assert_eq!(own.len(), visits[token]);
            prop_assert!(own.iter().all(|&slot| slots[slot as usize] == token as i32));
        }
    }

    #[test]
    fn tokens_are_dropped_only_from_full_experts_and_leave_exactly_zero(case in cases()) {
        let case = Case { router: Kind::Top1, ..case };
        let device = test_device();
        let routing = case.route(case.logits(&device));
        let choice = host::integers(&routing.choice);
        let slots = host::integers(&routing.plan.token_of_slot);
        let out = combine(
            dispatch(Tensor::ones([case.len(), D], &device), &routing.plan),
            routing.gates.clone(),
            &routing.plan,
            None,
        );
        let out = host::with_values(out, <[f32]>::to_vec);
        let (mut kept, mut dropped) = (0, 0);
        for token in 0..case.len() {
            let row = &out[token * D..][..D];
            prop_assert_eq!(choice[token] == -1, case.mask[token] == 0);
            if slots.contains(&(token as i32)) {
                kept += 1;
                prop_assert!(row.iter().all(|&value| value > 0.0));
                continue;
            }
            prop_assert!(row.iter().all(|value| value.to_bits() == 0), "{row:?}");
            if let Ok(expert) = usize::try_from(choice[token]) {
                dropped += 1;
                let held = &slots[expert * case.groups * case.capacity..][..case.groups * case.capacity];
                let group = token / case.tokens;
                let earlier = |other: i32| other >= 0 && other as usize / case.tokens == group && (other as usize) < token;
                prop_assert_eq!(held.iter().filter(|&&other| earlier(other)).count(), case.capacity);
            }
        }
        prop_assert_eq!(kept + dropped, case.mask.iter().sum::<i32>());
    }

    #[test]
    fn dispatch_then_combine_is_the_identity_when_nothing_drops(case in cases()) {
        let case = Case { router: Kind::Top1, capacity: case.tokens, mask: vec![1; case.len()], ..case };
        let device = test_device();
        let x = random([case.len(), D], 3, &device);
        let routing = case.route(case.logits(&device));
        let back = combine(dispatch(x.clone(), &routing.plan), routing.gates.ones_like(), &routing.plan, None);
        prop_assert_eq!(back.into_data(), x.into_data());
    }

    #[test]
    fn without_a_capacity_nothing_drops_and_the_fullest_expert_has_no_free_slot(case in cases()) {
        let device = test_device();
        let mask = host::int_tensor(case.mask.clone(), [case.len()], &device);
        let logits = case.logits(&device);
        let roomy = RouteOptions { token_mask: Some(mask), ..options(case.groups, case.tokens) };
        let route = |options| match case.router {
            Kind::Top1 => route_top1(logits.clone(), options),
            Kind::Top2 => route_top2(logits.clone(), options),
            Kind::ExpertChoice => route_expert_choice(logits.clone(), options),
        };
        let (roomy, fitted) = (
            route(roomy.clone()),
            route(RouteOptions { expert_capacity: None, ..roomy }),
        );
        let used = host::integers(&fitted.plan.rows_used);
        prop_assert_eq!(&used, &host::integers(&roomy.plan.rows_used));
        prop_assert_eq!(used.into_iter().fold(1, i32::max) as usize, fitted.plan.slots_per_expert);
        let x = random([case.len(), D], 3, &device);
        let out = |routing: &Routing| {
            combine(dispatch(x.clone(), &routing.plan), routing.gates.clone(), &routing.plan, None)
        };
        prop_assert!(alike(out(&fitted), out(&roomy)));
    }

    #[test]
    fn a_widened_routing_is_that_of_more_slots(case in cases()) {
        let device = test_device().autodiff();
        let roomy = case.groups * case.tokens;
        let weights = random([case.experts, roomy], 5, &device).reshape([case.experts * roomy]);
        let route = |capacity: Option<usize>| {
            let logits = case.logits(&device).detach().require_grad();
            let mask = host::int_tensor(case.mask.clone(), [case.len()], &device.clone().inner());
            let options = RouteOptions { expert_capacity: capacity, token_mask: Some(mask), ..options(case.groups, 1) };
            let routing = match case.router {
                Kind::Top1 => route_top1(logits.clone(), options),
                Kind::Top2 => route_top2(logits.clone(), options),
                Kind::ExpertChoice => route_expert_choice(logits.clone(), options),
            };
            prop_assert_eq!(routing.plan.fixed_capacity, capacity.is_some());
            let routing = routing.widened(roomy);
            let gradients = (routing.gates.clone() * weights.clone()).sum().backward();
            let gradient = logits.grad(&gradients).expect("leaf");
            Ok((routing.plan, routing.gates.inner(), gradient))
        };
        let ((wide, gates, gradient), (plan, other_gates, other_gradient)) =
            (route(None)?, route(Some(case.tokens))?);
        prop_assert_eq!((wide.num_experts, wide.slots_per_expert), (case.experts, roomy));
        for of in [
            |plan: &DispatchPlan| host::integers(&plan.token_of_slot),
            |plan: &DispatchPlan| host::integers(&plan.rows_used),
        ] {
            prop_assert_eq!(of(&wide), of(&plan));
        }
        prop_assert_eq!(wide.token_slots(), plan.token_slots());
        prop_assert!(alike(gates, other_gates));
        prop_assert!(alike(gradient, other_gradient));
    }

    #[test]
    fn ties_go_to_the_lowest_expert(experts in 2_usize..9, tokens in 1_usize..20) {
        let routing = route_top1(Tensor::zeros([tokens, experts], &test_device()), options(1, tokens));
        prop_assert!(host::integers(&routing.choice).iter().all(|&expert| expert == 0));
    }
}

#[test]
fn a_group_without_tokens_has_no_losses_and_no_gradient() {
    let device = test_device().autodiff();
    for router in ROUTERS {
        let case = Case {
            router,
            groups: 2,
            tokens: 5,
            experts: 4,
            capacity: 3,
            seed: 1,
            mask: vec![0; 10],
            idle_expert: false,
        };
        let logits = case.logits(&device).require_grad();
        let routing = case.route(logits.clone());
        let total = routing.gates.sum() + routing.mean_probability.sum() + routing.z.sum();
        let gradients = total.clone().backward();
        assert_eq!(total.into_scalar::<f32>(), 0.0);
        let gradient = logits.grad(&gradients).expect("leaf");
        assert!(host::with_values(gradient, |g| g.iter().all(|&g| g == 0.0)));
        assert!(host::with_values(routing.fraction, |f| f.iter().all(|&f| f == 0.0)));
    }
}

#[test]
fn uniform_routing_has_a_balance_of_one() {
    let device = test_device();
    let logits = Tensor::<2>::from_data([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0], [0.0, 4.0]], &device);
    let routing = route_top1(logits, options(1, 4));
    let balance: f32 = (routing.fraction * routing.mean_probability).sum().into_scalar();
    assert!((balance * 2.0 - 1.0).abs() < 1e-6);
}

#[test]
fn top2_gates_sum_to_one_and_their_gradient_equals_finite_differences() {
    let device = test_device().autodiff();
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
    let device = test_device();
    // Tokens 0 and 1 prefer expert 0 and then 1; token 2 prefers expert 1 and then 0.
    let logits = Tensor::<2>::from_data([[3.0, 2.0, 0.0], [3.0, 2.0, 0.0], [2.0, 3.0, 0.0]], &device);
    let plan = route_top2(logits, options(1, 2)).plan;
    assert_eq!(host::integers(&plan.token_of_slot), [0, 1, 2, 0, -1, -1]);
}

#[test]
fn expert_choice_fills_every_expert_with_its_likeliest_tokens() {
    let device = test_device();
    let logits = Tensor::<2>::from_data([[0.0, 2.0], [1.0, 0.0], [3.0, 0.0], [0.5, 1.0]], &device);
    let routing = route_expert_choice(logits, options(1, 2));
    assert_eq!(host::integers(&routing.plan.token_of_slot), [2, 1, 0, 3]);
    assert_eq!(host::integers(&routing.plan.rows_used), [2, 2]);
}

#[test]
fn forced_balance_gives_every_expert_the_same_load() {
    let device = test_device();
    let balanced = RouteOptions { force_balanced: true, ..options(1, 16) };
    let plan = route_top1(random([16, 4], 1, &device), balanced).plan;
    assert_eq!(host::integers(&plan.rows_used), [4, 4, 4, 4]);
}
