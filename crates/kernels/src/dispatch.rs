//! Moving tokens into expert slots and back: the permutation around the experts.
//!
//! Both directions touch each assigned token once; nothing of size tokens x experts x capacity
//! is ever built, so the cost does not depend on the number of experts.

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::element::Element;
use crate::host::{self, Held, by_format};
use crate::math::dot;
use crate::operation::{Operand, Operation, apply, given};
use crate::plan::{ByToken, DispatchPlan, TokenSlots};

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
/// `expert_outputs` is `[num_experts, slots, d_model]`, `gates` one float32 a slot. A token without
/// a slot gets exactly 0, so only the residual connection carries it. With a `residual` the sums are
/// added to it, rounded once.
pub fn combine(
    expert_outputs: Tensor<3>,
    gates: Tensor<1>,
    plan: &DispatchPlan,
    residual: Option<Tensor<2>>,
) -> Tensor<2> {
    let operation = Combine(Indices::new(plan));
    let (outputs, gates) = (Operand::from(expert_outputs), Operand::from(gates));
    let [out] = match residual {
        Some(residual) => apply(operation, [outputs, gates, Operand::from(residual)]),
        None => apply(operation, [outputs, gates]),
    };
    out.into_tensor()
}

/// The plan's integers.
#[derive(Debug, Clone)]
pub(crate) struct Indices {
    pub(crate) experts: usize,
    pub(crate) slots: usize,
    pub(crate) tokens: usize,
    pub(crate) token_of_slot: Held<i32>,
    pub(crate) by_token: ByToken,
}

impl Indices {
    fn new(plan: &DispatchPlan) -> Self {
        Self {
            experts: plan.num_experts,
            slots: plan.slots_per_expert,
            tokens: plan.num_tokens,
            token_of_slot: Held::integers(&plan.token_of_slot),
            by_token: plan.by_token.clone(),
        }
    }

    fn slots_by_token(&self) -> &TokenSlots {
        match &self.by_token {
            ByToken::Listed(slots) => slots,
            #[cfg(feature = "libtorch")]
            ByToken::Table(_) => panic!("all tensors of an operation lie on one device"),
        }
    }

