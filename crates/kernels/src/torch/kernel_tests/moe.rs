//! Dense layers, and sparse ones from the router to the residual.

use std::ops::Range;
use std::sync::Arc;

use super::*;

fn noise() -> TokenNoise {
    TokenNoise { key: KEY, first_row: 3, row_tokens: 7, columns: None }
}

const KINDS: [(Activation, bool, f64); 6] = [
    (Activation::Relu, false, 0.0),
    (Activation::Relu, false, 0.25),
    (Activation::Relu, true, 0.25),
    (Activation::GeluTanh, false, 0.25),
    (Activation::GeluTanh, true, 0.0),
    (Activation::Silu, true, 0.1),
];

#[test]
fn dense_layers_equal_the_cpus() {
    for (kind, gated, rate) in KINDS {
        for (columns, has_residual) in [(None, true), (Some(Columns { first: 8, total: 90 }), false)] {
            check(&format!("{kind:?}, gated {gated}, dropout {rate}"), 4.0, |inputs| {
                let weights = FeedForwardWeights {
                    wi: inputs.leaf([40, 72], 2),
                    wi_gate: gated.then(|| inputs.leaf([40, 72], 3)),
                    wo: inputs.leaf([72, 40], 4),
                };
                let residual = has_residual.then(|| inputs.leaf([45, 40], 5));
                let noise = TokenNoise { columns, ..noise() };
                vec![feed_forward(inputs.leaf([45, 40], 1), weights, kind, rate, noise, residual)]
            });
        }
    }
}

/// Three experts behind two senders with 8 slots each, some without a token.
#[test]
fn experts_of_several_senders_equal_the_cpus() {
    for (kind, gated, rate) in KINDS {
        for used in [vec![5, 8, 0, 0, 1, 7], vec![8; 6]] {
            check(&format!("{kind:?}, gated {gated}, dropout {rate}, {used:?}"), 4.0, |inputs| {
                let weights = ExpertWeights {
                    wi: inputs.leaf([3, 40, 72], 2),
                    wi_gate: gated.then(|| inputs.leaf([3, 40, 72], 3)),
                    wo: inputs.leaf([3, 72, 40], 4),
                };
                let places = (0..48).map(|slot| TokenPlace { row: slot % 5, token: slot * 7 % 11 });
                let rows = ExpertRows {
                    first_expert: 2,
                    segments: 2,
                    used: used.clone().into(),
                    places: Some(places.collect::<Vec<_>>().into()),
                    weight_gradients: WeightGradients::Summed,
                };
                let dropout = HiddenDropout { rate, key: KEY, columns: None };
                let out = expert_feed_forward(
                    inputs.leaf([3, 16, 40], 1),
                    weights,
                    kind,
                    dropout,
                    rows,
                    None,
                    None,
                );
                vec![out.reshape([48, 40])]
            });
        }
    }
}

/// The slots of two senders, both of which this is: they only change their order on the way.
#[derive(Debug)]
struct Reordered {
    /// Experts, and slots of each sender.
    sizes: [usize; 2],
}

impl Reordered {
    const SENDERS: usize = 2;

    /// Shape of all slots, and where those of a chunk begin and end in it.
    fn places(&self, chunk: &SlotChunk, all: &DeviceValues) -> ([usize; 4], [[usize; 4]; 2]) {
        let [experts, slots] = self.sizes;
        let width = all.len() / (Self::SENDERS * experts * slots);
        let start = [0, chunk.experts.start, chunk.slots.start, 0];
        let extent = [Self::SENDERS, chunk.experts.len(), chunk.slots.len(), width];
        ([Self::SENDERS, experts, slots, width], [start, extent])
    }
}

impl SlotTravel for Reordered {
    fn to_experts(&self, chunk: &SlotChunk, sent: &DeviceValues, there: &DeviceValues) {
        let (shape, [start, extent]) = self.places(chunk, sent);
        let [senders, experts, slots, width] = extent;
        there.write_swapped([senders, experts, slots * width], &sent.part_of(&shape, [&start, &extent]));
    }

    fn to_tokens(&self, chunk: &SlotChunk, there: &DeviceValues, sent: &DeviceValues) {
        let (shape, [start, extent]) = self.places(chunk, sent);
        let [senders, experts, slots, width] = extent;
        sent.write_part(&shape, [&start, &extent], &there.swapped([experts, senders, slots * width]), false);
    }
}

