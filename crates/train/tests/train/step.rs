//! One update: how a batch is split does not matter, and nothing else touches training.

use burn::tensor::Device;
use switchyard_config::RunPlan;
use switchyard_config::parameters::parameters;
use switchyard_kernels::{WorkStream, test_device};
use switchyard_parallel::Mesh;
use switchyard_train::evaluate::{EvaluationRules, evaluate};
use switchyard_train::{Learner, StepOutcome};

use super::{batch, small_plan, solo, step};

/// Gradients of the first update: AdamW's first moment is `1 - beta1` of it.
fn gradients(plan: &RunPlan, learner: &mut Learner) -> Vec<(String, Vec<f32>)> {
    let mut moment = |name: String| {
        let m = learner.moment(&format!("{name}/m")).unwrap().to_vec();
        (name, m)
    };
    parameters(&plan.model).into_iter().map(|spec| moment(spec.name)).collect()
}

fn close(a: f64, b: f64, what: &str) {
    assert!((a - b).abs() <= 1e-6 * b.abs().max(1e-3), "{what}: {a} {b}");
}

fn assert_same_outcome(found: &StepOutcome, expected: &StepOutcome) {
    close(found.loss, expected.loss, "loss");
    close(found.total_loss, expected.total_loss, "total loss");
    close(found.grad_norm, expected.grad_norm, "gradient norm");
    assert_eq!(found.tokens, expected.tokens);
    for ((name, found), (_, expected)) in found.moe.iter().zip(&expected.moe) {
        assert_eq!(found.tokens_per_expert, expected.tokens_per_expert, "{name}");
        assert_eq!(found.kept_per_expert, expected.kept_per_expert, "{name}");
        assert_eq!((found.dropped, found.groups), (expected.dropped, expected.groups), "{name}");
        close(found.load_balancing_loss, expected.load_balancing_loss, name);
        close(found.router_z_loss, expected.router_z_loss, name);
        close(found.entropy, expected.entropy, name);
        close(found.gates, expected.gates, name);
    }
}

#[test]
fn a_step_does_not_depend_on_micro_batches() {
    for router in ["top1", "top2", "expert_choice"] {
        let sets = |micro: usize| {
            small_plan(&[
                &format!("data.micro_batch_rows={micro}"),
                &format!("routing.router=\"{router}\""),
                "routing.group_rows=2",
                "routing.min_expert_capacity=1",
                "routing.router_jitter_noise=0.05",
                "routing.router_z_loss_coef=0.001",
                "trainer.dropout_rate=0.1",
                "trainer.expert_dropout=0.2",
                "optimizer.kind=\"adamw\"",
                "optimizer.clip_norm=0.0",
            ])
        };
        let whole_plan = sets(8);
        let batch = batch(&whole_plan, 3);
        let mut whole = solo(&whole_plan);
        let expected = step(&mut whole, &whole_plan, &batch, 5);
        if router == "top1" {
            assert!(expected.moe.iter().all(|(_, layer)| layer.dropped > 0), "the capacity cut is met");
        }
        for micro in [4, 2] {
            let plan = sets(micro);
            let mut split = solo(&plan);
            assert_same_outcome(&step(&mut split, &plan, &batch, 5), &expected);
            for ((name, found), (_, expected)) in
                gradients(&plan, &mut split).into_iter().zip(gradients(&plan, &mut whole))
            {
                let largest = expected.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
                let difference = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                // Products on a GPU add in an order that depends on the number of rows.
                let tolerance = if test_device() == Device::flex() { 1e-6 } else { 4e-6 };
                assert!(
                    difference <= tolerance * largest,
                    "{router} {micro} {name}: {difference} of {largest}"
                );
            }
        }
    }
}

/// On a GPU gradients of the experts wait for those of other micro-batches, here of one more.
#[test]
fn gradients_of_bfloat16_weights_add_up_over_micro_batches() {
    let sets = |micro: usize| {
        small_plan(&[
            &format!("data.micro_batch_rows={micro}"),
            "precision.mode=\"selective\"",
            "routing.group_rows=2",
            "trainer.expert_dropout=0.2",
            "optimizer.kind=\"adamw\"",
            "optimizer.clip_norm=0.0",
        ])
    };
    let (whole_plan, plan) = (sets(8), sets(2));
    let batch = batch(&whole_plan, 3);
    let (mut whole, mut split) = (solo(&whole_plan), solo(&plan));
    step(&mut whole, &whole_plan, &batch, 5);
    step(&mut split, &plan, &batch, 5);
    for ((name, found), (_, expected)) in
        gradients(&plan, &mut split).into_iter().zip(gradients(&whole_plan, &mut whole))
    {
        let largest = expected.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        let difference = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest > 0.0 && difference <= 0.02 * largest, "{name}: {difference} of {largest}");
    }
}

