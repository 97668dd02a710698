//! How the ranks of a job divide a run: the mesh axes, their sizes, and the one place that checks them.
//!
//! Pure arithmetic on sizes: nothing here communicates.

use std::collections::BTreeSet;
use std::fmt;

use crate::plan::{CommPlan, HierarchicalAllToAll, ParallelPlan, RunPlan};
use crate::provenance::Provenance;
use crate::validate::{Conflict, located};
use crate::{ConfigError, ErrorKind, ModelConfig};

/// Sizes of the axes of a job's mesh; a job has `data * tensor` ranks.
///
/// Experts live inside data parallelism: `expert` consecutive data-parallel ranks share one set of
/// experts. Tensor-parallel ranks are neighbours: rank = `data index * tensor + tensor index`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MeshShape {
    /// Ranks that learn from different rows: `data_parallel_size`.
    pub data: usize,
    /// Data-parallel ranks over which one set of experts is spread: `expert_parallel_size`.
    pub expert: usize,
    /// Ranks over which every matrix is split: `tensor_parallel_size`.
    pub tensor: usize,
}

/// Where one rank stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Coordinates {
    /// Index along the data axis.
    pub data: usize,
    /// Index within the expert group: which of the experts it holds.
    pub expert: usize,
    /// Index along the tensor axis.
    pub tensor: usize,
}

impl MeshShape {
    /// One rank that does everything.
    pub const SOLO: Self = Self { data: 1, expert: 1, tensor: 1 };

    /// The mesh of `plan` on `ranks` ranks.
    ///
    /// # Errors
    /// When the sizes do not multiply to `ranks` or do not divide what they split; names the keys.
    pub fn of(plan: &RunPlan, ranks: usize, provenance: &Provenance) -> Result<Self, ConfigError> {
        let sized = || {
            let mesh = Self::sized(&plan.parallel, ranks)?;
            mesh.check(plan)?;
            Ok(mesh)
        };
        sized().map_err(|conflict| located(conflict, plan, provenance))
    }

    /// The mesh of `ranks` ranks that use a model of `model` together.
    ///
    /// # Errors
    /// When the sizes do not divide the ranks or the model; names the keys.
    pub fn of_model(model: &ModelConfig, parallel: &ParallelPlan, ranks: usize) -> Result<Self, ConfigError> {
        let sized = || {
            divide_the_model(model, parallel)?;
            let mesh = Self::sized(parallel, ranks)?;
            mesh.expert_groups_fit()?;
            Ok(mesh)
        };
        sized().map_err(|Conflict { message, help, .. }: Conflict| {
            ConfigError::new(ErrorKind::Conflict { message }).help(help)
        })
    }

    fn sized(parallel: &ParallelPlan, ranks: usize) -> Result<Self, Conflict> {
        let ParallelPlan { data_parallel_size, expert_parallel_size, tensor_parallel_size } = *parallel;
        let keys = vec!["parallel.data_parallel_size", "parallel.tensor_parallel_size"];
        if !ranks.is_multiple_of(tensor_parallel_size) {
            return Err(Conflict {
                message: format!(
                    "{} cannot be cut into groups of parallel.tensor_parallel_size = {tensor_parallel_size}",
                    of_ranks(ranks)
                ),
                keys: vec!["parallel.tensor_parallel_size"],
                help: format!("start a multiple of {tensor_parallel_size} ranks"),
            });
        }
        let data = ranks / tensor_parallel_size;
        if data_parallel_size != 0 && data_parallel_size != data {
            return Err(Conflict {
                message: format!(
                    "parallel.data_parallel_size = {data_parallel_size} times parallel.tensor_parallel_size = \
                     {tensor_parallel_size} is not the job's {}",
                    of_ranks(ranks)
                ),
                keys,
                help: format!(
                    "start {} ranks, or leave parallel.data_parallel_size = 0 to take what there is",
                    data_parallel_size * tensor_parallel_size
                ),
            });
        }
        Ok(Self { data, expert: expert_parallel_size, tensor: tensor_parallel_size })
    }

