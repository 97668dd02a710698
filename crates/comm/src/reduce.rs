//! Combines the values of several ranks in rank order; every backend uses it, so all give the same bits.

use half::bf16;

use crate::buffer::Element;
use crate::communicator::ReduceOp;

/// Values combined at a time: the running result stays in the first-level cache.
const BLOCK: usize = 2048;

/// Types that ranks can combine.
pub(crate) trait Reduce: Element {
    /// Combines `parts` element by element into `output`, all of one length; there is at least one part.
    fn combine(op: ReduceOp, parts: &[&[Self]], output: &mut [Self]);
}

/// Walks over `output` and `parts` in blocks.
fn in_blocks<T: Copy>(parts: &[&[T]], output: &mut [T], mut block: impl FnMut(&mut [T], &[&[T]])) {
    let mut pieces = Vec::with_capacity(parts.len());
    for (index, result) in output.chunks_mut(BLOCK).enumerate() {
        let range = index * BLOCK..index * BLOCK + result.len();
        pieces.clear();
        pieces.extend(parts.iter().map(|part| &part[range.clone()]));
        block(result, &pieces);
    }
}

/// Folds the parts into `output`, which needs no other type to hold the running result.
fn fold<T: Copy>(parts: &[&[T]], output: &mut [T], combine: impl Fn(T, T) -> T + Copy) {
    in_blocks(parts, output, |result, pieces| {
        let (first, others) = pieces.split_first().expect("a group has a rank");
        result.copy_from_slice(first);
        for piece in others {
            for (value, other) in result.iter_mut().zip(*piece) {
                *value = combine(*value, *other);
            }
        }
    });
}

macro_rules! floats {
    ($($type:ty),+) => {$(
        impl Reduce for $type {
            fn combine(op: ReduceOp, parts: &[&[Self]], output: &mut [Self]) {
                match op {
                    ReduceOp::Sum => fold(parts, output, |a, b| a + b),
                    ReduceOp::Max => fold(parts, output, |a, b| if b > a || b.is_nan() { b } else { a }),
                    ReduceOp::Min => fold(parts, output, |a, b| if b < a || b.is_nan() { b } else { a }),
                }
            }
        }
    )+};
}

macro_rules! integers {
    ($($type:ty),+) => {$(
        impl Reduce for $type {
            fn combine(op: ReduceOp, parts: &[&[Self]], output: &mut [Self]) {
                match op {
                    ReduceOp::Sum => fold(parts, output, Self::wrapping_add),
                    ReduceOp::Max => fold(parts, output, Ord::max),
                    ReduceOp::Min => fold(parts, output, Ord::min),
                }
            }
        }
    )+};
}

floats!(f32, f64);
integers!(i32, u64, u8);

impl Reduce for bf16 {
    fn combine(op: ReduceOp, parts: &[&[Self]], output: &mut [Self]) {
        match op {
            ReduceOp::Sum => sum_bf16(parts, output),
            ReduceOp::Max => {
                fold(parts, output, |a, b| if widen(b) > widen(a) || b.is_nan() { b } else { a });
            }
            ReduceOp::Min => {
                fold(parts, output, |a, b| if widen(b) < widen(a) || b.is_nan() { b } else { a });
            }
        }
    }
}

fn sum_bf16(parts: &[&[bf16]], output: &mut [bf16]) {
    let mut sums = [0.0_f32; BLOCK];
    in_blocks(parts, output, |result, pieces| {
        let (first, others) = pieces.split_first().expect("a group has a rank");
        let sums = &mut sums[..result.len()];
        for (sum, value) in sums.iter_mut().zip(*first) {
            *sum = widen(*value);
        }
        for piece in others {
            for (sum, value) in sums.iter_mut().zip(*piece) {
                *sum += widen(*value);
            }
        }
        for (value, sum) in result.iter_mut().zip(&*sums) {
            *value = round(*sum);
        }
    });
}

/// Exact, and without the branches of [`bf16::to_f32`], which keep loops from being vectorised.
fn widen(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

/// As [`bf16::from_f32`], without branches.
fn round(value: f32) -> bf16 {
    let bits = value.to_bits();
    let nearest_even = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if value.is_nan() { quiet } else { nearest_even } as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_taken_in_rank_order() {
        let parts: [&[f32]; 3] = [&[1e8, 1.0], &[1.0, 2.0], &[-1e8, 3.0]];
        let mut output = [0.0; 2];
        f32::combine(ReduceOp::Sum, &parts, &mut output);
        assert_eq!(output, [0.0, 6.0]);
        let parts: [&[f32]; 3] = [parts[0], parts[2], parts[1]];
        f32::combine(ReduceOp::Sum, &parts, &mut output);
        assert_eq!(output, [1.0, 6.0]);
    }

    #[test]
    fn bf16_is_rounded_once() {
        // One step of bf16 at 256 is 2: each 1 alone would be lost.
        let (large, one) = (bf16::from_f32(256.0), bf16::from_f32(1.0));
        let mut output = [bf16::ZERO];
        bf16::combine(ReduceOp::Sum, &[&[large], &[one], &[one]], &mut output);
        assert_eq!(output, [bf16::from_f32(258.0)]);
    }

    #[test]
    fn conversions_are_those_of_half() {
        for bits in (0..=u32::MAX).step_by(997).chain([0x7f80_0001, 0xff80_0001, 0x7fff_ffff, 0xffff_ffff]) {
            let value = f32::from_bits(bits);
            assert_eq!(round(value).to_bits(), bf16::from_f32(value).to_bits(), "{bits:x}");
        }
        for bits in 0..=u16::MAX {
            let value = bf16::from_bits(bits);
            assert_eq!(widen(value).is_nan(), value.is_nan());
            assert!(value.is_nan() || widen(value).to_bits() == value.to_f32().to_bits(), "{bits:x}");
        }
    }

    #[test]
    fn a_nan_wins_over_any_number() {
        for op in [ReduceOp::Max, ReduceOp::Min] {
            let mut output = [0.0; 2];
            f64::combine(op, &[&[1.0, f64::NAN], &[f64::NAN, 1.0], &[2.0, 2.0]], &mut output);
            assert!(output.iter().all(|value| value.is_nan()));
            let (nan, one) = (bf16::NAN, bf16::ONE);
            let mut output = [bf16::ZERO; 2];
            bf16::combine(op, &[&[one, nan], &[nan, one]], &mut output);
            assert!(output.iter().all(|value| value.is_nan()));
        }
    }

    #[test]
    fn blocks_meet_without_gaps() {
        let length = 2 * BLOCK + 7;
        let part: Vec<u64> = (0..length as u64).collect();
        let mut output = vec![0; length];
        u64::combine(ReduceOp::Sum, &[&part, &part, &part], &mut output);
        assert!(output.iter().zip(&part).all(|(sum, value)| *sum == 3 * value));
        i32::combine(ReduceOp::Min, &[&[1, 5], &[4, 2]], &mut [0; 2]);
        let mut output = [0; 2];
        u8::combine(ReduceOp::Sum, &[&[200, 1], &[100, 2]], &mut output);
        assert_eq!(output, [44, 3]);
    }
}
