//! The same maths on any mesh: whole steps on rank threads against one rank with as many groups.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use switchyard_comm::{threads, threads_on};
use switchyard_config::parameters::{ParameterSpec, parameters};
use switchyard_config::partition::{Part, held_part, owners};
use switchyard_config::{HierarchicalAllToAll, MeshShape, RunPlan};
use switchyard_data::Share;
use switchyard_kernels::{ValuesMut, test_device};
use switchyard_parallel::{Mesh, TokenTravel, world_on};
use switchyard_train::evaluate::{Evaluation, EvaluationRules, evaluate};
use switchyard_train::{Learner, StepOutcome};

use super::{batch, small_plan};

/// What a run leaves: its steps, its whole parameters, the moments of the first update, an evaluation.
#[derive(Debug, PartialEq)]
struct Trained {
    steps: Vec<StepOutcome>,
    parameters: Vec<Vec<f32>>,
    first_moments: Vec<Vec<f32>>,
    evaluation: Evaluation,
}

/// Parts of whole tensors, as one rank has them.
type Parts = Vec<Vec<(Part, Vec<f32>)>>;

/// Steps, parameters, first moments and evaluation of one rank.
type RankTrained = (Vec<StepOutcome>, Parts, Parts, Evaluation);

fn plan(mesh: MeshShape, sets: &[&str]) -> RunPlan {
    let sizes = [
        format!("parallel.expert_parallel_size={}", mesh.expert),
        format!("parallel.tensor_parallel_size={}", mesh.tensor),
    ];
    let common = [
        "data.micro_batch_rows=2",
        "routing.min_expert_capacity=1",
        "routing.router_jitter_noise=0.05",
        "routing.router_z_loss_coef=0.001",
        "trainer.dropout_rate=0.1",
        "trainer.expert_dropout=0.2",
        "optimizer.learning_rate=0.01",
    ];
    let sizes = sizes.iter().map(String::as_str);
    small_plan(&common.into_iter().chain(sets.iter().copied()).chain(sizes).collect::<Vec<_>>())
}

/// Trains on every rank of `mesh`, a thread each, and puts the parts together.
///
/// Fails when two ranks hold different bits of the same values.
fn train(mesh: MeshShape, sets: &[&str], steps: u64) -> Trained {
    train_on(&vec![0; mesh.ranks()], mesh, sets, steps)
}

/// As [`train`], with the machine of every rank.
fn train_on(machines: &[usize], mesh: MeshShape, sets: &[&str], steps: u64) -> Trained {
    let plan = plan(mesh, sets);
    let specs = parameters(&plan.model);
    let ranks = threads_on(machines, Duration::from_secs(60)).into_iter().map(|world| {
        let plan = plan.clone();
        thread::spawn(move || {
            let world = world_on(world, &test_device()).unwrap();
            let hierarchical = plan.comm.hierarchical_all_to_all;
            let mesh = Mesh::new(world, mesh, (&plan.comm).into()).unwrap();
            assert!(mesh.is_hierarchical() || hierarchical != HierarchicalAllToAll::Always);
            train_rank(&plan, Arc::new(mesh), steps)
        })
    });
    let ranks: Vec<_> = ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect();
    let outcome = &ranks[0].0;
    for (rank, found) in ranks.iter().enumerate() {
        assert_eq!(found.0, *outcome, "rank {rank} of {mesh} reports the same steps");
        assert_eq!(found.3, ranks[0].3, "rank {rank} of {mesh} reports the same evaluation");
    }
    let parts = |pick: fn(&RankTrained) -> &Parts| {
        let of = |(number, spec): (usize, &ParameterSpec)| {
            joined(spec, ranks.iter().flat_map(|rank| &pick(rank)[number]))
        };
        specs.iter().enumerate().map(of).collect()
    };
    Trained {
        steps: outcome.clone(),
        parameters: parts(|rank| &rank.1),
        first_moments: parts(|rank| &rank.2),
        evaluation: ranks[0].3.clone(),
    }
}

