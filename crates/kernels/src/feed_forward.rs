//! Feed-forward layers, dense and as a stack of experts: `act(x wi) wo`, or `act(x wi_0) * (x wi_1) wo`.
//!
//! A dense layer is the stack of one expert that every token visits.

use std::ops::Range;

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::activation::Activation;
use crate::expert_rows::ExpertRows;
use crate::host;
use crate::matmul::{Threads, View, ViewMut, Write, matmul};
use crate::noise::{Columns, Factor, NoiseKey, TokenNoise};
use crate::operation::{Operand, Operation, apply};

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

/// Dropout on the hidden activations of experts.
#[derive(Debug, Clone, Copy)]
pub struct HiddenDropout {
    /// Probability of a zero.
    pub rate: f64,
    /// Random numbers, counted by token and expert.
    pub key: NoiseKey,
    /// Columns of `d_ff` on this device, if it is split.
    pub columns: Option<Columns>,
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
    let rows = ExpertRows::dense(tokens, (dropout > 0.0).then_some(noise));
    let dropout = HiddenDropout { rate: dropout, key: noise.key, columns: noise.columns };
    let x = x.reshape([1, tokens, width]);
    run(x, stack, FeedForward { activation, dropout, rows }).reshape([tokens, width])
}

/// Every expert on its own slots: `dispatched`, `[experts, slots, d_model]`, to the same shape.
///
/// Only slots that hold a token are computed; the others are 0. An expert without tokens costs
/// nothing and gets a zero gradient; `rows.weight_gradients` says how those of the weights are shaped. Dropout is keyed by token and expert, not by slot, so that it
/// does not depend on where the expert lives; `rows.places` must be there for it.
pub fn expert_feed_forward(
    dispatched: Tensor<3>,
    weights: ExpertWeights,
    activation: Activation,
    dropout: HiddenDropout,
    rows: ExpertRows,
) -> Tensor<3> {
    run(dispatched, weights, FeedForward { activation, dropout, rows })
}

fn run(x: Tensor<3>, weights: ExpertWeights, operation: FeedForward) -> Tensor<3> {
    let [experts, slots, _] = x.dims();
    operation.rows.check(experts, slots);
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
    dropout: HiddenDropout,
    rows: ExpertRows,
}

#[derive(Debug)]
struct Saved {
    x: FlexTensor,
    wo: FlexTensor,
    wi: Vec<FlexTensor>,
    /// `x wi` of every input matrix; of an ungated ReLU layer its activation. Only the rows of slots in
    /// use are there; empty without a backward pass.
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

/// Values that one pointwise task handles where a layer uses all threads.
const TASK_VALUES: usize = 1 << 14;

impl Sizes {
    fn of(x: &FlexTensor, wi: &FlexTensor) -> Self {
        let [e, c, d] = x.layout().shape().dims();
        let [_, _, f] = wi.layout().shape().dims();
        Self { e, c, d, f }
    }

    /// Fewer experts than threads use all threads inside; else the threads share the experts.
    fn threads(self) -> Threads {
        if self.e == 1 || self.e < rayon::current_num_threads() { Threads::All } else { Threads::One }
    }

    /// Rows of hidden activations that one pointwise task handles.
    fn task_rows(self) -> usize {
        match self.threads() {
            Threads::All => (TASK_VALUES / self.f.max(1)).max(1),
            Threads::One => self.c.max(1),
        }
    }

    fn task_values(self) -> usize {
        (self.task_rows() * self.f).max(1)
    }
}

/// Some consecutive slots in use of one expert.
#[derive(Debug, Clone)]
struct Run {
    expert: usize,
    slots: Range<usize>,
}

impl Run {
    /// What `slots` of the run's expert take of a buffer with `c` slots an expert, `width` values each.
    fn of<'a>(&self, buffer: &'a [f32], c: usize, width: usize) -> &'a [f32] {
        &buffer[(self.expert * c + self.slots.start) * width..][..self.slots.len() * width]
    }
}

impl FeedForward {
    /// `act(projected[0]) * projected[1] * dropout` of one run.
    fn hidden(&self, projected: &[&[f32]], sizes: Sizes, run: &Run) -> Vec<f32> {
        let mut hidden = host::uninit(projected[0].len());
        let task = sizes.task_values();
        hidden.par_chunks_mut(task).enumerate().for_each(|(i, hidden)| {
            let part = i * task..i * task + hidden.len();
            let linear = projected.get(1).map(|rows| &rows[part.clone()]);
            activate(self.activation, &projected[0][part.clone()], linear, hidden);
            self.drop_rows(hidden, sizes, run, i * sizes.task_rows());
        });
        hidden
    }

