//! Adafactor: second moments kept as row and column means, updates relative to the parameter.

use multiversion::multiversion;
use rayon::prelude::*;

use super::parallel::{CHUNK, sum_of_squares};
use crate::element::{Element, bf16, round_all};
use crate::math::{LANES, sum};

/// Constants of one update.
#[derive(Debug, Clone, Copy)]
pub struct Adafactor {
    /// Learning rate of this step, before the parameter scale.
    pub learning_rate: f64,
    /// Factor on the gradient: clipping and loss scaling in one.
    pub gradient_scale: f32,
    /// Decay of the second moment is `1 - update^-decay_exponent`.
    pub decay_exponent: f64,
    /// `eps1`: added to squared gradients.
    pub eps: f64,
    /// Largest root mean square of an update.
    pub update_clip: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// `eps2`, the floor of the parameter scale; `None` for updates that do not depend on the parameter's size.
    pub parameter_scale: Option<f64>,
    /// Number of this update, from 1.
    pub update: u64,
}

/// Second moments of one tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum AdafactorState {
    /// Of a stack of matrices: means over columns `[matrices * rows]` and over rows `[matrices * cols]`.
    Factored {
        /// Mean of squared gradients over each row.
        row: Vec<f32>,
        /// Mean of squared gradients over each column.
        col: Vec<f32>,
    },
    /// Of a vector: every value its own.
    Full(Vec<f32>),
}

impl AdafactorState {
    /// Fresh moments of a tensor: factored over its last two dims, a vector kept whole.
    pub fn new(shape: &[usize]) -> Self {
        match *shape {
            [ref stack @ .., rows, cols] => {
                let stack: usize = stack.iter().product();
                Self::Factored { row: vec![0.0; stack * rows], col: vec![0.0; stack * cols] }
            }
            _ => Self::Full(vec![0.0; shape.iter().product()]),
        }
    }
}

/// Updates `parameter` of `shape`; clipping and scale are those of each matrix alone.
///
/// `rounded`, if not empty, gets the new values as bfloat16.
///
/// # Source
/// Shazeer and Stern 2018 (arXiv:1804.04235), algorithms 4 and 5, without momentum, as in T5.
pub fn adafactor<G: Element>(
    parameter: &mut [f32],
    gradient: &[G],
    shape: &[usize],
    state: &mut AdafactorState,
    rules: Adafactor,
    rounded: &mut [bf16],
) {
    let decay = (1.0 - (rules.update as f64).powf(-rules.decay_exponent)) as f32;
    match state {
        AdafactorState::Full(v) => {
            let mut update = vec![0.0; parameter.len()];
            full_update(&mut update, gradient, v, decay, rules.gradient_scale, rules.eps as f32);
            let moved = sum_of_squares(&update);
            apply(parameter, &update, moved, rules);
            round_all(parameter, rounded);
        }
        AdafactorState::Factored { row, col } => {
            let (rows, cols) = (shape[shape.len() - 2], shape[shape.len() - 1]);
            let mut of_matrices: Vec<&mut [bf16]> = rounded.chunks_mut(rows * cols).collect();
            of_matrices.resize_with(parameter.len().div_ceil(rows * cols), Default::default);
            // Enough matrices keep the threads busy without cutting each of them.
            let alone = parameter.len() >= rows * cols * MATRICES_PER_THREAD * rayon::current_num_threads();
            let least_blocks = if alone { usize::MAX } else { 1 };
            let matrices = parameter
                .par_chunks_mut(rows * cols)
                .zip(gradient.par_chunks(rows * cols))
                .zip(row.par_chunks_mut(rows).zip(col.par_chunks_mut(cols)))
                .zip(of_matrices);
            matrices.for_each(|(((p, g), (row, col)), rounded)| {
                factored(p, g, row, col, decay, rules, rounded, least_blocks);
            });
        }
    }
}

/// Matrices for each thread that make it not worth while to share one.
const MATRICES_PER_THREAD: usize = 4;

