//! Whole training steps: forward, backward, clipping and optimizer on synthetic tokens.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::Device;
use switchyard_comm::Choice;
use switchyard_config::plan::PrecisionMode;
use switchyard_config::{MemorySummary, MeshShape, Resolved, preset, rank_memory, resolve_str, step_flops};
use switchyard_data::{HostBatch, Share};
use switchyard_kernels::{DeviceMemory, DeviceName, allow_tf32, device_memory};
use switchyard_parallel::{Mesh, TokenTravel};
use switchyard_train::Learner;

use super::gemm::peak_flops;
use super::{spread, synthetic_ids};
use crate::args::BenchStepArguments;
use crate::commands::output;
use crate::job::{Job, TIMEOUT};
use crate::report::in_options;
use crate::{Outcome, memory};

/// Steps before the clock starts: buffers and threads exist after them.
const WARM_UP: u64 = 3;

/// Measurements of the peak.
const PEAK_ROUNDS: usize = 9;

pub(crate) fn run(
    arguments: &BenchStepArguments,
    device: DeviceName,
    launcher: Choice,
) -> anyhow::Result<Outcome> {
    let job = Job::join(launcher, TIMEOUT)?;
    let first = job.is_first();
    let measured = job.device(device).and_then(|device| measure(arguments, &device, &job));
    let mut figures = None;
    let outcome = job.end(measured.map(|measured| {
        figures = Some(measured);
        Outcome::Done
    }))?;
    match figures {
        Some(figures) if first => show(arguments, &figures),
        _ => Ok(outcome),
    }
}

/// What the steps cost.
struct Figures {
    parameters: u64,
    mesh: MeshShape,
    /// Median, smallest and largest.
    step_ms: [f64; 3],
    /// Floating-point operations of a step's matrix products, and the most that this process could do of
    /// them in a second; not known of other ranks and of GPUs.
    flops: f64,
    peak: Option<f64>,
    loss: f64,
    fraction_tokens_dropped: f64,
    /// What the host needed to ask a GPU for a step, and whether that was to repeat a recording.
    host: Option<(f64, bool)>,
    /// Memory of this rank that the plan fixes, and what a GPU counted.
    planned_memory: MemorySummary,
    device_memory: Option<DeviceMemory>,
}

fn measure(arguments: &BenchStepArguments, device: &Device, job: &Job) -> anyhow::Result<Figures> {
    preset(&arguments.preset)?;
    let sparse = if arguments.experts == 0 {
        "num_experts = 0\nexpert_layer_every = 0".to_owned()
    } else {
        format!("num_experts = {}", arguments.experts)
    };
    let data_ranks = (job.ranks() / arguments.mesh.tensor_parallel_size).max(1);
    let parts = data_ranks * arguments.micro_batches;
    job.agree(if arguments.rows.is_multiple_of(parts) {
        Ok(())
    } else {
        Err(anyhow::anyhow!(
            "--rows {} cannot be shared by {data_ranks} data-parallel ranks with {} micro-batches each",
            arguments.rows,
            arguments.micro_batches
        ))
    })?;
    let text = format!(
        "name = \"bench\"\n[model]\npreset = \"{}\"\n{sparse}\n[precision]\nmode = \"{}\"\nallow_tf32 = {}\n\
         [optimizer]\nkind = \"{}\"\nlearning_rate = 1e-4\n[schedule]\nkind = \"constant\"\nwarmup_steps = 0\n\
         [routing]\ncapacity_factor = {:?}\n\
         [data]\nsources = [{{ path = \"synthetic\" }}]\ninputs_length = {}\ntargets_length = {}\n\
         batch_rows = {rows}\nmicro_batch_rows = {micro_rows}\n\
         [trainer]\nrecompute_activations = {}\ncuda_graph = {}\n[parallel]\nexpert_parallel_size = {}\ntensor_parallel_size = {}\n\
         [comm]\noverlap = \"{}\"\ndispatch_chunks = {}\n",
        arguments.preset,
        arguments.precision,
        arguments.allow_tf32,
        arguments.optimizer,
        arguments.capacity_factor,
        arguments.inputs_length,
        arguments.targets_length,
        arguments.recompute,
        !arguments.no_cuda_graph,
        arguments.mesh.expert_parallel_size,
        arguments.mesh.tensor_parallel_size,
        arguments.overlap,
        arguments.dispatch_chunks,
        rows = arguments.rows,
        micro_rows = arguments.rows / parts,
    );
    let Resolved { plan, provenance } = job.agree(resolve_str(&text, &[]).map_err(in_options))?;
    let shape = job.agree(MeshShape::of(&plan, job.ranks(), &provenance).map_err(in_options))?;
    let travel = arguments.mesh.hierarchical_all_to_all.into();
    let travel = TokenTravel { chunks: plan.comm.dispatch_chunks, ..travel };
    let mesh = Arc::new(Mesh::new(job.communicator_on(device)?, shape, travel)?);
    job.agree(allow_tf32(plan.allow_tf32).map_err(Into::into))?;
    let share = Share { index: mesh.at().data, of: shape.data, micro_batch_rows: plan.data.micro_batch_rows };
    let vocabulary = plan.model.vocab_size;
    let mut learner = Learner::new(&plan, &device.clone().autodiff(), Arc::clone(&mesh));
    let (mut times, mut host_times) = (Vec::new(), Vec::new());
    let mut loss = f64::NAN;
    let (mut routed, mut dropped) = (0, 0);
    let steps = WARM_UP + arguments.steps;
    let batch = |step: u64| {
        let salt = step as u32 * 2;
        let batch = HostBatch {
            rows: arguments.rows,
            inputs_length: arguments.inputs_length,
            targets_length: arguments.targets_length,
            input_ids: synthetic_ids(arguments.rows * arguments.inputs_length, vocabulary, salt),
            target_ids: synthetic_ids(arguments.rows * arguments.targets_length, vocabulary, salt + 1),
            first_row: 0,
        };
        batch.micro_batches(share)
    };
    let mut next = None;
    let mut finished = Instant::now();
    for step in 0..steps {
        let begun = match next.take() {
            Some(begun) => begun,
            None => {
                let micro_batches = batch(step);
                mesh.world().barrier()?;
                finished = Instant::now();
                learner.begin(&plan, micro_batches, step)?
            }
        };
        // As in training, a GPU has the next step before it is done with this one.
        if learner.runs_ahead_of(&begun) && step + 1 < steps {
            next = Some(learner.begin(&plan, batch(step + 1), step + 1)?);
        }
        let outcome = learner.finish(&plan, begun)?;
        let elapsed_ms = finished.elapsed().as_secs_f64() * 1e3;
        finished = Instant::now();
        loss = outcome.loss;
        if step >= WARM_UP {
            times.push(elapsed_ms);
            host_times.extend(learner.host_time().map(|time| time.as_secs_f64() * 1e3));
            routed += outcome.moe.iter().map(|(_, layer)| layer.tokens).sum::<u64>();
            dropped += outcome.moe.iter().map(|(_, layer)| layer.dropped).sum::<u64>();
        }
    }
    Ok(Figures {
        parameters: plan.model.num_parameters(),
        mesh: shape,
        step_ms: spread(times),
        flops: step_flops(
            &plan.model,
            plan.routing.router,
            arguments.rows,
            arguments.inputs_length,
            arguments.targets_length,
        ),
        peak: (job.ranks() == 1 && *device == Device::flex())
            .then(|| peak_flops(plan.precision != PrecisionMode::Fp32, PEAK_ROUNDS)),
        loss,
        fraction_tokens_dropped: dropped as f64 / routed.max(1) as f64,
        host: (!host_times.is_empty()).then(|| (spread(host_times)[0], learner.is_recorded())),
        planned_memory: rank_memory(&plan, shape, job.rank()),
        device_memory: device_memory(device),
    })
}

