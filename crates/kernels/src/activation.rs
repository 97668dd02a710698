//! Pointwise functions of feed-forward layers and their derivatives.

use crate::math::{exp, tanh};

/// Pointwise function of a feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)`, but NaN where `x` is.
    Relu,
    /// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `x * Phi(x)`.
    Gelu,
    /// `x * sigmoid(x)`.
    Silu,
}

const GELU_SCALE: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

impl Activation {
    /// The function's value.
    #[inline(always)]
    pub(crate) fn value(self, x: f32) -> f32 {
        match self {
            // Not `max`, which would turn a NaN into 0 and hide it.
            Self::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Self::GeluTanh => 0.5 * x * (1.0 + tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x))),
            Self::Gelu => x * normal_cdf(x),
            Self::Silu => x / (1.0 + exp(-x)),
        }
    }

    /// The function's derivative. For `Relu`, the same at `x` and at its value.
    #[inline(always)]
    pub(crate) fn derivative(self, x: f32) -> f32 {
        match self {
            Self::Relu => {
                if x > 0.0 {
                    1.0
                } else {
                    0.0
                }
            }
            Self::GeluTanh => {
                let t = tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x));
                let inner = GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * x * x);
                0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
            }
            Self::Gelu => normal_cdf(x) + x * 0.398_942_3 * exp(-0.5 * x * x),
            Self::Silu => {
                let s = 1.0 / (1.0 + exp(-x));
                s * (1.0 + x * (1.0 - s))
            }
        }
    }
}

/// Standard normal distribution function, to about 1.5e-7.
///
/// # Source
/// Abramowitz and Stegun, formula 7.1.26.
#[inline(always)]
fn normal_cdf(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let poly = ((((1.061_405_4 * t - 1.453_152) * t + 1.421_413_8) * t - 0.284_496_74) * t + 0.254_829_6) * t;
    let upper = 0.5 * poly * exp(-z * z);
    if x > 0.0 { 1.0 - upper } else { upper }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derivatives_equal_finite_differences() {
        for activation in [Activation::Relu, Activation::GeluTanh, Activation::Gelu, Activation::Silu] {
            for i in -40..40 {
                let x = i as f32 * 0.1 + 0.05;
                let h = 1e-2;
                let difference = (activation.value(x + h) - activation.value(x - h)) / (2.0 * h);
                assert!((difference - activation.derivative(x)).abs() < 1e-3, "{activation:?} at {x}");
            }
        }
    }

    #[test]
    fn no_activation_hides_a_nan() {
        for activation in [Activation::Relu, Activation::GeluTanh, Activation::Gelu, Activation::Silu] {
            assert!(activation.value(f32::NAN).is_nan(), "{activation:?}");
        }
    }

    #[test]
    fn values_equal_published_ones() {
        assert!((Activation::GeluTanh.value(1.0) - 0.841_192).abs() < 1e-5);
        assert!((Activation::Gelu.value(1.0) - 0.841_345).abs() < 1e-5);
        assert!((Activation::Silu.value(1.0) - 0.731_059).abs() < 1e-5);
    }
}
