//! Feed-forward layers beside the same mathematics composed of tensor operations.

use burn::tensor::{Distribution, activation};

use super::*;
use crate::expert_rows::WeightGradients;
use crate::noise::TokenPlace;
use crate::plan::DispatchPlan;
use crate::test_device;

fn noise() -> TokenNoise {
    let key = NoiseKey { seed: 0, step: 0, site: 0 };
    TokenNoise { key, first_row: 0, row_tokens: 4, columns: None }
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &test_device().autodiff()).require_grad()
}

fn difference<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f32 {
    (a - b).abs().max().into_scalar()
}

const ACTIVATIONS: [Activation; 4] =
    [Activation::Relu, Activation::GeluTanh, Activation::Gelu, Activation::Silu];

fn dropout(rate: f64) -> HiddenDropout {
    HiddenDropout { rate, key: noise().key, columns: None }
}

/// Factors that dropout puts on the hidden activations of `tokens` at `expert`. `[tokens, d_ff]`
fn factors(expert: u32, tokens: &[usize], width: usize, rate: f64) -> Tensor<2> {
    let factor = Factor::Dropout { rate: rate as f32 };
    let mut values = Vec::new();
    for &token in tokens {
        let mut words = vec![0; width];
        noise().place(token).fill(noise().key, expert, None, &mut words);
        values.extend(words.into_iter().map(|word| factor.of(word)));
    }
    Tensor::<1>::from_data(values.as_slice(), &test_device().autodiff()).reshape([tokens.len(), width])
}

/// The layer from tensor operations; `dropped` multiplies its hidden activations.
fn reference(
    x: Tensor<2>,
    [wi, gate, wo]: [Tensor<2>; 3],
    kind: Activation,
    gated: bool,
    dropped: Tensor<2>,
) -> Tensor<2> {
    let projected = x.clone().matmul(wi);
    let mut hidden = match kind {
        Activation::Relu => activation::relu(projected),
        Activation::GeluTanh => activation::gelu_approximate(projected),
        Activation::Gelu => activation::gelu(projected),
        Activation::Silu => activation::silu(projected),
    };
    if gated {
        hidden = hidden * x.matmul(gate);
    }
    (hidden * dropped).matmul(wo)
}

/// Compares outputs and the gradients of `leaves`.
fn assert_equal<const D: usize, const W: usize>(
    fused: Tensor<D>,
    plain: Tensor<D>,
    x: &Tensor<D>,
    weights: &[Tensor<W>],
    case: &str,
) {
    let largest: f32 = plain.clone().abs().max().into_scalar();
    assert!(difference(fused.clone(), plain.clone()) < 1e-6 * largest.max(1.0), "output, {case}");
    let (a, b) = (fused.square().sum().backward(), plain.square().sum().backward());
    let close = |a: f32, scale: f32| a < 1e-5 * scale.max(1.0);
    let (gx, gx_plain) = (x.grad(&a).expect("leaf"), x.grad(&b).expect("leaf"));
    let scale: f32 = gx_plain.clone().abs().max().into_scalar();
    assert!(close(difference(gx, gx_plain), scale), "gradient of x, {case}");
    for (i, leaf) in weights.iter().enumerate() {
        let (g, plain) = (leaf.grad(&a).expect("leaf"), leaf.grad(&b).expect("leaf"));
        let scale: f32 = plain.clone().abs().max().into_scalar();
        assert!(close(difference(g, plain), scale), "gradient of matrix {i}, {case}");
    }
}

fn cases() -> impl Iterator<Item = (Activation, bool, f64)> {
    ACTIVATIONS.into_iter().flat_map(|kind| {
        [false, true].into_iter().flat_map(move |gated| [0.0, 0.3].map(|rate| (kind, gated, rate)))
    })
}