    /// Row `token_of_slot[s]` of `rows`, times `gates[s]` if given, for every slot `s`.
    fn scatter<E: Element>(&self, rows: &[E], width: usize, gates: Option<&[f32]>) -> FlexTensor {
        let token_of_slot = self.token_of_slot.on_host();
        let mut out = host::uninit::<E>(self.experts * self.slots * width);
        out.par_chunks_mut(width).enumerate().with_min_len(64).for_each(|(slot, out)| {
            let Ok(token) = usize::try_from(token_of_slot[slot]) else {
                out.fill(E::default());
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

    /// `onto`, if given, plus each token's slots' rows of `slots`, times `gates[s]` if given.
    fn gather<E: Element>(
        &self,
        slots: &[E],
        width: usize,
        gates: Option<&[f32]>,
        onto: Option<&[E]>,
    ) -> FlexTensor {
        let by_token = self.slots_by_token();
        let mut out = host::uninit::<E>(self.tokens * width);
        out.par_chunks_mut(width).enumerate().with_min_len(64).for_each_init(
            || vec![0.0; width],
            |sums, (token, out)| {
                let row = |slot: i32| &slots[slot as usize * width..][..width];
                let gate = |slot: i32| gates.map_or(1.0, |gates| gates[slot as usize]);
                let onto = onto.map(|onto| &onto[token * width..][..width]);
                match (by_token.of(token), onto) {
                    ([], Some(onto)) => out.copy_from_slice(onto),
                    ([], None) => out.fill(E::default()),
                    (&[slot], None) => copy_scaled(out, row(slot), gate(slot)),
                    (&[slot], Some(onto)) => add_to(out, onto, row(slot), gate(slot)),
                    (slots, onto) => {
                        sums.fill(0.0);
                        if let Some(onto) = onto {
                            add_scaled(sums, onto, 1.0);
                        }
                        for &slot in slots {
                            add_scaled(sums, row(slot), gate(slot));
                        }
                        copy_scaled(out, sums, 1.0);
                    }
                }
            },
        );
        host::tensor(out, [self.tokens, width])
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn add_scaled<E: Element>(out: &mut [f32], row: &[E], factor: f32) {
    for (out, value) in out.iter_mut().zip(row) {
        *out += factor * value.widen();
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn copy_scaled<E: Element, F: Element>(out: &mut [E], row: &[F], factor: f32) {
    for (out, value) in out.iter_mut().zip(row) {
        *out = E::round(factor * value.widen());
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn add_to<E: Element>(out: &mut [E], onto: &[E], row: &[E], factor: f32) {
    for ((out, onto), value) in out.iter_mut().zip(onto).zip(row) {
        *out = E::round(onto.widen() + factor * value.widen());
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn inner_product<E: Element>(a: &[E], b: &[E]) -> f32 {
    dot(a, b)
}

#[derive(Debug)]
pub(crate) struct Dispatch(pub(crate) Indices);

impl Operation<Flex, 1, 1> for Dispatch {
    /// Width of a token.
    type Saved = usize;

    fn forward(&self, [tokens]: &[FlexTensor; 1], _: bool) -> ([FlexTensor; 1], usize) {
        let tokens = host::contiguous(tokens);
        let [_, width] = tokens.layout().shape().dims();
        let out = by_format!(tokens, E => self.0.scatter(host::values::<E>(&tokens), width, None));
        ([out], width)
    }

    fn backward(
        &self,
        &width: &usize,
        gradients: [Option<FlexTensor>; 1],
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let [gradient] = given(gradients);
        [Some(by_format!(gradient, E => self.0.gather(host::values::<E>(&gradient), width, None, None)))]
    }
}

#[derive(Debug)]
pub(crate) struct Combine(pub(crate) Indices);

#[derive(Debug)]
pub(crate) struct CombineSaved {
    expert_outputs: FlexTensor,
    gates: FlexTensor,
}

impl Combine {
    fn compute(&self, inputs: &[FlexTensor]) -> ([FlexTensor; 1], CombineSaved) {
        let (expert_outputs, gates) = (host::contiguous(&inputs[0]), host::contiguous(&inputs[1]));
        let residual = inputs.get(2).map(host::contiguous);
        let [_, _, width] = expert_outputs.layout().shape().dims();
        let out = by_format!(expert_outputs, E => {
            let residual = residual.as_ref().map(host::values::<E>);
            self.0.gather(host::values::<E>(&expert_outputs), width, Some(host::values(&gates)), residual)
        });
        ([out], CombineSaved { expert_outputs, gates })
    }

    /// Gradients of the expert outputs and of the gates.
    fn gradients<E: Element>(&self, saved: &CombineSaved, gradient: &FlexTensor) -> [FlexTensor; 2] {
        let [_, _, width] = saved.expert_outputs.layout().shape().dims();
        let (rows, outputs) = (host::values::<E>(gradient), host::values::<E>(&saved.expert_outputs));
        let to_experts = self.0.scatter(rows, width, Some(host::values(&saved.gates)));
        let gates: Vec<f32> = (self.0.token_of_slot.on_host().par_iter().enumerate().with_min_len(64))
            .map(|(slot, &token)| match usize::try_from(token) {
                Ok(token) => {
                    inner_product(&rows[token * width..][..width], &outputs[slot * width..][..width])
                }
                Err(_) => 0.0,
            })
            .collect();
        let slots = gates.len();
        [to_experts, host::tensor(gates, [slots])]
    }
}

impl Operation<Flex, 2, 1> for Combine {
    type Saved = CombineSaved;

    fn forward(&self, inputs: &[FlexTensor; 2], _: bool) -> ([FlexTensor; 1], CombineSaved) {
        self.compute(inputs)
    }

    fn backward(
        &self,
        saved: &CombineSaved,
        gradients: [Option<FlexTensor>; 1],
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [gradient] = given(gradients);
        by_format!(gradient, E => self.gradients::<E>(saved, &gradient)).map(Some)
    }
}

impl Operation<Flex, 3, 1> for Combine {
    type Saved = CombineSaved;

    fn forward(&self, inputs: &[FlexTensor; 3], _: bool) -> ([FlexTensor; 1], CombineSaved) {
        self.compute(inputs)
    }

    fn backward(
        &self,
        saved: &CombineSaved,
        gradients: [Option<FlexTensor>; 1],
        _: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [gradient] = given(gradients);
        let [to_experts, to_gates] = by_format!(gradient, E => self.gradients::<E>(saved, &gradient));
        [Some(to_experts), Some(to_gates), Some(gradient)]
    }
}
