//! Plan, dispatch and combine, forward and backward, without router product and experts.

use std::time::Instant;

use burn::tensor::{Device, Tensor};
use switchyard_kernels::{RouteOptions, combine, dispatch, route_top1};

use super::spread;
use crate::Outcome;
use crate::commands::output;

/// Runs that are timed for each number of experts.
const RUNS: usize = 30;

pub(crate) fn run(
    tokens: usize,
    d_model: usize,
    experts: &[usize],
    json: bool,
    device: &Device,
) -> anyhow::Result<Outcome> {
    let device = device.clone().autodiff();
    let mut times: Vec<Vec<f64>> = vec![Vec::new(); experts.len()];
    for run in 0..RUNS + 2 {
        for (times, &experts) in times.iter_mut().zip(experts) {
            let elapsed_ms = once(tokens, d_model, experts, &device);
            if run >= 2 {
                times.push(elapsed_ms);
            }
        }
    }
    let mut rows = Vec::new();
    for (times, experts) in times.into_iter().zip(experts) {
        let [median, min, max] = spread(times);
        rows.push(serde_json::json!({
            "experts": experts, "tokens": tokens, "d_model": d_model,
            "median_ms": median, "min_ms": min, "max_ms": max,
        }));
        if !json {
            output::line(format!("{experts:>5} experts  {median:7.3} ms  ({min:.3} to {max:.3})"))?;
        }
    }
    if json {
        output::json(&rows)?;
    }
    Ok(Outcome::Done)
}

/// One forward and backward at capacity factor 1.25, in milliseconds.
fn once(tokens: usize, d_model: usize, experts: usize, device: &Device) -> f64 {
    let values = |count: usize, salt: u32| -> Vec<f32> {
        let mut random = switchyard_random::Philox::new(7).stream([salt, 0, 0]);
        (0..count).map(|_| switchyard_random::unit_f32(random.next_u32()) * 2.0 - 1.0).collect()
    };
    let matrix = |rows: usize, cols: usize, salt: u32| {
        Tensor::<1>::from_data(values(rows * cols, salt).as_slice(), device).reshape([rows, cols])
    };
    let logits = matrix(tokens, experts, 0).require_grad();
    let x = matrix(tokens, d_model, 1).require_grad();
    let expert_capacity = ((tokens as f64 * 1.25 / experts as f64).ceil() as usize).max(4).min(tokens);
    let started = Instant::now();
    let expert_capacity = Some(expert_capacity);
    let options = RouteOptions { groups: 1, expert_capacity, token_mask: None, force_balanced: false };
    let routing = route_top1(logits, options);
    let slots = dispatch(x, &routing.plan);
    let out = combine(slots, routing.gates.clone(), &routing.plan);
    drop(out.sum().backward());
    started.elapsed().as_secs_f64() * 1e3
}