    /// Refuses axes that do not divide what they split.
    fn check(self, plan: &RunPlan) -> Result<(), Conflict> {
        self.expert_groups_fit()?;
        let rounds = plan.data.batch_rows / plan.data.micro_batch_rows;
        if !rounds.is_multiple_of(self.data) {
            return Err(Conflict {
                message: format!(
                    "data.batch_rows = {} in micro-batches of data.micro_batch_rows = {} are {rounds}, which {} \
                     data-parallel ranks cannot share evenly",
                    plan.data.batch_rows, plan.data.micro_batch_rows, self.data
                ),
                keys: vec!["data.micro_batch_rows", "data.batch_rows", "parallel.data_parallel_size"],
                help: format!(
                    "make data.batch_rows a multiple of {}, or data.micro_batch_rows smaller",
                    self.data * plan.data.micro_batch_rows
                ),
            });
        }
        Ok(())
    }

    fn expert_groups_fit(self) -> Result<(), Conflict> {
        if self.data.is_multiple_of(self.expert) {
            return Ok(());
        }
        Err(Conflict {
            message: format!(
                "parallel.expert_parallel_size = {} does not divide the {} data-parallel ranks that share experts",
                self.expert, self.data
            ),
            keys: vec!["parallel.expert_parallel_size", "parallel.data_parallel_size"],
            help: format!("parallel.expert_parallel_size = {} fits", largest_divisor(self.data, self.expert)),
        })
    }

    /// Refuses ranks whose tokens cannot travel machine by machine where `plan` says that they always do;
    /// `machines` are those of all ranks.
    ///
    /// # Errors
    /// When an expert group has no [`ranks_of_each_machine`]; names the key.
    ///
    /// # Panics
    /// When there are fewer machines than ranks.
    pub fn check_machines(
        self,
        plan: &RunPlan,
        machines: &[usize],
        provenance: &Provenance,
    ) -> Result<(), ConfigError> {
        if self.expert == 1 || plan.comm.hierarchical_all_to_all != HierarchicalAllToAll::Always {
            return Ok(());
        }
        let first_of_groups = (0..self.ranks()).filter(|&rank| self.coordinates(rank).expert == 0);
        for first in first_of_groups {
            let ranks = (0..self.expert).map(|expert| first + expert * self.tensor);
            let machines: Vec<usize> = ranks.map(|rank| machines[rank]).collect();
            if ranks_of_each_machine(&machines).is_none() {
                let told: Vec<String> = machines.iter().map(ToString::to_string).collect();
                let conflict = Conflict {
                    message: format!(
                        "comm.hierarchical_all_to_all = \"always\" needs the ranks of an expert group on several \
                         machines, as many on each, more than one, numbered machine after machine; those of rank \
                         {first}'s group are on machines {}",
                        told.join(", ")
                    ),
                    keys: vec!["comm.hierarchical_all_to_all", "parallel.expert_parallel_size"],
                    help: "spread each expert group evenly over machines, or leave comm.hierarchical_all_to_all = \"auto\""
                        .to_owned(),
                };
                return Err(located(conflict, plan, provenance));
            }
        }
        Ok(())
    }

    /// Ranks of the job.
    pub fn ranks(self) -> usize {
        self.data * self.tensor
    }

    /// Where `rank` stands.
    pub fn coordinates(self, rank: usize) -> Coordinates {
        let data = rank / self.tensor;
        Coordinates { data, expert: data % self.expert, tensor: rank % self.tensor }
    }

    /// Ranks that hold the experts of expert index `expert`, in rank order.
    pub fn expert_holders(self, expert: usize) -> Vec<usize> {
        (0..self.ranks()).filter(|&rank| self.coordinates(rank).expert == expert).collect()
    }

    /// One line for every expert group: its ranks and their experts.
    pub fn describe(self, model: &ModelConfig) -> Vec<String> {
        let mut lines = vec![format!(
            "mesh: data {} x tensor {}, expert groups of {} data-parallel ranks",
            self.data, self.tensor, self.expert
        )];
        if model.num_experts == 0 {
            return lines;
        }
        let local = model.num_experts / self.expert;
        for expert in 0..self.expert {
            let ranks: Vec<String> = self.expert_holders(expert).iter().map(ToString::to_string).collect();
            let (first, last) = (expert * local, (expert + 1) * local - 1);
            let experts =
                if local == 1 { format!("expert {first}") } else { format!("experts {first} to {last}") };
            let on = if ranks.len() == 1 { "rank" } else { "ranks" };
            lines.push(format!("{experts} on {on} {}", ranks.join(", ")));
        }
        lines
    }
}

impl fmt::Display for MeshShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "(dp {}, ep {}, tp {})", self.data, self.expert, self.tensor)
    }
}