#[test]
fn dense_layers_equal_the_composed_reference() {
    for (kind, gated, rate) in cases() {
        let (x, wi, gate, wo) = (random([9, 6]), random([6, 20]), random([6, 20]), random([20, 6]));
        let weights =
            FeedForwardWeights { wi: wi.clone(), wi_gate: gated.then(|| gate.clone()), wo: wo.clone() };
        let fused = feed_forward(x.clone(), weights, kind, rate, noise(), None);
        let dropped = factors(0, &[0, 1, 2, 3, 4, 5, 6, 7, 8], 20, rate);
        let plain = reference(x.clone(), [wi.clone(), gate.clone(), wo.clone()], kind, gated, dropped);
        let used = if gated { vec![wi, wo, gate] } else { vec![wi, wo] };
        assert_equal(fused, plain, &x, &used, &format!("{kind:?} gated {gated} dropout {rate}"));
    }
}

#[test]
fn experts_equal_the_composed_reference_on_the_slots_that_hold_a_token() {
    let device = test_device();
    let held: [&[i32]; 3] = [&[2, 0], &[], &[1, 5, 3, 4]];
    let slots = held.iter().flat_map(|tokens| (0..4).map(|i| tokens.get(i).copied().unwrap_or(-1)));
    let plan = DispatchPlan::new(slots.collect(), 3, 4, true, 6, &device);
    for (kind, gated, rate) in cases() {
        let (wi, gate, wo) = (random([3, 6, 20]), random([3, 6, 20]), random([3, 20, 6]));
        let x: Tensor<3> = random([3, 4, 6]);
        let weights = ExpertWeights { wi: wi.clone(), wi_gate: gated.then(|| gate.clone()), wo: wo.clone() };
        let fused = expert_feed_forward(
            x.clone(),
            weights,
            kind,
            dropout(rate),
            ExpertRows::local(&plan, Some(noise())),
            None,
            None,
        );
        let of = |t: &Tensor<3>, expert: usize| t.clone().slice(expert..expert + 1).squeeze_dim::<2>(0);
        let experts = held.iter().enumerate().map(|(expert, tokens)| {
            let rest = Tensor::<2>::zeros([4 - tokens.len(), 6], &x.device());
            if tokens.is_empty() {
                return rest;
            }
            let tokens: Vec<usize> = tokens.iter().map(|&token| token as usize).collect();
            let matrices = [of(&wi, expert), of(&gate, expert), of(&wo, expert)];
            let rows = of(&x, expert).slice(0..tokens.len());
            let out = reference(rows, matrices, kind, gated, factors(expert as u32, &tokens, 20, rate));
            if tokens.len() == 4 { out } else { Tensor::cat(vec![out, rest], 0) }
        });
        let plain = Tensor::cat(experts.map(|out| out.unsqueeze::<3>()).collect(), 0);
        let used = if gated { vec![wi, wo, gate] } else { vec![wi, wo] };
        assert_equal(fused, plain, &x, &used, &format!("{kind:?} gated {gated} dropout {rate}"));
    }
}

#[test]
fn an_expert_without_tokens_stays_zero() {
    let device = test_device().autodiff();
    let plan = DispatchPlan::new(vec![0, 1, -1, -1, -1, -1], 2, 3, true, 2, &device);
    let weights = ExpertWeights { wi: random([2, 4, 5]), wi_gate: None, wo: random([2, 5, 4]) };
    let (wi, wo) = (weights.wi.clone(), weights.wo.clone());
    let rows = ExpertRows::local(&plan, Some(noise()));
    let out =
        expert_feed_forward(random([2, 3, 4]), weights, Activation::Relu, dropout(0.5), rows, None, None);
    let gradients = out.clone().square().sum().backward();
    let idle = |t: Tensor<3>| t.slice(1..2).abs().max().into_scalar::<f32>();
    assert_eq!(idle(out), 0.0);
    assert_eq!(idle(wi.grad(&gradients).expect("leaf")), 0.0);
    assert_eq!(idle(wo.grad(&gradients).expect("leaf")), 0.0);
}

