//! Routing against a plain float64 form of it.

use switchyard_cuda::{
    Address, CudaError, Format, Route, RouteAt, RouteGradients, RouterChoice, route, route_backward,
    route_workspace,
};

use crate::support::{Buffer, assert_close, held, normal, queue};

/// What [`route`] left on the device.
struct Routed {
    choice: Buffer,
    second_choice: Buffer,
    entropy: Buffer,
    token_of_slot: Buffer,
    slot_of_token: Buffer,
    gates: Buffer,
    rows_used: Buffer,
    mean_probability: Buffer,
    fraction: Buffer,
    z: Buffer,
    counted: Buffer,
}

fn num_choices(rules: &Route) -> usize {
    if rules.choice == RouterChoice::Top2 { 2 } else { 1 }
}

fn run(logits: &Buffer, mask: Option<&[i32]>, rules: Route) -> Routed {
    let Route { tokens, experts, groups, expert_capacity, .. } = rules;
    let slots = experts * groups * expert_capacity;
    let words = |len| Buffer::poisoned(len, Format::F32);
    let routed = Routed {
        choice: words(tokens),
        second_choice: words(tokens),
        entropy: words(tokens),
        token_of_slot: words(slots),
        slot_of_token: words(tokens * num_choices(&rules)),
        gates: words(slots),
        rows_used: words(experts),
        mean_probability: words(groups * experts),
        fraction: words(groups * experts),
        z: words(groups),
        counted: words(groups),
    };
    let mask = mask.map(Buffer::of);
    let workspace = words(route_workspace(rules).expect("sizes that there are").div_ceil(4));
    let at = RouteAt {
        logits: logits.at(),
        token_mask: mask.as_ref().map_or(Address::NONE, Buffer::at),
        choice: routed.choice.at(),
        second_choice: if num_choices(&rules) == 2 { routed.second_choice.at() } else { Address::NONE },
        entropy: routed.entropy.at(),
        token_of_slot: routed.token_of_slot.at(),
        slot_of_token: routed.slot_of_token.at(),
        gates: routed.gates.at(),
        rows_used: routed.rows_used.at(),
        mean_probability: routed.mean_probability.at(),
        fraction: routed.fraction.at(),
        z: routed.z.at(),
        counted: routed.counted.at(),
        workspace: workspace.at(),
    };
    // SAFETY: all buffers have the values of `rules`.
    unsafe { route(queue(), at, rules) }.expect("launched");
    // The mask and the workspace must outlive the kernels.
    let _ = routed.counted.read::<i32>();
    routed
}

/// Probabilities of a row, its entropy and its `logsumexp`, in float64.
fn softmax(logits: &[f64]) -> (Vec<f64>, f64, f64) {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|l| (l - largest).exp()).sum();
    let log_z = largest + total.ln();
    let p: Vec<f64> = logits.iter().map(|l| (l - log_z).exp()).collect();
    let entropy = log_z - p.iter().zip(logits).map(|(p, l)| p * l).sum::<f64>();
    (p, entropy, log_z)
}

fn largest(p: &[f64], except: Option<usize>) -> usize {
    (0..p.len())
        .filter(|&e| Some(e) != except)
        .fold(None, |best: Option<usize>, e| match best {
            Some(best) if p[best] >= p[e] => Some(best),
            _ => Some(e),
        })
        .expect("two experts at least")
}

/// Choices of each token; those of the device where they are as good.
fn choices(p: &[Vec<f64>], mask: &[i32], found: [&[i32]; 2], rules: &Route, exact: bool) -> [Vec<i32>; 2] {
    let tolerance = if rules.format == Format::F32 { 1e-6 } else { 1.0 / 100.0 };
    let pick = |token: usize, except: Option<usize>, found: i32| {
        let best = largest(&p[token], except);
        let near =
            usize::try_from(found).ok().filter(|&found| found < rules.experts && Some(found) != except);
        match near {
            Some(found) if !exact && p[token][found] >= p[token][best] * (1.0 - tolerance) => found as i32,
            _ => best as i32,
        }
    };
    let mut chosen = [vec![-1; p.len()], vec![-1; p.len()]];
    for token in (0..p.len()).filter(|&token| mask[token] != 0) {
        if rules.force_balanced {
            chosen[0][token] = (token % rules.experts) as i32;
            chosen[1][token] = ((token + 1) % rules.experts) as i32;
        } else {
            chosen[0][token] = pick(token, None, found[0][token]);
            chosen[1][token] = pick(token, Some(chosen[0][token] as usize), found[1][token]);
        }
    }
    chosen
}