/// One matrix, in tasks of `least_blocks` blocks at least: `update = g * rsqrt(row * col / mean(row))`.
#[allow(clippy::too_many_arguments)]
fn factored<G: Element>(
    p: &mut [f32],
    g: &[G],
    row: &mut [f32],
    col: &mut [f32],
    decay: f32,
    rules: Adafactor,
    rounded: &mut [bf16],
    least_blocks: usize,
) {
    let cols = col.len();
    let block_rows = (CHUNK / cols).max(1);
    let parts: Vec<(Vec<f32>, f32)> = p
        .par_chunks(block_rows * cols)
        .zip(g.par_chunks(block_rows * cols))
        .zip(row.par_chunks_mut(block_rows))
        .with_min_len(least_blocks)
        .map(|((p, g), row)| {
            let mut columns = vec![0.0; cols];
            let squares = accumulate(p, g, row, &mut columns, decay, rules.gradient_scale, rules.eps as f32);
            (columns, squares)
        })
        .collect();
    let parameter_squares = parts.iter().map(|(_, squares)| f64::from(*squares)).sum();
    let share = (1.0 - decay) / row.len() as f32;
    for (i, col) in col.iter_mut().enumerate() {
        *col = decay * *col + share * parts.iter().map(|(columns, _)| columns[i]).sum::<f32>();
    }
    let row_mean = row.iter().sum::<f32>() / row.len() as f32;
    let row_factor: Vec<f32> = row.iter().map(|r| rules.gradient_scale / (r / row_mean).sqrt()).collect();
    let col_factor: Vec<f32> = col.iter().map(|c| 1.0 / c.sqrt()).collect();
    let squares: Vec<f64> = g
        .par_chunks(block_rows * cols)
        .zip(row_factor.par_chunks(block_rows))
        .with_min_len(least_blocks)
        .map(|(g, rows)| f64::from(update_squares(g, rows, &col_factor)))
        .collect();
    let step = Step::new(p.len(), parameter_squares, squares.iter().sum(), rules);
    let mut of_blocks: Vec<&mut [bf16]> = rounded.chunks_mut(block_rows * cols).collect();
    of_blocks.resize_with(row_factor.len().div_ceil(block_rows), Default::default);
    p.par_chunks_mut(block_rows * cols)
        .zip(g.par_chunks(block_rows * cols))
        .zip(row_factor.par_chunks(block_rows))
        .zip(of_blocks)
        .with_min_len(least_blocks)
        .for_each(|(((p, g), rows), rounded)| {
            apply_factored(p, g, rows, &col_factor, step, rounded);
        });
}

#[derive(Clone, Copy)]
struct Step {
    keep: f32,
    rate: f32,
}

impl Step {
    /// Rate after the parameter scale and the clip of an update, from the sums of squares of `len` values.
    fn new(len: usize, of_parameter: f64, of_update: f64, rules: Adafactor) -> Self {
        let root_mean = |squares: f64| (squares / len.max(1) as f64).sqrt();
        let scale = rules.parameter_scale.map_or(1.0, |floor| root_mean(of_parameter).max(floor));
        let rms = root_mean(of_update);
        let clip = (rms / rules.update_clip).max(1.0);
        let rate = rules.learning_rate * scale;
        Self { keep: (1.0 - rate * rules.weight_decay) as f32, rate: (rate / clip) as f32 }
    }
}

fn apply(p: &mut [f32], update: &[f32], squares: f64, rules: Adafactor) {
    let step = Step::new(p.len(), sum_of_squares(p), squares, rules);
    for (p, u) in p.iter_mut().zip(update) {
        *p = *p * step.keep - step.rate * u;
    }
}

fn full_update<G: Element>(update: &mut [f32], g: &[G], v: &mut [f32], decay: f32, scale: f32, eps: f32) {
    for ((u, g), v) in update.iter_mut().zip(g).zip(v) {
        let g = g.widen() * scale;
        *v = decay * *v + (1.0 - decay) * (g * g + eps);
        *u = g / v.sqrt();
    }
}

/// Updates the row means of a block of rows, adds up its columns and returns the sum of squares of `p`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn accumulate<G: Element>(
    p: &[f32],
    g: &[G],
    row: &mut [f32],
    columns: &mut [f32],
    decay: f32,
    scale: f32,
    eps: f32,
) -> f32 {
    let cols = columns.len();
    let mut of_parameter = [0.0; LANES];
    for ((p, g), row) in p.chunks_exact(cols).zip(g.chunks_exact(cols)).zip(row) {
        let mut of_row = [0.0; LANES];
        let (columns, columns_tail) = columns.as_chunks_mut::<LANES>();
        let ((p, p_tail), (g, g_tail)) = (p.as_chunks::<LANES>(), g.as_chunks::<LANES>());
        for ((columns, p), g) in columns.iter_mut().zip(p).zip(g) {
            for i in 0..LANES {
                let g = g[i].widen() * scale;
                let square = g * g + eps;
                columns[i] += square;
                of_row[i] += square;
                of_parameter[i] += p[i] * p[i];
            }
        }
        for (i, ((column, p), g)) in columns_tail.iter_mut().zip(p_tail).zip(g_tail).enumerate() {
            let g = g.widen() * scale;
            let square = g * g + eps;
            *column += square;
            of_row[i] += square;
            of_parameter[i] += p * p;
        }
        *row = decay * *row + (1.0 - decay) * sum(&of_row) / cols as f32;
    }
    sum(&of_parameter)
}

