//! Moving tokens into expert slots and back: the permutation around the experts.
//!
//! Both directions touch each assigned token once; nothing of size tokens x experts x capacity
//! is ever built, so the cost does not depend on the number of experts.

use std::sync::Arc;

use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::host;
use crate::math::dot;
use crate::operation::{Operand, Operation, apply};
use crate::plan::DispatchPlan;

/// Copies tokens `[tokens, d_model]` into their slots `[num_experts, slots, d_model]`; unused slots are 0.
///
/// # Source
/// Switch Transformer, section 2.2 and appendix F (arXiv:2101.03961), as a gather instead of an einsum.
pub fn dispatch(tokens: Tensor<2>, plan: &DispatchPlan) -> Tensor<3> {
    let [out] = apply(Dispatch(Indices::new(plan)), [Operand::from(tokens)]);
    out.into_tensor()
}

/// Sums the expert outputs of each token, weighted by the gates of its slots: `[tokens, d_model]`.
///
/// `expert_outputs` is `[num_experts, slots, d_model]`, `gates` one value a slot. A token without
/// a slot gets exactly 0, so only the residual connection carries it.
pub fn combine(expert_outputs: Tensor<3>, gates: Tensor<1>, plan: &DispatchPlan) -> Tensor<2> {
    let operation = Combine(Indices::new(plan));
    let [out] = apply(operation, [Operand::from(expert_outputs), Operand::from(gates)]);
    out.into_tensor()
}

/// The plan's integers on the host.
#[derive(Debug, Clone)]
struct Indices {
    experts: usize,
    slots: usize,
    token_of_slot: Arc<Vec<i32>>,
    offsets: Arc<Vec<i32>>,
    slots_of_token: Arc<Vec<i32>>,
}

impl Indices {
    fn new(plan: &DispatchPlan) -> Self {
        Self {
            experts: plan.num_experts,
            slots: plan.slots_per_expert,
            token_of_slot: Arc::new(host::integers(&plan.token_of_slot)),
            offsets: Arc::new(host::integers(&plan.slot_offsets)),
            slots_of_token: Arc::new(host::integers(&plan.slots_of_token)),
        }
    }

    fn tokens(&self) -> usize {
        self.offsets.len() - 1
    }

    fn slots_of(&self, token: usize) -> &[i32] {
        &self.slots_of_token[self.offsets[token] as usize..self.offsets[token + 1] as usize]
    }

    /// Row `token_of_slot[s]` of `rows`, times `gates[s]` if given, for every slot `s`.
    fn scatter(&self, rows: &[f32], width: usize, gates: Option<&[f32]>) -> FlexTensor {
        let mut out = host::uninit(self.experts * self.slots * width);
        out.par_chunks_mut(width).enumerate().with_min_len(64).for_each(|(slot, out)| {
            let Ok(token) = usize::try_from(self.token_of_slot[slot]) else {
                out.fill(0.0);
                return;
            };
            let row = &rows[token * width..][..width];
            match gates {
                Some(gates) => copy_scaled(out, row, gates[slot]),
                None => out.copy_from_slice(row),
            }
        });
        host::tensor(out, [self.experts, self.slots, width])
    }

    /// Sum over each token's slots of its row in `slots`, times `gates[s]` if given.
    fn gather(&self, slots: &[f32], width: usize, gates: Option<&[f32]>) -> FlexTensor {
        let mut out = host::uninit(self.tokens() * width);
        out.par_chunks_mut(width).enumerate().with_min_len(64).for_each(|(token, out)| {
            out.fill(0.0);
            for &slot in self.slots_of(token) {
                let gate = gates.map_or(1.0, |gates| gates[slot as usize]);
                add_scaled(out, &slots[slot as usize * width..][..width], gate);
            }
        });
        host::tensor(out, [self.tokens(), width])
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn add_scaled(out: &mut [f32], row: &[f32], factor: f32) {
    for (out, value) in out.iter_mut().zip(row) {
        *out += factor * value;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn copy_scaled(out: &mut [f32], row: &[f32], factor: f32) {
    for (out, value) in out.iter_mut().zip(row) {
        *out = factor * value;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn inner_product(a: &[f32], b: &[f32]) -> f32 {
    dot(a, b)
}

#[derive(Debug)]
struct Dispatch(Indices);

impl Operation<1, 1> for Dispatch {
    /// Width of a token.
    type Saved = usize;

    fn forward(&self, [tokens]: &[FlexTensor; 1], _: bool) -> ([FlexTensor; 1], usize) {
        let tokens = host::contiguous(tokens);
        let [_, width] = tokens.layout().shape().dims();
        ([self.0.scatter(host::values(&tokens), width, None)], width)
    }

    fn backward(
        &self,
        &width: &usize,
        _: usize,
        gradient: &FlexTensor,
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        [Some(self.0.gather(host::values(gradient), width, None))]
    }
}

#[derive(Debug)]
struct Combine(Indices);

#[derive(Debug)]
struct CombineSaved {
    expert_outputs: FlexTensor,
    gates: FlexTensor,
}

impl Operation<2, 1> for Combine {
    type Saved = CombineSaved;

    fn forward(&self, [expert_outputs, gates]: &[FlexTensor; 2], _: bool) -> ([FlexTensor; 1], CombineSaved) {
        let (expert_outputs, gates) = (host::contiguous(expert_outputs), host::contiguous(gates));
        let [_, _, width] = expert_outputs.layout().shape().dims();
        let out = self.0.gather(host::values(&expert_outputs), width, Some(host::values(&gates)));
        ([out], CombineSaved { expert_outputs, gates })
    }

    fn backward(
        &self,
        saved: &CombineSaved,
        _: usize,
        gradient: &FlexTensor,
        wanted: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [_, _, width] = saved.expert_outputs.layout().shape().dims();
        let rows = host::values(gradient);
        let outputs = host::values(&saved.expert_outputs);
        let to_experts = wanted[0].then(|| self.0.scatter(rows, width, Some(host::values(&saved.gates))));
        let to_gates = wanted[1].then(|| {
            let gates: Vec<f32> = (self.0.token_of_slot.par_iter().enumerate().with_min_len(64))
                .map(|(slot, &token)| match usize::try_from(token) {
                    Ok(token) => {
                        inner_product(&rows[token * width..][..width], &outputs[slot * width..][..width])
                    }
                    Err(_) => 0.0,
                })
                .collect();
            let slots = gates.len();
            host::tensor(gates, [slots])
        });
        [to_experts, to_gates]
    }
}
