//! Feed-forward layers, dense and as a stack of experts: `act(x wi) wo`, or `act(x wi_0) * (x wi_1) wo`.
//!
//! A dense layer is the stack of one expert that every token visits.

use std::ops::Range;

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::Deferral;
use crate::activation::Activation;
use crate::element::Element;
use crate::expert_rows::ExpertRows;
use crate::gemm::{Multiply, Threads, View, ViewMut, Write, matmul};
use crate::host::{self, by_format};
use crate::noise::{Columns, Factor, NoiseKey, TokenNoise};
#[cfg(feature = "libtorch")]
use crate::operation::apply_in_torch;
use crate::operation::{Operand, Operation, apply, given};
use crate::slot_travel::SlotWay;

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
///
/// With a `residual` the outputs are added to it, rounded once.
pub fn feed_forward(
    x: Tensor<2>,
    weights: FeedForwardWeights,
    activation: Activation,
    dropout: f64,
    noise: TokenNoise,
    residual: Option<Tensor<2>>,
) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let stack = ExpertWeights {
        wi: weights.wi.unsqueeze(),
        wi_gate: weights.wi_gate.map(Tensor::unsqueeze),
        wo: weights.wo.unsqueeze(),
    };
    let rows = ExpertRows::dense(tokens, (dropout > 0.0).then_some(noise));
    let dropout = HiddenDropout { rate: dropout, key: noise.key, columns: noise.columns };
    let stacked = |x: Tensor<2>| x.reshape([1, tokens, width]);
    let (gated, deferral) = (stack.wi_gate.is_some(), None);
    let layer = FeedForward { activation, dropout, threads: threads(&rows), rows, gated, deferral };
    run(layer, stacked(x), stack, residual.map(stacked)).reshape([tokens, width])
}

/// Every expert on its own slots: `dispatched`, `[experts, slots, d_model]`, to the same shape.
///
/// Only slots that hold a token are computed; the others are 0. An expert without tokens costs
/// nothing and gets a zero gradient; `rows.weight_gradients` says how those of the weights are shaped. Dropout is keyed by token and expert, not by slot, so that it
/// does not depend on where the expert lives; `rows.places` must be there for it.
///
/// With a `deferral` gradients of the weights may go there instead of into automatic differentiation.
///
/// With a `way`, which only values of LibTorch have, `dispatched` are this rank's slots at the experts of all ranks,
/// `[num_experts, slots, d_model]`; they go there, and the outputs of all come back. `rows` tells what is at the
/// experts of this rank, a segment for each sender.
pub fn expert_feed_forward(
    dispatched: Tensor<3>,
    weights: ExpertWeights,
    activation: Activation,
    dropout: HiddenDropout,
    rows: ExpertRows,
    way: Option<SlotWay>,
    deferral: Option<Deferral>,
) -> Tensor<3> {
    let gated = weights.wi_gate.is_some();
    let layer = FeedForward { activation, dropout, threads: threads(&rows), rows, gated, deferral };
    match way {
        None => run(layer, dispatched, weights, None),
        Some(way) => run_travelling(layer, way, dispatched, weights),
    }
}

#[cfg(feature = "libtorch")]
fn run_travelling(layer: FeedForward, way: SlotWay, sent: Tensor<3>, weights: ExpertWeights) -> Tensor<3> {
    let [experts, _, _] = weights.wi.dims();
    let [all, slots, _] = sent.dims();
    layer.rows.check(experts, all / experts * slots);
    assert_eq!(all, experts * layer.rows.segments, "every sender has slots at the experts of all");
    let operation = crate::torch::travelling::TravellingExperts { layer, way };
    let (x, wi, wo) = (Operand::from(sent), Operand::from(weights.wi), Operand::from(weights.wo));
    let [out] = match weights.wi_gate.map(Operand::from) {
        Some(gate) => apply_in_torch(operation, [x, wo, wi, gate]),
        None => apply_in_torch(operation, [x, wo, wi]),
    };
    out.into_tensor()
}

#[cfg(not(feature = "libtorch"))]
fn run_travelling(_: FeedForward, _: SlotWay, _: Tensor<3>, _: ExpertWeights) -> Tensor<3> {
    unreachable!("no values lie on devices that could bring them to each other")
}