/// Experts 2 and 3 of a layer on a device that gets slots from two senders.
#[test]
fn slots_of_several_senders_equal_the_composed_reference() {
    let device = test_device();
    // Global rows and positions of the tokens in slots [expert][sender]; a sender has 3 slots.
    let held: [[&[(u32, u32)]; 2]; 2] = [[&[(0, 1), (0, 3)], &[(7, 2), (7, 0), (7, 1)]], [&[], &[(7, 3)]]];
    let none = TokenPlace { row: 0, token: 0 };
    let mut places = vec![none; 12];
    for (at, held) in held.iter().flatten().enumerate() {
        for (slot, &(row, token)) in held.iter().enumerate() {
            places[at * 3 + slot] = TokenPlace { row, token };
        }
    }
    let rows = ExpertRows {
        first_expert: 2,
        segments: 2,
        used: held.iter().flatten().map(|held| held.len()).collect::<Vec<_>>().into(),
        places: Some(places.clone().into()),
        weight_gradients: WeightGradients::Summed,
    };
    let (wi, gate, wo) = (random([2, 6, 20]), random([2, 6, 20]), random([2, 20, 6]));
    for (kind, gated, rate) in cases() {
        let x: Tensor<3> = random([2, 6, 6]);
        let weights = ExpertWeights { wi: wi.clone(), wi_gate: gated.then(|| gate.clone()), wo: wo.clone() };
        let fused = expert_feed_forward(x.clone(), weights, kind, dropout(rate), rows.clone(), None, None);
        let of = |t: &Tensor<3>, expert: usize| t.clone().slice(expert..expert + 1).squeeze_dim::<2>(0);
        let experts = (0..2).map(|expert| {
            // All slots by the reference, then 0 where nothing is: the mask multiplies the outputs.
            let (mut mask, mut drops) = (Vec::new(), Vec::new());
            for slot in 0..6 {
                let used = slot % 3 < held[expert][slot / 3].len();
                mask.push(f32::from(u8::from(used)));
                let mut words = vec![0; 20];
                places[expert * 6 + slot].fill(noise().key, 2 + expert as u32, None, &mut words);
                let factor = Factor::Dropout { rate: rate as f32 };
                drops.extend(words.into_iter().map(|word| factor.of(word)));
            }
            let mask = Tensor::<1>::from_data(mask.as_slice(), &device.clone().autodiff());
            let drops = Tensor::<1>::from_data(drops.as_slice(), &device.clone().autodiff());
            let matrices = [of(&wi, expert), of(&gate, expert), of(&wo, expert)];
            reference(of(&x, expert), matrices, kind, gated, drops.reshape([6, 20])) * mask.reshape([6, 1])
        });
        let plain = Tensor::cat(experts.map(|out| out.unsqueeze::<3>()).collect(), 0);
        let used = if gated { vec![&wi, &wo, &gate] } else { vec![&wi, &wo] };
        let used: Vec<_> = used.into_iter().cloned().collect();
        assert_equal(fused, plain, &x, &used, &format!("{kind:?} gated {gated} dropout {rate}"));
    }
}

/// Slots of a segment in the test below, and d_model and d_ff of its experts.
const SEGMENT: usize = 700;
const WIDTHS: [usize; 2] = [48, 96];

/// Slots in use of three segments of two experts.
const USED: [[usize; 3]; 2] = [[SEGMENT, 0, 37], [1, 601, 0]];

