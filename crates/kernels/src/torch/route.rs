//! Routing: on a GPU wholly by kernels, elsewhere the differentiable part of it.

use burn::backend::LibTorch;
use burn::tensor::Tensor as BurnTensor;
use burn_tch::TchTensor;
use switchyard_cuda::{Route, RouteAt, RouteGradients, RouterChoice, route_backward, route_workspace};
use tch::{Kind, Tensor};

use crate::operation::{Operand, Operation, apply_in_torch};
use crate::plan::{ByToken, DispatchPlan};
use crate::route::{Gate, GateRule, RouteOptions, Routing};
use crate::torch::composed::composed_operation;
use crate::torch::gpu::{at, at_optional, format, narrow, queue, room, started, workspace};
use crate::torch::{contiguous, exchanged, floats, is_here, uploaded, wide};

fn integers(values: impl Iterator<Item = i64>, like: &Tensor) -> Tensor {
    exchanged("decisions of a router");
    Tensor::from_slice(&values.collect::<Vec<_>>()).to(like.device())
}

impl Gate {
    /// Gates, mean probabilities and mean squares of `log_z`.
    fn composed(&self, logits: &Tensor) -> [Tensor; 3] {
        let scores = &self.scores;
        let (experts, groups) = (scores.experts as i64, scores.options.groups as i64);
        let values = wide(logits);
        let probabilities = values.softmax(-1, Kind::Float).to_kind(logits.kind());
        let probabilities = wide(&probabilities);
        let flat = probabilities.view([-1]);
        let slots = self.token_of_slot.len() / scores.experts;
        let assigned = || self.token_of_slot.iter().enumerate();
        let token = |token: i32| i64::from(token.max(0));
        let index = integers(assigned().map(|(slot, &t)| token(t) * experts + (slot / slots) as i64), logits);
        let mut gates = flat.index_select(0, &index);
        if let GateRule::Normalized { second } = &self.rule {
            let of = |choice: &[i32]| {
                let choice =
                    choice.iter().enumerate().map(|(t, &e)| t as i64 * experts + i64::from(e.max(0)));
                flat.index_select(0, &integers(choice, logits))
            };
            let divisor = of(&scores.best) + of(second);
            gates = &gates / divisor.index_select(0, &integers(assigned().map(|(_, &t)| token(t)), logits));
        }
        let used: Vec<f32> = self.token_of_slot.iter().map(|&t| if t < 0 { 0.0 } else { 1.0 }).collect();
        let gates = wide(&(gates * uploaded(&used, &[used.len() as i64], logits)).to_kind(logits.kind()));

        let counted: Vec<f32> = scores.mask.iter().map(|&counted| if counted { 1.0 } else { 0.0 }).collect();
        let shares: Vec<f32> = self.counted.iter().map(|&n| 1.0 / n.max(1) as f32).collect();
        let weights =
            uploaded(&counted, &[groups, -1, 1], logits) * uploaded(&shares, &[groups, 1, 1], logits);
        let over_tokens = |x: Tensor| (x * &weights).sum_dim_intlist([1_i64].as_slice(), false, Kind::Float);
        let mean = over_tokens(probabilities.view([groups, -1, experts]));
        let log_z = values.logsumexp([-1_i64].as_slice(), true);
        let z = over_tokens(log_z.square().view([groups, -1, 1])).view([groups]);
        [gates, mean, z]
    }
}

composed_operation!(Gate, 1, 3, false, |gate, [logits]| gate.composed(logits));

/// Routing by kernels: logits to gates, mean probabilities and z, and on the way everything else.
#[derive(Debug)]
struct Routed {
    rules: Route,
    token_mask: Option<TchTensor>,
    choice: TchTensor,
    second_choice: Option<TchTensor>,
    entropy: TchTensor,
    token_of_slot: TchTensor,
    slot_of_token: TchTensor,
    rows_used: TchTensor,
    fraction: TchTensor,
    counted: TchTensor,
}