#[test]
fn noise_differs_between_steps_and_repeats_within_one() {
    let plan = small_plan(&["trainer.dropout_rate=0.1"]);
    let batch = batch(&plan, 3);
    let loss = |number| step(&mut solo(&plan), &plan, &batch, number).loss;
    assert_eq!(loss(4).to_bits(), loss(4).to_bits());
    assert_ne!(loss(4), loss(5));
}

#[test]
fn evaluation_leaves_training_untouched() {
    let plan = small_plan(&["trainer.dropout_rate=0.1"]);
    let rules = EvaluationRules { first_sentinel: 60, mismatched_inputs: false };
    let (mut plain, mut evaluated) = (solo(&plan), solo(&plan));
    for number in 0..3 {
        let held_out = [batch(&plan, 100 + number)];
        let (config, routing) = (&plan.model, &plan.routing);
        let run =
            || evaluate(evaluated.model(), config, routing, &held_out, 4, rules, &Mesh::solo()).unwrap();
        let first = run();
        assert_eq!(run(), first, "evaluation repeats");
        let outcomes =
            [&mut plain, &mut evaluated].map(|learner| step(learner, &plan, &batch(&plan, number), number));
        assert_eq!(outcomes[0], outcomes[1]);
    }
    for spec in parameters(&plan.model) {
        let [a, b] = [&plain, &evaluated].map(|learner| learner.model().parameter(&spec.name).unwrap());
        assert_eq!(a, b, "{}", spec.name);
    }
}

#[test]
fn a_step_that_is_not_finite_changes_nothing() {
    let plan = small_plan(&["optimizer.kind=\"adamw\""]);
    let batch = batch(&plan, 3);
    let mut learner = solo(&plan);
    step(&mut learner, &plan, &batch, 0);
    let name = "encoder.final_norm";
    let whole = learner.model().parameter(name).unwrap();
    let mut broken = whole.clone();
    broken[3] = f32::NAN;
    learner.model_mut().set_parameter(name, broken).unwrap();
    let moments = gradients(&plan, &mut learner);
    let others = learner.model().parameter("shared.embedding").unwrap();
    let outcome = step(&mut learner, &plan, &batch, 1);
    assert_eq!(outcome.skipped.map(|at| at.place).as_deref(), Some(name));
    assert_eq!(gradients(&plan, &mut learner), moments);
    assert_eq!(learner.model().parameter("shared.embedding").unwrap(), others);
    learner.model_mut().set_parameter(name, whole).unwrap();
    assert_eq!(step(&mut learner, &plan, &batch, 1).skipped, None, "and training goes on");

    let name = "encoder.block.0.feed_forward.wo";
    let len = learner.model().parameter(name).unwrap().len();
    learner.model_mut().set_parameter(name, vec![f32::MAX; len]).unwrap();
    let outcome = step(&mut learner, &plan, &batch, 2);
    assert_eq!(outcome.skipped.map(|at| at.place).as_deref(), Some("encoder.block.0"));
}

#[test]
fn clipping_scales_the_whole_gradient() {
    let [free, clipped] = ["0.0", "0.25"].map(|norm| {
        let plan = small_plan(&["optimizer.kind=\"adamw\"", &format!("optimizer.clip_norm={norm}")]);
        let mut learner = solo(&plan);
        let outcome = step(&mut learner, &plan, &batch(&plan, 3), 0);
        (outcome.grad_norm, gradients(&plan, &mut learner))
    });
    assert_eq!(free.0, clipped.0, "the norm before clipping is reported");
    assert!(free.0 > 0.25);
    let scale = (0.25 / free.0) as f32;
    for ((name, clipped), (_, free)) in clipped.1.iter().zip(&free.1) {
        let near = |(a, b): (&f32, &f32)| (a - b * scale).abs() <= 1e-6 * b.abs() * scale + 1e-12;
        assert!(clipped.iter().zip(free).all(near), "{name}");
    }
}

#[test]
fn losses_average_over_targets_and_groups_of_the_whole_step() {
    let plan =
        small_plan(&["data.micro_batch_rows=2", "trainer.z_loss=0.0", "routing.router_jitter_noise=0.0"]);
    let batch = batch(&plan, 3);
    let outcome = step(&mut solo(&plan), &plan, &batch, 0);
    // With group_rows = 0 a micro-batch is a group: four of them.
    let balance: f64 = outcome.moe.iter().map(|(_, layer)| layer.load_balancing_loss).sum();
    assert!(outcome.moe.iter().all(|(_, layer)| layer.groups == 4));
    let expected = outcome.loss + plan.routing.load_balancing_loss_coef * balance / 4.0;
    close(outcome.total_loss, expected, "total loss");
}

