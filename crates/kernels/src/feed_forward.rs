//! Feed-forward layers, dense and as a stack of experts: `act(x wi) wo`, or `act(x wi_0) * (x wi_1) wo`.
//!
//! A dense layer is the stack of one expert that every token visits.

use std::sync::Arc;

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::activation::Activation;
use crate::host;
use crate::matmul::{Threads, View, ViewMut, Write, matmul};
use crate::noise::{Factor, TokenNoise};
use crate::operation::{Operand, Operation, apply};
use crate::plan::DispatchPlan;

/// Weights of a dense layer.
#[derive(Debug)]
pub struct FeedForwardWeights {
    /// Input matrix, activated. `[d_model, d_ff]`
    pub wi: Tensor<2>,
    /// Second input matrix of a gated layer, linear. `[d_model, d_ff]`
    pub wi_gate: Option<Tensor<2>>,
    /// Output matrix. `[d_ff, d_model]`
    pub wo: Tensor<2>,
}

/// Weights of a stack of experts.
#[derive(Debug)]
pub struct ExpertWeights {
    /// Input matrices, activated. `[num_experts, d_model, d_ff]`
    pub wi: Tensor<3>,
    /// Second input matrices of gated experts, linear. `[num_experts, d_model, d_ff]`
    pub wi_gate: Option<Tensor<3>>,
    /// Output matrices. `[num_experts, d_ff, d_model]`
    pub wo: Tensor<3>,
}

/// A dense layer on `x`, `[tokens, d_model]`, with dropout on its hidden activations.
pub fn feed_forward(
    x: Tensor<2>,
    weights: FeedForwardWeights,
    activation: Activation,
    dropout: f64,
    noise: TokenNoise,
) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let stack = ExpertWeights {
        wi: weights.wi.unsqueeze(),
        wi_gate: weights.wi_gate.map(Tensor::unsqueeze),
        wo: weights.wo.unsqueeze(),
    };
    let operation = FeedForward {
        activation,
        dropout: dropout as f32,
        noise,
        rows_used: vec![tokens],
        token_of_row: None,
    };
    run(x.reshape([1, tokens, width]), stack, operation).reshape([tokens, width])
}

/// Every expert on its own slots: `dispatched`, `[num_experts, slots, d_model]`, to the same shape.
///
/// Only slots that hold a token are computed; the others stay 0. An expert without tokens costs
/// nothing and gets a zero gradient. Dropout on hidden activations is keyed by token, not by slot.
pub fn expert_feed_forward(
    dispatched: Tensor<3>,
    weights: ExpertWeights,
    activation: Activation,
    dropout: f64,
    noise: TokenNoise,
    plan: &DispatchPlan,
) -> Tensor<3> {
    let operation = FeedForward {
        activation,
        dropout: dropout as f32,
        noise,
        rows_used: host::integers(&plan.rows_used).into_iter().map(|rows| rows as usize).collect(),
        token_of_row: (dropout > 0.0).then(|| Arc::new(host::integers(&plan.token_of_slot))),
    };
    run(dispatched, weights, operation)
}

fn run(x: Tensor<3>, weights: ExpertWeights, operation: FeedForward) -> Tensor<3> {
    let (x, wi, wo) = (Operand::from(x), Operand::from(weights.wi), Operand::from(weights.wo));
    let [out] = match weights.wi_gate {
        Some(gate) => apply(operation, [x, wo, wi, Operand::from(gate)]),
        None => apply(operation, [x, wo, wi]),
    };
    out.into_tensor()
}

#[derive(Debug)]
struct FeedForward {
    activation: Activation,
    dropout: f32,
    noise: TokenNoise,
    /// Rows of each expert that hold a token, at the front of its slots.
    rows_used: Vec<usize>,
    /// Token of each row; `None` when row and token are the same.
    token_of_row: Option<Arc<Vec<i32>>>,
}

#[derive(Debug)]
struct Saved {
    x: FlexTensor,
    wo: FlexTensor,
    wi: Vec<FlexTensor>,
    /// `x wi` of every input matrix; of an ungated ReLU layer its activation.
    projected: Vec<Vec<f32>>,
}

/// Sizes of the stack: experts, slots, d_model, d_ff.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    e: usize,
    c: usize,
    d: usize,
    f: usize,
}

impl Sizes {
    fn of(x: &FlexTensor, wi: &FlexTensor) -> Self {
        let [e, c, d] = x.layout().shape().dims();
        let [_, _, f] = wi.layout().shape().dims();
        Self { e, c, d, f }
    }

    /// A lone expert lets each product use all threads; several share the threads among them.
    fn threads(self) -> Threads {
        if self.e == 1 { Threads::All } else { Threads::One }
    }
}

