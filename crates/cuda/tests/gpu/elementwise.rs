//! Sums and conversions are exact but for one rounding.

use switchyard_cuda::{Format, add, narrow, widen};

use crate::support::{Buffer, held, normal, queue};

const LENGTHS: [usize; 8] = [0, 1, 7, 8, 2049, 4096, 4100, 20_003];

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn two_buffers_add_up() {
    for format in [Format::F32, Format::Bf16] {
        for len in LENGTHS {
            let [a, b] = [1, 2].map(|seed| normal(seed, len, format));
            let [x, y] = [&a, &b].map(|values| Buffer::floats(values, format));
            let out = Buffer::poisoned(len, format);
            let expected: Vec<f64> =
                a.iter().zip(&b).map(|(&a, &b)| held(f64::from(a as f32 + b as f32), format)).collect();
            // SAFETY: all buffers have `len` values.
            unsafe { add(queue(), x.at(), y.at(), out.at(), len, format) }.unwrap();
            assert_eq!(out.read_floats(format), expected, "{len}");
            // SAFETY: as above.
            unsafe { add(queue(), x.at(), y.at(), y.at(), len, format) }.unwrap();
            assert_eq!(y.read_floats(format), expected, "{len}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn formats_become_each_other() {
    for len in LENGTHS {
        let values = normal(1, len, Format::F32);
        let rounded: Vec<f64> = values.iter().map(|&value| held(value, Format::Bf16)).collect();
        let wide = Buffer::floats(&values, Format::F32);
        let (half, back) = (Buffer::poisoned(len, Format::Bf16), Buffer::poisoned(len, Format::F32));
        // SAFETY: all buffers have `len` values.
        unsafe { narrow(queue(), wide.at(), half.at(), len) }.unwrap();
        assert_eq!(half.read_floats(Format::Bf16), rounded, "{len}");
        // SAFETY: as above.
        unsafe { widen(queue(), half.at(), back.at(), len) }.unwrap();
        assert_eq!(back.read_floats(Format::F32), rounded, "{len}");
    }
}