/// Output, then the gradients of `x`, `wi`, `wi_gate` and `wo`, of the chosen segments of `x`, which is
/// `[2, 3 * SEGMENT, d]`, when the gradient of the output is `upstream`.
fn run_segments(
    x: &[f32],
    upstream: &[f32],
    weights: &[Vec<f32>; 3],
    segments: Range<usize>,
    (kind, gated, rate): (Activation, bool, f64),
) -> Vec<Vec<f32>> {
    let device = test_device().autodiff();
    let ([d, f], slots) = (WIDTHS, segments.len() * SEGMENT);
    let leaf = |values: &[f32], shape: [usize; 3]| {
        Tensor::<1>::from_data(values, &device).reshape(shape).detach().require_grad()
    };
    let chosen = |all: &[f32]| -> Vec<f32> {
        let of = |expert: usize| &all[(expert * 3 + segments.start) * SEGMENT * d..][..slots * d];
        [of(0), of(1)].concat()
    };
    let place = |at: usize| TokenPlace { row: (at / SEGMENT) as u32, token: (at % SEGMENT) as u32 };
    let places = (0..2).flat_map(|expert| {
        let first = (expert * 3 + segments.start) * SEGMENT;
        (first..first + slots).map(place)
    });
    let rows = ExpertRows {
        first_expert: 2,
        segments: segments.len(),
        used: USED.iter().flat_map(|used| used[segments.clone()].to_vec()).collect::<Vec<_>>().into(),
        places: Some(places.collect::<Vec<_>>().into()),
        weight_gradients: WeightGradients::PerSegment,
    };
    let x = leaf(&chosen(x), [2, slots, d]);
    let [wi, gate, wo] = [(0, [2, d, f]), (1, [2, d, f]), (2, [2, f, d])].map(|(i, s)| leaf(&weights[i], s));
    let stack = ExpertWeights { wi: wi.clone(), wi_gate: gated.then(|| gate.clone()), wo: wo.clone() };
    let out = expert_feed_forward(x.clone(), stack, kind, dropout(rate), rows, None, None);
    let upstream = Tensor::<1>::from_data(chosen(upstream).as_slice(), &device).reshape([2, slots, d]);
    let gradients = (out.clone() * upstream).sum().backward();
    let leaves = if gated { vec![x, wi, gate, wo] } else { vec![x, wi, wo] };
    let values = |tensor: Tensor<3>| host::with_values(tensor, <[f32]>::to_vec);
    let gradient = |leaf: Tensor<3>| values(leaf.grad(&gradients).expect("leaf"));
    std::iter::once(values(out)).chain(leaves.into_iter().map(gradient)).collect()
}

#[test]
fn weight_gradients_of_a_segment_have_the_bits_of_a_sender_alone() {
    let [d, f] = WIDTHS;
    let random = |len: usize| host::with_values(random([len]), <[f32]>::to_vec);
    let (x, upstream) = (random(6 * SEGMENT * d), random(6 * SEGMENT * d));
    let weights = [random(2 * d * f), random(2 * d * f), random(2 * f * d)];
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    for case in [(Activation::Relu, false, 0.0), (Activation::GeluTanh, true, 0.3)] {
        let run = |threads, segments: Range<usize>| {
            pool(threads).install(|| run_segments(&x, &upstream, &weights, segments, case))
        };
        let alone = [0, 1, 2].map(|segment| run(1, segment..segment + 1));
        for threads in [1, 2, 5] {
            let together = run(threads, 0..3);
            for (number, together) in together.iter().enumerate() {
                // Experts side by side, the segments of each within.
                let length = together.len() / 6;
                for (at, part) in together.chunks(length).enumerate() {
                    let expected = &alone[at % 3][number][at / 3 * length..][..length];
                    let equal = part.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(equal, "value {number}, expert {}, segment {}, {case:?}", at / 3, at % 3);
                }
            }
        }
    }
}

#[test]
fn a_relu_layer_passes_nan_on() {
    let device = test_device();
    let weights = FeedForwardWeights {
        wi: Tensor::full([3, 4], f32::NAN, &device),
        wi_gate: None,
        wo: Tensor::ones([4, 3], &device),
    };
    let out = feed_forward(Tensor::ones([2, 3], &device), weights, Activation::Relu, 0.0, noise(), None);
    assert!(host::with_values(out, |out| out.iter().all(|value| value.is_nan())));
}

#[test]
fn experts_of_one_token_drop_different_activations() {
    let device = test_device();
    let plan = DispatchPlan::new(vec![0, 0], 2, 1, true, 1, &device);
    let weights = ExpertWeights {
        wi: Tensor::ones([2, 64, 64], &device),
        wi_gate: None,
        wo: Tensor::cat(vec![Tensor::<2>::eye(64, &device).unsqueeze::<3>(); 2], 0),
    };
    let rows = ExpertRows::local(&plan, Some(noise()));
    let x = Tensor::ones([2, 1, 64], &device);
    let out = expert_feed_forward(x, weights, Activation::Relu, dropout(0.5), rows, None, None);
    let [first, second] = [0, 1].map(|expert| out.clone().slice(expert..expert + 1).into_data());
    assert_ne!(first, second);
}
