//! AdamW: Adam with decoupled weight decay.

use multiversion::multiversion;
use rayon::prelude::*;

use super::parallel::{CHUNK, optional_chunks, root_mean_square};
use crate::element::{Element, bf16, round_all};

/// Constants of one update.
#[derive(Debug, Clone, Copy)]
pub struct Adamw {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Factor on the gradient: clipping and loss scaling in one.
    pub gradient_scale: f32,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Floor of the parameter scale; `None` for updates that do not depend on the parameter's size.
    pub parameter_scale: Option<f64>,
    /// Number of this update, from 1.
    pub update: u64,
}

/// Moments of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamwState {
    /// First moment.
    pub m: Vec<f32>,
    /// Second moment.
    pub v: Vec<f32>,
}

impl AdamwState {
    /// Fresh moments of a tensor with `len` values.
    pub fn new(len: usize) -> Self {
        Self { m: vec![0.0; len], v: vec![0.0; len] }
    }
}

/// Updates `parameter`, made of matrices of `matrix_len` values, each with a scale of its own.
///
/// `rounded`, if not empty, gets the new values as bfloat16.
///
/// # Source
/// Loshchilov and Hutter 2019 (arXiv:1711.05101); the parameter scale is Adafactor's (arXiv:1804.04235, section 8).
pub fn adamw<G: Element>(
    parameter: &mut [f32],
    gradient: &[G],
    state: &mut AdamwState,
    matrix_len: usize,
    rules: Adamw,
    rounded: &mut [bf16],
) {
    let correction1 = 1.0 - rules.beta1.powf(rules.update as f64);
    let correction2 = 1.0 - rules.beta2.powf(rules.update as f64);
    let mut rounded = rounded.chunks_mut(matrix_len);
    let matrices = parameter
        .chunks_mut(matrix_len)
        .zip(gradient.chunks(matrix_len))
        .zip(state.m.chunks_mut(matrix_len).zip(state.v.chunks_mut(matrix_len)));
    for ((p, g), (m, v)) in matrices {
        let rounded = rounded.next().unwrap_or_default();
        let scale = rules.parameter_scale.map_or(1.0, |floor| f64::from(root_mean_square(p)).max(floor));
        let step = Step {
            gradient_scale: rules.gradient_scale,
            beta1: rules.beta1 as f32,
            beta2: rules.beta2 as f32,
            eps: rules.eps as f32,
            keep: (1.0 - rules.learning_rate * rules.weight_decay) as f32,
            rate: (rules.learning_rate * scale / correction1) as f32,
            inverse_root_correction2: (1.0 / correction2.sqrt()) as f32,
        };
        let p_chunks = p.len().div_ceil(CHUNK);
        p.par_chunks_mut(CHUNK)
            .zip(g.par_chunks(CHUNK))
            .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
            .zip(optional_chunks(rounded, p_chunks))
            .for_each(|(((p, g), (m, v)), rounded)| {
                update(p, g, m, v, step);
                round_all(p, rounded);
            });
    }
}

#[derive(Clone, Copy)]
struct Step {
    gradient_scale: f32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    keep: f32,
    rate: f32,
    inverse_root_correction2: f32,
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn update<G: Element>(p: &mut [f32], g: &[G], m: &mut [f32], v: &mut [f32], s: Step) {
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g.widen() * s.gradient_scale;
        *m = s.beta1 * *m + (1.0 - s.beta1) * g;
        *v = s.beta2 * *v + (1.0 - s.beta2) * g * g;
        *p = *p * s.keep - s.rate * *m / (v.sqrt() * s.inverse_root_correction2 + s.eps);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_steps_move_by_the_learning_rate() {
        let rules = Adamw {
            learning_rate: 0.1,
            gradient_scale: 1.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            parameter_scale: None,
            update: 1,
        };
        let mut p = vec![1.0; 3];
        let mut state = AdamwState::new(3);
        adamw(&mut p, &[2.0_f32, -0.5, 0.0], &mut state, 3, rules, &mut []);
        for (p, expected) in p.iter().zip([0.9, 1.1, 1.0]) {
            assert!((p - expected).abs() < 1e-6);
        }
        let scaled = Adamw { parameter_scale: Some(1e-3), weight_decay: 0.5, ..rules };
        let mut p = vec![2.0, 4.0];
        let mut rounded = [bf16::default(); 2];
        adamw(&mut p, &[1.0_f32, 1.0], &mut AdamwState::new(2), 1, scaled, &mut rounded);
        assert_eq!(rounded.map(|v| v.widen()), [1.703_125, 3.406_25], "the new values, rounded");
        assert!((p[0] - (2.0 * 0.95 - 0.2)).abs() < 1e-5);
        assert!((p[1] - (4.0 * 0.95 - 0.4)).abs() < 1e-5);
    }
}
