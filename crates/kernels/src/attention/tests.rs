//! Attention beside the same mathematics composed of tensor operations.

use burn::tensor::{Device, Distribution, activation};

use super::*;
use crate::test_device;

const RULES: Attention = Attention {
    batch: 2,
    num_heads: 3,
    queries: 5,
    keys: 7,
    key_room: 7,
    causal: false,
    query_offset: 0,
    dropout: 0.0,
    noise: NoiseKey { seed: 3, step: 0, site: 0 },
    first_row: 0,
    first_head: 0,
};
const D_KV: usize = 4;

struct Case {
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    bias: Tensor<2>,
}

impl Case {
    fn new(rules: &Attention) -> Self {
        let device = test_device().autodiff();
        let random = |shape: [usize; 2]| {
            Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad()
        };
        let width = rules.num_heads * D_KV;
        Self {
            q: random([rules.batch * rules.queries, width]),
            k: random([rules.batch * rules.keys, width]),
            v: random([rules.batch * rules.keys, width]),
            bias: random([rules.num_heads, rules.queries + rules.keys - 1]),
        }
    }

    fn inputs(&self, key_mask: Option<Tensor<2, Int>>, segments: Option<Segments>) -> AttentionInputs {
        AttentionInputs {
            q: self.q.clone(),
            k: self.k.clone(),
            v: self.v.clone(),
            relative_bias: Some(self.bias.clone()),
            key_mask,
            segments,
        }
    }
}

/// What hides keys and probabilities in one check.
#[derive(Default)]
struct Hidden {
    key_mask: Option<Vec<i32>>,
    segments: Option<(Vec<i32>, Vec<i32>)>,
    without_bias: bool,
}

impl Hidden {
    /// Additive mask, `[batch, 1, queries, keys]`.
    fn mask(&self, rules: &Attention, device: &Device) -> Tensor<4> {
        let (b, s, t) = (rules.batch, rules.queries, rules.keys);
        let mut mask = vec![0.0_f32; b * s * t];
        for (at, mask) in mask.iter_mut().enumerate() {
            let (row, i, j) = (at / (s * t), at / t % s, at % t);
            let hidden = self.key_mask.as_ref().is_some_and(|m| m[row * t + j] == 0)
                || self.segments.as_ref().is_some_and(|(q, k)| q[row * s + i] != k[row * t + j])
                || (rules.causal && j > i + rules.query_offset);
            if hidden {
                *mask = -1e30;
            }
        }
        Tensor::<1>::from_data(mask.as_slice(), device).reshape([b, 1, s, t])
    }
}

/// Factors that dropout puts on the probabilities, `[batch, num_heads, queries, keys]`.
fn dropout_factors(rules: &Attention, device: &Device) -> Tensor<4> {
    let (b, h, s, t) = (rules.batch, rules.num_heads, rules.queries, rules.keys);
    let mut words = vec![0; b * h * s * t];
    for (row, words) in words.chunks_mut(h * s * t).enumerate() {
        rules.noise.fill(rules.first_row + row as u32, 0, 0, words);
    }
    let factor = Factor::Dropout { rate: rules.dropout as f32 };
    let factors: Vec<f32> = words.into_iter().map(|word| factor.of(word)).collect();
    Tensor::<1>::from_data(factors.as_slice(), device).reshape([b, h, s, t])
}

/// The same from tensor operations.
fn reference(case: &Case, rules: &Attention, hidden: &Hidden) -> Tensor<2> {
    let (b, h, s, t) = (rules.batch, rules.num_heads, rules.queries, rules.keys);
    let device = case.q.device();
    let split = |x: Tensor<2>, n: usize| x.reshape([b, n, h, D_KV]).swap_dims(1, 2);
    let rows: Vec<Tensor<3>> =
        (0..s).map(|i| case.bias.clone().slice([0..h, s - 1 - i..s - 1 - i + t]).unsqueeze_dim(1)).collect();
    let bias = Tensor::cat(rows, 1).unsqueeze::<4>();
    let mut scores = split(case.q.clone(), s).matmul(split(case.k.clone(), t).swap_dims(2, 3));
    if !hidden.without_bias {
        scores = scores + bias;
    }
    let mut p = activation::softmax(scores + hidden.mask(rules, &device), 3);
    if rules.dropout > 0.0 {
        p = p * dropout_factors(rules, &device);
    }
    p.matmul(split(case.v.clone(), t)).swap_dims(1, 2).reshape([b * s, h * D_KV])
}

fn check(rules: Attention, hidden: Hidden) {
    let rules = Attention { key_room: rules.keys, ..rules };
    let case = Case::new(&rules);
    let device = test_device();
    let (b, s, t) = (rules.batch, rules.queries, rules.keys);
    let plain = reference(&case, &rules, &hidden);
    let key_mask = hidden.key_mask.map(|m| host::int_tensor(m, [b, t], &device));
    let segments = hidden.segments.map(|(q, k)| Segments {
        queries: host::int_tensor(q, [b, s], &device),
        keys: host::int_tensor(k, [b, t], &device),
    });
    let mut inputs = case.inputs(key_mask, segments);
    if hidden.without_bias {
        inputs.relative_bias = None;
    }
    let fused = attention(inputs, rules);
    let difference = |a: Tensor<2>, b: Tensor<2>| (a - b).abs().max().into_scalar::<f32>();
    assert!(difference(fused.clone(), plain.clone()) < 1e-5);
    let (a, b) = (fused.square().sum().backward(), plain.square().sum().backward());
    let leaves = [&case.q, &case.k, &case.v, &case.bias];
    for leaf in &leaves[..if hidden.without_bias { 3 } else { 4 }] {
        let (a, b) = (leaf.grad(&a).expect("leaf"), leaf.grad(&b).expect("leaf"));
        let scale: f32 = b.clone().abs().max().into_scalar();
        assert!(difference(a, b) < 1e-5 * scale.max(1.0));
    }
}

