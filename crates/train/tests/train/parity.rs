//! What transformers computed, beside what this program computes with the same weights.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::Tensor;
use switchyard_checkpoint::TensorSource;
use switchyard_config::plan::{OptimizerKind, OptimizerPlan};
use switchyard_config::{RunPlan, StackKind};
use switchyard_data::HostBatch;
use switchyard_kernels::{test_device, with_values};
use switchyard_model::moe::RouterOutput;
use switchyard_model::{ForwardContext, LossOutput};
use switchyard_train::verify::{Array, Tolerances, fixture_batch, verify};

use super::fixture::{Fixture, arrays};
use super::hf_names::Place;
use super::{small_plan, solo, step};

/// Beam search does not exist here: greedy decoding only.
const BEAM_SEARCH: [&str; 6] = [
    "beam4_all_ids",
    "beam4_all_scores",
    "beam4_ids",
    "beam4_lp06_early_all_ids",
    "beam4_lp06_early_all_scores",
    "beam4_lp06_early_ids",
];

/// Arrays that `verify` leaves to the tests of gradients and optimizers below.
const COMPARED_BELOW: [&str; 4] = ["grad.", "grad_ce.", "paper_grad.", "train_"];

/// Every array that `verify` can compute is within tolerance, and it leaves out no other than these.
fn assert_verified(fixture: &Fixture, not_compared: &[&str]) {
    let (config, routing) = (fixture.directory.model(), fixture.directory.routing());
    let tolerances = Tolerances { absolute: fixture.suggested("hidden"), loss: fixture.suggested("loss") };
    let model = fixture.model(&test_device());
    let result = verify(&model, config, routing, &fixture.arrays, tolerances).unwrap();
    let mut worst = BTreeMap::from([("ids", 0.0_f64), ("arrays", 0.0), ("logits", 0.0), ("losses", 0.0)]);
    for array in &result.compared {
        let is_logits = array.name.ends_with("logits");
        let tolerance = if is_logits { fixture.suggested("logits") } else { array.tolerance };
        assert!(array.difference <= tolerance, "{}: {array:?}", fixture.name);
        let kind = match () {
            () if fixture.arrays[&array.name].discrete => "ids",
            () if is_logits => "logits",
            () if array.name.contains("loss") => "losses",
            () => "arrays",
        };
        let entry = worst.get_mut(kind).unwrap();
        *entry = entry.max(array.difference);
    }
    let worst: Vec<String> =
        worst.iter().map(|(kind, difference)| format!("{kind} {difference:.1e}")).collect();
    println!("{}: {} arrays, largest differences {}", fixture.name, result.compared.len(), worst.join(", "));
    let left: Vec<&str> = (result.not_compared.iter().map(String::as_str))
        .filter(|name| !COMPARED_BELOW.iter().any(|prefix| name.starts_with(prefix)))
        .collect();
    assert_eq!(left, not_compared, "{}", fixture.name);
}

/// Gradients of `loss`, by logical name.
fn gradients(fixture: &Fixture, loss: impl Fn(&LossOutput) -> Tensor<1>) -> BTreeMap<String, Vec<f32>> {
    let model = fixture.model(&test_device().autodiff());
    let (config, routing) = (fixture.directory.model(), fixture.directory.routing());
    let batch = fixture_batch(&fixture.arrays, config, &test_device()).unwrap();
    let output = model.loss(&batch, 0.0, &ForwardContext::evaluation(config, routing));
    let targets: f32 = with_values(batch.weights.clone(), |weights| weights.iter().sum());
    let total = output.cross_entropy.loss_sum.clone() / f64::from(targets) + loss(&output);
    let mut found = BTreeMap::new();
    model.take_gradients(&mut total.backward(), |name, gradient| {
        found.insert(name.to_owned(), gradient.into_f32());
    });
    found
}

