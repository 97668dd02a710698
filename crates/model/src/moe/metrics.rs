//! What routing did in one layer, in numbers for people.

use burn::tensor::{DType, Int, Tensor};
use switchyard_kernels::{integers, with_values};

use crate::moe::layer::RouterOutput;

/// Sums of one layer over any number of micro-batches.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerMetrics {
    /// Tokens whose first choice is the expert, before the capacity cut. `[num_experts]`
    pub tokens_per_expert: Vec<u64>,
    /// Slots in use of each expert, after the cut. `[num_experts]`
    pub kept_per_expert: Vec<u64>,
    /// Tokens that were routed.
    pub tokens: u64,
    /// Routed tokens that got no slot.
    pub dropped: u64,
    /// Sum of the gates of used slots.
    pub gates: f64,
    /// Sum of router entropies, in nats.
    pub entropy: f64,
    /// Sum over groups of the load-balancing loss, without coefficient.
    pub load_balancing_loss: f64,
    /// Sum over groups of the z-loss, without coefficient.
    pub router_z_loss: f64,
    /// Groups.
    pub groups: u64,
}

impl LayerMetrics {
    /// Metrics of one forward pass.
    pub fn new(output: &RouterOutput) -> Self {
        let routing = &output.routing;
        let [groups, num_experts] = routing.fraction.dims();
        let (choice, slots) = (integers(&routing.choice), routing.plan.token_slots());
        let mut tokens_per_expert = vec![0; num_experts];
        let mut tokens = 0;
        for &choice in &choice {
            if let Ok(expert) = usize::try_from(choice) {
                tokens_per_expert[expert] += 1;
                tokens += 1;
            }
        }
        let dropped = choice.iter().zip(slots.iter()).filter(|(c, own)| **c >= 0 && own.is_empty()).count();
        let sum = |values: &[f32]| values.iter().map(|&v| f64::from(v)).sum::<f64>();
        let balance = with_values(routing.fraction.clone(), <[f32]>::to_vec);
        let load_balancing_loss = with_values(routing.mean_probability.clone(), |p| {
            p.iter().zip(&balance).map(|(p, f)| f64::from(p * f)).sum::<f64>() * num_experts as f64
        });
        Self {
            tokens_per_expert,
            kept_per_expert: integers(&routing.plan.rows_used).iter().map(|&n| n as u64).collect(),
            tokens,
            dropped: dropped as u64,
            gates: with_values(routing.gates.clone(), sum),
            entropy: with_values(routing.entropy.clone(), sum),
            load_balancing_loss,
            router_z_loss: with_values(routing.z.clone(), sum),
            groups: groups as u64,
        }
    }

    /// [`to_sums`](Self::to_sums) of every layer of a stack, computed where the layers are: float32, so counts are
    /// exact up to 2^22. `[layers, 2 * num_experts + 7]`
    ///
    /// # Panics
    /// When there is no layer.
    pub fn sums(outputs: &[RouterOutput]) -> Tensor<2> {
        let routings = || outputs.iter().map(|output| &output.routing);
        let first = routings().next().expect("a stack has sparse layers where this is asked");
        let ([groups, num_experts], [tokens]) = (first.fraction.dims(), first.choice.dims());
        let layers = outputs.len();
        let wide = |integers: Tensor<2, Int>| integers.float().cast(DType::F32);
        let by_layer = |sums: Vec<Tensor<1>>| Tensor::stack::<2>(sums, 0);
        let choice: Tensor<2, Int> = Tensor::stack(routings().map(|r| r.choice.clone()).collect(), 0);
        let routed = wide(choice.greater_equal_elem(0).int());
        let counted = routed.reshape([layers, groups, tokens / groups]).sum_dim(2);
        let fraction: Tensor<3> = Tensor::stack(routings().map(|r| r.fraction.clone()).collect(), 0);
        let chosen = (fraction.clone() * counted.clone()).round().sum_dim(1).reshape([layers, num_experts]);
        let kept = wide(Tensor::stack(routings().map(|r| r.plan.rows_used.clone()).collect(), 0));
        let counted = counted.reshape([layers, groups]).sum_dim(1);
        let placed = by_layer(routings().map(|r| r.plan.tokens_with_slot()).collect());
        let gates = by_layer(routings().map(|r| r.gates.clone().inner().sum()).collect());
        let entropy = by_layer(routings().map(|r| r.entropy.clone()).collect()).sum_dim(1);
        let mean: Tensor<3> =
            Tensor::stack(routings().map(|r| r.mean_probability.clone().inner()).collect(), 0);
        let balance = (fraction * mean).reshape([layers, groups * num_experts]).sum_dim(1);
        let z = by_layer(routings().map(|r| r.z.clone().inner()).collect()).sum_dim(1);
        let dropped = counted.clone() - placed;
        let number_of_groups = counted.ones_like() * groups as f64;
        let balance = balance * num_experts as f64;
        Tensor::cat(vec![chosen, kept, counted, dropped, number_of_groups, gates, entropy, balance, z], 1)
    }

