//! A model's numbers beside those that another implementation recorded.
//!
//! A fixture is a safetensors file of inputs (`input_ids`, `attention_mask`, `labels`) and expected
//! arrays named as transformers names them. Every array that this module can compute is compared;
//! the caller learns which ones it could not. Reads no files: the caller brings [`Arrays`].

mod computation;
mod fixture;
mod router_table;

use switchyard_config::ModelConfig;
use switchyard_config::plan::RoutingConfig;
use switchyard_model::SwitchTransformer;

pub use fixture::{Array, Arrays, FixtureError, fixture_batch};

use computation::Computation;
use fixture::{INPUTS, Inputs};

/// Largest allowed differences.
#[derive(Debug, Clone, Copy)]
pub struct Tolerances {
    /// Hidden states, logits and everything made of them.
    pub absolute: f64,
    /// Losses.
    pub loss: f64,
}

impl Default for Tolerances {
    /// What float32 on one CPU and another may differ by.
    fn default() -> Self {
        Self { absolute: 2e-4, loss: 5e-5 }
    }
}

/// One compared array.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Name.
    pub name: String,
    /// Largest absolute difference; of ids, 0 or 1; infinite for a wrong shape and where either side
    /// holds NaN or an infinity.
    pub difference: f64,
    /// Allowed difference.
    pub tolerance: f64,
}

impl Comparison {
    /// Whether the difference is allowed, which an infinite one never is.
    pub fn passed(&self) -> bool {
        self.difference.is_finite() && self.difference <= self.tolerance
    }
}

/// Compared arrays, and the expected ones that nothing was computed for.
#[derive(Debug, Clone, PartialEq)]
pub struct Verification {
    /// In the order of their names.
    pub compared: Vec<Comparison>,
    /// Names of arrays left out.
    pub not_compared: Vec<String>,
}

/// Computes and compares every array of `fixture` that this version can compute.
///
/// # Errors
/// [`FixtureError`] for inputs that are missing or fit neither each other nor the model; nothing is
/// computed then.
pub fn verify(
    model: &SwitchTransformer,
    config: &ModelConfig,
    routing: &RoutingConfig,
    fixture: &Arrays,
    tolerances: Tolerances,
) -> Result<Verification, FixtureError> {
    let device = model.device().inner();
    let inputs = Inputs::new(fixture, config, &device)?;
    let computed = Computation::new(model, config, routing, inputs).run();
    let mut verification = Verification { compared: Vec::new(), not_compared: Vec::new() };
    for (name, expected) in fixture {
        match computed.get(name) {
            Some(found) => {
                let tolerance = match (expected.discrete, name.contains("loss")) {
                    (true, _) => 0.0,
                    (false, true) => tolerances.loss,
                    (false, false) => tolerances.absolute,
                };
                let difference = match (name.as_str(), fixture.get("greedy_ids")) {
                    ("greedy_logits", Some(ids)) => live_difference(found, expected, ids, config),
                    _ => difference(found, expected),
                };
                verification.compared.push(Comparison { name: name.clone(), difference, tolerance });
            }
            None if INPUTS.contains(&name.as_str()) => {}
            None => verification.not_compared.push(name.clone()),
        }
    }
    Ok(verification)
}

fn difference(found: &Array, expected: &Array) -> f64 {
    if found.shape != expected.shape || !expected.is_complete() {
        return f64::INFINITY;
    }
    let largest = largest_distance(&found.values, &expected.values);
    // How far apart two ids are says nothing.
    if expected.discrete && largest.is_finite() && largest > 0.0 { 1.0 } else { largest }
}

/// Difference of greedy logits, `[rows, steps, vocabulary]`, up to the EOS of each row of `ids`,
/// `[rows, steps + 1]`: rows that have ended keep listing logits of padding, which mean nothing.
fn live_difference(found: &Array, expected: &Array, ids: &Array, config: &ModelConfig) -> f64 {
    let (&[rows, steps, vocabulary], &[found_rows, found_steps, found_vocabulary]) =
        (&expected.shape[..], &found.shape[..])
    else {
        return f64::INFINITY;
    };
    let fits = [rows, vocabulary] == [found_rows, found_vocabulary] && ids.shape == [rows, steps + 1];
    if !fits || !expected.is_complete() {
        return f64::INFINITY;
    }
    let eos = f64::from(config.eos_token_id);
    let mut largest: f64 = 0.0;
    for (row, ids) in ids.values.chunks(steps + 1).enumerate() {
        let live = ids[1..].iter().position(|&id| id == eos).map_or(steps, |end| end + 1);
        if live > found_steps {
            return f64::INFINITY;
        }
        let found = &found.values[row * found_steps * vocabulary..][..live * vocabulary];
        let expected = &expected.values[row * steps * vocabulary..][..live * vocabulary];
        largest = largest.max(largest_distance(found, expected));
    }
    largest
}

/// Largest absolute difference of two equally long lists; never NaN.
fn largest_distance(found: &[f64], expected: &[f64]) -> f64 {
    // `f64::max` leaves NaN out, and a model that computes NaN must not pass for that.
    let distance = |(a, b): (&f64, &f64)| if (a - b).is_nan() { f64::INFINITY } else { (a - b).abs() };
    found.iter().zip(expected).map(distance).fold(0.0, f64::max)
}