#[test]
fn updates_below_the_spacing_of_bfloat16_add_up_in_the_masters() {
    let plan = small_plan(&[
        "precision.mode=\"selective\"",
        "optimizer.kind=\"adamw\"",
        "optimizer.learning_rate=1e-5",
        "optimizer.weight_decay=0.0",
    ]);
    let mut learner = solo(&plan);
    let weights = |learner: &Learner| learner.model().parameter("encoder.block.0.feed_forward.wi").unwrap();
    let start = weights(&learner);
    assert!(start.iter().all(|v| v.to_bits() & 0xFFFF == 0), "weights are bfloat16");
    let moved = |learner: &Learner| weights(learner).iter().zip(&start).filter(|(a, b)| a != b).count();
    let batch = batch(&plan, 0);
    step(&mut learner, &plan, &batch, 0);
    let at_first = moved(&learner);
    for number in 1..60 {
        step(&mut learner, &plan, &batch, number);
    }
    let at_last = moved(&learner);
    assert!(at_first * 10 < start.len(), "one step is less than half a unit: {at_first}");
    assert!(at_last > 5 * at_first.max(start.len() / 20), "sixty are not: {at_last} of {}", start.len());
}

#[test]
fn narrow_losses_follow_float32_ones() {
    let losses = |precision: &str| -> Vec<f64> {
        let plan = small_plan(&[
            &format!("precision.mode=\"{precision}\""),
            "optimizer.kind=\"adafactor\"",
            "optimizer.learning_rate=0.02",
        ]);
        let mut learner = solo(&plan);
        let batch = batch(&plan, 0);
        (0..40).map(|number| step(&mut learner, &plan, &batch, number).loss).collect()
    };
    let wide = losses("fp32");
    let (first, last) = (wide[0], wide[39]);
    assert!(last < 0.8 * first, "it learns: {first} to {last}");
    for precision in ["selective", "bf16"] {
        for (step, (narrow, wide)) in losses(precision).iter().zip(&wide).enumerate() {
            // A token that goes to another expert moves the loss of so small a batch.
            let apart = (narrow - wide).abs() / first;
            let bound = if test_device() == Device::flex() { 0.06 } else { 0.1 };
            assert!(apart < bound, "{precision} step {step}: {narrow}, float32 {wide}");
        }
    }
}

#[test]
fn steps_begun_ahead_do_what_steps_one_by_one_do() {
    let plan = small_plan(&["optimizer.kind = 'adafactor'", "optimizer.learning_rate = 0.01"]);
    // Losses in the middle are not finite, one behind the other, so that what was begun meanwhile is begun again.
    let mut broken = plan.clone();
    broken.routing.router_z_loss_coef = f64::INFINITY;
    let plan_of = |step: u64| if matches!(step, 3 | 6 | 7) { &broken } else { &plan };
    let micro_batches = |step: u64| vec![batch(&plan, step)];
    let mut one_by_one = solo(&plan);
    let expected: Vec<StepOutcome> =
        (0..11).map(|s| one_by_one.step(plan_of(s), &micro_batches(s), s).expect("one rank")).collect();
    let skipped = |(step, outcome): (usize, &StepOutcome)| outcome.skipped.is_some().then_some(step);
    assert!(expected.iter().enumerate().filter_map(skipped).eq([3, 6, 7]));

    let mut ahead = solo(&plan);
    let mut next = Some(ahead.begin(plan_of(0), micro_batches(0), 0).expect("one rank"));
    for (step, expected) in (0..).zip(&expected) {
        let begun = next.take().expect("begun before");
        if step < 10 {
            next = Some(ahead.begin(plan_of(step + 1), micro_batches(step + 1), step + 1).expect("one rank"));
        }
        let found = ahead.finish(plan_of(step), begun).expect("one rank");
        // As text: what is not a number equals nothing.
        assert_eq!(format!("{found:?}"), format!("{expected:?}"));
    }
    let weights = |learner: &Learner| learner.model().parameter("shared.embedding").expect("there is one");
    assert_eq!(weights(&ahead), weights(&one_by_one));
}

#[test]
fn a_recorded_step_does_what_one_does_that_is_not() {
    for more in [
        &["precision.mode = 'fp32'", "optimizer.kind = 'adamw'"][..],
        &["optimizer.kind = 'adafactor'", "trainer.recompute_activations = true"],
    ] {
        let noise =
            ["trainer.dropout_rate = 0.1", "trainer.expert_dropout = 0.2", "data.micro_batch_rows = 4"];
        let warming =
            ["schedule.kind = 'inverse_sqrt'", "schedule.warmup_steps = 4", "optimizer.clip_norm = 0.5"];
        let outcomes = [true, false].map(|recorded| {
            let graph = format!("trainer.cuda_graph = {recorded}");
            let sets = [more, &noise, &warming, &[graph.as_str()]].concat();
            let plan = small_plan(&sets);
            let mut learner = solo(&plan);
            let steps: Vec<StepOutcome> =
                (0..6).map(|s| step(&mut learner, &plan, &batch(&plan, s), s)).collect();
            let on_gpu = WorkStream::on(&test_device()).is_some();
            assert_eq!(learner.is_recorded(), recorded && on_gpu);
            let weights = learner.model().parameter("shared.embedding").expect("there is one");
            (steps, weights)
        });
        let [recorded, eager] = outcomes;
        assert_eq!(recorded, eager);
    }
}
