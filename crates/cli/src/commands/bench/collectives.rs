//! Collectives of the ranks of a job, beside those of the MPI library.

use switchyard_comm::Choice;
use switchyard_comm::bench::Measurement;
#[cfg(not(feature = "mpi"))]
use switchyard_comm::bench::collectives;
#[cfg(feature = "mpi")]
use switchyard_comm::bench::collectives_beside_bare;

use crate::Outcome;
use crate::commands::output;
use crate::job::{Job, TIMEOUT};

pub(crate) fn run(mebibytes: &[f64], rounds: usize, json: bool, launcher: Choice) -> anyhow::Result<Outcome> {
    let job = Job::join(launcher, TIMEOUT)?;
    let measured = measure(&job, mebibytes, rounds, json);
    job.end(measured.map(|()| Outcome::Done))
}

fn measure(job: &Job, mebibytes: &[f64], rounds: usize, json: bool) -> anyhow::Result<()> {
    let bytes: Vec<usize> = mebibytes.iter().map(|size| (size * 1024.0 * 1024.0) as usize).collect();
    #[cfg(feature = "mpi")]
    let measured = collectives_beside_bare(job.world(), &bytes, rounds)?;
    #[cfg(not(feature = "mpi"))]
    let measured = collectives(&**job.communicator(), &bytes, rounds)?;
    if !job.is_first() {
        return Ok(());
    }
    if json {
        let rows = measured.iter().map(|Measurement { operation, bytes, seconds, bare_seconds }| {
            serde_json::json!({
                "operation": operation, "ranks": job.ranks(), "bytes": bytes,
                "median_ms": seconds * 1e3, "bare_ms": bare_seconds.map(|seconds| seconds * 1e3),
            })
        });
        return output::json(&rows.collect::<Vec<_>>());
    }
    let (backend, library) = (job.world().backend(), job.world().library());
    output::line(format!("{} ranks, {backend} ({library})", job.ranks()))?;
    for Measurement { operation, bytes, seconds, bare_seconds } in measured {
        let rate = bytes as f64 / seconds / 1e9;
        let beside = bare_seconds.map_or(String::new(), |bare| {
            format!("; the library's own {:.3} ms: {:.0} % of its speed", bare * 1e3, bare / seconds * 100.0)
        });
        let size = output::bytes(bytes as u64);
        output::line(format!(
            "{operation:<12} {size:>10}  {:9.3} ms  {rate:6.2} GB/s{beside}",
            seconds * 1e3
        ))?;
    }
    Ok(())
}
