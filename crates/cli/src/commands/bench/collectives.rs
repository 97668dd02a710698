//! Collectives of the ranks of a job, in main memory beside those of the MPI library, on GPUs beside NCCL's.

use anyhow::Context;
use burn::tensor::Device;
use switchyard_comm::bench::Measurement;
#[cfg(not(feature = "mpi"))]
use switchyard_comm::bench::collectives;
#[cfg(feature = "mpi")]
use switchyard_comm::bench::collectives_beside_bare;
use switchyard_comm::{Choice, ElementType, nccl_version};
use switchyard_kernels::{DeviceName, Place, place_of};
use switchyard_parallel::measure_collectives;

use crate::Outcome;
use crate::commands::output;
use crate::job::{Job, TIMEOUT};

pub(crate) fn run(
    mebibytes: &[f64],
    rounds: usize,
    json: bool,
    device: DeviceName,
    launcher: Choice,
) -> anyhow::Result<Outcome> {
    let job = Job::join(launcher, TIMEOUT)?;
    let bytes: Vec<usize> = mebibytes.iter().map(|size| (size * 1024.0 * 1024.0) as usize).collect();
    let measured = job.device(device).and_then(|device| {
        let measured = measure(&job, &device, &bytes, rounds)?;
        if job.is_first() { show(&job, &device, &measured, json) } else { Ok(()) }
    });
    job.end(measured.map(|()| Outcome::Done))
}

fn measure(job: &Job, device: &Device, bytes: &[usize], rounds: usize) -> anyhow::Result<Vec<Measurement>> {
    if place_of(device) != Place::Host {
        let world = job.communicator_on(device)?;
        let measured = measure_collectives(&*world, device, bytes, rounds)?;
        return measured.context("one device has no other to exchange with; start several ranks");
    }
    #[cfg(feature = "mpi")]
    let measured = collectives_beside_bare(job.world(), bytes, rounds)?;
    #[cfg(not(feature = "mpi"))]
    let measured = collectives(&**job.communicator(), bytes, rounds)?;
    Ok(measured)
}

fn show(job: &Job, device: &Device, measured: &[Measurement], json: bool) -> anyhow::Result<()> {
    let format = |element| if element == ElementType::Bf16 { "bf16" } else { "f32" };
    if json {
        let rows = measured.iter().map(|found| {
            serde_json::json!({
                "operation": found.operation, "ranks": found.ranks, "format": format(found.element),
                "bytes": found.bytes, "median_ms": found.seconds * 1e3,
                "bare_ms": found.bare_seconds.map(|seconds| seconds * 1e3),
                "algorithm_gb_per_s": found.algorithm_gb_per_s(), "bus_gb_per_s": found.bus_gb_per_s(),
            })
        });
        return output::json(&rows.collect::<Vec<_>>());
    }
    let way = match place_of(device) {
        Place::Gpu(_) => format!("on GPUs, NCCL {}", nccl_version()?),
        Place::LibTorch => format!("in LibTorch's main memory, {}", job.world().backend()),
        Place::Host => format!("{} ({})", job.world().backend(), job.world().library()),
    };
    output::line(format!("{} ranks, {way}", job.ranks()))?;
    for found in measured {
        let beside = found.bare_seconds.map_or(String::new(), |bare| {
            let share = bare / found.seconds * 100.0;
            format!("; the library's own {:.3} ms: {share:.0} % of its speed", bare * 1e3)
        });
        output::line(format!(
            "{:<11} {:<4} {:>10}  {:9.3} ms  {:7.2} GB/s, bus {:7.2} GB/s{beside}",
            found.operation,
            format(found.element),
            output::bytes(found.bytes as u64),
            found.seconds * 1e3,
            found.algorithm_gb_per_s(),
            found.bus_gb_per_s(),
        ))?;
    }
    Ok(())
}
