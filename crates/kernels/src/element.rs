//! The number formats that activations, weights and gradients come in.

use std::fmt::Debug;

use burn::tensor::DType;
pub use burn::tensor::bf16;
use multiversion::multiversion;

/// A format that operations read and write; every sum inside them is float32.
pub trait Element: burn::tensor::Element + bytemuck::Pod + Default + Debug + PartialEq {
    /// Its name as a tensor's format.
    const FORMAT: DType;

    /// Neighbours along the inner dimension that a product takes as one 32-bit word.
    const PER_WORD: usize;

    /// Exactly the same number.
    fn widen(self) -> f32;

    /// The nearest number of the format, ties to even.
    fn round(value: f32) -> Self;
}

impl Element for f32 {
    const FORMAT: DType = DType::F32;
    const PER_WORD: usize = 1;

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn round(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    const FORMAT: DType = DType::BF16;
    const PER_WORD: usize = 2;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn round(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
        // Rounding could carry a NaN into an infinity; a quiet one of the same sign cannot.
        let bits = if value.is_nan() { bits >> 16 | 0x40 } else { rounded };
        Self::from_bits(bits as u16)
    }
}

/// Rounds as many values as there is room for.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
pub(crate) fn round_all<E: Element>(values: &[f32], rounded: &mut [E]) {
    for (rounded, value) in rounded.iter_mut().zip(values) {
        *rounded = E::round(*value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_the_nearest_and_to_even() {
        let bits = |value: f32| bf16::round(value).to_bits();
        assert_eq!(bits(f32::from_bits(0x3F80_8000)), 0x3F80, "a tie goes to the even neighbour");
        assert_eq!(bits(f32::from_bits(0x3F81_8000)), 0x3F82, "a tie goes to the even neighbour");
        assert_eq!(bits(f32::from_bits(0x3F80_8001)), 0x3F81);
        assert_eq!(bits(f32::MAX), 0x7F80, "beyond the largest number is infinity");
        assert!(bf16::round(f32::from_bits(0x7F80_0001)).is_nan(), "no NaN becomes infinite");
        for bits in (0..=u16::MAX).filter(|&bits| !bf16::from_bits(bits).is_nan()) {
            assert_eq!(bf16::round(bf16::from_bits(bits).widen()).to_bits(), bits);
        }
    }
}