    /// Every sum as a number, so that ranks can add theirs; counts stay exact below 2^53.
    pub fn to_sums(&self) -> Vec<f64> {
        let counts = self.tokens_per_expert.iter().chain(&self.kept_per_expert);
        let totals = [self.tokens, self.dropped, self.groups];
        let counts = counts.chain(&totals).map(|&count| count as f64);
        counts.chain([self.gates, self.entropy, self.load_balancing_loss, self.router_z_loss]).collect()
    }

    /// The metrics of which `sums` came by [`to_sums`](Self::to_sums).
    pub fn from_sums(sums: &[f64]) -> Self {
        let num_experts = (sums.len() - 7) / 2;
        let counts = |sums: &[f64]| sums.iter().map(|&count| count as u64).collect::<Vec<_>>();
        let rest = &sums[2 * num_experts..];
        Self {
            tokens_per_expert: counts(&sums[..num_experts]),
            kept_per_expert: counts(&sums[num_experts..2 * num_experts]),
            tokens: rest[0] as u64,
            dropped: rest[1] as u64,
            groups: rest[2] as u64,
            gates: rest[3],
            entropy: rest[4],
            load_balancing_loss: rest[5],
            router_z_loss: rest[6],
        }
    }

    /// Adds the sums of another micro-batch.
    pub fn add(&mut self, other: &Self) {
        let add = |to: &mut [u64], from: &[u64]| to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
        add(&mut self.tokens_per_expert, &other.tokens_per_expert);
        add(&mut self.kept_per_expert, &other.kept_per_expert);
        self.tokens += other.tokens;
        self.dropped += other.dropped;
        self.gates += other.gates;
        self.entropy += other.entropy;
        self.load_balancing_loss += other.load_balancing_loss;
        self.router_z_loss += other.router_z_loss;
        self.groups += other.groups;
    }

    /// Share of routed tokens without a slot.
    pub fn fraction_tokens_dropped(&self) -> f64 {
        self.dropped as f64 / self.tokens.max(1) as f64
    }

    /// Share of experts that at least one token chose.
    pub fn expert_usage(&self) -> f64 {
        let used = self.tokens_per_expert.iter().filter(|&&n| n > 0).count();
        used as f64 / self.tokens_per_expert.len().max(1) as f64
    }

    /// Standard deviation of the expert loads over their mean.
    pub fn load_cv(&self) -> f64 {
        let n = self.tokens_per_expert.len() as f64;
        let mean = self.tokens as f64 / n;
        let variance = self.tokens_per_expert.iter().map(|&c| (c as f64 - mean).powi(2)).sum::<f64>() / n;
        if mean > 0.0 { variance.sqrt() / mean } else { 0.0 }
    }

    /// Mean entropy of the router's probabilities, in nats.
    pub fn router_entropy(&self) -> f64 {
        self.entropy / self.tokens.max(1) as f64
    }

    /// Mean gate of used slots.
    pub fn router_confidence(&self) -> f64 {
        self.gates / self.kept_per_expert.iter().sum::<u64>().max(1) as f64
    }
}