fn run(
    operation: FeedForward,
    x: Tensor<3>,
    weights: ExpertWeights,
    residual: Option<Tensor<3>>,
) -> Tensor<3> {
    let [experts, slots, _] = x.dims();
    operation.rows.check(experts, slots);
    let (x, wi, wo) = (Operand::from(x), Operand::from(weights.wi), Operand::from(weights.wo));
    let [out] = match (weights.wi_gate.map(Operand::from), residual.map(Operand::from)) {
        (Some(gate), Some(residual)) => apply(operation, [x, wo, wi, gate, residual]),
        (Some(other), None) | (None, Some(other)) => apply(operation, [x, wo, wi, other]),
        (None, None) => apply(operation, [x, wo, wi]),
    };
    out.into_tensor()
}

#[derive(Debug, Clone)]
pub(crate) struct FeedForward {
    pub(crate) activation: Activation,
    pub(crate) dropout: HiddenDropout,
    pub(crate) rows: ExpertRows,
    pub(crate) gated: bool,
    /// Where gradients of the weights wait, if they may.
    #[cfg_attr(
        not(feature = "libtorch"),
        expect(dead_code, reason = "only steps on a GPU put gradients off")
    )]
    pub(crate) deferral: Option<Deferral>,
    /// Who shares a product.
    pub(crate) threads: Threads,
}

/// Experts for each thread that make it not worth while to share their products.
const EXPERTS_PER_THREAD: usize = 8;

/// Who shares a product: many experts with tokens keep the threads busy without.
fn threads(rows: &ExpertRows) -> Threads {
    let Some(used) = rows.used.0.if_on_host() else { return Threads::All };
    let busy = used.iter().filter(|&&used| used > 0).count() / rows.segments.max(1);
    if busy >= EXPERTS_PER_THREAD * rayon::current_num_threads() { Threads::One } else { Threads::All }
}

/// Tensors of one layer.
#[derive(Debug)]
pub(crate) struct Inputs {
    x: FlexTensor,
    wo: FlexTensor,
    wi: Vec<FlexTensor>,
    residual: Option<FlexTensor>,
}

#[derive(Debug)]
pub(crate) struct Saved {
    inputs: Inputs,
    /// `x wi` of every input matrix; of an ungated ReLU layer its activation. Only the rows of slots in
    /// use are there; empty without a backward pass. `[experts * slots * d_ff]`
    projected: Vec<FlexTensor>,
}

/// Sizes of the stack: experts, slots, d_model, d_ff.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    e: usize,
    c: usize,
    d: usize,
    f: usize,
}

/// Values that one pointwise task handles.
const TASK_VALUES: usize = 1 << 14;

impl Sizes {
    fn of(x: &FlexTensor, wi: &FlexTensor) -> Self {
        let [e, c, d] = x.layout().shape().dims();
        let [_, _, f] = wi.layout().shape().dims();
        Self { e, c, d, f }
    }

    /// Rows of hidden activations that one pointwise task handles.
    fn task_rows(self) -> usize {
        (TASK_VALUES / self.f.max(1)).max(1)
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
    fn of<'a, E>(&self, buffer: &'a [E], c: usize, width: usize) -> &'a [E] {
        &buffer[(self.expert * c + self.slots.start) * width..][..self.slots.len() * width]
    }
}

impl FeedForward {
    /// Whether the backward pass can do with the activations that the outputs were computed from.
    pub(crate) fn keeps_activated(&self) -> bool {
        self.activation == Activation::Relu && !self.gated
    }

    /// `act(projected[0]) * projected[1] * dropout` of one run.
    fn hidden<E: Element>(&self, projected: &[&[E]], sizes: Sizes, run: &Run) -> Vec<E> {
        let mut hidden = host::uninit(projected[0].len());
        let task = sizes.task_values();
        hidden.par_chunks_mut(task).enumerate().for_each(|(i, hidden)| {
            let part = i * task..i * task + hidden.len();
            let linear = projected.get(1).map_or(&[] as &[E], |rows| &rows[part.clone()]);
            activate(self.activation, &projected[0][part.clone()], linear, hidden);
            self.drop_rows(hidden, sizes, run, i * sizes.task_rows());
        });
        hidden
    }