struct Expected {
    p: Vec<Vec<f64>>,
    log_z: Vec<f64>,
    token_of_slot: Vec<i32>,
    slot_of_token: Vec<i32>,
    rows_used: Vec<i32>,
    gates: Vec<f64>,
    counted: Vec<i32>,
    mean_probability: Vec<f64>,
    fraction: Vec<f64>,
    z: Vec<f64>,
    entropy: Vec<f64>,
    chosen: [Vec<i32>; 2],
}

fn expected(logits: &[f64], mask: &[i32], found: [&[i32]; 2], rules: &Route, exact: bool) -> Expected {
    let &Route { tokens, experts, groups, expert_capacity, .. } = rules;
    let rows: Vec<(Vec<f64>, f64, f64)> = logits.chunks(experts).map(softmax).collect();
    let p: Vec<Vec<f64>> =
        rows.iter().map(|(p, ..)| p.iter().map(|&p| held(p, rules.format)).collect()).collect();
    let chosen = choices(&p, mask, found, rules, exact);
    let (lists, group_tokens, slots) = (num_choices(rules), tokens / groups, groups * expert_capacity);
    let mut e = Expected {
        p,
        log_z: rows.iter().map(|row| row.2).collect(),
        token_of_slot: vec![-1; experts * slots],
        slot_of_token: vec![-1; tokens * lists],
        rows_used: vec![0; experts],
        gates: vec![0.0; experts * slots],
        counted: vec![0; groups],
        mean_probability: vec![0.0; groups * experts],
        fraction: vec![0.0; groups * experts],
        z: vec![0.0; groups],
        entropy: (0..tokens).map(|t| if mask[t] != 0 { rows[t].1 } else { 0.0 }).collect(),
        chosen,
    };
    for group in 0..groups {
        let mut in_group = vec![0; experts];
        let range = group * group_tokens..(group + 1) * group_tokens;
        for list in 0..lists {
            for token in range.clone().filter(|&token| mask[token] != 0) {
                let expert = e.chosen[list][token] as usize;
                if in_group[expert] == expert_capacity {
                    continue;
                }
                let slot = expert * slots + e.rows_used[expert] as usize;
                in_group[expert] += 1;
                e.rows_used[expert] += 1;
                e.token_of_slot[slot] = token as i32;
                e.slot_of_token[token * lists + list] = slot as i32;
                let row = &e.p[token];
                let both: f64 = (0..2).map(|list| row[e.chosen[list][token] as usize]).sum();
                let gate = row[expert] / if lists == 2 { both } else { 1.0 };
                e.gates[slot] = held(gate, rules.format);
            }
        }
        let counted: Vec<usize> = range.filter(|&token| mask[token] != 0).collect();
        e.counted[group] = counted.len() as i32;
        let share = 1.0 / counted.len().max(1) as f64;
        for token in counted {
            for expert in 0..experts {
                e.mean_probability[group * experts + expert] += share * e.p[token][expert];
            }
            e.fraction[group * experts + e.chosen[0][token] as usize] += share;
            e.z[group] += share * e.log_z[token] * e.log_z[token];
        }
    }
    e
}