/// Compares every array `prefix + name of transformers`; returns the logical parameters it met.
fn assert_gradients(
    fixture: &Fixture,
    prefix: &str,
    gradients: &BTreeMap<String, Vec<f32>>,
) -> BTreeSet<String> {
    let config = fixture.directory.model();
    let mut met = BTreeSet::new();
    let mut worst = (0.0, "");
    for (name, expected) in &fixture.arrays {
        let Some(hf) = name.strip_prefix(prefix) else { continue };
        let place = Place::of(hf, config);
        let found = place.extract(&gradients[&place.parameter], config);
        let difference = relative_difference(&found, expected);
        assert!(
            difference <= fixture.suggested("grad_relative_to_max"),
            "{} {name}: {difference}",
            fixture.name
        );
        if difference > worst.0 {
            worst = (difference, name);
        }
        met.insert(place.parameter);
    }
    println!(
        "{}: gradients {prefix}*, largest relative difference {:.1e} in {}",
        fixture.name, worst.0, worst.1
    );
    met
}

/// Largest difference, relative to the largest expected value.
fn relative_difference(found: &[f32], expected: &Array) -> f64 {
    assert_eq!(found.len(), expected.values.len());
    let largest = expected.values.iter().fold(0.0_f64, |a, b| a.max(b.abs()));
    let pairs = found.iter().zip(&expected.values);
    // Of an expert whose gradient is zero, nothing else will do.
    pairs.map(|(&a, b)| (f64::from(a) - b).abs()).fold(0.0, f64::max) / largest.max(f64::MIN_POSITIVE)
}

/// The router losses of a whole stack as transformers 4 adds them, where it adds any.
///
/// It counts a dropped token under expert 0. That is no rule to train with, so it exists in this
/// test only, as constant shares `f`.
fn hf4_router_losses(fixture: &Fixture, stack: StackKind, routers: &[RouterOutput]) -> Option<Tensor<1>> {
    let (config, routing) = (fixture.directory.model(), fixture.directory.routing());
    if routers.is_empty() || routers.len() == config.layers(stack) {
        return None;
    }
    let layers = routers.len() as f64;
    let index = &fixture.arrays[&format!("{}_expert_index_hf4", stack.name())];
    let [rows, experts] = routers[0].routing.mean_probability.dims();
    let (length, share) = (index.shape[2], 1.0 / (index.shape[0] * index.shape[2]) as f32);
    let mut f = vec![0.0_f32; rows * experts];
    for (at, &expert) in index.values.iter().enumerate() {
        f[at / length % rows * experts + expert as usize] += share;
    }
    let sum = |parts: Vec<Tensor<2>>| parts.into_iter().reduce(|a, b| a + b).expect("a sparse layer");
    let p = sum(routers.iter().map(|r| r.routing.mean_probability.clone()).collect()) / layers;
    let f = Tensor::<1>::from_data(f.as_slice(), &p.device()).reshape([rows, experts]);
    let balance = (f * p).sum() * (experts as f64 / rows as f64);
    let z = sum(routers.iter().map(|r| r.routing.z.clone().unsqueeze()).collect()).mean() / layers;
    Some(balance * routing.load_balancing_loss_coef + z * routing.router_z_loss_coef)
}

fn zero(output: &LossOutput) -> Tensor<1> {
    output.cross_entropy.loss_sum.zeros_like()
}

fn assert_all_gradients(fixture: &Fixture) {
    let total = gradients(fixture, |output| {
        let stacks =
            [(StackKind::Encoder, &output.encoder_routers), (StackKind::Decoder, &output.decoder_routers)];
        let losses =
            stacks.into_iter().filter_map(|(stack, routers)| hf4_router_losses(fixture, stack, routers));
        losses.fold(zero(output), |a, b| a + b)
    });
    let met = assert_gradients(fixture, "grad.", &total);
    let config = fixture.directory.model();
    let mut names = fixture.model(&test_device()).parameter_names().into_iter().collect::<BTreeSet<_>>();
    assert_eq!(total.keys().cloned().collect::<BTreeSet<_>>(), names, "every parameter has a gradient");
    for hf in fixture.expected["params_without_grad"].as_array().unwrap() {
        let place = Place::of(hf.as_str().unwrap(), config);
        let idle = place.extract(&total[&place.parameter], config);
        assert!(idle.iter().all(|&g| g == 0.0), "{hf} belongs to an expert without tokens");
    }
    names.retain(|name| !met.contains(name));
    assert!(names.is_empty(), "not compared: {names:?}");
}

