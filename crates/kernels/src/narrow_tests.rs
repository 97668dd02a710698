//! Every operation in bfloat16 beside itself in float32, on inputs that bfloat16 holds exactly.
//!
//! The float32 forms are held against composed references and finite differences elsewhere, to 1e-5.
//! What is left here is rounding: of outputs and gradients, and of what is kept between two products.

use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::host::int_tensor;
use crate::test_device;
use crate::*;

/// Numbers between -1 and 1 that bfloat16 holds exactly, without a pattern.
fn numbers(count: usize, salt: u32) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::round((state >> 8) as f32 / 8_388_608.0 - 1.0).widen()
    };
    (0..count).map(|_| next()).collect()
}

/// Finds the gradient of one leaf, as float32.
type GradientOf = Box<dyn Fn(&burn::tensor::Gradients) -> Vec<f32>>;

/// Makes the leaves of one run, in one format.
struct Leaves {
    format: DType,
    made: Vec<GradientOf>,
}

impl Leaves {
    /// A leaf in the format of the run.
    fn leaf<const D: usize>(&mut self, shape: [usize; D], salt: u32) -> Tensor<D> {
        self.leaf_in(shape, salt, self.format)
    }

    /// A leaf that is float32 in every run.
    fn wide<const D: usize>(&mut self, shape: [usize; D], salt: u32) -> Tensor<D> {
        self.leaf_in(shape, salt, DType::F32)
    }

    fn leaf_in<const D: usize>(&mut self, shape: [usize; D], salt: u32, format: DType) -> Tensor<D> {
        let values = numbers(shape.iter().product(), salt);
        let data = match format {
            DType::BF16 => TensorData::new(values.iter().map(|&v| bf16::round(v)).collect::<Vec<_>>(), shape),
            _ => TensorData::new(values, shape),
        };
        let tensor = Tensor::<D>::from_data(data, (&test_device().autodiff(), format)).require_grad();
        let kept = tensor.clone();
        self.made.push(Box::new(move |gradients| {
            Values::of(kept.grad(gradients).expect("the loss depends on every leaf")).into_f32()
        }));
        tensor
    }
}

/// Compares outputs, and gradients of `sum(output * upstream)`, of the two formats.
///
/// `roundings` bounds how many, each off by 2^-8 at most, lie between inputs and a result; their errors
/// add up as their squares do.
fn check(name: &str, roundings: f32, run: impl Fn(&mut Leaves) -> Vec<Tensor<2>>) {
    let results = |format: DType| {
        let mut leaves = Leaves { format, made: Vec::new() };
        let outputs = run(&mut leaves);
        let device = outputs[0].device();
        let mut found: Vec<Vec<f32>> =
            outputs.iter().map(|out| with_values(out.clone(), <[f32]>::to_vec)).collect();
        let loss = outputs
            .into_iter()
            .enumerate()
            .map(|(i, out)| {
                let shape = out.dims();
                let upstream = TensorData::new(numbers(shape[0] * shape[1], 90 + i as u32), shape);
                let wide = out.cast(burn::tensor::FloatDType::F32);
                (wide * Tensor::<2>::from_data(upstream, &device)).sum()
            })
            .reduce(|a, b| a + b)
            .expect("one output at least");
        let gradients = loss.backward();
        found.extend(leaves.made.iter().map(|gradient| gradient(&gradients)));
        found
    };
    let (wide, narrow) = (results(DType::F32), results(DType::BF16));
    for (i, (wide, narrow)) in wide.iter().zip(&narrow).enumerate() {
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
        let size = norm(&mut wide.iter().copied());
        let error = norm(&mut wide.iter().zip(narrow).map(|(w, n)| w - n));
        assert!(size > 0.0 && wide.len() == narrow.len(), "{name}: result {i} is empty");
        let bound = roundings.sqrt() * size / 256.0;
        assert!(error <= bound, "{name}: result {i} is off by {error} of {size}, bound {bound}");
    }
}