impl FeedForward {
    /// `act(projected[0]) * projected[1] * dropout`, rows of expert `expert`.
    fn hidden(&self, projected: &[&[f32]], sizes: Sizes, expert: usize) -> Vec<f32> {
        let mut hidden = vec![0.0; projected[0].len()];
        activate(self.activation, projected[0], projected.get(1).copied(), &mut hidden);
        self.drop_rows(&mut hidden, sizes, expert);
        hidden
    }

    fn drop_rows(&self, hidden: &mut [f32], sizes: Sizes, expert: usize) {
        if self.dropout == 0.0 {
            return;
        }
        let factor = Factor::Dropout { rate: self.dropout };
        let mut words = vec![0; sizes.f];
        for (row, hidden) in hidden.chunks_exact_mut(sizes.f).enumerate() {
            let row = expert * sizes.c + row;
            let token = self.token_of_row.as_ref().map_or(row, |tokens| tokens[row] as usize);
            self.noise.fill(token, &mut words);
            for (value, &word) in hidden.iter_mut().zip(&words) {
                *value *= factor.of(word);
            }
        }
    }

    fn compute(
        &self,
        x: &FlexTensor,
        wo: &FlexTensor,
        wi: &[FlexTensor],
        tracked: bool,
    ) -> (FlexTensor, Saved) {
        let x = host::contiguous(x);
        let wo = host::contiguous(wo);
        let wi: Vec<_> = wi.iter().map(host::contiguous).collect();
        let sizes @ Sizes { e, c, d, f } = Sizes::of(&x, &wi[0]);
        let mut out = vec![0.0; e * c * d];
        let mut projected = vec![vec![0.0; if tracked { e * c * f } else { 0 }]; wi.len()];
        let in_place = self.activation == Activation::Relu && wi.len() == 1;
        let mut kept: Vec<Vec<&mut [f32]>> = (0..e).map(|_| Vec::new()).collect();
        if tracked {
            for buffer in &mut projected {
                for (expert, rows) in buffer.chunks_mut((c * f).max(1)).enumerate() {
                    kept[expert].push(rows);
                }
            }
        }
        out.par_chunks_mut((c * d).max(1)).zip(kept).enumerate().with_max_len(1).for_each(
            |(expert, (out, kept))| {
                let n = self.rows_used[expert];
                let mut scratch: Vec<Vec<f32>> = Vec::new();
                let mut rows: Vec<&mut [f32]> = kept;
                if rows.is_empty() {
                    scratch = vec![vec![0.0; n * f]; wi.len()];
                    rows = scratch.iter_mut().map(Vec::as_mut_slice).collect();
                }
                let x = View::new(&host::values(&x)[expert * c * d..], n, d);
                for (wi, rows) in wi.iter().zip(&mut rows) {
                    let wi = View::new(&host::values(wi)[expert * d * f..], d, f);
                    matmul(ViewMut::new(rows, n, f), x, wi, Write::Overwrite, sizes.threads());
                }
                if in_place {
                    relu(&mut rows[0][..n * f]);
                }
                let projected: Vec<&[f32]> = rows.iter().map(|rows| &rows[..n * f]).collect();
                let hidden;
                let hidden = if in_place && self.dropout == 0.0 {
                    projected[0]
                } else {
                    hidden = self.hidden(&projected, sizes, expert);
                    &hidden
                };
                let wo = View::new(&host::values(&wo)[expert * f * d..], f, d);
                matmul(
                    ViewMut::new(out, n, d),
                    View::new(hidden, n, f),
                    wo,
                    Write::Overwrite,
                    sizes.threads(),
                );
                drop(scratch);
            },
        );
        (host::tensor(out, [e, c, d]), Saved { x, wo, wi, projected })
    }

    /// Gradients of `x`, `wo` and every `wi`.
    fn gradients(&self, saved: &Saved, gradient: &FlexTensor) -> (FlexTensor, FlexTensor, Vec<FlexTensor>) {
        let sizes @ Sizes { e, c, d, f } = Sizes::of(&saved.x, &saved.wi[0]);
        let mut gx = vec![0.0; e * c * d];
        let mut gwo = vec![0.0; e * f * d];
        let mut gwi = vec![vec![0.0; e * d * f]; saved.wi.len()];
        let mut gwi_of: Vec<Vec<&mut [f32]>> = (0..e).map(|_| Vec::new()).collect();
        for buffer in &mut gwi {
            for (expert, chunk) in buffer.chunks_mut(d * f).enumerate() {
                gwi_of[expert].push(chunk);
            }
        }
        gx.par_chunks_mut((c * d).max(1))
            .zip(gwo.par_chunks_mut(f * d))
            .zip(gwi_of)
            .enumerate()
            .with_max_len(1)
            .for_each(|(expert, ((gx, gwo), gwi))| {
                self.expert_gradients(saved, host::values(gradient), sizes, expert, gx, gwo, gwi);
            });
        let gwi = gwi.into_iter().map(|gwi| host::tensor(gwi, [e, d, f])).collect();
        (host::tensor(gx, [e, c, d]), host::tensor(gwo, [e, f, d]), gwi)
    }

