//! What `switchyard check` foresees of a rank's memory, against what a learner has.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use burn::tensor::Device;
use switchyard_config::{MemorySummary, MeshShape, RunPlan, rank_memory, resolve_str};
use switchyard_data::HostBatch;
use switchyard_kernels::{Values, ValuesMut};
use switchyard_parallel::{Gradients, Mesh, SumFormats, TokenTravel};

use crate::step::{Learner, device_batch, training_context};

const PLAN: &str = r#"
name = "memory"
[model]
vocab_size = 48
d_model = 16
d_ff = 24
d_kv = 4
num_heads = 4
num_layers = 2
num_experts = 4
expert_layer_every = 2
tie_word_embeddings = false
[data]
inputs_length = 8
targets_length = 4
batch_rows = 8
micro_batch_rows = 4
"#;

fn plans() -> Vec<RunPlan> {
    let mut plans = Vec::new();
    for optimizer in ["adafactor", "adamw"] {
        for (mode, accumulation) in
            [("fp32", "fp32"), ("selective", "fp32"), ("selective", "bf16"), ("bf16", "fp32")]
        {
            let sets = [
                format!("optimizer.kind={optimizer}"),
                format!("precision.mode={mode}"),
                format!("precision.accumulation_dtype={accumulation}"),
            ];
            for rows in [4, 8] {
                let sets: Vec<String> =
                    sets.iter().cloned().chain([format!("data.micro_batch_rows={rows}")]).collect();
                plans.push(resolve_str(PLAN, &sets).expect("the plan is valid").plan);
            }
        }
    }
    plans
}

/// Parameters of the model, and masters and moments of the optimizer.
fn held(learner: &mut Learner) -> (u64, u64) {
    let mut parameters = 0;
    let counted = learner.replace_model(|model| {
        Ok::<_, ()>(model.update_parameters(|_, _, values| {
            parameters += match values {
                ValuesMut::F32(values) => size_of_val(values),
                ValuesMut::Bf16(values) => size_of_val(values),
            };
        }))
    });
    counted.expect("nothing fails");
    let optimizer = learner.optimizer_mut();
    let masters: usize = optimizer.masters().values().map(|values| size_of_val(values.as_slice())).sum();
    let moments: usize = optimizer.moments().map(|moment| size_of_val(moment.values.as_slice())).sum();
    (parameters as u64, (masters + moments) as u64)
}

/// Gradients of a step, summed over its micro-batches.
fn gradients(learner: &Learner, plan: &RunPlan, mesh: &Mesh, device: &Device) -> u64 {
    let (sum_formats, mut sums) = (SumFormats::of(plan), Gradients::new());
    let data = &plan.data;
    for first_row in (0..data.batch_rows).step_by(data.micro_batch_rows) {
        let ids = |length: usize| (0..data.micro_batch_rows * length).map(|i| 3 + i as i32 % 40).collect();
        let batch = HostBatch {
            rows: data.micro_batch_rows,
            inputs_length: data.inputs_length,
            targets_length: data.targets_length,
            input_ids: ids(data.inputs_length),
            target_ids: ids(data.targets_length),
            first_row: first_row as u32,
        };
        let context = training_context(plan, mesh, 0, batch.first_row);
        let output = learner.model().loss(&device_batch(&batch, 0, device), plan.trainer.z_loss, &context);
        let mut loss = output.cross_entropy.loss_sum.clone();
        for router in &output.router_losses {
            loss = loss + router.load_balancing.clone() + router.z.clone();
        }
        learner.model().take_gradients(&mut loss.backward(), |name, gradient| {
            sum_formats.add(&mut sums, name, gradient)
        });
    }
    let bytes = |values: &Values| match values {
        Values::F32(values) => size_of_val(values.as_slice()),
        Values::Bf16(values) => size_of_val(values.as_slice()),
        Values::Device(_) => unreachable!("this device is the CPU"),
    };
    sums.values().map(bytes).sum::<usize>() as u64
}

#[test]
fn one_rank_has_what_is_foreseen() {
    let device = Device::flex();
    for plan in plans() {
        let mesh = Arc::new(Mesh::solo());
        let mut learner = Learner::new(&plan, &device.clone().autodiff(), Arc::clone(&mesh));
        let (parameter_bytes, optimizer_bytes) = held(&mut learner);
        let gradient_bytes = gradients(&learner, &plan, &mesh, &device);
        let foreseen = rank_memory(&plan, MeshShape::SOLO, 0);
        let found = MemorySummary { parameter_bytes, gradient_bytes, optimizer_bytes, ..foreseen };
        let rows = plan.data.micro_batch_rows;
        let what = (plan.precision, plan.accumulation, plan.optimizer.kind, rows);
        assert_eq!(found, foreseen, "{what:?}");
        let masters: usize = learner.optimizer().masters().values().map(Vec::len).sum();
        assert_eq!(foreseen.gpu_saves_bytes, 2 * masters as u64, "{what:?}");
    }
}

#[test]
fn every_rank_of_a_mesh_has_what_is_foreseen() {
    let shape = MeshShape { data: 2, expert: 2, tensor: 2 };
    for plan in plans().into_iter().step_by(2) {
        let ranks = switchyard_comm::threads(shape.ranks(), Duration::from_secs(60)).into_iter();
        let ranks: Vec<_> = ranks
            .map(|world| {
                let plan = plan.clone();
                thread::spawn(move || {
                    let mesh =
                        Arc::new(Mesh::new(world, shape, TokenTravel::default()).expect("ranks that talk"));
                    held(&mut Learner::new(&plan, &Device::flex().autodiff(), mesh))
                })
            })
            .collect();
        for (rank, found) in ranks.into_iter().enumerate() {
            let foreseen = rank_memory(&plan, shape, rank);
            let found = found.join().expect("no panic");
            let what = (plan.precision, plan.optimizer.kind, rank);
            assert_eq!(found, (foreseen.parameter_bytes, foreseen.optimizer_bytes), "{what:?}");
        }
    }
}
