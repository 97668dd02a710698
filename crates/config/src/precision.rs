//! Number formats of a run: the one place that says what stays in float32.

use serde::{Deserialize, Serialize};

use crate::parameters::ParameterKind;

/// Number formats of a run.
///
/// # Source
/// Switch Transformer, section 2.4 and table 2 (arXiv:2101.03961): bfloat16 everywhere diverges,
/// bfloat16 but for the router trains as float32 does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrecisionMode {
    /// Everything in float32.
    Fp32,
    /// Weights, activations and their gradients in bfloat16, the router's too.
    Bf16,
    /// As `bf16`, but the router, norm weights and relative bias in float32.
    Selective,
}

/// Format of sums of gradients over micro-batches and ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AccumulationDtype {
    /// float32.
    Fp32,
    /// Each sum in the format of its gradients: half the memory and traffic of bfloat16 ones, whose
    /// small summands get lost in the rounding of large sums.
    Bf16,
}

impl PrecisionMode {
    /// Whether weights of this kind, and so the products with them, are float32.
    pub fn keeps_fp32(self, kind: ParameterKind) -> bool {
        match self {
            Self::Fp32 => true,
            Self::Bf16 => false,
            Self::Selective => matches!(
                kind,
                ParameterKind::Norm
                    | ParameterKind::Router
                    | ParameterKind::RouterBias
                    | ParameterKind::RelativeBias
            ),
        }
    }

    /// Bytes of a weight of this kind in the model, and of its gradient.
    pub fn bytes(self, kind: ParameterKind) -> usize {
        if self.keeps_fp32(kind) { 4 } else { 2 }
    }

    /// Bytes of a value of a sum of gradients of this kind.
    pub fn sum_bytes(self, kind: ParameterKind, accumulation: AccumulationDtype) -> usize {
        match accumulation {
            AccumulationDtype::Fp32 => 4,
            AccumulationDtype::Bf16 => self.bytes(kind),
        }
    }

    /// What is float32, in words for people.
    pub fn kept_in_fp32(self, accumulation: AccumulationDtype) -> Vec<&'static str> {
        const SUMS: &str = "sums of gradients over micro-batches and ranks";
        const SELECTIVE: &[&str] = &[
            "master weights and moments of the optimizer",
            SUMS,
            "sums inside matrix products, norms, softmax and losses",
            "attention scores and their softmax",
            "logits of the head and the cross-entropy",
            "the router: its input, weights, logits, probabilities and gates",
            "weights of norms",
            "relative attention bias",
        ];
        let kept = match self {
            Self::Fp32 => &["everything"],
            Self::Bf16 => &SELECTIVE[..5],
            Self::Selective => SELECTIVE,
        };
        let sums = accumulation == AccumulationDtype::Fp32;
        kept.iter().copied().filter(|&what| sums || what != SUMS).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_router_is_what_selective_precision_selects() {
        use PrecisionMode::{Bf16, Fp32, Selective};
        let kept = |kind| [Fp32, Selective, Bf16].map(|mode: PrecisionMode| mode.keeps_fp32(kind));
        assert_eq!(kept(ParameterKind::Router), [true, true, false]);
        assert_eq!(kept(ParameterKind::ExpertIn), [true, false, false]);
        assert_eq!(Selective.bytes(ParameterKind::Embedding), 2);
        let says = |mode: PrecisionMode, accumulation, what: &str| {
            mode.kept_in_fp32(accumulation).iter().any(|kept| kept.contains(what))
        };
        use AccumulationDtype as Sums;
        assert!(says(Selective, Sums::Fp32, "router") && !says(Bf16, Sums::Fp32, "router"));
        assert!(says(Bf16, Sums::Fp32, "micro-batches") && !says(Bf16, Sums::Bf16, "micro-batches"));
        let bytes = |accumulation| Selective.sum_bytes(ParameterKind::Embedding, accumulation);
        assert_eq!([bytes(Sums::Fp32), bytes(Sums::Bf16)], [4, 2]);
        assert_eq!(Selective.sum_bytes(ParameterKind::Norm, Sums::Bf16), 4);
    }
}
