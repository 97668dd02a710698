//! Load-balancing loss and router z-loss of all sparse layers.

use burn::tensor::Tensor;
use switchyard_config::plan::{RouterKind, RoutingConfig, RoutingSemantics};

use crate::moe::layer::RouterOutput;

/// Sums over routing groups (and, in the paper's semantics, layers), before any coefficient.
///
/// The caller divides by the number of groups of the whole step, so the value does not depend on
/// how the step is split.
#[derive(Debug, Clone)]
pub struct RouterLosses {
    /// `num_experts * sum_e f_e * P_e` of every group. `[1]`
    pub load_balancing: Tensor<1>,
    /// Mean of `logsumexp(logits)^2` of every group. `[1]`
    pub z: Tensor<1>,
}

/// Losses of the sparse layers of one stack; `None` when it has none.
///
/// `paper`: every layer adds its own loss. `hf`: `f`, `P` and `z` are averaged over the stack's
/// layers first, as transformers does, and a stack whose every layer is sparse adds nothing.
/// Expert choice is balanced by construction and adds no balancing loss.
///
/// # Source
/// Switch Transformer, equation 4 (arXiv:2101.03961); ST-MoE, equation 5 (arXiv:2202.08906).
pub fn router_losses(
    outputs: &[RouterOutput],
    routing: &RoutingConfig,
    every_layer_sparse: bool,
) -> Option<RouterLosses> {
    let first = outputs.first()?;
    let [_, num_experts] = first.routing.mean_probability.dims();
    let hugging_face = routing.semantics == RoutingSemantics::Hf;
    if hugging_face && every_layer_sparse {
        return None;
    }
    let balance = |f: Tensor<2>, p: Tensor<2>| (p * f).sum() * num_experts as f64;
    let sum = |parts: Vec<Tensor<1>>| parts.into_iter().reduce(|a, b| a + b).expect("one output at least");
    let z = sum(outputs.iter().map(|o| o.routing.z.clone().sum()).collect());
    let (load_balancing, z) = if hugging_face {
        let layers = outputs.len() as f64;
        let mean = |pick: fn(&RouterOutput) -> Tensor<2>| {
            outputs.iter().map(pick).reduce(|a, b| a + b).expect("one output at least") / layers
        };
        let f = mean(|o| constant(o.routing.fraction.clone(), &o.routing.mean_probability));
        let p = mean(|o| o.routing.mean_probability.clone());
        (balance(f, p), z / layers)
    } else {
        let of = |o: &RouterOutput| {
            let f = constant(o.routing.fraction.clone(), &o.routing.mean_probability);
            balance(f, o.routing.mean_probability.clone())
        };
        (sum(outputs.iter().map(of).collect()), z)
    };
    let load_balancing =
        if routing.router == RouterKind::ExpertChoice { load_balancing.zeros_like() } else { load_balancing };
    Some(RouterLosses { load_balancing, z })
}

/// `tensor` where automatic differentiation can combine it with `like`.
fn constant(tensor: Tensor<2>, like: &Tensor<2>) -> Tensor<2> {
    if like.is_autodiff() { tensor.autodiff() } else { tensor }
}