/// How many ranks of a group each of its machines has: where it has several, with as many ranks each, more than
/// one, that follow each other. `machines` are those of its ranks.
pub fn ranks_of_each_machine(machines: &[usize]) -> Option<usize> {
    let runs: Vec<&[usize]> = machines.chunk_by(|a, b| a == b).collect();
    let each = runs.first()?.len();
    let distinct: BTreeSet<usize> = machines.iter().copied().collect();
    let even = runs.len() == distinct.len() && runs.iter().all(|run| run.len() == each);
    (even && runs.len() > 1 && each > 1).then_some(each)
}

/// Refuses axes that do not divide the model, whatever the number of ranks.
pub(crate) fn axes_divide_the_model(plan: &RunPlan) -> Result<(), Conflict> {
    let parallel = &plan.parallel;
    divide_the_model(&plan.model, parallel)?;
    if parallel.data_parallel_size == 0 {
        return Ok(());
    }
    let mesh = MeshShape {
        data: parallel.data_parallel_size,
        expert: parallel.expert_parallel_size,
        tensor: parallel.tensor_parallel_size,
    };
    mesh.check(plan)
}

fn divide_the_model(model: &ModelConfig, parallel: &ParallelPlan) -> Result<(), Conflict> {
    let tensor = ("parallel.tensor_parallel_size", parallel.tensor_parallel_size);
    let expert = ("parallel.expert_parallel_size", parallel.expert_parallel_size);
    if model.num_experts == 0 && expert.1 > 1 {
        return Err(Conflict {
            message: format!("parallel.expert_parallel_size = {} has no experts to spread", expert.1),
            keys: vec![expert.0, "model.num_experts"],
            help: "leave it at 1 for a dense model".to_owned(),
        });
    }
    let divided = [
        (expert, "model.num_experts", model.num_experts),
        (tensor, "model.num_heads", model.num_heads),
        (tensor, "model.d_ff", model.d_ff),
        (tensor, "model.vocab_size", model.vocab_size),
    ];
    for ((axis, size), key, whole) in divided {
        if !whole.is_multiple_of(size) {
            return Err(Conflict {
                message: format!("{axis} = {size} does not divide {key} = {whole}"),
                keys: vec![axis, key],
                help: format!("{axis} = {} fits", largest_divisor(whole, size)),
            });
        }
    }
    Ok(())
}

/// Refuses times that are none.
pub(crate) fn timeout_is_positive(plan: &RunPlan) -> Result<(), Conflict> {
    let CommPlan { timeout_s, .. } = plan.comm;
    if (1..=MOST_SECONDS).contains(&timeout_s) {
        return Ok(());
    }
    Err(Conflict {
        message: format!("comm.timeout_s = {timeout_s} must be from 1 to {MOST_SECONDS}"),
        keys: vec!["comm.timeout_s"],
        help: "600 is the default; it must exceed the slowest step, evaluation or save".to_owned(),
    })
}

/// A month.
const MOST_SECONDS: u64 = 31 * 24 * 3600;

fn of_ranks(ranks: usize) -> String {
    if ranks == 1 { "1 rank".to_owned() } else { format!("{ranks} ranks") }
}

/// The largest divisor of `whole` up to `limit`.
fn largest_divisor(whole: usize, limit: usize) -> usize {
    (1..=limit.min(whole)).rev().find(|n| whole.is_multiple_of(*n)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensor_ranks_are_neighbours_and_experts_live_inside_data() {
        let mesh = MeshShape { data: 4, expert: 2, tensor: 2 };
        assert_eq!(mesh.ranks(), 8);
        assert_eq!(mesh.coordinates(5), Coordinates { data: 2, expert: 0, tensor: 1 });
        assert_eq!(mesh.expert_holders(1), [2, 3, 6, 7]);
    }

    #[test]
    fn machines_are_even_when_each_has_as_many_ranks_in_a_row() {
        assert_eq!(ranks_of_each_machine(&[4, 4, 4, 1, 1, 1]), Some(3));
        assert_eq!(ranks_of_each_machine(&[2, 2, 0, 0, 1, 1]), Some(2));
        for uneven in
            [&[][..], &[0, 0, 0, 0], &[0, 1, 2, 3], &[0, 0, 0, 1], &[0, 1, 0, 1], &[0, 0, 1, 1, 0, 0]]
        {
            assert_eq!(ranks_of_each_machine(uneven), None, "{uneven:?}");
        }
    }
}