fn noise() -> TokenNoise {
    let key = NoiseKey { seed: 5, step: 1, site: 2 };
    TokenNoise { key, first_row: 0, row_tokens: 5, columns: None }
}

fn ids(ids: Vec<i32>) -> Tensor<1, Int> {
    let count = ids.len();
    int_tensor(ids, [count], &test_device())
}

#[test]
fn norm_alone_and_beside_the_residual() {
    check("norm", 1.0, |l| vec![rms_norm(l.leaf([45, 70], 1), l.wide([70], 2), 1e-6)]);
    check("norm with a narrow weight", 2.0, |l| vec![rms_norm(l.leaf([1, 3], 1), l.leaf([3], 2), 1e-6)]);
    check("norm beside", 2.0, |l| rms_norm_beside(l.leaf([45, 70], 1), l.wide([70], 2), 1e-6).into());
}

#[test]
fn projections_and_sums() {
    for (n, d, out) in [(1, 1, 1), (45, 33, 19), (130, 64, 96)] {
        check("project", 1.0, |l| vec![project(l.leaf([n, d], 1), l.leaf([d, out], 2))]);
        check("three", 3.0, |l| {
            let weights = [l.leaf([d, out], 2), l.leaf([d, out], 3), l.leaf([d, 2 * out], 4)];
            project_three(l.leaf([n, d], 1), weights).into()
        });
        check("onto", 2.0, |l| {
            vec![project_onto(l.leaf([n, out], 3), l.leaf([n, d], 1), l.leaf([d, out], 2))]
        });
    }
    check("add", 1.0, |l| vec![add(l.leaf([7, 9], 1), l.leaf([7, 9], 2))]);
    check("dropout", 1.0, |l| vec![dropout(l.leaf([10, 9], 1), 0.3, noise())]);
}

#[test]
fn attention_with_bias_masks_and_dropout() {
    let rules = Attention {
        batch: 2,
        num_heads: 3,
        queries: 17,
        keys: 17,
        key_room: 17,
        causal: false,
        query_offset: 0,
        dropout: 0.0,
        noise: noise().key,
        first_row: 0,
        first_head: 0,
    };
    let mask = || {
        let seen = (0..34).map(|i| i32::from(i % 17 < 12)).collect();
        int_tensor(seen, [2, 17], &test_device())
    };
    for (rules, key_mask) in [
        (rules, None),
        (rules, Some(mask())),
        (Attention { causal: true, ..rules }, None),
        (Attention { dropout: 0.2, ..rules }, None),
        (Attention { queries: 1, keys: 1, key_room: 1, ..rules }, None),
    ] {
        check("attention", 12.0, |l| {
            let (n, width) = (2 * rules.queries, 3 * 20);
            let inputs = AttentionInputs {
                q: l.leaf([n, width], 1),
                k: l.leaf([n, width], 2),
                v: l.leaf([n, width], 3),
                relative_bias: (rules.queries > 1).then(|| l.wide([3, 2 * rules.queries - 1], 4)),
                key_mask: key_mask.clone(),
                segments: None,
            };
            let out = attention(inputs, rules);
            // With one key, queries and keys change nothing: their gradients are 0.
            if rules.queries == 1 {
                l.made.drain(..2);
            }
            vec![out]
        });
    }
}

#[test]
fn feed_forward_layers_of_every_kind() {
    for activation in [Activation::Relu, Activation::GeluTanh, Activation::Silu] {
        for (gated, rate, tokens) in [(false, 0.0, 1), (true, 0.0, 45), (false, 0.25, 45), (true, 0.25, 7)] {
            check("feed forward", 16.0, |l| {
                let weights = FeedForwardWeights {
                    wi: l.leaf([24, 50], 2),
                    wi_gate: gated.then(|| l.leaf([24, 50], 3)),
                    wo: l.leaf([50, 24], 4),
                };
                let residual = (tokens > 1).then(|| l.leaf([tokens, 24], 5));
                vec![feed_forward(l.leaf([tokens, 24], 1), weights, activation, rate, noise(), residual)]
            });
        }
    }
}

