//! Gradients and losses of the whole model.

use std::collections::BTreeMap;
use switchyard_kernels::test_device;

use burn::tensor::Tensor;
use switchyard_config::plan::{PrecisionMode, RouterKind, RoutingConfig, RoutingSemantics};
use switchyard_config::{MeshShape, ModelConfig};
use switchyard_model::{Capacity, ForwardContext, LossOutput, Seq2SeqBatch, SwitchTransformer};

use super::{paper_routing, random_batch, random_ids, scalar, shift_right, small_model, values};

pub(super) fn total(output: &LossOutput) -> Tensor<1> {
    let mut loss = output.cross_entropy.loss_sum.clone();
    for router in &output.router_losses {
        loss = loss + router.load_balancing.clone() * 0.5 + router.z.clone() * 0.1;
    }
    loss
}

pub(super) fn gradients(model: &SwitchTransformer, loss: &Tensor<1>) -> BTreeMap<String, Vec<f32>> {
    let mut found = BTreeMap::new();
    model.take_gradients(&mut loss.backward(), |name, gradient| {
        found.insert(name.to_owned(), gradient.into_f32());
    });
    found
}

#[test]
fn an_expert_without_tokens_gets_a_zero_gradient() {
    let device = test_device().autodiff();
    let config = ModelConfig { num_experts: 16, ..small_model() };
    let routing = paper_routing();
    for router in [RouterKind::Top1, RouterKind::Top2] {
        let routing = RoutingConfig { router, ..routing.clone() };
        let model = SwitchTransformer::new(&config, 2, &device);
        let context = ForwardContext::evaluation(&config, &routing);
        let output = model.loss(&random_batch(2, 4, 3, 40), 1e-4, &context);
        let gradients = gradients(&model, &total(&output));
        assert_eq!(gradients.len(), model.parameter_names().len(), "every parameter is in the graph");
        assert!(gradients.values().flatten().all(|g| g.is_finite()));
        for (stack, routers) in [("encoder", &output.encoder_routers), ("decoder", &output.decoder_routers)] {
            let used: Vec<i32> =
                routers[0].routing.plan.rows_used.clone().into_data().iter::<i32>().collect();
            assert!(used.contains(&0) && used.iter().any(|&n| n > 0));
            for matrix in ["wi", "wo"] {
                let gradient = &gradients[&format!("{stack}.block.1.moe.experts.{matrix}")];
                for (expert, gradient) in gradient.chunks(gradient.len() / 16).enumerate() {
                    let idle = gradient.iter().all(|&g| g == 0.0);
                    assert_eq!(idle, used[expert] == 0, "{stack} {matrix} of expert {expert}");
                }
            }
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let device = test_device().autodiff();
    for gated in [false, true] {
        let config = ModelConfig { gated, router_bias: true, tie_word_embeddings: !gated, ..small_model() };
        let routing = RoutingConfig { router: RouterKind::Top2, ..paper_routing() };
        let mut context = ForwardContext::evaluation(&config, &routing);
        (context.dropout_rate, context.expert_dropout, context.router_jitter_noise) = (0.1, 0.2, 0.05);
        let batch = random_batch(2, 5, 4, 40);
        let loss = |model: &SwitchTransformer| total(&model.loss(&batch, 1e-2, &context));
        let mut model = SwitchTransformer::new(&config, 5, &device);
        let gradients = gradients(&model, &loss(&model));
        for (name, gradient) in &gradients {
            // Along the gradient, so that one step sees every element.
            let norm = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
            let start = model.parameter(name).unwrap();
            // Far enough to outweigh the rounding of the loss, too close to change any routing.
            let h = 3e-3 / norm;
            let mut at = |delta: f32| {
                let moved = start.iter().zip(gradient).map(|(v, g)| v + delta * g / norm).collect();
                model.set_parameter(name, moved).unwrap();
                scalar(loss(&model))
            };
            let slope = (at(h) - at(-h)) / f64::from(2.0 * h);
            at(0.0);
            let difference = (slope - f64::from(norm)).abs() / f64::from(norm);
            assert!(difference < 5e-3, "{name}: slope {slope}, gradient {norm}");
        }
    }
}

/// A model with everything that draws noise or is in doubt, in some precision.
fn eventful(precision: PrecisionMode) -> (ModelConfig, SwitchTransformer) {
    let config = ModelConfig { router_bias: true, tie_word_embeddings: true, ..small_model() };
    let device = test_device().autodiff();
    let at = MeshShape::SOLO.coordinates(0);
    let model = SwitchTransformer::part(&config, 5, &device, MeshShape::SOLO, at, precision);
    (config, model)
}

#[test]
fn block_by_block_the_gradients_are_the_same() {
    use PrecisionMode::{Bf16, Fp32, Selective};
    for (precision, semantics, bound) in [
        (Fp32, RoutingSemantics::Paper, 1e-6),
        (Fp32, RoutingSemantics::Hf, 1e-6),
        // Sums over the uses of one tensor are rounded at other places.
        (Selective, RoutingSemantics::Paper, 2e-2),
        (Bf16, RoutingSemantics::Paper, 2e-2),
    ] {
        let (config, model) = eventful(precision);
        let routing = RoutingConfig { semantics, expert_capacity: 4, ..paper_routing() };
        let mut context = ForwardContext::evaluation(&config, &routing);
        (context.dropout_rate, context.expert_dropout, context.router_jitter_noise) = (0.1, 0.2, 0.05);
        let batch = random_batch(2, 5, 4, 40);
        let at_once = model.loss(&batch, 1e-2, &context);
        let expected = gradients(&model, &total(&at_once));
        let mut sums: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        let (output, loss) = model.gradients_by_block(&batch, 1e-2, &context, total, |name, part| {
            let part = part.into_f32();
            let sum = sums.entry(name.to_owned()).or_insert_with(|| vec![0.0; part.len()]);
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        });
        assert_eq!(scalar(loss), scalar(total(&at_once)), "the first pass is the same computation");
        assert_eq!(output.encoder_routers.len(), at_once.encoder_routers.len());
        assert!(sums.keys().eq(expected.keys()));
        for (name, expected) in &expected {
            let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
            let error = norm(&mut expected.iter().zip(&sums[name]).map(|(a, b)| a - b));
            let size = norm(&mut expected.iter().copied());
            assert!(error <= bound * size, "{precision:?} {name}: {error} of {size}");
        }
    }
}

#[test]
fn selective_gradients_point_where_float32_ones_do() {
    let batch = random_batch(4, 6, 5, 40);
    let of = |precision| {
        let (config, model) = eventful(precision);
        let routing = paper_routing();
        let context = ForwardContext::evaluation(&config, &routing);
        gradients(&model, &total(&model.loss(&batch, 1e-2, &context)))
    };
    let (wide, narrow) = (of(PrecisionMode::Fp32), of(PrecisionMode::Selective));
    for (name, wide) in &wide {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let narrow = &narrow[name];
        let cosine = dot(wide, narrow) / (dot(wide, wide) * dot(narrow, narrow)).sqrt();
        assert!(cosine > 0.98, "{name}: {cosine}");
    }
}

#[test]
fn padding_columns_change_nothing() {
    let device = test_device();
    let (config, routing) = (small_model(), paper_routing());
    let context =
        ForwardContext { capacity: Capacity::Unlimited, ..ForwardContext::evaluation(&config, &routing) };
    let model = SwitchTransformer::new(&config, 4, &device);
    let widen = |ids: &[i32], from: usize, to: usize| -> Vec<i32> {
        ids.chunks(from)
            .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0, to - from)))
            .collect()
    };
    let (inputs, labels) = (random_ids(3 * 6, 40, 7), random_ids(3 * 5, 40, 8));
    let batch = |inputs: Vec<i32>, labels: Vec<i32>, targets: usize| {
        Seq2SeqBatch::from_ids(3, inputs, shift_right(&labels, targets), labels, 0, &device)
    };
    let narrow = model.loss(&batch(inputs.clone(), labels.clone(), 5), 1e-4, &context);
    let wide = model.loss(&batch(widen(&inputs, 6, 9), widen(&labels, 5, 8), 8), 1e-4, &context);
    let close = |a: f64, b: f64| assert!((a - b).abs() < 2e-6 * b.abs().max(1.0), "{a} {b}");
    close(scalar(wide.cross_entropy.loss_sum), scalar(narrow.cross_entropy.loss_sum));
    for (wide, narrow) in wide.router_losses.into_iter().zip(narrow.router_losses) {
        close(scalar(wide.load_balancing), scalar(narrow.load_balancing));
        close(scalar(wide.z), scalar(narrow.z));
    }
}