fn check(logits: &[f64], mask: Option<&[i32]>, rules: Route, exact: bool) {
    let what = format!("{rules:?}, mask {}", mask.is_some());
    let at = Buffer::floats(logits, rules.format);
    let routed = run(&at, mask, rules);
    let choice = routed.choice.read::<i32>();
    let second = routed.second_choice.read::<i32>();
    let all = vec![1; rules.tokens];
    let e = expected(logits, mask.unwrap_or(&all), [&choice, &second], &rules, exact);
    assert_eq!(choice, e.chosen[0], "{what}: choice");
    if num_choices(&rules) == 2 {
        assert_eq!(second, e.chosen[1], "{what}: second choice");
    }
    assert_eq!(routed.token_of_slot.read::<i32>(), e.token_of_slot, "{what}: token_of_slot");
    assert_eq!(routed.slot_of_token.read::<i32>(), e.slot_of_token, "{what}: slot_of_token");
    assert_eq!(routed.rows_used.read::<i32>(), e.rows_used, "{what}: rows_used");
    assert_eq!(routed.counted.read::<i32>(), e.counted, "{what}: counted");
    let of = |buffer: &Buffer| buffer.read_floats(Format::F32);
    // Probabilities that round to the other side in bfloat16 move what is made of them.
    let tolerance = if rules.format == Format::F32 { 1e-5 } else { 2e-2 };
    let close = |name: &str, found: &Buffer, expected: &[f64]| {
        assert_close(&format!("{what}: {name}"), &of(found), expected, tolerance, rules.format);
    };
    close("gates", &routed.gates, &e.gates);
    close("mean probability", &routed.mean_probability, &e.mean_probability);
    close("fraction", &routed.fraction, &e.fraction);
    close("z", &routed.z, &e.z);
    close("entropy", &routed.entropy, &e.entropy);
    check_backward(&at, &routed, &e, &rules);
}

fn check_backward(logits: &Buffer, routed: &Routed, e: &Expected, rules: &Route) {
    let &Route { tokens, experts, groups, format, .. } = rules;
    let of_gates = normal(11, e.gates.len(), Format::F32);
    let of_mean = normal(12, groups * experts, Format::F32);
    let of_z = normal(13, groups, Format::F32);
    let given = [&of_gates, &of_mean, &of_z].map(|values| Buffer::floats(values, Format::F32));
    for used in [[true, true, true], [true, false, false], [false, true, false], [false, false, true]] {
        let gradient = Buffer::poisoned(tokens * experts, format);
        let [gates, mean_probability, z] =
            [0, 1, 2].map(|i| if used[i] { given[i].at() } else { Address::NONE });
        let at = RouteGradients {
            logits: logits.at(),
            choice: routed.choice.at(),
            second_choice: routed.second_choice.at(),
            slot_of_token: routed.slot_of_token.at(),
            counted: routed.counted.at(),
            gates,
            mean_probability,
            z,
            gradient: gradient.at(),
        };
        // SAFETY: all buffers have the values of `rules`.
        unsafe { route_backward(queue(), at, *rules) }.expect("launched");
        let mut expected = vec![0.0; tokens * experts];
        for (token, out) in expected.chunks_mut(experts).enumerate() {
            let Ok(first) = usize::try_from(e.chosen[0][token]) else { continue };
            let group = token / (tokens / groups);
            let (p, share) = (&e.p[token], 1.0 / f64::from(e.counted[group]));
            let mut of_p = vec![0.0; experts];
            if used[0] {
                let lists = num_choices(rules);
                let of = |list: usize| {
                    usize::try_from(e.slot_of_token[token * lists + list]).map_or(0.0, |slot| of_gates[slot])
                };
                if lists == 2 {
                    let second = e.chosen[1][token] as usize;
                    let both = p[first] + p[second];
                    let common = (of(0) - of(1)) / (both * both);
                    (of_p[first], of_p[second]) = (common * p[second], -common * p[first]);
                } else {
                    of_p[first] = of(0);
                }
            }
            if used[1] {
                (0..experts).for_each(|i| of_p[i] += share * of_mean[group * experts + i]);
            }
            let total: f64 = p.iter().zip(&of_p).map(|(p, g)| p * g).sum();
            let through_z = if used[2] { 2.0 * e.log_z[token] * share * of_z[group] } else { 0.0 };
            for i in 0..experts {
                out[i] = p[i] * (of_p[i] - total + through_z);
            }
        }
        let tolerance = if format == Format::F32 { 2e-4 } else { 3e-2 };
        let what = format!("{rules:?}: gradient through {used:?}");
        assert_close(&what, &gradient.read_floats(format), &expected, tolerance, format);
    }
}