/// Gradients of the cross-entropy alone, and of the paper's loss with one group a row.
fn assert_other_gradients(fixture: &Fixture) {
    let cross_entropy = gradients(fixture, zero);
    assert!(!assert_gradients(fixture, "grad_ce.", &cross_entropy).is_empty());
    let paper = gradients(fixture, |output| {
        let routers = output.encoder_routers.iter().chain(&output.decoder_routers);
        routers.fold(zero(output), |total, router| {
            let p = router.routing.mean_probability.clone();
            let [rows, experts] = p.dims();
            let f = Tensor::from_inner(router.routing.fraction.clone());
            total + (f * p).sum() * (1e-2 * experts as f64 / rows as f64)
        })
    });
    assert!(!assert_gradients(fixture, "paper_grad.", &paper).is_empty());
}

#[test]
fn t5_v1_0() {
    let fixture = Fixture::open("t5_v10_relu_tied");
    assert_verified(&fixture, &BEAM_SEARCH);
    assert_all_gradients(&fixture);
}

#[test]
fn t5_v1_1() {
    let fixture = Fixture::open("t5_v11_gated_gelu_untied");
    assert_verified(&fixture, &BEAM_SEARCH);
    assert_all_gradients(&fixture);
}

#[test]
fn mt5() {
    let fixture = Fixture::open("mt5_like");
    assert_verified(&fixture, &BEAM_SEARCH);
    assert_all_gradients(&fixture);
}

#[test]
fn switch_without_drops() {
    let fixture = Fixture::open("switch_step2_nodrop");
    assert_verified(&fixture, &BEAM_SEARCH);
    assert_all_gradients(&fixture);
    assert_other_gradients(&fixture);
}

#[test]
fn switch_with_drops() {
    let fixture = Fixture::open("switch_step2_drop");
    assert_verified(&fixture, &BEAM_SEARCH);
    assert_all_gradients(&fixture);
    assert_other_gradients(&fixture);
}

#[test]
fn switch_with_every_layer_sparse() {
    let fixture = Fixture::open("switch_step1_nodrop");
    assert_verified(&fixture, &BEAM_SEARCH);
    assert_all_gradients(&fixture);
    assert_other_gradients(&fixture);
}

#[test]
fn other_layouts_of_the_same_weights() {
    let plain = Fixture::open("t5_v10_relu_tied");
    for layout in ["t5_v10_sharded", "t5_v10_hubstyle"] {
        let directory = switchyard_checkpoint::open_model(&super::fixture::path(layout)).unwrap();
        assert_eq!(directory.model(), plain.directory.model());
        for (name, _) in directory.specs() {
            assert_eq!(
                directory.read(&name).unwrap(),
                plain.directory.read(&name).unwrap(),
                "{layout} {name}"
            );
        }
    }
}

#[test]
fn bfloat16_on_disk() {
    let full = Fixture::open("t5_v11_gated_gelu_untied");
    let directory = switchyard_checkpoint::open_model(&super::fixture::path("t5_v11_bf16")).unwrap();
    let fixture =
        Fixture { name: "t5_v11_bf16", directory, arrays: arrays("t5_v11_bf16"), expected: full.expected };
    assert_verified(&fixture, &[]);
    for (name, _) in fixture.directory.specs() {
        let (rounded, whole) = (fixture.directory.read(&name).unwrap(), full.directory.read(&name).unwrap());
        let near = rounded.iter().zip(whole.iter()).all(|(a, b)| (a - b).abs() <= b.abs() / 256.0);
        assert!(near, "{name}");
    }
}