/// Sum of squares of the update of a block of rows.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn update_squares<G: Element>(g: &[G], rows: &[f32], cols: &[f32]) -> f32 {
    // Sums in memory: sixteen of them in registers the compiler would add up in vectors of two.
    let mut sums = [0.0; SQUARES];
    for (g, row) in g.chunks_exact(cols.len()).zip(rows) {
        for (g, cols) in g.chunks(SQUARES).zip(cols.chunks(SQUARES)) {
            for ((sum, g), col) in sums.iter_mut().zip(g).zip(cols) {
                let update = g.widen() * col * row;
                *sum += update * update;
            }
        }
    }
    sum(&sums)
}

/// Neighbours of which squares are summed apart.
const SQUARES: usize = 256;

/// Applies the update to a block of rows; `rounded`, if not empty, gets the new values.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn apply_factored<G: Element>(
    p: &mut [f32],
    g: &[G],
    rows: &[f32],
    cols: &[f32],
    step: Step,
    rounded: &mut [bf16],
) {
    let width = cols.len();
    for (i, ((p, g), row)) in p.chunks_exact_mut(width).zip(g.chunks_exact(width)).zip(rows).enumerate() {
        let rate = step.rate * row;
        let values = p.iter_mut().zip(g).zip(cols);
        if rounded.is_empty() {
            for ((p, g), col) in values {
                *p = *p * step.keep - rate * g.widen() * col;
            }
        } else {
            for (((p, g), col), rounded) in values.zip(&mut rounded[i * width..][..width]) {
                *p = *p * step.keep - rate * g.widen() * col;
                *rounded = bf16::round(*p);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Adafactor = Adafactor {
        learning_rate: 0.01,
        gradient_scale: 1.0,
        decay_exponent: 0.8,
        eps: 1e-30,
        update_clip: 1.0,
        weight_decay: 0.0,
        parameter_scale: Some(1e-3),
        update: 1,
    };

    #[test]
    fn a_rank_one_gradient_moves_every_value_by_the_scaled_rate() {
        let g: Vec<f32> = (0..12).map(|i| (1 + i / 4) as f32 * (1 + i % 4) as f32).collect();
        let mut p = vec![2.0; 12];
        adafactor(&mut p, &g, &[3, 4], &mut AdafactorState::new(&[3, 4]), RULES, &mut []);
        for value in p {
            assert!((value - (2.0 - 0.01 * 2.0)).abs() < 1e-5, "{value}");
        }
    }

    #[test]
    fn a_stack_updates_each_matrix_alone() {
        let g: Vec<f32> = (0..24).map(|i| ((i * 7) % 11) as f32 - 5.0).collect();
        let start: Vec<f32> = (0..24).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut stacked = start.clone();
        adafactor(&mut stacked, &g, &[2, 3, 4], &mut AdafactorState::new(&[2, 3, 4]), RULES, &mut []);
        for expert in 0..2 {
            let mut alone = start[expert * 12..][..12].to_vec();
            adafactor(
                &mut alone,
                &g[expert * 12..][..12],
                &[3, 4],
                &mut AdafactorState::new(&[3, 4]),
                RULES,
                &mut [],
            );
            assert_eq!(alone, stacked[expert * 12..][..12]);
        }
    }

    #[test]
    fn an_expert_without_gradient_stays_put() {
        let mut p = vec![0.5; 8];
        let mut state = AdafactorState::new(&[2, 2, 2]);
        for update in 1..4 {
            adafactor(&mut p, &[0.0_f32; 8], &[2, 2, 2], &mut state, Adafactor { update, ..RULES }, &mut []);
        }
        assert_eq!(p, [0.5; 8]);
    }
}
