//! `switchyard doctor`: what this machine and build can do, and the remedy for what is missing.

use std::time::Instant;

use serde_json::{Value, json};
use switchyard_comm::{Choice, Communicator, DevicesError, ReduceOp, nccl_version};
use switchyard_kernels::{CpuPath, devices};
use switchyard_parallel::gather_text;

use super::output;
use crate::Outcome;
use crate::job::{Job, TIMEOUT};

/// Exchanges that are timed between the ranks.
const ROUNDS: usize = 20;

/// Values of a large message: 4 MiB.
const LARGE: usize = 1 << 20;

pub(crate) fn run(as_json: bool, launcher: Choice) -> anyhow::Result<Outcome> {
    let job = Job::join(launcher, TIMEOUT)?;
    let examined = examine(&job);
    let first = job.is_first();
    let mut found = None;
    let outcome = job.end(examined.map(|examination| {
        found = Some(examination);
        Outcome::Done
    }))?;
    match found {
        Some(found) if first && as_json => output::json(&found)?,
        Some(found) if first => show(&found)?,
        _ => {}
    }
    Ok(outcome)
}

fn examine(job: &Job) -> anyhow::Result<Value> {
    let threads = rayon::current_num_threads();
    let rank = json!({
        "rank": job.rank(), "host": host(), "pid": std::process::id(), "threads": threads,
        "cores": std::thread::available_parallelism().map_or(1, usize::from),
    });
    let world = &**job.communicator();
    let ranks = gather_text(world, &rank.to_string())?;
    let ranks: Vec<Value> = ranks.iter().map(|text| serde_json::from_str(text)).collect::<Result<_, _>>()?;
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "devices": devices().into_iter().map(|(name, found)| match found {
            Ok(what) => json!({"name": name, "what": what}),
            Err(error) => json!({"name": name, "unusable": error.to_string()}),
        }).collect::<Vec<_>>(),
        "vector_instructions": vector_instructions(),
        "matrix_products": CpuPath::best().name(),
        "mpi": cfg!(feature = "mpi"),
        "nccl": nccl(),
        "backend": job.world().backend(),
        "library": job.world().library(),
        "transport": if job.ranks() > 1 { transport(world)? } else { Value::Null },
        "ranks": ranks,
    }))
}

/// The NCCL of this machine, or why it cannot be used; null in builds without.
fn nccl() -> Value {
    match nccl_version() {
        Ok(version) => json!({"what": version}),
        Err(DevicesError::NotInThisBuild) => Value::Null,
        Err(error) => json!({"unusable": error.to_string()}),
    }
}

/// How fast a short and a long message travel, and what the user has told Open MPI of the way.
fn transport(world: &dyn Communicator) -> anyhow::Result<Value> {
    let mut short = [0_u64];
    let latency = fastest(|| Ok(world.all_reduce(short.as_mut_slice().into(), ReduceOp::Max)?))?;
    let n = LARGE.next_multiple_of(world.size());
    let (sent, mut received) = (vec![0.0_f32; n], vec![0.0_f32; n]);
    let exchange = fastest(|| Ok(world.all_to_all(sent.as_slice().into(), received.as_mut_slice().into())?))?;
    let set = |name: &str| std::env::var(name).ok();
    Ok(json!({
        "latency_us": latency * 1e6,
        "all_to_all_gb_per_s": n as f64 * 4.0 / exchange / 1e9,
        "chosen_by_user": {
            "pml": set("OMPI_MCA_pml"), "btl": set("OMPI_MCA_btl"), "mtl": set("OMPI_MCA_mtl"),
        },
    }))
}

/// Seconds of the fastest of some rounds.
fn fastest(mut round: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..ROUNDS {
        let started = Instant::now();
        round()?;
        least = least.min(started.elapsed().as_secs_f64());
    }
    Ok(least)
}

fn show(found: &Value) -> anyhow::Result<()> {
    let row = |name: &str, text: String| output::line(format!("{name:<12} {text}"));
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    row("version", text(&found["version"]))?;
    let usable = |part: &Value| match part["what"].as_str() {
        Some(what) => what.to_owned(),
        None => format!("not usable: {}", text(&part["unusable"])),
    };
    for device in found["devices"].as_array().map_or(&[][..], Vec::as_slice) {
        row("device", format!("{}: {}", text(&device["name"]), usable(device)))?;
    }
    if !found["nccl"].is_null() {
        row("NCCL", usable(&found["nccl"]))?;
    }
    row("vectors", text(&found["vector_instructions"]))?;
    row("products", text(&found["matrix_products"]))?;
    let ranks = found["ranks"].as_array().map_or(&[][..], Vec::as_slice);
    let mpi = if found["mpi"] == false {
        "no: for ranks under mpirun or srun build with `cargo build --release --features switchyard-cli/mpi`"
            .to_owned()
    } else if found["backend"] == "tcp" {
        "yes, but these ranks met by MASTER_ADDR".to_owned()
    } else if ranks.len() == 1 {
        "yes; this process is alone, start it with `mpirun -n N` or `srun --mpi=pmix` to see the ranks"
            .to_owned()
    } else {
        text(&found["library"])
    };
    row("MPI", mpi)?;
    row("backend", text(&found["backend"]))?;
    for rank in ranks {
        row(
            &format!("rank {}", rank["rank"]),
            format!(
                "on {}, pid {}, {} threads, {} cores within reach",
                text(&rank["host"]),
                rank["pid"],
                rank["threads"],
                rank["cores"]
            ),
        )?;
    }
    if let Some(transport) = found["transport"].as_object() {
        let number = |name: &str| transport[name].as_f64().unwrap_or(f64::NAN);
        let mut hosts: Vec<&Value> = ranks.iter().map(|rank| &rank["host"]).collect();
        hosts.dedup();
        let way = if hosts.len() == 1 { "within one machine" } else { "between machines" };
        row(
            "transport",
            format!(
                "{way}: {:.0} us for a number from all to all, {:.2} GB/s all-to-all",
                number("latency_us"),
                number("all_to_all_gb_per_s")
            ),
        )?;
        for (name, value) in transport["chosen_by_user"].as_object().into_iter().flatten() {
            if let Some(value) = value.as_str() {
                row("", format!("OMPI_MCA_{name} = {value}"))?;
            }
        }
    }
    Ok(())
}

fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    name.map_or_else(|_| "unknown".to_owned(), |name| name.trim().to_owned())
}

/// The widest vectors that the kernels use here.
fn vector_instructions() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") {
            return "AVX-512";
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return "AVX2";
        }
    }
    "the architecture's base"
}