const RULES: Route = Route {
    tokens: 0,
    experts: 0,
    groups: 1,
    expert_capacity: 0,
    choice: RouterChoice::Top1,
    force_balanced: false,
    format: Format::F32,
};

/// Tokens, experts, groups, capacity: each number of lanes, experts that fill no 16 bytes, groups of less and
/// more than a tile, full experts and idle ones.
const SIZES: [(usize, usize, usize, usize); 14] = [
    (1, 2, 1, 1),
    (1000, 8, 1, 156),
    (300, 7, 3, 20),
    (4096, 32, 1, 160),
    (1026, 30, 9, 5),
    (640, 64, 5, 3),
    (513, 50, 1, 11),
    (2000, 128, 4, 5),
    (999, 100, 1, 20),
    (700, 256, 2, 2),
    (300, 201, 3, 1),
    (260, 512, 1, 3),
    (130, 2048, 1, 1),
    (140, 1001, 2, 4),
];

fn mask_of(tokens: usize) -> Vec<i32> {
    (0..tokens).map(|token| i32::from(token % 5 != 3 && token % 114 < 100)).collect()
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn tokens_go_to_their_likeliest_experts_until_those_are_full() {
    for (tokens, experts, groups, expert_capacity) in SIZES {
        let mask = mask_of(tokens);
        for format in [Format::F32, Format::Bf16] {
            for choice in [RouterChoice::Top1, RouterChoice::Top2] {
                let rules = Route { tokens, experts, groups, expert_capacity, choice, format, ..RULES };
                // One expert that most tokens like, so that some are dropped.
                let mut logits = normal(tokens as u64, tokens * experts, format);
                logits.iter_mut().step_by(experts).for_each(|l| *l = held(*l + 1.0, format));
                check(&logits, (tokens % 2 == 0).then_some(&mask[..]), rules, false);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn ties_go_to_the_lowest_expert() {
    for (tokens, experts, groups, expert_capacity) in SIZES {
        for format in [Format::F32, Format::Bf16] {
            for choice in [RouterChoice::Top1, RouterChoice::Top2] {
                let rules = Route { tokens, experts, groups, expert_capacity, choice, format, ..RULES };
                let logits: Vec<f64> =
                    normal(7, tokens * experts, format).into_iter().map(|l| l.round().min(1.0)).collect();
                check(&logits, None, rules, true);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn forced_balance_ignores_the_logits() {
    for (tokens, experts, groups, expert_capacity) in SIZES {
        for choice in [RouterChoice::Top1, RouterChoice::Top2] {
            let rules =
                Route { tokens, experts, groups, expert_capacity, choice, force_balanced: true, ..RULES };
            let logits = normal(9, tokens * experts, Format::F32);
            check(&logits, Some(&mask_of(tokens)), rules, false);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn without_tokens_there_are_empty_slots_and_no_losses() {
    for choice in [RouterChoice::Top1, RouterChoice::Top2] {
        for tokens in [0, 300] {
            let rules = Route { tokens, experts: 9, groups: 2, expert_capacity: 4, choice, ..RULES };
            let logits = normal(3, tokens * 9, Format::F32);
            check(&logits, Some(&vec![0; tokens]), rules, false);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn logits_that_are_not_numbers_still_have_choices() {
    let rules = Route { tokens: 70, experts: 9, expert_capacity: 70, choice: RouterChoice::Top2, ..RULES };
    let routed = run(&Buffer::floats(&[f64::NAN; 630], Format::F32), None, rules);
    assert_eq!(routed.choice.read::<i32>(), [0; 70]);
    assert_eq!(routed.second_choice.read::<i32>(), [1; 70]);
    let gates = routed.gates.read_floats(Format::F32);
    assert!(gates[..140].iter().all(|gate| gate.is_nan()), "what is not a number must not go unseen");
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn what_has_no_kernels_is_an_error() {
    let rules = Route { tokens: 8, experts: 4, expert_capacity: 2, ..RULES };
    for wrong in
        [Route { experts: 1, ..rules }, Route { experts: 4096, ..rules }, Route { groups: 3, ..rules }]
    {
        assert!(matches!(route_workspace(wrong), Err(CudaError::Size { .. })), "{wrong:?}");
    }
}
