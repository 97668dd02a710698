//! Plan, dispatch and combine, forward and backward, without router product and experts.

use burn::tensor::{Device, Tensor};
use serde_json::Value;
use switchyard_comm::Choice;
use switchyard_config::MeshShape;
use switchyard_kernels::{DeviceName, RouteOptions, route_top1};
use switchyard_parallel::{Mesh, device_time};

use super::spread;
use crate::Outcome;
use crate::args::TokenRoute;
use crate::commands::output;
use crate::job::{Job, TIMEOUT};

/// Runs that are timed for each number of experts.
const RUNS: usize = 30;

pub(crate) fn run(
    tokens: usize,
    d_model: usize,
    experts: &[usize],
    way: TokenRoute,
    json: bool,
    device: DeviceName,
    launcher: Choice,
) -> anyhow::Result<Outcome> {
    let job = Job::join(launcher, TIMEOUT)?;
    let first = job.is_first();
    let measured = job
        .device(device)
        .and_then(|device| measure(&job, tokens, d_model, experts, way, &device.autodiff()));
    let mut rows = Vec::new();
    let outcome = job.end(measured.map(|measured| {
        rows = measured;
        Outcome::Done
    }))?;
    if !first {
        return Ok(outcome);
    }
    if json {
        output::json(&rows)?;
        return Ok(outcome);
    }
    for row in rows {
        let number = |name: &str| row[name].as_f64().unwrap_or(f64::NAN);
        let (median, min, max) = (number("median_ms"), number("min_ms"), number("max_ms"));
        output::line(format!("{:>5} experts  {median:7.3} ms  ({min:.3} to {max:.3})", number("experts")))?;
    }
    Ok(outcome)
}

/// Figures for each number of experts, measured in turn.
fn measure(
    job: &Job,
    tokens: usize,
    d_model: usize,
    experts: &[usize],
    way: TokenRoute,
    device: &Device,
) -> anyhow::Result<Vec<Value>> {
    let ranks = job.ranks();
    let fitting = experts.iter().find(|&experts| !experts.is_multiple_of(ranks)).map_or(Ok(()), |experts| {
        Err(anyhow::anyhow!(
            "{ranks} ranks cannot share {experts} experts evenly; choose multiples with --experts"
        ))
    });
    job.agree(fitting)?;
    let shape = MeshShape { data: ranks, expert: ranks, tensor: 1 };
    let mesh = Mesh::new(job.communicator_on(device)?, shape, way.into())?;
    let x = random_matrix([tokens, d_model], 1, device);
    let mut cases: Vec<_> = experts
        .iter()
        .map(|&experts| (random_matrix([tokens, experts], 0, device), Vec::with_capacity(RUNS)))
        .collect();
    for run in 0..RUNS + 2 {
        for (logits, times) in &mut cases {
            let elapsed_ms = once(logits.clone().require_grad(), x.clone().require_grad(), device, &mesh)?;
            mesh.check()?;
            if run >= 2 {
                times.push(elapsed_ms);
            }
        }
    }
    let times = cases.into_iter().map(|(_, times)| times);
    let row = |(times, experts): (Vec<f64>, &usize)| {
        let [median, min, max] = spread(times);
        serde_json::json!({
            "experts": experts, "ranks": ranks, "tokens": tokens, "d_model": d_model,
            "hierarchical_all_to_all": mesh.is_hierarchical(), "median_ms": median,
            "min_ms": min, "max_ms": max,
        })
    };
    Ok(times.zip(experts).map(row).collect())
}

/// Numbers from -1 to 1, the same for the same `salt`.
fn random_matrix([rows, cols]: [usize; 2], salt: u32, device: &Device) -> Tensor<2> {
    let mut random = switchyard_random::Philox::new(7).stream([salt, 0, 0]);
    let values: Vec<f32> =
        (0..rows * cols).map(|_| switchyard_random::unit_f32(random.next_u32()) * 2.0 - 1.0).collect();
    Tensor::<1>::from_data(values.as_slice(), device).reshape([rows, cols])
}

/// One forward and backward at capacity factor 1.25, in milliseconds. `[tokens, experts]` and `[tokens, d_model]`
fn once(logits: Tensor<2>, x: Tensor<2>, device: &Device, mesh: &Mesh) -> anyhow::Result<f64> {
    let [tokens, experts] = logits.dims();
    let expert_capacity = ((tokens as f64 * 1.25 / experts as f64).ceil() as usize).max(4).min(tokens);
    let expert_capacity = Some(expert_capacity);
    let options = RouteOptions { groups: 1, expert_capacity, token_mask: None, force_balanced: false };
    let world = mesh.world();
    world.barrier()?;
    let seconds = device_time(&**world, device, || {
        let routing = route_top1(logits, options);
        let there = mesh.dispatcher().dispatch(x, &routing.plan, None);
        let (gates, plan) = (routing.gates.clone(), &routing.plan);
        let out = mesh.dispatcher().combine(there.slots_lcd, gates, plan, &there.counts, None);
        drop(out.sum().backward());
        Ok(())
    })?;
    Ok(seconds * 1e3)
}
