//! Norms against sums in float64.

use switchyard_cuda::{
    Address, Format, RmsNorm, RmsNormGradients, rms_norm, rms_norm_backward, rms_norm_workspace,
};

use crate::support::{Buffer, assert_close, held, normal, queue};

const EPSILON: f64 = 1e-6;

/// Rows and width: every share of a row among threads, whole and with threads that have less.
const SIZES: [(usize, usize); 13] = [
    (1, 8),
    (7, 256),
    (33, 264),
    (5, 512),
    (131, 768),
    (3, 1024),
    (4, 1032),
    (6, 2048),
    (5, 3000),
    (3, 4096),
    (2, 4104),
    (9, 8192),
    (3001, 64),
];

fn rules(rows: usize, d_model: usize, format: Format, weight_format: Format) -> RmsNorm {
    RmsNorm { rows, d_model, epsilon: EPSILON, format, weight_format }
}

const FORMATS: [(Format, Format); 3] =
    [(Format::F32, Format::F32), (Format::Bf16, Format::Bf16), (Format::Bf16, Format::F32)];

fn tolerance(format: Format) -> f64 {
    if format == Format::F32 { 1e-5 } else { 1e-3 }
}

fn inverse_rms(x: &[f64], width: usize) -> Vec<f64> {
    let row = |row: &[f64]| 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / width as f64 + EPSILON).sqrt();
    x.chunks(width).map(row).collect()
}

fn normed(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let width = weight.len();
    let inverse = inverse_rms(x, width);
    (0..x.len()).map(|i| x[i] * inverse[i / width] * weight[i % width]).collect()
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rows_are_normalised() {
    for (format, weight_format) in FORMATS {
        for (rows, width) in SIZES {
            let rules = rules(rows, width, format, weight_format);
            let (x, w) = (normal(1, rows * width, format), normal(2, width, weight_format));
            let (out, inverse) = (Buffer::poisoned(x.len(), format), Buffer::poisoned(rows, Format::F32));
            let (at, weight) = (Buffer::floats(&x, format), Buffer::floats(&w, weight_format));
            // SAFETY: all buffers have the values of `rules`.
            unsafe { rms_norm(queue(), at.at(), weight.at(), out.at(), inverse.at(), rules) }.unwrap();
            let what = format!("{rules:?}");
            let found = inverse.read_floats(Format::F32);
            assert_close(&what, &found, &inverse_rms(&x, width), 1e-6, Format::F32);
            let expected = normed(&x, &w);
            assert_close(&what, &out.read_floats(format), &expected, tolerance(format), format);
            // SAFETY: as above.
            unsafe { rms_norm(queue(), at.at(), weight.at(), at.at(), Address::NONE, rules) }.unwrap();
            assert_eq!(at.read_floats(format), out.read_floats(format), "in place, {what}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_row_of_zeros_stays_zero_and_no_rows_are_none() {
    let (x, w) = (Buffer::floats(&[0.0; 16], Format::F32), Buffer::floats(&[1.0; 16], Format::F32));
    let (out, inverse) = (Buffer::poisoned(16, Format::F32), Buffer::poisoned(1, Format::F32));
    for rows in [0, 1] {
        let rules = rules(rows, 16, Format::F32, Format::F32);
        // SAFETY: all buffers have the values of `rules`.
        unsafe { rms_norm(queue(), x.at(), w.at(), out.at(), inverse.at(), rules) }.unwrap();
        let found = out.read_floats(Format::F32);
        assert!(if rows == 0 { found.iter().all(|f| f.is_nan()) } else { found == [0.0; 16] });
    }
    assert!((inverse.read::<f32>()[0] - 1e3).abs() < 1e-2);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gradients_are_those_of_the_formula() {
    for (format, weight_format) in FORMATS {
        for (case, (rows, width)) in SIZES.into_iter().chain([(0, 64), (5000, 256)]).enumerate() {
            let with_beside = case % 2 == 0;
            let rules = rules(rows, width, format, weight_format);
            let len = rows * width;
            let [x, g, beside] = [1, 2, 3].map(|seed| normal(seed, len, format));
            let w = normal(4, width, weight_format);
            let inverse: Vec<f64> =
                inverse_rms(&x, width).into_iter().map(|r| held(r, Format::F32)).collect();

            let (mut gx, mut gw) = (vec![0.0; len], vec![0.0; width]);
            for (row, &r) in inverse.iter().enumerate() {
                let at = row * width;
                let dot: f64 = (0..width).map(|c| g[at + c] * w[c] * x[at + c]).sum();
                for c in 0..width {
                    let through = r * (g[at + c] * w[c] - x[at + c] * r * r * dot / width as f64);
                    gx[at + c] = through + if with_beside { beside[at + c] } else { 0.0 };
                    gw[c] += g[at + c] * x[at + c] * r;
                }
            }

            let [xs, gs, others] = [&x, &g, &beside].map(|values| Buffer::floats(values, format));
            let (weight, rms) = (Buffer::floats(&w, weight_format), Buffer::floats(&inverse, Format::F32));
            let (out, of_weight) = (Buffer::poisoned(len, format), Buffer::poisoned(width, weight_format));
            let workspace = Buffer::of(&vec![0xFF_u8; rms_norm_workspace(&rules).unwrap()]);
            let mut at = RmsNormGradients {
                x: xs.at(),
                weight: weight.at(),
                inverse_rms: rms.at(),
                gradient: gs.at(),
                beside: if with_beside { others.at() } else { Address::NONE },
                x_gradient: out.at(),
                weight_gradient: of_weight.at(),
                workspace: workspace.at(),
            };
            // SAFETY: all buffers have the values of `rules`.
            unsafe { rms_norm_backward(queue(), at, rules) }.unwrap();
            let what = format!("{rules:?} beside {with_beside}");
            let found = out.read_floats(format);
            assert_close(&what, &found, &gx, tolerance(format), format);
            let weights = of_weight.read_floats(weight_format);
            assert_close(&what, &weights, &gw, tolerance(weight_format), weight_format);
            workspace.read::<u8>();
            at.x_gradient = gs.at();
            // SAFETY: as above; the gradient may be written.
            unsafe { rms_norm_backward(queue(), at, rules) }.unwrap();
            assert_eq!(gs.read_floats(format), found, "in place, {what}");
        }
    }
}