    /// Dropout of some rows of a run, from its row `first` on.
    fn drop_rows(&self, hidden: &mut [f32], sizes: Sizes, run: &Run, first: usize) {
        if self.dropout.rate == 0.0 {
            return;
        }
        let HiddenDropout { rate, key, columns } = self.dropout;
        let factor = Factor::Dropout { rate: rate as f32 };
        let places = self.rows.places.as_ref().expect("rows come with places where dropout needs them");
        let places = &places[run.expert * sizes.c + run.slots.start + first..];
        let expert = (self.rows.first_expert + run.expert) as u32;
        let mut words = vec![0; sizes.f];
        for (hidden, place) in hidden.chunks_exact_mut(sizes.f).zip(places) {
            place.fill(key, expert, columns, &mut words);
            for (value, &word) in hidden.iter_mut().zip(&words) {
                *value *= factor.of(word);
            }
        }
    }

    /// Slots in use of `expert`.
    fn runs(&self, expert: usize, sizes: Sizes) -> impl Iterator<Item = Run> + '_ {
        self.rows.runs(expert, sizes.c).map(move |slots| Run { expert, slots })
    }

    fn compute(
        &self,
        x: &FlexTensor,
        wo: &FlexTensor,
        wi: &[FlexTensor],
        tracked: bool,
    ) -> (FlexTensor, Saved) {
        let (x, wo) = (host::contiguous(x), host::contiguous(wo));
        let wi: Vec<_> = wi.iter().map(host::contiguous).collect();
        let sizes @ Sizes { e, c, d, f } = Sizes::of(&x, &wi[0]);
        let kept = if tracked { e * c * f } else { 0 };
        let mut projected: Vec<Vec<f32>> = wi.iter().map(|_| host::uninit(kept)).collect();
        let mut out = host::uninit(e * c * d);
        let inputs = Saved { x, wo, wi, projected: Vec::new() };
        out.par_chunks_mut((c * d).max(1))
            .zip(by_expert(&mut projected, c * f, e))
            .enumerate()
            .with_max_len(1)
            .for_each(|(expert, (out, kept))| self.expert_outputs(&inputs, sizes, expert, out, kept));
        (host::tensor(out, [e, c, d]), Saved { projected, ..inputs })
    }

    /// Writes the outputs of one expert, and into `kept`, unless it is empty, what a backward pass needs.
    fn expert_outputs(
        &self,
        inputs: &Saved,
        sizes: Sizes,
        expert: usize,
        out: &mut [f32],
        mut kept: Vec<&mut [f32]>,
    ) {
        let Sizes { c, d, f, .. } = sizes;
        let in_place = self.activation == Activation::Relu && inputs.wi.len() == 1;
        let wo = View::new(&host::values(&inputs.wo)[expert * f * d..], f, d);
        let mut written = 0;
        for run in self.runs(expert, sizes) {
            let (n, slots) = (run.slots.len(), run.slots.clone());
            out[written * d..slots.start * d].fill(0.0);
            written = slots.end;
            let mut scratch: Vec<Vec<f32>>;
            let rows: Vec<&mut [f32]> = if kept.is_empty() {
                scratch = inputs.wi.iter().map(|_| host::uninit(n * f)).collect();
                scratch.iter_mut().map(Vec::as_mut_slice).collect()
            } else {
                kept.iter_mut().map(|kept| &mut kept[slots.start * f..slots.end * f]).collect()
            };
            let x = View::new(run.of(host::values(&inputs.x), c, d), n, d);
            let mut projected: Vec<&[f32]> = Vec::new();
            for (wi, rows) in inputs.wi.iter().zip(rows) {
                let wi = View::new(&host::values(wi)[expert * d * f..], d, f);
                matmul(ViewMut::new(rows, n, f), x, wi, Write::Overwrite, sizes.threads());
                if in_place {
                    rows.par_chunks_mut(sizes.task_values()).for_each(relu);
                }
                projected.push(rows);
            }
            let hidden;
            let hidden = if in_place && self.dropout.rate == 0.0 {
                projected[0]
            } else {
                hidden = self.hidden(&projected, sizes, &run);
                &hidden
            };
            let out = ViewMut::new(&mut out[slots.start * d..slots.end * d], n, d);
            matmul(out, View::new(hidden, n, f), wo, Write::Overwrite, sizes.threads());
        }
        out[written * d..].fill(0.0);
    }

    /// Gradients of `x`, `wo` and every `wi`.
    fn gradients(&self, saved: &Saved, gradient: &FlexTensor) -> (FlexTensor, FlexTensor, Vec<FlexTensor>) {
        let sizes @ Sizes { e, c, d, f } = Sizes::of(&saved.x, &saved.wi[0]);
        let parts = self.rows.gradients();
        let mut gx = host::uninit(e * c * d);
        let mut gwo = host::uninit(e * parts * f * d);
        let mut gwi: Vec<Vec<f32>> = saved.wi.iter().map(|_| host::uninit(e * parts * d * f)).collect();
        let mut gx_of: Vec<&mut [f32]> = gx.chunks_mut((c * d).max(1)).collect();
        gx_of.resize_with(e, Default::default);
        gwo.par_chunks_mut((parts * f * d).max(1))
            .zip(gx_of)
            .zip(by_expert(&mut gwi, parts * d * f, e))
            .enumerate()
            .with_max_len(1)
            .for_each(|(expert, ((wo, x), wi))| {
                let out = ExpertGradients { x, wo, wi };
                self.expert_gradients(saved, host::values(gradient), sizes, expert, out);
            });
        let gwi = gwi.into_iter().map(|gwi| host::tensor(gwi, [e * parts, d, f])).collect();
        (host::tensor(gx, [e, c, d]), host::tensor(gwo, [e * parts, f, d]), gwi)
    }

    fn expert_gradients(
        &self,
        saved: &Saved,
        gradient: &[f32],
        sizes: Sizes,
        expert: usize,
        out: ExpertGradients<'_>,
    ) {
        let (Sizes { c, d, f, .. }, threads) = (sizes, sizes.threads());
        let ExpertGradients { x: gx, wo: mut gwo, wi: mut gwi } = out;
        let wo = View::new(&host::values(&saved.wo)[expert * f * d..], f, d);
        let (mut written, mut begun) = (0, 0);
        for run in self.runs(expert, sizes) {
            let (n, slots) = (run.slots.len(), run.slots.clone());
            gx[written * d..slots.start * d].fill(0.0);
            written = slots.end;
            let part = self.rows.gradient_of(slots.start, c);
            let write = if part < begun { Write::Add } else { Write::Overwrite };
            for gradient in gwi.iter_mut().chain([&mut gwo]) {
                gradient[begun * d * f..part.max(begun) * d * f].fill(0.0);
            }
            begun = part + 1;
            let matrix = part * d * f..begun * d * f;
            let x = View::new(run.of(host::values(&saved.x), c, d), n, d);
            let g = View::new(run.of(gradient, c, d), n, d);
            let projected: Vec<&[f32]> = saved.projected.iter().map(|rows| run.of(rows, c, f)).collect();
            let mut gh = self.hidden(&projected, sizes, &run);
            let gwo = ViewMut::new(&mut gwo[matrix.clone()], f, d);
            matmul(gwo, View::new(&gh, n, f).t(), g, write, threads);
            matmul(ViewMut::new(&mut gh, n, f), g, wo.t(), Write::Overwrite, threads);
            let gates = self.through_hidden(&projected, sizes, &run, &mut gh);
            for (i, (gp, gwi)) in [gh, gates].iter().zip(&mut gwi).enumerate() {
                let gp = View::new(gp, n, f);
                let wi = View::new(&host::values(&saved.wi[i])[expert * d * f..], d, f);
                let gwi = ViewMut::new(&mut gwi[matrix.clone()], d, f);
                matmul(gwi, x.t(), gp, write, threads);
                let gx = ViewMut::new(&mut gx[slots.start * d..slots.end * d], n, d);
                matmul(gx, gp, wi.t(), if i == 0 { Write::Overwrite } else { Write::Add }, threads);
            }
        }
        gx[written * d..].fill(0.0);
        for gradient in gwi.into_iter().chain([gwo]) {
            gradient[begun * d * f..].fill(0.0);
        }
    }

    /// Turns the gradient of a run's hidden activations into that of its first `x wi`; returns that of
    /// the second, empty without one.
    fn through_hidden(&self, projected: &[&[f32]], sizes: Sizes, run: &Run, gh: &mut [f32]) -> Vec<f32> {
        let (task, rows) = (sizes.task_values(), sizes.task_rows());
        let Some(linear) = projected.get(1) else {
            gh.par_chunks_mut(task).zip(projected[0].par_chunks(task)).enumerate().for_each(
                |(i, (gh, x))| {
                    self.drop_rows(gh, sizes, run, i * rows);
                    multiply_by_derivative(self.activation, x, gh);
                },
            );
            return Vec::new();
        };
        let mut gates = host::uninit(gh.len());
        gh.par_chunks_mut(task)
            .zip(gates.par_chunks_mut(task))
            .zip(projected[0].par_chunks(task).zip(linear.par_chunks(task)))
            .enumerate()
            .for_each(|(i, ((gh, gates), (x, linear)))| {
                self.drop_rows(gh, sizes, run, i * rows);
                gates.copy_from_slice(gh);
                activate_into_gradient(self.activation, x, linear, gh, gates);
            });
        gates
    }
}

/// Where the gradients of one expert go.
struct ExpertGradients<'a> {
    x: &'a mut [f32],
    wo: &'a mut [f32],
    wi: Vec<&'a mut [f32]>,
}

/// Every buffer's part of each of `e` experts, `len` values long; no parts when the buffers are empty.
fn by_expert(buffers: &mut [Vec<f32>], len: usize, e: usize) -> Vec<Vec<&mut [f32]>> {
    let mut parts: Vec<Vec<&mut [f32]>> = (0..e).map(|_| Vec::new()).collect();
    for buffer in buffers {
        for (parts, part) in parts.iter_mut().zip(buffer.chunks_mut(len.max(1))) {
            parts.push(part);
        }
    }
    parts
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
        *value = Activation::Relu.value(*value);
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
