//! Norms against sums in float64.

use switchyard_cuda::{
    Address, Columns, Dropout, Format, ResidualNorm, RmsNorm, RmsNormGradients, residual_rms_norm, rms_norm,
    rms_norm_backward, rms_norm_workspace,
};

use crate::noise::{STEP, dropout_factor, noise, scaled, words};
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

/// `residual + branch`, with dropout of the branch.
fn joined(residual: &[f64], branch: &[f64], factors: Option<&[f32]>, format: Format) -> Vec<f64> {
    let branch = |i: usize| factors.map_or(branch[i], |factors| scaled(branch[i], factors[i], format));
    (0..residual.len()).map(|i| held(f64::from(residual[i] as f32 + branch(i) as f32), format)).collect()
}

/// Dropout of `[rows, width]` and its factors.
fn dropped(step: &Buffer, rate: f64, rows: usize, width: usize, odd: bool) -> (Dropout, Vec<f32>) {
    let columns = odd.then_some(Columns { first: 5, total: width + 9 });
    let noise = noise(step, columns);
    let factors = words(&noise, rows, width).into_iter().map(|word| dropout_factor(word, rate)).collect();
    (Dropout { rate, noise }, factors)
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_branch_joins_its_residual_and_both_are_normalised() {
    let step = Buffer::of(&[STEP]);
    for (format, weight_format) in FORMATS {
        for (rows, width) in SIZES {
            for rate in [None, Some(0.3), Some(1.0)] {
                let rules = rules(rows, width, format, weight_format);
                let (residual, branch) = (normal(1, rows * width, format), normal(2, rows * width, format));
                let w = normal(3, width, weight_format);
                let drops = rate.map(|rate| dropped(&step, rate, rows, width, rows % 2 == 0));
                let factors = drops.as_ref().map(|(_, factors)| &factors[..]);
                let x = joined(&residual, &branch, factors, format);
                let (a, b) = (Buffer::floats(&residual, format), Buffer::floats(&branch, format));
                let weight = Buffer::floats(&w, weight_format);
                let [sum, out] = [(); 2].map(|()| Buffer::poisoned(rows * width, format));
                let inverse = Buffer::poisoned(rows, Format::F32);
                let mut at = ResidualNorm {
                    residual: a.at(),
                    branch: b.at(),
                    weight: weight.at(),
                    x: sum.at(),
                    out: out.at(),
                    inverse_rms: inverse.at(),
                };
                let dropout = drops.as_ref().map(|(dropout, _)| *dropout);
                // SAFETY: all buffers have the values of `rules`.
                unsafe { residual_rms_norm(queue(), at, rules, dropout) }.unwrap();
                let what = format!("{rules:?} {rate:?}");
                assert_eq!(sum.read_floats(format), x, "{what}");
                let found = inverse.read_floats(Format::F32);
                assert_close(&what, &found, &inverse_rms(&x, width), 1e-6, Format::F32);
                let found = out.read_floats(format);
                assert_close(&what, &found, &normed(&x, &w), tolerance(format), format);
                (at.x, at.out) = (a.at(), b.at());
                // SAFETY: as above.
                unsafe { residual_rms_norm(queue(), at, rules, dropout) }.unwrap();
                assert_eq!(a.read_floats(format), x, "in place, {what}");
                assert_eq!(b.read_floats(format), found, "in place, {what}");
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gradients_are_those_of_the_formula() {
    let step = Buffer::of(&[STEP]);
    for (format, weight_format) in FORMATS {
        for (case, (rows, width)) in SIZES.into_iter().chain([(0, 64), (5000, 256)]).enumerate() {
            let (with_beside, onto, drops) = (case % 2 == 0, case % 3 == 0, case % 4 < 2);
            let rules = rules(rows, width, format, weight_format);
            let len = rows * width;
            let [x, g, beside] = [1, 2, 3].map(|seed| normal(seed, len, format));
            let (w, before) = (normal(4, width, weight_format), normal(5, width, weight_format));
            let inverse: Vec<f64> =
                inverse_rms(&x, width).into_iter().map(|r| held(r, Format::F32)).collect();

            let mut gx = vec![0.0; len];
            let mut gw = if onto { before.clone() } else { vec![0.0; width] };
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
            let [out, branch] = [(); 2].map(|()| Buffer::poisoned(len, format));
            let weight_gradient = match onto {
                true => Buffer::floats(&before, weight_format),
                false => Buffer::poisoned(width, weight_format),
            };
            let workspace = Buffer::of(&vec![0xFF_u8; rms_norm_workspace(&rules).unwrap()]);
            let at = RmsNormGradients {
                x: xs.at(),
                weight: weight.at(),
                inverse_rms: rms.at(),
                gradient: gs.at(),
                beside: if with_beside { others.at() } else { Address::NONE },
                x_gradient: out.at(),
                branch_gradient: branch.at(),
                weight_gradient: weight_gradient.at(),
                workspace: workspace.at(),
            };
            let drops = drops.then(|| dropped(&step, 0.3, rows, width, case % 8 == 0));
            let dropout = drops.as_ref().map(|(dropout, _)| *dropout);
            // SAFETY: all buffers have the values of `rules`.
            unsafe { rms_norm_backward(queue(), at, rules, dropout, onto) }.unwrap();
            let what = format!("{rules:?} beside {with_beside} onto {onto} dropout {}", drops.is_some());
            let found = out.read_floats(format);
            assert_close(&what, &found, &gx, tolerance(format), format);
            let weights = weight_gradient.read_floats(weight_format);
            assert_close(&what, &weights, &gw, tolerance(weight_format), weight_format);
            workspace.read::<u8>();
            if let Some((_, factors)) = &drops {
                let expected: Vec<f64> =
                    found.iter().zip(factors).map(|(&g, &factor)| scaled(g, factor, format)).collect();
                assert_eq!(branch.read_floats(format), expected, "{what}");
                // SAFETY: as above.
                let alone = RmsNormGradients { x_gradient: Address::NONE, branch_gradient: gs.at(), ..at };
                unsafe { rms_norm_backward(queue(), alone, rules, dropout, false) }.unwrap();
                assert_eq!(gs.read_floats(format), expected, "the branch alone, in place, {what}");
            } else {
                // SAFETY: as above.
                unsafe {
                    rms_norm_backward(
                        queue(),
                        RmsNormGradients { x_gradient: gs.at(), ..at },
                        rules,
                        None,
                        false,
                    )
                }
                .unwrap();
                assert_eq!(gs.read_floats(format), found, "in place, {what}");
            }
        }
    }
}