/// Each token to its likeliest expert, or to its two likeliest where there are two `choices`, all on the
/// GPU where the logits are. `None` on other devices and for sizes without a kernel.
pub(crate) fn route(logits: &BurnTensor<2>, options: &RouteOptions, choices: usize) -> Option<Routing> {
    let [tokens, experts] = logits.dims();
    let expert_capacity = options.expert_capacity?;
    if !is_here(&logits.device()) || !(2..=2048).contains(&experts) {
        return None;
    }
    let like = floats(logits.clone()).tensor;
    queue(&like)?;
    let groups = options.groups;
    assert!(tokens.is_multiple_of(groups), "groups divide the tokens");
    let rules = Route {
        tokens,
        experts,
        groups,
        expert_capacity,
        choice: if choices == 2 { RouterChoice::Top2 } else { RouterChoice::Top1 },
        force_balanced: options.force_balanced,
        format: format(&like),
    };
    let slots_per_expert = groups * expert_capacity;
    let room_for = |shape: &[usize], kind| TchTensor::new(room(shape, kind, &like));
    let mask = options.token_mask.as_ref().map(crate::torch::integers);
    let routed = Routed {
        rules,
        token_mask: mask.map(|mask| TchTensor::from_existing(narrow(&mask.tensor), mask.storage)),
        choice: room_for(&[tokens], Kind::Int),
        second_choice: (choices == 2).then(|| room_for(&[tokens], Kind::Int)),
        entropy: room_for(&[tokens], Kind::Float),
        token_of_slot: room_for(&[experts * slots_per_expert], Kind::Int),
        slot_of_token: room_for(&[tokens, choices], Kind::Int),
        rows_used: room_for(&[experts], Kind::Int),
        fraction: room_for(&[groups, experts], Kind::Float),
        counted: room_for(&[groups], Kind::Int),
    };
    let plan = DispatchPlan {
        num_experts: experts,
        slots_per_expert,
        fixed_capacity: true,
        num_tokens: tokens,
        token_of_slot: BurnTensor::from_primitive::<LibTorch>(routed.token_of_slot.clone()),
        rows_used: BurnTensor::from_primitive::<LibTorch>(routed.rows_used.clone()),
        by_token: ByToken::Table(routed.slot_of_token.clone()),
    };
    let fraction = BurnTensor::from_primitive::<LibTorch>(routed.fraction.clone());
    let choice = BurnTensor::from_primitive::<LibTorch>(routed.choice.clone());
    let entropy = BurnTensor::from_primitive::<LibTorch>(routed.entropy.clone());
    let [gates, mean_probability, z] = apply_in_torch(routed, [Operand::from(logits.clone())]);
    Some(Routing {
        plan,
        gates: gates.into_tensor(),
        mean_probability: mean_probability.into_tensor(),
        fraction,
        z: z.into_tensor(),
        choice,
        entropy,
    })
}

fn optional(tensor: Option<&TchTensor>) -> Option<&Tensor> {
    tensor.map(|tensor| &tensor.tensor)
}

impl Operation<LibTorch, 1, 3> for Routed {
    /// The logits.
    type Saved = TchTensor;

    fn forward(&self, [logits]: &[TchTensor; 1], _: bool) -> ([TchTensor; 3], TchTensor) {
        let logits = contiguous(logits);
        let queue = queue(&logits.tensor).expect("kernels were chosen on a GPU");
        let Route { experts, groups, expert_capacity, .. } = self.rules;
        let floats = |shape: &[usize]| room(shape, Kind::Float, &logits.tensor);
        let gates = floats(&[experts * groups * expert_capacity]);
        let (mean_probability, z) = (floats(&[groups, experts]), floats(&[groups]));
        let bytes = started(route_workspace(self.rules));
        let scratch = workspace(bytes, &logits.tensor);
        let addresses = RouteAt {
            logits: at(&logits.tensor),
            token_mask: at_optional(optional(self.token_mask.as_ref())),
            choice: at(&self.choice.tensor),
            second_choice: at_optional(optional(self.second_choice.as_ref())),
            entropy: at(&self.entropy.tensor),
            token_of_slot: at(&self.token_of_slot.tensor),
            slot_of_token: at(&self.slot_of_token.tensor),
            gates: at(&gates),
            rows_used: at(&self.rows_used.tensor),
            mean_probability: at(&mean_probability),
            fraction: at(&self.fraction.tensor),
            z: at(&z),
            counted: at(&self.counted.tensor),
            workspace: at(&scratch),
        };
        // SAFETY: all tensors have the sizes of the rules; scratch memory is reused in the order of the stream.
        started(unsafe { switchyard_cuda::route(queue, addresses, self.rules) });
        ([gates, mean_probability, z].map(TchTensor::new), logits)
    }

    fn backward(
        &self,
        logits: &TchTensor,
        gradients: [Option<TchTensor>; 3],
        _: [bool; 1],
    ) -> [Option<TchTensor>; 1] {
        let logits = &logits.tensor;
        let queue = queue(logits).expect("kernels were chosen on a GPU");
        let gradient = logits.empty_like();
        let [gates, mean_probability, z] =
            gradients.each_ref().map(|gradient| at_optional(optional(gradient.as_ref())));
        let addresses = RouteGradients {
            logits: at(logits),
            choice: at(&self.choice.tensor),
            second_choice: at_optional(optional(self.second_choice.as_ref())),
            slot_of_token: at(&self.slot_of_token.tensor),
            counted: at(&self.counted.tensor),
            gates,
            mean_probability,
            z,
            gradient: at(&gradient),
        };
        // SAFETY: all tensors have the sizes of the rules.
        started(unsafe { route_backward(queue, addresses, self.rules) });
        [Some(TchTensor::new(gradient))]
    }
}