    /// Dropout of some rows of a run, from its row `first` on.
    fn drop_rows<E: Element>(&self, hidden: &mut [E], sizes: Sizes, run: &Run, first: usize) {
        if self.dropout.rate == 0.0 {
            return;
        }
        let HiddenDropout { rate, key, columns } = self.dropout;
        let factor = Factor::Dropout { rate: rate as f32 };
        let first = run.expert * sizes.c + run.slots.start + first;
        let expert = (self.rows.first_expert + run.expert) as u32;
        let mut words = vec![0; sizes.f];
        for (row, hidden) in hidden.chunks_exact_mut(sizes.f).enumerate() {
            self.rows.place(first + row).fill(key, expert, columns, &mut words);
            for (value, &word) in hidden.iter_mut().zip(&words) {
                *value = E::round(value.widen() * factor.of(word));
            }
        }
    }

    /// Slots in use of `expert`.
    fn runs(&self, expert: usize, sizes: Sizes) -> impl Iterator<Item = Run> + '_ {
        self.rows.runs(expert, sizes.c).map(move |slots| Run { expert, slots })
    }

    fn inputs(&self, inputs: &[FlexTensor]) -> Inputs {
        let mut inputs = inputs.iter().map(host::contiguous);
        let mut next = || inputs.next().expect("a layer has three tensors at least");
        let (x, wo, mut wi) = (next(), next(), vec![next()]);
        if self.gated {
            wi.push(next());
        }
        Inputs { x, wo, wi, residual: inputs.next() }
    }

    fn compute<E: Multiply<E> + Multiply<f32>>(&self, inputs: Inputs, tracked: bool) -> (FlexTensor, Saved) {
        let sizes @ Sizes { e, c, d, f } = Sizes::of(&inputs.x, &inputs.wi[0]);
        let kept = if tracked { e * c * f } else { 0 };
        let mut projected: Vec<Vec<E>> = inputs.wi.iter().map(|_| host::uninit(kept)).collect();
        let mut out = host::uninit::<E>(e * c * d);
        out.par_chunks_mut((c * d).max(1))
            .zip(by_expert(&mut projected, c * f, e))
            .enumerate()
            .with_max_len(1)
            .for_each(|(expert, (out, kept))| self.expert_outputs::<E>(&inputs, sizes, expert, out, kept));
        let projected = projected.into_iter().map(|rows| host::tensor(rows, [kept])).collect();
        (host::tensor(out, [e, c, d]), Saved { inputs, projected })
    }

    /// Writes the outputs of one expert, and into `kept`, unless it is empty, what a backward pass needs.
    fn expert_outputs<E: Multiply<E> + Multiply<f32>>(
        &self,
        inputs: &Inputs,
        sizes: Sizes,
        expert: usize,
        out: &mut [E],
        mut kept: Vec<&mut [E]>,
    ) {
        let Sizes { c, d, f, .. } = sizes;
        let wo = View::new(&host::values::<E>(&inputs.wo)[expert * f * d..], f, d);
        let mut written = 0;
        for run in self.runs(expert, sizes) {
            let (n, slots) = (run.slots.len(), run.slots.clone());
            out[written * d..slots.start * d].fill(E::default());
            written = slots.end;
            let mut scratch: Vec<Vec<E>>;
            let rows: Vec<&mut [E]> = if kept.is_empty() {
                scratch = inputs.wi.iter().map(|_| host::uninit(n * f)).collect();
                scratch.iter_mut().map(Vec::as_mut_slice).collect()
            } else {
                kept.iter_mut().map(|kept| &mut kept[slots.start * f..slots.end * f]).collect()
            };
            let x = View::new(run.of(host::values::<E>(&inputs.x), c, d), n, d);
            let mut projected: Vec<&[E]> = Vec::new();
            for (wi, rows) in inputs.wi.iter().zip(rows) {
                let wi = View::new(&host::values::<E>(wi)[expert * d * f..], d, f);
                let write = if self.keeps_activated() { Write::Relu } else { Write::Overwrite };
                matmul(ViewMut::new(rows, n, f), x, wi, write, self.threads);
                projected.push(rows);
            }
            let hidden;
            let hidden = if self.keeps_activated() && self.dropout.rate == 0.0 {
                projected[0]
            } else {
                hidden = self.hidden(&projected, sizes, &run);
                &hidden
            };
            let out = ViewMut::new(&mut out[slots.start * d..slots.end * d], n, d);
            let write = match &inputs.residual {
                Some(residual) => Write::Onto(View::new(run.of(host::values::<E>(residual), c, d), n, d)),
                None => Write::Overwrite,
            };
            matmul(out, View::new(hidden, n, f), wo, write, self.threads);
        }
        out[written * d..].fill(E::default());
    }

    /// Gradients of `x`, `wo` and every `wi`.
    fn gradients<E: Multiply<E> + Multiply<f32>>(
        &self,
        saved: &Saved,
        gradient: &FlexTensor,
    ) -> Vec<FlexTensor> {
        let sizes @ Sizes { e, c, d, f } = Sizes::of(&saved.inputs.x, &saved.inputs.wi[0]);
        let parts = self.rows.gradients();
        let mut gx = host::uninit::<E>(e * c * d);
        let mut gwo = host::uninit::<E>(e * parts * f * d);
        let mut gwi: Vec<Vec<E>> = saved.inputs.wi.iter().map(|_| host::uninit(e * parts * d * f)).collect();
        let mut gx_of: Vec<&mut [E]> = gx.chunks_mut((c * d).max(1)).collect();
        gx_of.resize_with(e, Default::default);
        gwo.par_chunks_mut((parts * f * d).max(1))
            .zip(gx_of)
            .zip(by_expert(&mut gwi, parts * d * f, e))
            .enumerate()
            .with_max_len(1)
            .for_each(|(expert, ((wo, x), wi))| {
                let out = ExpertGradients { x, wo, wi };
                self.expert_gradients::<E>(saved, host::values(gradient), sizes, expert, out);
            });
        let mut all = vec![host::tensor(gx, [e, c, d]), host::tensor(gwo, [e * parts, f, d])];
        all.extend(gwi.into_iter().map(|gwi| host::tensor(gwi, [e * parts, d, f])));
        all
    }

    fn expert_gradients<E: Multiply<E> + Multiply<f32>>(
        &self,
        saved: &Saved,
        gradient: &[E],
        sizes: Sizes,
        expert: usize,
        out: ExpertGradients<'_, E>,
    ) {
        let Sizes { c, d, f, .. } = sizes;
        let ExpertGradients { x: gx, wo: mut gwo, wi: mut gwi } = out;
        let inputs = &saved.inputs;
        let wo = View::new(&host::values::<E>(&inputs.wo)[expert * f * d..], f, d);
        let (mut written, mut begun) = (0, 0);
        for run in self.runs(expert, sizes) {
            let (n, slots) = (run.slots.len(), run.slots.clone());
            gx[written * d..slots.start * d].fill(E::default());
            written = slots.end;
            let part = self.rows.gradient_of(slots.start, c);
            let write = if part < begun { Write::Add } else { Write::PastCaches };
            for gradient in gwi.iter_mut().chain([&mut gwo]) {
                gradient[begun * d * f..part.max(begun) * d * f].fill(E::default());
            }
            begun = part + 1;
            let matrix = part * d * f..begun * d * f;
            let x = View::new(run.of(host::values::<E>(&inputs.x), c, d), n, d);
            let g = View::new(run.of(gradient, c, d), n, d);
            let projected: Vec<&[E]> =
                saved.projected.iter().map(|rows| run.of(host::values::<E>(rows), c, f)).collect();
            let gwo = ViewMut::new(&mut gwo[matrix.clone()], f, d);
            let mut gh;
            let mut gates = Vec::new();
            if self.keeps_activated() && self.dropout.rate == 0.0 {
                let activated = View::new(projected[0], n, f);
                gh = host::uninit(n * f);
                let through = ViewMut::new(&mut gh, n, f);
                rayon::join(
                    || matmul(through, g, wo.t(), Write::Mask(activated), self.threads),
                    || matmul(gwo, activated.t(), g, write, self.threads),
                );
            } else {
                gh = self.hidden(&projected, sizes, &run);
                matmul(gwo, View::new(&gh, n, f).t(), g, write, self.threads);
                matmul(ViewMut::new(&mut gh, n, f), g, wo.t(), Write::Overwrite, self.threads);
                gates = self.through_hidden(&projected, sizes, &run, &mut gh);
            }
            for (i, (gp, gwi)) in [gh, gates].iter().zip(&mut gwi).enumerate() {
                let gp = View::new(gp, n, f);
                let wi = View::new(&host::values::<E>(&inputs.wi[i])[expert * d * f..], d, f);
                let gwi = ViewMut::new(&mut gwi[matrix.clone()], d, f);
                let gx = ViewMut::new(&mut gx[slots.start * d..slots.end * d], n, d);
                let onto = if i == 0 { Write::Overwrite } else { Write::Add };
                rayon::join(
                    || matmul(gx, gp, wi.t(), onto, self.threads),
                    || matmul(gwi, x.t(), gp, write, self.threads),
                );
            }
        }
        gx[written * d..].fill(E::default());
        for gradient in gwi.into_iter().chain([gwo]) {
            gradient[begun * d * f..].fill(E::default());
        }
    }

    /// Turns the gradient of a run's hidden activations into that of its first `x wi`; returns that of
    /// the second, empty without one.
    fn through_hidden<E: Element>(
        &self,
        projected: &[&[E]],
        sizes: Sizes,
        run: &Run,
        gh: &mut [E],
    ) -> Vec<E> {
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
                activate_into_gradient(self.activation, x, linear, gh, gates);
            });
        gates
    }
}