/// The whole tensor of its parts, which may overlap when they agree.
fn joined<'a>(spec: &ParameterSpec, parts: impl Iterator<Item = &'a (Part, Vec<f32>)>) -> Vec<f32> {
    let mut parts = parts.peekable();
    if parts.peek().is_none() {
        return Vec::new();
    }
    let mut whole = vec![None; spec.num_elements() as usize];
    for (part, values) in parts {
        for (at, &value) in part.runs(&spec.shape).flatten().zip(values) {
            let bits = value.to_bits();
            assert_eq!(*whole[at].get_or_insert(bits), bits, "{} differs between ranks", spec.name);
        }
    }
    whole.into_iter().map(|bits| f32::from_bits(bits.expect("every element has a holder"))).collect()
}

fn train_rank(plan: &RunPlan, mesh: Arc<Mesh>, steps: u64) -> RankTrained {
    let (shape, at) = (mesh.shape(), mesh.at());
    let specs = parameters(&plan.model);
    let mut learner = Learner::new(plan, &test_device().autodiff(), Arc::clone(&mesh));
    let share = Share { index: at.data, of: shape.data, micro_batch_rows: plan.data.micro_batch_rows };
    let mut outcomes = Vec::new();
    let mut moments = Vec::new();
    for number in 0..steps {
        let micro_batches = batch(plan, number).micro_batches(share);
        outcomes.push(learner.step(plan, &micro_batches, number).unwrap());
        if number == 0 {
            moments = owned_moments(&mut learner, &specs, &mesh);
        }
    }
    let held = |spec: &ParameterSpec| {
        let values = learner.model().parameter(&spec.name).unwrap();
        vec![(held_part(spec, shape, at), values)]
    };
    let parts = specs.iter().map(held).collect();
    let rules = EvaluationRules { first_sentinel: 60, mismatched_inputs: false };
    // Five micro-batches and a short one: the ranks have unequal shares.
    let mut held_out = vec![batch(plan, 100), batch(plan, 101)];
    held_out[1] = held_out[1].slice(0, 3);
    let (config, routing) = (&plan.model, &plan.routing);
    let evaluation = evaluate(learner.model(), config, routing, &held_out, 2, rules, &mesh).unwrap();
    (outcomes, parts, moments, evaluation)
}

/// First moments of what this rank owns: after one update of AdamW they are the gradient, scaled.
fn owned_moments(learner: &mut Learner, specs: &[ParameterSpec], mesh: &Mesh) -> Parts {
    let owners = owners(specs, mesh.shape());
    let mut of = |spec: &ParameterSpec| {
        let mine = owners[&spec.name].iter().find(|owned| owned.owner == mesh.world().rank())?;
        let mut part = Part::whole(&spec.shape);
        if spec.kind.is_expert() {
            (part.start[0], part.shape[0]) = (mine.matrices.start, mine.matrices.len());
        }
        Some((part, learner.moment(&format!("{}/m", spec.name))?.to_vec()))
    };
    specs.iter().map(|spec| of(spec).into_iter().collect()).collect()
}

fn mesh(data: usize, expert: usize, tensor: usize) -> MeshShape {
    MeshShape { data, expert, tensor }
}

const ADAMW: [&str; 1] = ["optimizer.kind=\"adamw\""];

/// Tells what was compared, with `--nocapture`.
#[expect(clippy::print_stdout, reason = "the test runner shows it when asked")]
fn tell(line: &str) {
    println!("{line}");
}

/// Compares the first step: its loss, every gradient and the routing. Returns the largest difference of
/// a gradient, relative to its tensor's largest value.
fn assert_near(found: &Trained, expected: &Trained, shape: MeshShape) -> f32 {
    let mut worst = 0.0_f32;
    let specs = parameters(&plan(shape, &ADAMW).model);
    for ((spec, found), expected) in specs.iter().zip(&found.first_moments).zip(&expected.first_moments) {
        let largest = expected.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
        let difference = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Splitting a matrix changes the order of sums in every layer, not only in the last sum.
        let allowed = if shape.tensor > 1 { 3e-6 } else { 1e-6 };
        assert!(difference <= allowed * largest, "{shape} {}: {difference} of {largest}", spec.name);
        if largest > 0.0 {
            worst = worst.max(difference / largest);
        }
    }
    let (found, expected) = (&found.steps[0], &expected.steps[0]);
    let difference = (found.total_loss / expected.total_loss - 1.0).abs();
    assert!(difference <= 1e-6, "{shape}: {difference:.1e}");
    assert_eq!(found.tokens, expected.tokens);
    for ((name, found), (_, expected)) in found.moe.iter().zip(&expected.moe) {
        assert_eq!(found.tokens_per_expert, expected.tokens_per_expert, "{shape} {name}");
        assert_eq!((found.dropped, found.groups), (expected.dropped, expected.groups), "{shape} {name}");
    }
    worst
}