/// The fixture's inputs as training data, without dropout and jitter.
fn training(fixture: &Fixture, optimizer: OptimizerPlan) -> (RunPlan, HostBatch) {
    let mut plan = small_plan(&["trainer.z_loss=0.0"]);
    let ids = |name: &str| -> Vec<i32> {
        fixture.arrays[name].values.iter().map(|&id| if id < 0.0 { 0 } else { id as i32 }).collect()
    };
    let batch = HostBatch {
        rows: fixture.arrays["input_ids"].shape[0],
        inputs_length: fixture.arrays["input_ids"].shape[1],
        targets_length: fixture.arrays["labels"].shape[1],
        input_ids: ids("input_ids"),
        target_ids: ids("labels"),
        first_row: 0,
    };
    plan.model = fixture.directory.model().clone();
    plan.routing = fixture.directory.routing().clone();
    plan.routing.router_jitter_noise = 0.0;
    (plan.data.batch_rows, plan.data.micro_batch_rows) = (batch.rows, batch.rows);
    plan.optimizer = optimizer;
    (plan, batch)
}

/// Five updates; the losses before each, and the weights that the fixture recorded after them.
fn assert_trains_alike(fixture: &Fixture, which: &str, optimizer: OptimizerPlan) {
    let (plan, batch) = training(fixture, optimizer);
    let mut learner = solo(&plan);
    for (name, _) in fixture.directory.specs() {
        let values = fixture.directory.read(&name).unwrap().into_owned();
        learner.model_mut().set_parameter(&name, values).unwrap();
    }
    let expected = &fixture.arrays[&format!("train_{which}_losses")].values;
    let mut worst: f64 = 0.0;
    for (number, expected) in expected.iter().enumerate() {
        let found = step(&mut learner, &plan, &batch, number as u64).total_loss;
        worst = worst.max((found - expected).abs());
        assert!(worst <= fixture.suggested("loss"), "{which} step {number}: {found}, expected {expected}");
    }
    let prefix = format!("train_{which}_after.");
    let mut worst_weight: f64 = 0.0;
    for (name, expected) in &fixture.arrays {
        let Some(hf) = name.strip_prefix(&prefix) else { continue };
        let place = Place::of(hf, &plan.model);
        let found = place.extract(&learner.model().parameter(&place.parameter).unwrap(), &plan.model);
        let difference = relative_difference(&found, expected);
        worst_weight = worst_weight.max(difference);
        assert!(difference < 2e-4, "{name}: {difference}");
    }
    println!(
        "{} {which}: largest difference of losses {worst:.1e}, of weights {worst_weight:.1e}",
        fixture.name
    );
}

/// `variant` is part of the arrays' names.
fn assert_optimizers(fixture: &Fixture, variant: &str) {
    let adamw = OptimizerPlan {
        kind: OptimizerKind::Adamw,
        learning_rate: 1e-3,
        clip_norm: 0.0,
        parameter_scale: false,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        eps2: 1e-3,
        weight_decay: 0.01,
        decay_exponent: 0.8,
        update_clip: 1.0,
    };
    assert_trains_alike(fixture, &format!("adamw{variant}"), adamw.clone());
    let fixed = OptimizerPlan { kind: OptimizerKind::Adafactor, eps: 1e-30, weight_decay: 0.0, ..adamw };
    assert_trains_alike(fixture, &format!("adafactor_fixed{variant}"), fixed.clone());
    // The relative step is min(1e-2, 1 / sqrt(step)).
    let relative = OptimizerPlan { learning_rate: 1e-2, parameter_scale: true, ..fixed };
    assert_trains_alike(fixture, &format!("adafactor_relative{variant}"), relative);
}

#[test]
fn optimizers_on_t5() {
    assert_optimizers(&Fixture::open("t5_v10_relu_tied"), "");
}

/// Experts are stacked, so one without tokens has a zero gradient and takes part in the update;
/// torch leaves it out. The two ways agree until an idle expert gets its first tokens.
#[test]
fn optimizers_on_switch() {
    let fixture = Fixture::open("switch_step2_nodrop");
    assert_optimizers(&fixture, "_zeros");
    for which in ["adamw", "adafactor_fixed", "adafactor_relative"] {
        let losses = |variant: &str| &fixture.arrays[&format!("train_{which}{variant}_losses")].values[..3];
        assert_eq!(losses(""), losses("_zeros"));
    }
}
