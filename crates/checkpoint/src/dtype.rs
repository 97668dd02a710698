//! Number formats of stored tensors, to and from float32.

use half::{bf16, f16};
use safetensors::Dtype;

/// Number format of stored values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDtype {
    /// 32 bits.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl StoredDtype {
    /// Name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
        }
    }

    /// Bytes of a value.
    pub fn size(self) -> usize {
        if self == Self::F32 { 4 } else { 2 }
    }

    /// Largest finite value.
    fn max(self) -> f32 {
        match self {
            Self::F32 => f32::MAX,
            Self::Bf16 => bf16::MAX.to_f32(),
            Self::F16 => f16::MAX.to_f32(),
        }
    }

    /// Appends `values` in this format; gives back the first finite value that becomes infinite in it.
    pub(crate) fn encode(self, values: &[f32], out: &mut Vec<u8>) -> Result<(), f32> {
        match self {
            Self::F32 => values.iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes())),
            Self::Bf16 => {
                values.iter().for_each(|&v| out.extend_from_slice(&bf16::from_f32(v).to_le_bytes()));
            }
            Self::F16 => values.iter().for_each(|&v| out.extend_from_slice(&f16::from_f32(v).to_le_bytes())),
        }
        let too_large = |v: f32| v.is_finite() && v.abs() > self.max() && self.round(v).is_infinite();
        values.iter().copied().find(|&v| too_large(v)).map_or(Ok(()), Err)
    }

    /// `value` as this format holds it.
    fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::Bf16 => bf16::from_f32(value).to_f32(),
            Self::F16 => f16::from_f32(value).to_f32(),
        }
    }
}

/// Formats that [`decode`] reads, for messages.
pub(crate) const READABLE: &str = "F32, BF16, F16 or F64";

/// Bytes of a value of format `dtype`; `None` for a format that is not [`READABLE`].
pub(crate) fn readable_size(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::BF16 | Dtype::F16 => Some(2),
        Dtype::F32 => Some(4),
        Dtype::F64 => Some(8),
        _ => None,
    }
}

/// Puts little-endian values of format `dtype`, which is [`READABLE`], into `out` as float32.
pub(crate) fn decode(dtype: Dtype, data: &[u8], out: &mut [f32]) {
    fn each<const N: usize>(data: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
        let (values, _) = data.as_chunks::<N>();
        out.iter_mut().zip(values).for_each(|(out, &bytes)| *out = value(bytes));
    }
    match dtype {
        Dtype::BF16 => each(data, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        Dtype::F16 => each(data, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
        Dtype::F64 => each(data, out, |bytes| f64::from_le_bytes(bytes) as f32),
        _ => each(data, out, f32::from_le_bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0.0; bytes.len() / readable_size(dtype).unwrap()];
        decode(dtype, bytes, &mut values);
        values
    }

    #[test]
    fn every_readable_format_decodes_exactly() {
        let values = [0.0_f32, -1.5, 0.15625, 3.0e4];
        for (stored, dtype) in
            [(StoredDtype::F32, Dtype::F32), (StoredDtype::Bf16, Dtype::BF16), (StoredDtype::F16, Dtype::F16)]
        {
            let mut bytes = Vec::new();
            stored.encode(&values, &mut bytes).unwrap();
            assert_eq!(bytes.len(), values.len() * stored.size());
            let expected: Vec<f32> = values.iter().map(|&v| stored.round(v)).collect();
            assert_eq!(decoded(dtype, &bytes), expected);
        }
        let doubles: Vec<u8> = values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect();
        assert_eq!(decoded(Dtype::F64, &doubles), values);
        assert_eq!(readable_size(Dtype::I8), None);
    }

    #[test]
    fn values_beyond_a_format_are_found_and_infinities_kept() {
        let mut bytes = Vec::new();
        assert_eq!(StoredDtype::F16.encode(&[1.0, -70_000.0], &mut bytes), Err(-70_000.0));
        // Rounds down to the largest half.
        assert_eq!(StoredDtype::F16.encode(&[65_510.0, f32::INFINITY], &mut bytes), Ok(()));
        assert_eq!(StoredDtype::Bf16.encode(&[f32::MAX], &mut bytes), Err(f32::MAX));
        assert_eq!(StoredDtype::F32.encode(&[f32::MAX, f32::NAN], &mut bytes), Ok(()));
    }
}
