//! Scalar functions and reductions that the compiler turns into vector code.
//!
//! Callers are compiled for several instruction sets and choose at run time; what stands here is
//! inlined into them. Sums run over sixteen lanes, in an order that never changes.

use crate::element::Element;

pub(crate) const LANES: usize = 16;

/// `e^x`, exact to about 2 units in the last place; 0 below -87, `e^88` above 88 (never infinite).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.0, 88.0);
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5.000_000_3e-1;
    let mantissa = p * (r * r) + r + 1.0;
    let exponent = (rounded.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32).wrapping_add(127);
    let scale = f32::from_bits((exponent as u32) << 23);
    if x < -87.0 { 0.0 } else { mantissa * scale }
}

/// Hyperbolic tangent.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// Joins lanes in pairs, then pairs of pairs: short chains, and vector code.
#[inline(always)]
fn halve(lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    // Seen through, the pairs would make the compiler keep the lanes of the loop before in vectors of two.
    let mut lanes = std::hint::black_box(lanes);
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = join(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// Combines equal lanes of `x` by `step`, then the lanes by `join` and the tail by `step`.
#[inline(always)]
fn fold(x: &[f32], start: f32, step: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = step(*lane, value);
        }
    }
    let mut total = halve(lanes, join);
    for &value in tail {
        total = step(total, value);
    }
    total
}

/// Sum of all values.
#[inline(always)]
pub(crate) fn sum(x: &[f32]) -> f32 {
    fold(x, 0.0, |a, v| a + v, |a, b| a + b)
}

/// Sum of all squares.
#[inline(always)]
pub(crate) fn sum_of_squares<E: Element>(x: &[E]) -> f32 {
    dot(x, x)
}

/// Largest value.
#[inline(always)]
pub(crate) fn max(x: &[f32]) -> f32 {
    fold(x, f32::NEG_INFINITY, |a, v| if v > a { v } else { a }, f32::max)
}

/// Inner product.
#[inline(always)]
pub(crate) fn dot<A: Element, B: Element>(x: &[A], y: &[B]) -> f32 {
    let mut lanes = [[0.0; LANES]; 2];
    let (xs, ys) = (x.chunks_exact(2 * LANES), y.chunks_exact(2 * LANES));
    let tail: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(a, b)| a.widen() * b.widen()).sum();
    for (a, b) in xs.zip(ys) {
        for lane in 0..LANES {
            lanes[0][lane] += a[lane].widen() * b[lane].widen();
            lanes[1][lane] += a[lane + LANES].widen() * b[lane + LANES].widen();
        }
    }
    let [mut even, odd] = lanes;
    for lane in 0..LANES {
        even[lane] += odd[lane];
    }
    halve(even, |a, b| a + b) + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_exact_to_two_units() {
        for i in -8600..8700 {
            let x = i as f32 * 0.01;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 2.5e-7, "exp({x})");
        }
        assert_eq!(exp(f32::MIN), 0.0);
    }

    #[test]
    fn reductions_count_every_value() {
        let x: Vec<f32> = (0..37).map(|v| v as f32).collect();
        assert_eq!(sum(&x), 666.0);
        assert_eq!(max(&x), 36.0);
        assert_eq!(dot(&x, &x[..]), sum_of_squares(&x));
        assert_eq!(dot(&x, &x), 16_206.0);
    }
}