#[test]
fn the_last_bit_of_weights_moves_gradients_as_far_as_split_tensors_do() {
    let expected = train(MeshShape::SOLO, &ADAMW, 1).first_moments;
    let plan = plan(MeshShape::SOLO, &ADAMW);
    let specs = parameters(&plan.model);
    let world = threads(1, Duration::from_secs(60)).remove(0);
    let mesh = Arc::new(Mesh::new(world, MeshShape::SOLO, TokenTravel::default()).unwrap());
    let mut learner = Learner::new(&plan, &test_device().autodiff(), Arc::clone(&mesh));
    let every_other = |values: ValuesMut<'_>| {
        let ValuesMut::F32(values) = values else { panic!("float32 weights") };
        values.iter_mut().step_by(2).for_each(|v| *v = v.next_up());
    };
    let model = learner.model().clone().update_parameters(|_, _, values| every_other(values));
    *learner.model_mut() = model;
    let share = Share { index: 0, of: 1, micro_batch_rows: plan.data.micro_batch_rows };
    learner.step(&plan, &batch(&plan, 0).micro_batches(share), 0).unwrap();
    let found = owned_moments(&mut learner, &specs, &mesh);
    let worst = specs.iter().zip(&found).zip(&expected).map(|((spec, found), expected)| {
        let largest = expected.iter().fold(f32::MIN_POSITIVE, |a, b| a.max(b.abs()));
        let found = joined(spec, found.iter());
        found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest
    });
    let worst = worst.fold(0.0, f32::max);
    tell(&format!("every other weight one bit larger: gradients within {worst:.1e}"));
    // What every_mesh_computes_the_same allows a tensor axis is no more than float32 can tell.
    assert!(worst > 1e-6, "{worst:.1e}");
}

#[test]
fn every_mesh_computes_the_same() {
    let expected = train(MeshShape::SOLO, &ADAMW, 1);
    assert!(expected.steps[0].moe.iter().any(|(_, layer)| layer.dropped > 0), "the capacity cut is met");
    for shape in [
        mesh(2, 1, 1),
        mesh(4, 1, 1),
        mesh(4, 2, 1),
        mesh(4, 4, 1),
        mesh(1, 1, 2),
        mesh(2, 2, 2),
        mesh(2, 1, 4),
    ] {
        let worst = assert_near(&train(shape, &ADAMW, 1), &expected, shape);
        tell(&format!("{shape}: gradients of the first step within {worst:.1e}"));
    }
}

#[test]
fn deterministic_sums_are_bitwise_equal_on_any_data_and_expert_axes() {
    for (optimizer, precision, sums) in [
        ("adamw", "fp32", "fp32"),
        ("adafactor", "fp32", "fp32"),
        ("adafactor", "selective", "fp32"),
        ("adafactor", "selective", "bf16"),
    ] {
        let optimizer = format!("optimizer.kind=\"{optimizer}\"");
        let precision = format!("precision.mode=\"{precision}\"");
        let sums = format!("precision.accumulation_dtype=\"{sums}\"");
        let sets = [&*optimizer, &precision, &sums, "comm.deterministic=true"];
        let expected = train(MeshShape::SOLO, &sets, 10);
        for shape in [mesh(2, 1, 1), mesh(4, 1, 1), mesh(2, 2, 1), mesh(4, 2, 1), mesh(4, 4, 1)] {
            let found = train(shape, &sets, 10);
            let losses = |run: &Trained| -> Vec<u64> {
                run.steps.iter().flat_map(|step| [step.loss.to_bits(), step.grad_norm.to_bits()]).collect()
            };
            assert_eq!(losses(&found), losses(&expected), "{shape} {optimizer}");
            assert_eq!(found.parameters, expected.parameters, "{shape} {optimizer}");
            assert_eq!(found.evaluation.loss.to_bits(), expected.evaluation.loss.to_bits(), "{shape}");
            tell(&format!("{shape}: 10 steps the same bit for bit, {optimizer}, {precision}, {sums}"));
        }
    }
}

