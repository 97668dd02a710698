//! The router losses of transformers, in float64, from the router results of one stack.
//!
//! Versions 4 and 5 differ in where they count dropped tokens, and neither computes what the paper
//! defines, so none of this is a loss to train with. Routes nothing itself.

use switchyard_kernels::with_values;
use switchyard_model::moe::RouterOutput;

use super::computation::with_ids;

/// Router results of all sparse layers of a stack, `[layers, rows * length]`.
pub(super) struct RouterTable {
    pub(super) layers: usize,
    pub(super) rows: usize,
    /// `rows * length`
    pub(super) tokens: usize,
    pub(super) experts: usize,
    /// `[layers, tokens, experts]`
    pub(super) logits: Vec<f64>,
    /// First choice of each token, -1 for padding that is not routed.
    pub(super) choice: Vec<f64>,
    /// 1 where an expert took the token.
    pub(super) kept: Vec<f64>,
    probabilities: Vec<f64>,
    log_z: Vec<f64>,
}

impl RouterTable {
    /// The results of `routers`, of which there is at least one.
    pub(super) fn new(routers: &[RouterOutput], rows: usize) -> Self {
        let [tokens, experts] = routers[0].logits_ne.dims();
        let mut table = Self {
            layers: routers.len(),
            rows,
            tokens,
            experts,
            logits: Vec::new(),
            choice: Vec::new(),
            kept: Vec::new(),
            probabilities: Vec::new(),
            log_z: Vec::new(),
        };
        for router in routers {
            let logits: Vec<f64> =
                with_values(router.logits_ne.clone(), |l| l.iter().map(|&l| f64::from(l)).collect());
            for row in logits.chunks(experts) {
                let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = row.iter().map(|l| (l - largest).exp()).sum();
                table.probabilities.extend(row.iter().map(|l| (l - largest).exp() / total));
                table.log_z.push(largest + total.ln());
            }
            table.logits.extend(logits);
            table.choice.extend(with_ids(&router.routing.choice));
            let slots = router.routing.plan.token_slots();
            table.kept.extend(slots.iter().map(|own| if own.is_empty() { 0.0 } else { 1.0 }));
        }
        table
    }

    /// The expert of each token as transformers 4 reports it: a dropped token's is expert 0.
    pub(super) fn index_hf4(&self) -> Vec<f64> {
        self.choice.iter().zip(&self.kept).map(|(&c, &kept)| if kept > 0.0 { c } else { 0.0 }).collect()
    }

    /// Probability of each token's likeliest expert.
    pub(super) fn best_probability(&self) -> Vec<f64> {
        // `f64::max` would leave NaN out and report 0.
        let larger = |a: f64, b: f64| if b > a || b.is_nan() { b } else { a };
        self.probabilities.chunks(self.experts).map(|row| row.iter().copied().fold(0.0, larger)).collect()
    }

    /// Mean of `logsumexp(logits)^2` over all tokens of all layers.
    pub(super) fn z(&self) -> f64 {
        mean_of_squares(&self.log_z)
    }

    /// The same of each layer.
    pub(super) fn z_per_layer(&self) -> Vec<f64> {
        self.log_z.chunks(self.tokens).map(mean_of_squares).collect()
    }

    /// Layers of a row pooled before the product, as transformers does; mean over rows.
    pub(super) fn pooled_balance(&self, index: &[f64]) -> f64 {
        let length = self.tokens / self.rows;
        let row = |row: usize| {
            let tokens = (0..self.layers)
                .flat_map(move |layer| (0..length).map(move |t| layer * self.tokens + row * length + t));
            self.balance(tokens, index)
        };
        (0..self.rows).map(row).sum::<f64>() / self.rows as f64
    }

    /// Each layer alone, mean over `groups` equal runs of tokens.
    pub(super) fn balance_per_layer(&self, groups: usize) -> Vec<f64> {
        let size = self.tokens / groups;
        let group = |layer: usize, g: usize| {
            let start = layer * self.tokens + g * size;
            self.balance(start..start + size, &self.choice)
        };
        (0..self.layers)
            .map(|layer| (0..groups).map(|g| group(layer, g)).sum::<f64>() / groups as f64)
            .collect()
    }

    /// `experts * sum_e f_e P_e` over the given tokens, numbered across layers.
    fn balance(&self, tokens: impl Iterator<Item = usize> + Clone, index: &[f64]) -> f64 {
        let count = tokens.clone().count() as f64;
        let (mut f, mut p) = (vec![0.0; self.experts], vec![0.0; self.experts]);
        for token in tokens {
            // Padding that is not routed has -1, which as an unsigned number would be expert 0.
            if index[token] >= 0.0 {
                f[index[token] as usize] += 1.0 / count;
            }
            for (p, q) in p.iter_mut().zip(&self.probabilities[token * self.experts..]) {
                *p += q / count;
            }
        }
        self.experts as f64 * f.iter().zip(&p).map(|(f, p)| f * p).sum::<f64>()
    }
}

fn mean_of_squares(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64
}