#[test]
fn experts_some_without_tokens() {
    check("experts", 8.0, |l| {
        let weights = ExpertWeights { wi: l.leaf([3, 12, 20], 2), wi_gate: None, wo: l.leaf([3, 20, 12], 3) };
        let rows = ExpertRows {
            first_expert: 0,
            segments: 1,
            used: vec![5, 0, 2].into(),
            places: None,
            weight_gradients: WeightGradients::Summed,
        };
        let dropout = HiddenDropout { rate: 0.0, key: noise().key, columns: None };
        let slots = l.leaf([3, 6, 12], 1);
        vec![
            expert_feed_forward(slots, weights, Activation::Relu, dropout, rows, None, None)
                .reshape([18, 12]),
        ]
    });
}

#[test]
fn routing_to_experts_and_back() {
    let options =
        RouteOptions { groups: 1, expert_capacity: Some(4), token_mask: None, force_balanced: false };
    for route in [route_top1, route_top2] {
        check("routed", 6.0, |l| {
            let [logits, x] = router_logits(l.leaf([20, 30], 1), l.wide([30, 4], 2), 0.0, noise());
            let routing = route(logits, options.clone());
            let residual = l.leaf([20, 30], 3);
            vec![combine(dispatch(x, &routing.plan), routing.gates, &routing.plan, Some(residual))]
        });
    }
}

#[test]
fn a_narrow_router_rounds_its_probabilities() {
    let device = test_device();
    let logits = Tensor::<2>::from_data(
        TensorData::new([0.1_f32, 1.3, -0.4].map(bf16::round).to_vec(), [1, 3]),
        (&device, DType::BF16),
    );
    let options = RouteOptions { groups: 1, expert_capacity: None, token_mask: None, force_balanced: false };
    let gate = |logits: Tensor<2>| {
        with_values(route_top1(logits, options.clone()).gates, |gates| {
            gates.iter().copied().fold(0.0, f32::max)
        })
    };
    let narrow = gate(logits.clone());
    let wide = gate(logits.cast(burn::tensor::FloatDType::F32));
    assert_eq!(narrow, bf16::round(wide).widen());
    assert_ne!(narrow, wide);
}

#[test]
fn embeddings_and_a_tied_head() {
    check("embedding", 1.0, |l| vec![embedding(l.leaf([6, 10], 1), ids(vec![3, 3, 0, 5]))]);
    check("table", 1.0, |l| {
        embedding_and_table(l.leaf([6, 10], 1), [ids(vec![3, 3, 0]), ids(vec![5, 3])], None).into()
    });
    for (layout, head) in
        [(HeadLayout::VocabularyByModel, [70, 24]), (HeadLayout::ModelByVocabulary, [24, 70])]
    {
        let rules = CrossEntropy { layout, scale: 0.5, z_coefficient: 1e-3 };
        check("cross-entropy", 4.0, |l| {
            let weights = Tensor::from_data([1.0_f32, 0.0, 1.0, 1.0, 1.0], &test_device());
            let (hidden, head) = (l.leaf([5, 24], 1), l.leaf(head, 2));
            let (targets, loss_scale) = (ids(vec![3, 0, 69, 20, 3]), Tensor::full([1], 0.25, &test_device()));
            let out = cross_entropy(hidden, head, targets, weights, loss_scale, rules, None);
            vec![out.loss_sum.reshape([1, 1]) * 0.25]
        });
    }
}

#[test]
fn no_tokens_at_all() {
    let device = test_device().autodiff();
    let narrow = |shape: [usize; 2]| {
        let zeros = TensorData::new(vec![bf16::default(); shape[0] * shape[1]], shape);
        Tensor::<2>::from_data(zeros, (&device, DType::BF16)).require_grad()
    };
    let (x, w) = (narrow([0, 4]), narrow([4, 6]));
    let out = project(x, w.clone());
    assert_eq!(out.dims(), [0, 6]);
    let gradients = out.sum().backward();
    assert_eq!(Values::of(w.grad(&gradients).expect("leaf")).into_f32(), [0.0; 24]);
}