#[test]
fn tokens_that_travel_machine_by_machine_change_no_bit() {
    const STRAIGHT: &str = "comm.hierarchical_all_to_all=\"never\"";
    const BY_MACHINE: &str = "comm.hierarchical_all_to_all=\"always\"";
    for (shape, machines) in [(mesh(4, 4, 1), &[0, 0, 1, 1][..]), (mesh(4, 4, 2), &[1, 1, 1, 1, 0, 0, 0, 0])]
    {
        for precision in ["precision.mode=\"fp32\"", "precision.mode=\"selective\""] {
            for sums in ["comm.deterministic=false", "comm.deterministic=true"] {
                let found = |way| train_on(machines, shape, &[ADAMW[0], precision, sums, way], 2);
                assert_eq!(found(BY_MACHINE), found(STRAIGHT), "{shape} {precision} {sums}");
            }
        }
    }
}

#[test]
fn tokens_that_travel_in_chunks_change_no_bit_of_whole_experts() {
    for (shape, machines) in [(mesh(4, 2, 1), &[0; 4]), (mesh(4, 4, 1), &[0, 0, 1, 1])] {
        for precision in ["precision.mode=\"fp32\"", "precision.mode=\"selective\""] {
            for (sums, chunks) in
                [("comm.deterministic=false", &[1, 2, 5][..]), ("comm.deterministic=true", &[2])]
            {
                let found = |chunks: usize| {
                    let chunks = format!("comm.dispatch_chunks={chunks}");
                    train_on(machines, shape, &[ADAMW[0], "model.num_experts=8", precision, sums, &chunks], 2)
                };
                let expected = found(0);
                for &chunks in chunks {
                    assert_eq!(found(chunks), expected, "{chunks} chunks, {shape} {precision} {sums}");
                }
            }
        }
    }
}

/// The only expert of a rank has its slots cut, so that its gradients are added up in another order.
#[test]
fn chunks_of_the_only_expert_compute_the_same() {
    let sets = |chunks| [ADAMW[0], chunks];
    let expected = train(mesh(4, 4, 1), &sets("comm.dispatch_chunks=0"), 1);
    for chunks in ["comm.dispatch_chunks=2", "comm.dispatch_chunks=3"] {
        let found = train(mesh(4, 4, 1), &sets(chunks), 1);
        assert_near(&found, &expected, mesh(4, 4, 1));
    }
}

#[test]
fn one_group_may_travel_machine_by_machine_and_another_straight() {
    let found = |way: &str| {
        let way = format!("comm.hierarchical_all_to_all=\"{way}\"");
        let sets = [ADAMW[0], "data.micro_batch_rows=1", &way];
        train_on(&[0, 0, 1, 1, 1, 2, 2, 2], mesh(8, 4, 1), &sets, 2)
    };
    assert_eq!(found("auto"), found("never"));
}

#[test]
fn one_rank_sums_alike_with_and_without_determinism() {
    let plain = train(MeshShape::SOLO, &ADAMW, 3);
    let deterministic = train(MeshShape::SOLO, &["optimizer.kind=\"adamw\"", "comm.deterministic=true"], 3);
    assert_eq!(plain, deterministic);
}