const HOLES: [i32; 14] = [1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1];

fn packed() -> Option<(Vec<i32>, Vec<i32>)> {
    Some((vec![1, 1, 2, 2, 2, 1, 1, 1, 1, 2], vec![1, 1, 1, 2, 2, 2, 2, 1, 1, 2, 2, 2, 2, 2]))
}

#[test]
fn equals_the_composed_reference() {
    check(RULES, Hidden::default());
    check(Attention { queries: 19, keys: 37, ..RULES }, Hidden::default());
    check(Attention { batch: 1, queries: 1, keys: 1, ..RULES }, Hidden::default());
}

#[test]
fn cross_attention_has_no_bias() {
    check(RULES, Hidden { without_bias: true, ..Hidden::default() });
    check(RULES, Hidden { without_bias: true, key_mask: Some(HOLES.to_vec()), ..Hidden::default() });
}

#[test]
fn masks_may_have_holes_and_segments_keep_apart() {
    check(RULES, Hidden { key_mask: Some(HOLES.to_vec()), ..Hidden::default() });
    check(RULES, Hidden { segments: packed(), ..Hidden::default() });
}

#[test]
fn causal_with_and_without_offset() {
    check(Attention { causal: true, keys: 5, ..RULES }, Hidden::default());
    check(Attention { causal: true, query_offset: 2, ..RULES }, Hidden::default());
}

#[test]
fn dropout_acts_on_the_probabilities_of_the_row_in_the_global_batch() {
    for first_row in [0, 5] {
        check(Attention { dropout: 0.3, first_row, ..RULES }, Hidden::default());
    }
    check(Attention { dropout: 0.3, ..RULES }, Hidden { without_bias: true, ..Hidden::default() });
}

#[test]
fn room_after_the_keys_of_a_row_is_not_read() {
    let case = Case::new(&RULES);
    let expected = attention(case.inputs(None, None), RULES).inner();
    let roomy = |x: &Tensor<2>| {
        let width = RULES.num_heads * D_KV;
        let keys = x.clone().inner().reshape([2, 7, width]);
        let rest = Tensor::full([2, 4, width], f32::NAN, &keys.device());
        Tensor::cat(vec![keys, rest], 1).reshape([2 * 11, width])
    };
    let inputs = case.inputs(None, None);
    let inputs = AttentionInputs { k: roomy(&inputs.k), v: roomy(&inputs.v), ..inputs };
    let out = attention(inputs, Attention { key_room: 11, ..RULES }).inner();
    assert_eq!(out.into_data(), expected.into_data());
}

#[test]
fn devices_that_split_the_heads_draw_parts_of_one_mask() {
    let case = Case::new(&RULES);
    let rules = Attention { dropout: 0.4, ..RULES };
    let whole = attention(case.inputs(None, None), rules).inner();
    for (first_head, num_heads) in [(0, 1), (1, 2)] {
        let columns = first_head * D_KV..(first_head + num_heads) * D_KV;
        let part = |x: Tensor<2>| {
            let rows = x.dims()[0];
            x.slice([0..rows, columns.clone()])
        };
        let AttentionInputs { q, k, v, .. } = case.inputs(None, None);
        let bias = case.bias.clone().slice(first_head..first_head + num_heads);
        let inputs = AttentionInputs {
            q: part(q),
            k: part(k),
            v: part(v),
            relative_bias: Some(bias),
            key_mask: None,
            segments: None,
        };
        let out = attention(inputs, Attention { first_head, num_heads, ..rules }).inner();
        let difference: f32 = (out - part(whole.clone())).abs().max().into_scalar();
        assert!(difference < 1e-6);
    }
}

#[test]
fn all_rules_together() {
    let rules = Attention { causal: true, query_offset: 2, dropout: 0.25, ..RULES };
    check(rules, Hidden { key_mask: Some(HOLES.to_vec()), segments: packed(), ..Hidden::default() });
}

#[test]
fn a_row_that_sees_nothing_gives_the_mean_of_the_values() {
    let case = Case::new(&RULES);
    let mask = host::int_tensor(vec![0; 14], [2, 7], &test_device());
    let out = attention(case.inputs(Some(mask), None), RULES).inner();
    let mean = case.v.clone().inner().slice(0..7).mean_dim(0);
    let difference: f32 = (out.slice(0..1) - mean).abs().max().into_scalar();
    assert!(difference < 1e-5);
    let one_row = [vec![0; 7], vec![1; 7]].concat();
    check(RULES, Hidden { key_mask: Some(one_row), ..Hidden::default() });
}
