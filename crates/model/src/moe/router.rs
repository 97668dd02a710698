//! Which experts a token visits.

use burn::tensor::Tensor;
use switchyard_config::plan::RouterKind;
use switchyard_kernels::{RouteOptions, Routing, route_expert_choice, route_top1, route_top2};

/// Turns router logits into a plan, gates and the quantities of the router losses.
pub trait Router: Send + Sync {
    /// Routes logits, `[groups * tokens, num_experts]`; probabilities and gates have their format.
    fn route(&self, logits_ne: Tensor<2>, options: RouteOptions) -> Routing;
}

/// Each token to its best expert (Switch Transformer).
#[derive(Debug, Clone, Copy, Default)]
pub struct Top1;

/// Each token to its two best experts (GShard).
#[derive(Debug, Clone, Copy, Default)]
pub struct Top2;

/// Each expert takes its best tokens (Zhou et al. 2022).
#[derive(Debug, Clone, Copy, Default)]
pub struct ExpertChoice;

impl Router for Top1 {
    fn route(&self, logits_ne: Tensor<2>, options: RouteOptions) -> Routing {
        route_top1(logits_ne, options)
    }
}

impl Router for Top2 {
    fn route(&self, logits_ne: Tensor<2>, options: RouteOptions) -> Routing {
        route_top2(logits_ne, options)
    }
}

impl Router for ExpertChoice {
    fn route(&self, logits_ne: Tensor<2>, options: RouteOptions) -> Routing {
        route_expert_choice(logits_ne, options)
    }
}

/// The router that a config names.
pub fn router_of(kind: RouterKind) -> &'static dyn Router {
    match kind {
        RouterKind::Top1 => &Top1,
        RouterKind::Top2 => &Top2,
        RouterKind::ExpertChoice => &ExpertChoice,
    }
}
