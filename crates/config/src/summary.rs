//! What a plan will need, from the plan alone: parameters, expert capacity, tokens, memory.

use serde::Serialize;

use crate::mesh::MeshShape;
use crate::model::StackKind;
use crate::parameters::{ParameterSpec, parameters};
use crate::partition::{held_part, owners};
use crate::plan::{OptimizerKind, RouterKind, RoutingSemantics, RunPlan};

/// Bytes of a float32.
const FLOAT: u64 = 4;

/// The figures of `switchyard check`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Parameters in all, each tied tensor once.
    pub total_parameters: u64,
    /// Parameters that one token meets: everything dense and the experts of one token per sparse layer.
    pub active_parameters: u64,
    /// The stacks that have sparse layers.
    pub stacks: Vec<StackSummary>,
    /// Encoder and decoder tokens of a global batch, padding included.
    pub tokens_per_step: u64,
    /// Micro-batches of a step.
    pub micro_batches_per_step: usize,
    /// Memory that the plan fixes; activations come on top.
    pub memory: MemorySummary,
}

/// Routing of one stack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StackSummary {
    /// `encoder` or `decoder`.
    pub stack: &'static str,
    /// Layers with experts, counted from 0.
    pub sparse_layers: Vec<usize>,
    /// Tokens of a routing group, padding included.
    pub tokens_per_group: usize,
    /// Slots of an expert in training.
    pub expert_capacity: usize,
    /// Slots of an expert in evaluation.
    pub eval_expert_capacity: usize,
}

/// Bytes, each value in the format that it has in the run's precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemorySummary {
    /// The parameters.
    pub parameter_bytes: u64,
    /// Their gradients.
    pub gradient_bytes: u64,
    /// Moments of the optimizer, and its float32 masters of narrower parameters.
    pub optimizer_bytes: u64,
    /// Of the optimizer's bytes those that a GPU does not need: where the model has the upper half of a master,
    /// the lower half is kept beside it.
    pub gpu_saves_bytes: u64,
}

impl MemorySummary {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
    }
}

/// Sums up `plan`.
pub fn summarize(plan: &RunPlan) -> Summary {
    let specs = parameters(&plan.model);
    let total_parameters = specs.iter().map(ParameterSpec::num_elements).sum();
    let data = &plan.data;
    Summary {
        total_parameters,
        active_parameters: specs.iter().map(|spec| active_elements(spec, plan)).sum(),
        stacks: [StackKind::Encoder, StackKind::Decoder]
            .into_iter()
            .filter_map(|stack| stack_summary(plan, stack))
            .collect(),
        tokens_per_step: data.batch_rows as u64 * (data.inputs_length + data.targets_length) as u64,
        micro_batches_per_step: data.batch_rows / data.micro_batch_rows,
        memory: rank_memory(plan, MeshShape::SOLO, 0),
    }
}

/// What the plan fixes of the memory of one rank of `mesh`.
pub fn rank_memory(plan: &RunPlan, mesh: MeshShape, rank: usize) -> MemorySummary {
    let specs = parameters(&plan.model);
    let owners = owners(&specs, mesh);
    let summed = mesh.ranks() > 1 || plan.data.batch_rows > plan.data.micro_batch_rows;
    let mut memory =
        MemorySummary { parameter_bytes: 0, gradient_bytes: 0, optimizer_bytes: 0, gpu_saves_bytes: 0 };
    for spec in &specs {
        let held = held_part(spec, mesh, mesh.coordinates(rank));
        let elements = held.num_elements() as u64;
        let narrow = !plan.precision.keeps_fp32(spec.kind);
        memory.parameter_bytes += elements * plan.precision.bytes(spec.kind) as u64;
        let bytes = if summed {
            plan.precision.sum_bytes(spec.kind, plan.accumulation)
        } else {
            plan.precision.bytes(spec.kind)
        };
        memory.gradient_bytes += elements * bytes as u64;
        for owned in owners[&spec.name].iter().filter(|owned| owned.owner == rank) {
            let mut shape = spec.shape.clone();
            if spec.kind.is_expert() {
                shape[0] = owned.matrices.len();
            }
            let unit = ParameterSpec { shape, ..spec.clone() };
            memory.optimizer_bytes += optimizer_elements(&unit, plan) * FLOAT;
            // Of a matrix that is split, its owner keeps the whole beside the part it holds.
            let beside = held.shape[1..] != unit.shape[1..] || held.shape[0] < unit.shape[0];
            if narrow || beside {
                memory.optimizer_bytes += unit.num_elements() * FLOAT;
            }
            if narrow && !beside {
                memory.gpu_saves_bytes += unit.num_elements() * FLOAT / 2;
            }
        }
    }
    memory
}

/// Elements of `spec` that one token meets; of expert choice, the mean.
fn active_elements(spec: &ParameterSpec, plan: &RunPlan) -> u64 {
    if !spec.kind.is_expert() {
        return spec.num_elements();
    }
    let one_expert = spec.num_elements() / plan.model.num_experts as u64;
    match plan.routing.router {
        RouterKind::Top1 => one_expert,
        RouterKind::Top2 => 2 * one_expert,
        RouterKind::ExpertChoice => {
            ((one_expert as f64 * plan.routing.capacity_factor) as u64).min(spec.num_elements())
        }
    }
}

/// Elements of the optimizer's state for `spec`.
fn optimizer_elements(spec: &ParameterSpec, plan: &RunPlan) -> u64 {
    match (plan.optimizer.kind, spec.shape.as_slice()) {
        (OptimizerKind::Adamw, _) => 2 * spec.num_elements(),
        // One mean for each row and one for each column, of every expert on its own.
        (OptimizerKind::Adafactor, [experts @ .., rows, columns]) => {
            experts.iter().map(|&n| n as u64).product::<u64>() * (rows + columns) as u64
        }
        (OptimizerKind::Adafactor, _) => spec.num_elements(),
    }
}

fn stack_summary(plan: &RunPlan, stack: StackKind) -> Option<StackSummary> {
    let sparse_layers = plan.model.sparse_layers(stack);
    if sparse_layers.is_empty() {
        return None;
    }
    let (routing, data) = (&plan.routing, &plan.data);
    let rows = match (routing.semantics, routing.group_rows) {
        (RoutingSemantics::Hf, _) => 1,
        (RoutingSemantics::Paper, 0) => data.micro_batch_rows,
        (RoutingSemantics::Paper, rows) => rows,
    };
    let length = match stack {
        StackKind::Encoder => data.inputs_length,
        StackKind::Decoder => data.targets_length,
    };
    let tokens_per_group = rows * length;
    let capacity = |training| routing.capacity(tokens_per_group, plan.model.num_experts, training);
    Some(StackSummary {
        stack: stack.name(),
        sparse_layers,
        tokens_per_group,
        expert_capacity: capacity(true),
        eval_expert_capacity: capacity(false),
    })
}