fn show(arguments: &BenchStepArguments, figures: &Figures) -> anyhow::Result<Outcome> {
    let Figures { parameters, mesh, step_ms, flops, peak: peak_flops, loss, fraction_tokens_dropped, .. } =
        figures;
    let [step_ms, min_ms, max_ms] = step_ms;
    let gflops = flops / step_ms / 1e6;
    let share = peak_flops.map(|peak| gflops * 1e9 / peak);
    let tokens = arguments.rows * (arguments.inputs_length + arguments.targets_length);
    let tokens_per_second = tokens as f64 / step_ms * 1e3;
    let peak = memory::peak_bytes();
    if arguments.json {
        output::json(&serde_json::json!({
            "preset": arguments.preset, "experts": arguments.experts, "optimizer": arguments.optimizer,
            "precision": arguments.precision, "allow_tf32": arguments.allow_tf32, "recompute": arguments.recompute, "parameters": parameters, "micro_batches": arguments.micro_batches,
            "data_parallel_size": mesh.data, "expert_parallel_size": mesh.expert,
            "tensor_parallel_size": mesh.tensor,
            "step_ms": step_ms, "min_ms": min_ms, "max_ms": max_ms,
            "tokens_per_second": tokens_per_second, "gflops": gflops, "share_of_peak": share,
            "peak_memory_bytes": peak, "planned_memory": figures.planned_memory,
            "device_memory": figures.device_memory.map(|memory| serde_json::json!({
                "allocated_bytes": memory.allocated,
                "peak_allocated_bytes": memory.peak_allocated,
                "peak_reserved_bytes": memory.peak_reserved,
            })),
            "host_ms": figures.host.map(|(ms, _)| ms), "cuda_graph": figures.host.map(|(_, recorded)| recorded),
            "loss": loss,
            "fraction_tokens_dropped": fraction_tokens_dropped,
        }))?;
    } else {
        output::line(format!(
            "{step_ms:.1} ms a step ({min_ms:.1} to {max_ms:.1}), {} tokens/s, {gflops:.0} GFLOP/s{}, \
             peak memory {}, {:.1} % dropped",
            output::grouped(tokens_per_second as u64),
            share.map_or(String::new(), |share| format!(" ({:.0} % of the peak)", share * 100.0)),
            peak.map_or("unknown".to_owned(), output::bytes),
            fraction_tokens_dropped * 100.0,
        ))?;
        if let Some((ms, recorded)) = figures.host {
            let way = if recorded { "repeating a CUDA graph" } else { "kernel by kernel" };
            output::line(format!("the host asks for a step in {ms:.2} ms, {way}"))?;
        }
        if let Some(memory) = figures.device_memory {
            output::line(format!("on the GPU {}", memory::on_device(memory, figures.planned_memory)))?;
        }
    }
    Ok(Outcome::Done)
}