    #[allow(clippy::too_many_arguments)]
    fn expert_gradients(
        &self,
        saved: &Saved,
        gradient: &[f32],
        sizes: Sizes,
        expert: usize,
        gx: &mut [f32],
        gwo: &mut [f32],
        gwi: Vec<&mut [f32]>,
    ) {
        let Sizes { c, d, f, .. } = sizes;
        let (n, threads) = (self.rows_used[expert], sizes.threads());
        if n == 0 {
            return;
        }
        let x = View::new(&host::values(&saved.x)[expert * c * d..], n, d);
        let g = View::new(&gradient[expert * c * d..], n, d);
        let wo = View::new(&host::values(&saved.wo)[expert * f * d..], f, d);
        let projected: Vec<&[f32]> =
            saved.projected.iter().map(|rows| &rows[expert * c * f..][..n * f]).collect();
        let hidden = self.hidden(&projected, sizes, expert);
        matmul(ViewMut::new(gwo, f, d), View::new(&hidden, n, f).t(), g, Write::Overwrite, threads);
        let mut gh = hidden;
        matmul(ViewMut::new(&mut gh, n, f), g, wo.t(), Write::Overwrite, threads);
        self.drop_rows(&mut gh, sizes, expert);
        let mut gates = Vec::new();
        if let Some(&linear) = projected.get(1) {
            gates = gh.clone();
            activate_into_gradient(self.activation, projected[0], linear, &mut gh, &mut gates);
        } else {
            multiply_by_derivative(self.activation, projected[0], &mut gh);
        }
        for (i, (gp, gwi)) in [gh, gates].iter().zip(gwi).enumerate() {
            let gp = View::new(gp, n, f);
            let wi = View::new(&host::values(&saved.wi[i])[expert * d * f..], d, f);
            matmul(ViewMut::new(gwi, d, f), x.t(), gp, Write::Overwrite, threads);
            let write = if i == 0 { Write::Overwrite } else { Write::Add };
            matmul(ViewMut::new(gx, n, d), gp, wi.t(), write, threads);
        }
    }
}

impl Operation<3, 1> for FeedForward {
    type Saved = Saved;

    fn forward(&self, [x, wo, wi]: &[FlexTensor; 3], tracked: bool) -> ([FlexTensor; 1], Saved) {
        let (out, saved) = self.compute(x, wo, std::slice::from_ref(wi), tracked);
        ([out], saved)
    }

    fn backward(
        &self,
        saved: &Saved,
        _: usize,
        gradient: &FlexTensor,
        _: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let (gx, gwo, gwi) = self.gradients(saved, gradient);
        let mut gwi = gwi.into_iter();
        [Some(gx), Some(gwo), gwi.next()]
    }
}

impl Operation<4, 1> for FeedForward {
    type Saved = Saved;

    fn forward(&self, [x, wo, wi, gate]: &[FlexTensor; 4], tracked: bool) -> ([FlexTensor; 1], Saved) {
        let (out, saved) = self.compute(x, wo, &[wi.clone(), gate.clone()], tracked);
        ([out], saved)
    }

    fn backward(
        &self,
        saved: &Saved,
        _: usize,
        gradient: &FlexTensor,
        _: [bool; 4],
    ) -> [Option<FlexTensor>; 4] {
        let (gx, gwo, gwi) = self.gradients(saved, gradient);
        let mut gwi = gwi.into_iter();
        [Some(gx), Some(gwo), gwi.next(), gwi.next()]
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn relu(values: &mut [f32]) {
    for value in values {
        *value = value.max(0.0);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn activate(activation: Activation, x: &[f32], linear: Option<&[f32]>, out: &mut [f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = activation.value(x);
    }
    if let Some(linear) = linear {
        for (out, linear) in out.iter_mut().zip(linear) {
            *out *= linear;
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn multiply_by_derivative(activation: Activation, x: &[f32], gradient: &mut [f32]) {
    for (g, &x) in gradient.iter_mut().zip(x) {
        *g *= activation.derivative(x);
    }
}

/// Turns two copies of the hidden gradient into those of the activated and of the linear factor.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn activate_into_gradient(
    activation: Activation,
    x: &[f32],
    linear: &[f32],
    activated_gradient: &mut [f32],
    linear_gradient: &mut [f32],
) {
    for (((ga, gl), &x), linear) in activated_gradient.iter_mut().zip(linear_gradient).zip(x).zip(linear) {
        *ga *= linear * activation.derivative(x);
        *gl *= activation.value(x);
    }
}

#[cfg(test)]
mod tests;