/// Where the gradients of one expert go.
struct ExpertGradients<'a, E> {
    x: &'a mut [E],
    wo: &'a mut [E],
    wi: Vec<&'a mut [E]>,
}

/// Every buffer's part of each of `e` experts, `len` values long; no parts when the buffers are empty.
fn by_expert<E>(buffers: &mut [Vec<E>], len: usize, e: usize) -> Vec<Vec<&mut [E]>> {
    let mut parts: Vec<Vec<&mut [E]>> = (0..e).map(|_| Vec::new()).collect();
    for buffer in buffers {
        for (parts, part) in parts.iter_mut().zip(buffer.chunks_mut(len.max(1))) {
            parts.push(part);
        }
    }
    parts
}

macro_rules! operation {
    ($inputs:literal) => {
        impl Operation<Flex, $inputs, 1> for FeedForward {
            type Saved = Saved;

            fn forward(&self, inputs: &[FlexTensor; $inputs], tracked: bool) -> ([FlexTensor; 1], Saved) {
                let inputs = self.inputs(inputs);
                let (out, saved) = by_format!(inputs.x, E => self.compute::<E>(inputs, tracked));
                ([out], saved)
            }

            fn backward(
                &self,
                saved: &Saved,
                gradients: [Option<FlexTensor>; 1],
                _: [bool; $inputs],
            ) -> [Option<FlexTensor>; $inputs] {
                let [gradient] = given(gradients);
                let computed = by_format!(gradient, E => self.gradients::<E>(saved, &gradient));
                let residual = saved.inputs.residual.is_some().then_some(gradient);
                let mut all = computed.into_iter().chain(residual);
                std::array::from_fn(|_| all.next())
            }
        }
    };
}