/// Experts whose slots come and go in chunks beside those of the CPU, which has them at hand.
#[test]
fn experts_whose_slots_travel_equal_the_cpus() {
    const SLOTS: usize = 8;
    // Rows of 37 values do not begin at whole pieces of 16 bytes.
    let sizes = [(3, 1, 40), (3, 2, 40), (1, 3, 40), (1, 3, 37)];
    for ((kind, gated, rate), (experts, chunks, width)) in
        KINDS.into_iter().flat_map(|kind| sizes.map(|sizes| (kind, sizes)))
    {
        let name = format!(
            "{kind:?}, gated {gated}, dropout {rate}, {experts} experts in {chunks} chunks, {width} wide"
        );
        for weight_gradients in [WeightGradients::Summed, WeightGradients::PerSegment] {
            check(&name, 4.0, |inputs| {
                let weights = ExpertWeights {
                    wi: inputs.leaf([experts, width, 72], 2),
                    wi_gate: gated.then(|| inputs.leaf([experts, width, 72], 3)),
                    wo: inputs.leaf([experts, 72, width], 4),
                };
                let total = experts * Reordered::SENDERS * SLOTS;
                let used = [5, 8, 0, 3, 1, 7][..experts * Reordered::SENDERS].to_vec();
                let places: Vec<TokenPlace> = (0..total as u32)
                    .map(|slot| TokenPlace { row: slot % 5, token: slot * 7 % 11 })
                    .collect();
                let on_host = inputs.device == Device::flex();
                let (used, places) = if on_host {
                    (used.into(), places.into())
                } else {
                    let there = |values: Vec<i32>| {
                        let count = values.len();
                        let integers = int_tensor(values, [count], &inputs.device);
                        crate::torch::int32(&crate::torch::integers(&integers))
                    };
                    let words = places.iter().flat_map(|place| [place.row as i32, place.token as i32]);
                    (
                        there(used.into_iter().map(|used: usize| used as i32).collect()).into(),
                        there(words.collect()).into(),
                    )
                };
                let rows = ExpertRows {
                    first_expert: 2,
                    segments: Reordered::SENDERS,
                    used,
                    places: Some(places),
                    weight_gradients,
                };
                let dropout = HiddenDropout { rate, key: KEY, columns: None };
                let sent = inputs.leaf([Reordered::SENDERS, experts, SLOTS * width], 1);
                let out = if on_host {
                    let slots = sent.swap_dims(0, 1).reshape([experts, Reordered::SENDERS * SLOTS, width]);
                    let out = expert_feed_forward(slots, weights, kind, dropout, rows, None, None);
                    out.reshape([experts, Reordered::SENDERS, SLOTS * width]).swap_dims(0, 1)
                } else {
                    let slots = sent.reshape([Reordered::SENDERS * experts, SLOTS, width]);
                    let travel = Arc::new(Reordered { sizes: [experts, SLOTS] });
                    let way = SlotWay::new(travel, chunks, [experts, SLOTS], weight_gradients);
                    let out = expert_feed_forward(slots, weights, kind, dropout, rows, Some(way), None);
                    out.reshape([Reordered::SENDERS, experts, SLOTS * width])
                };
                vec![out.reshape([total, width])]
            });
        }
    }
}

/// Gradients of one sender's slots alone and among others have the same bits.
#[test]
fn gradients_of_a_sender_have_bits_of_their_own() {
    for format in [DType::F32, DType::BF16] {
        let inputs = Inputs { device: test_device(), format, leaves: Vec::new() };
        let run = |senders: Range<usize>, experts: Range<usize>| {
            let leaf = |salt, shape: [usize; 3]| {
                let all = inputs.tensor(shape, salt, format);
                all.slice(experts.clone()).detach().require_grad()
            };
            let (wi, wo) = (leaf(2, [4, 128, 256]), leaf(3, [4, 256, 128]));
            let slots = |salt| {
                let all = inputs.tensor([4, 3, 32 * 128], salt, format);
                let own = all.slice([experts.clone(), senders.clone()]);
                own.reshape([experts.len(), senders.len() * 32, 128]).detach()
            };
            let used = experts.clone().flat_map(|e| senders.clone().map(move |s| (5 * e + 11 * s) % 33));
            let rows = ExpertRows {
                first_expert: experts.start,
                segments: senders.len(),
                used: used.collect::<Vec<_>>().into(),
                places: None,
                weight_gradients: WeightGradients::PerSegment,
            };
            let dropout = HiddenDropout { rate: 0.0, key: KEY, columns: None };
            let weights = ExpertWeights { wi: wi.clone(), wi_gate: None, wo: wo.clone() };
            let out = expert_feed_forward(slots(1), weights, Activation::Relu, dropout, rows, None, None);
            let gradients = (out * slots(4)).sum().backward();
            [wi, wo].map(|leaf| Values::of(leaf.grad(&gradients).expect("leaf")).into_f32())
        };
        let together = run(0..3, 0..4);
        for (expert, sender) in (0..4).flat_map(|expert| (0..3).map(move |sender| (expert, sender))) {
            let alone = run(sender..sender + 1, expert..expert + 1);
            for (together, alone) in together.iter().zip(&alone) {
                let part = &together[(expert * 3 + sender) * alone.len()..][..alone.len()];
                let equal = part.iter().zip(alone).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(equal, "expert {expert}, sender {sender}, {format:?}");
            }
        }
    }
}