#[test]
fn only_the_router_sees_jitter() {
    let device = test_device();
    let routing = paper_routing();
    let batch = random_batch(2, 6, 5, 40);
    let loss_sum = |config: &ModelConfig, jitter: f64| {
        let mut context = ForwardContext::evaluation(config, &routing);
        context.router_jitter_noise = jitter;
        let model = SwitchTransformer::new(config, 4, &device);
        values(model.loss(&batch, 0.0, &context).cross_entropy.loss_sum)
    };
    // A single expert has gate 1 whatever its router says.
    let single = ModelConfig { num_experts: 1, ..small_model() };
    assert_eq!(loss_sum(&single, 0.5), loss_sum(&single, 0.0));
    assert_ne!(loss_sum(&small_model(), 0.5), loss_sum(&small_model(), 0.0));
}

#[test]
fn dropped_tokens_leave_a_sparse_layer_as_zeros() {
    let device = test_device();
    let config = small_model();
    // All four experts together hold half of the tokens.
    let routing = RoutingConfig { eval_capacity_factor: 0.5, min_expert_capacity: 1, ..paper_routing() };
    let context = ForwardContext::evaluation(&config, &routing);
    let model = SwitchTransformer::new(&config, 4, &device);
    let batch = random_batch(2, 8, 4, 40);
    let inputs = model.encoder_inputs(&batch.input_mask, &context);
    let embedded = model.embed(batch.input_ids.clone(), &context);
    let block = &model.encoder().blocks()[1];
    let (out, router) = block.forward(1, embedded.clone(), &inputs, None, &context);
    let router = router.expect("the second block is sparse");
    let slots = router.routing.plan.token_slots();

    // The same block with experts that write nothing: what attention and residual alone give.
    let mut silent = model.clone();
    silent.set_parameter("encoder.block.1.moe.experts.wo", vec![0.0; 4 * 24 * 16]).unwrap();
    let (attended, _) = silent.encoder().blocks()[1].forward(1, embedded, &inputs, None, &context);
    let (out, attended) = (values(out), values(attended));
    let mut dropped = 0;
    for (token, own) in slots.iter().enumerate() {
        let rows = [&out, &attended].map(|values| &values[token * 16..][..16]);
        assert_eq!(rows[0] == rows[1], own.is_empty(), "token {token}");
        dropped += usize::from(own.is_empty());
    }
    assert!(dropped >= 8, "{dropped}");
}