#[test]
fn other_models_and_routers_compute_the_same() {
    let variants: [&[&str]; 5] = [
        &["routing.router=\"top2\""],
        &["model.gated=true", "model.activation=\"gelu_tanh\"", "model.tie_word_embeddings=false"],
        &["routing.semantics=\"hf\"", "routing.expert_capacity=4"],
        &["model.router_bias=true", "routing.group_rows=1"],
        &["trainer.recompute_activations=true"],
    ];
    for variant in variants {
        let sets: Vec<&str> = ADAMW.into_iter().chain(variant.iter().copied()).collect();
        let expected = train(MeshShape::SOLO, &sets, 1);
        for shape in [mesh(4, 2, 1), mesh(2, 2, 2)] {
            assert_near(&train(shape, &sets, 1), &expected, shape);
        }
    }
}

#[test]
fn fifty_steps_stay_together_on_any_mesh() {
    // Adafactor, which sees whole matrices. AdamW would blow rounding up: it divides each gradient by its
    // own size, also those that are nothing but rounding.
    let sets = ["optimizer.kind=\"adafactor\""];
    let expected = train(MeshShape::SOLO, &sets, 50);
    for shape in [mesh(4, 1, 1), mesh(4, 2, 1), mesh(4, 4, 1), mesh(1, 1, 2), mesh(2, 2, 2)] {
        let found = train(shape, &sets, 50);
        let relative = |(found, expected): (&StepOutcome, &StepOutcome)| {
            (found.total_loss / expected.total_loss - 1.0).abs()
        };
        let worst = found.steps.iter().zip(&expected.steps).map(relative).fold(0.0, f64::max);
        assert!(worst <= 1e-5, "{shape}: {worst:.1e}");
        tell(&format!("{shape}: losses of 50 steps within {worst:.1e}"));
    }
}

#[test]
fn bfloat16_steps_stay_close_on_any_mesh() {
    const NARROW_SUMS: &str = "precision.accumulation_dtype=\"bf16\"";
    for precision in [
        &["precision.mode=\"selective\""][..],
        &["precision.mode=\"bf16\""],
        &["precision.mode=\"selective\"", NARROW_SUMS],
        &["precision.mode=\"bf16\"", NARROW_SUMS],
    ] {
        let sets = [&["optimizer.kind=\"adafactor\""], precision].concat();
        // Narrow sums are held against wide ones.
        let wide: Vec<&str> = sets.iter().copied().filter(|&set| set != NARROW_SUMS).collect();
        let expected = train(MeshShape::SOLO, &wide, 20);
        for shape in [mesh(4, 2, 1), mesh(1, 1, 2), mesh(2, 2, 2)] {
            let found = train(shape, &sets, 20);
            let relative = |(found, expected): (&StepOutcome, &StepOutcome)| {
                (found.total_loss / expected.total_loss - 1.0).abs()
            };
            let worst = found.steps.iter().zip(&expected.steps).map(relative).fold(0.0, f64::max);
            // Rounding to eight bits may send a token to another expert.
            assert!(worst <= 2e-2, "{shape} {precision:?}: {worst:.1e}");
            tell(&format!("{shape}: losses of 20 steps within {worst:.1e}, {precision:?}"));
        }
    }
}

#[test]
fn a_step_that_is_not_finite_is_skipped_on_all_ranks_alike() {
    let shape = mesh(2, 2, 2);
    let plan = plan(shape, &ADAMW);
    let ranks = threads(shape.ranks(), Duration::from_secs(60)).into_iter().map(|world| {
        let plan = plan.clone();
        thread::spawn(move || {
            let mesh = Arc::new(Mesh::new(world, shape, TokenTravel::default()).unwrap());
            let mut learner = Learner::new(&plan, &test_device().autodiff(), Arc::clone(&mesh));
            let share = Share { index: mesh.at().data, of: 2, micro_batch_rows: 2 };
            let micro_batches = batch(&plan, 0).micro_batches(share);
            if mesh.world().rank() == 3 {
                let name = "encoder.block.1.moe.experts.wi";
                let len = learner.model().parameter(name).unwrap().len();
                learner.model_mut().set_parameter(name, vec![f32::MAX; len]).unwrap();
            }
            learner.step(&plan, &micro_batches, 0).unwrap().skipped.map(|at| at.place)
        })
    });
    for rank in ranks.collect::<Vec<_>>() {
        assert_eq!(rank.join().unwrap().as_deref(), Some("encoder.block.1"));
    }
}