/// Router, dispatch, experts with dropout, and combine onto a residual, with tokens that find no slot. Choices
/// are forced: rounding must not decide them.
#[test]
fn sparse_layers_equal_the_cpus() {
    for (choices, jitter, narrow_router) in
        [(1, 0.0, false), (1, 0.2, false), (2, 0.0, true), (2, 0.2, false), (1, 0.2, true)]
    {
        check(&format!("top-{choices}, jitter {jitter}, narrow router {narrow_router}"), 10.0, |inputs| {
            let router_format = if narrow_router { inputs.format } else { DType::F32 };
            let router = inputs.leaf_in([40, 8], 2, router_format);
            let [logits, x] = router_logits(inputs.leaf([84, 40], 1), router, jitter, noise());
            let options = RouteOptions {
                groups: 2,
                expert_capacity: Some(4 * choices),
                token_mask: Some(inputs.integers([84], |token| i32::from(token % 9 != 4))),
                force_balanced: true,
            };
            let route = if choices == 1 { route_top1 } else { route_top2 };
            let routing = route(logits.clone(), options);
            let rows = ExpertRows::local(&routing.plan, Some(noise()));
            let weights = ExpertWeights {
                wi: inputs.leaf([8, 40, 72], 3),
                wi_gate: None,
                wo: inputs.leaf([8, 72, 40], 4),
            };
            let dropout = HiddenDropout { rate: 0.25, key: KEY, columns: None };
            let slots = dispatch(x, &routing.plan);
            let outputs = expert_feed_forward(slots, weights, Activation::Relu, dropout, rows, None, None);
            let residual = inputs.leaf([84, 40], 5);
            let out = combine(outputs, routing.gates, &routing.plan, Some(residual));
            vec![out, routing.mean_probability, routing.z.reshape([2, 1]), logits]
        });
    }
}

#[test]
fn plans_equal_the_cpus() {
    for (route, groups, experts, capacity) in [
        (route_top1 as fn(_, _) -> _, 1, 5, 30),
        (route_top1, 3, 8, 2),
        (route_top2, 3, 8, 5),
        (route_top2, 1, 40, 4),
    ] {
        let found = [test_device(), Device::flex()].map(|device| {
            let inputs = Inputs { device, format: DType::F32, leaves: Vec::new() };
            let logits = inputs.tensor([90, experts], 3, DType::F32) * 3.0;
            let options = RouteOptions {
                groups,
                expert_capacity: Some(capacity),
                token_mask: Some(inputs.integers([90], |token| i32::from(token % 7 != 0))),
                force_balanced: false,
            };
            let routing: Routing = route(logits, options);
            let wide = routing.clone().widened(groups * capacity + 3);
            let whole = [&routing.plan, &wide.plan].map(|plan| {
                let (tokens, used) = (integers(&plan.token_of_slot), integers(&plan.rows_used));
                (plan.slots_per_expert, tokens, used, plan.token_slots())
            });
            let floats = [routing.gates, wide.gates, routing.entropy, routing.z]
                .into_iter()
                .chain(
                    [routing.fraction, routing.mean_probability]
                        .map(|means| means.reshape([groups * experts])),
                )
                .flat_map(|values| with_values(values, <[f32]>::to_vec))
                .collect::<Vec<_>>();
            (whole, integers(&routing.choice), floats)
        });
        let [(here, choice, floats), (cpu, cpu_choice, cpu_floats)] = found;
        assert_eq!(here, cpu);
        assert_eq!(choice, cpu_choice);
        assert!(floats.len() == cpu_floats.len());
        assert!(floats.iter().zip(&cpu_floats).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.0)));
    }
}