operation!(3);
operation!(4);
operation!(5);

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn activate<E: Element>(activation: Activation, x: &[E], linear: &[E], out: &mut [E]) {
    if linear.is_empty() {
        for (out, x) in out.iter_mut().zip(x) {
            *out = E::round(activation.value(x.widen()));
        }
    } else {
        for ((out, x), linear) in out.iter_mut().zip(x).zip(linear) {
            *out = E::round(activation.value(x.widen()) * linear.widen());
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn multiply_by_derivative<E: Element>(activation: Activation, x: &[E], gradient: &mut [E]) {
    for (g, x) in gradient.iter_mut().zip(x) {
        *g = E::round(g.widen() * activation.derivative(x.widen()));
    }
}

/// Turns the hidden gradient into that of the activated factor, and writes that of the linear one.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn activate_into_gradient<E: Element>(
    activation: Activation,
    x: &[E],
    linear: &[E],
    gradient: &mut [E],
    linear_gradient: &mut [E],
) {
    for (((g, gl), x), linear) in gradient.iter_mut().zip(linear_gradient).zip(x).zip(linear) {
        let (x, hidden) = (x.widen(), g.widen());
        *g = E::round(hidden * linear.widen() * activation.derivative(x));
        *gl = E::round(hidden * activation.value(x));
    }
}

#[cfg(test)]
mod tests;
