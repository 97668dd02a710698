//! Teaches a tiny Switch Transformer to copy its input, without any file.
//!
//! `cargo run --release --example train_tiny`
#![allow(clippy::print_stdout)]

use std::sync::Arc;

use burn::tensor::Device;
use switchyard_config::resolve_str;
use switchyard_data::HostBatch;
use switchyard_parallel::Mesh;
use switchyard_train::Learner;

const EXPERIMENT: &str = r#"
name = "copy"
model = { vocab_size = 32, d_model = 64, d_ff = 128, d_kv = 16, num_heads = 4, num_layers = 2, num_experts = 4, expert_layer_every = 2 }
optimizer = { learning_rate = 2e-2 }
schedule = { kind = "constant", warmup_steps = 0, total_steps = 300 }
data = { inputs_length = 8, targets_length = 8, batch_rows = 32, micro_batch_rows = 32 }
"#;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let plan = resolve_str(EXPERIMENT, &[])?.plan;
    let mut learner = Learner::new(&plan, &Device::flex().autodiff(), Arc::new(Mesh::solo()));
    for step in 0..plan.schedule.total_steps {
        let ids: Vec<i32> = (0..32 * 8).map(|i| 2 + (step as i32 * 31 + i * i * 7) % 30).collect();
        let batch = HostBatch {
            rows: 32,
            inputs_length: 8,
            targets_length: 8,
            target_ids: ids.clone(),
            input_ids: ids,
            first_row: 0,
        };
        let outcome = learner.step(&plan, &[batch], step)?;
        if step % 50 == 0 {
            println!("step {step:>3}  loss {:.3}", outcome.loss);
        }
    }
    Ok(())
}
