//! Sparse layers: router, experts and the layer that ties them.

mod experts;
mod layer;
mod losses;
mod metrics;
mod router;

pub use experts::Experts;
pub use layer::{MoeLayer, RouterOutput};
pub use losses::{RouterLosses, router_losses};
pub use metrics::LayerMetrics;
pub use router::{ExpertChoice, Router, Top1, Top2, router_of};
