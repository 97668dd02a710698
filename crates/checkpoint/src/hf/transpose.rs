//! Matrices turned: `[in, out]` here, `[out, in]` in transformers.

use rayon::prelude::*;

/// Edge of the squares that are turned at once; two of them fit the first cache.
const TILE: usize = 32;

/// Writes the transpose of `values`, `[rows, columns]`, to `out`, `[columns, rows]`.
pub(super) fn transpose(values: &[f32], rows: usize, columns: usize, out: &mut [f32]) {
    debug_assert!(values.len() == rows * columns && out.len() == values.len());
    if values.is_empty() {
        return;
    }
    out.par_chunks_mut(rows * TILE).enumerate().for_each(|(tile, out)| {
        let first = tile * TILE;
        for row in (0..rows).step_by(TILE) {
            for (column, out) in out.chunks_mut(rows).enumerate() {
                for (r, value) in out.iter_mut().enumerate().skip(row).take(TILE) {
                    *value = values[r * columns + first + column];
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_moves_to_its_place() {
        for (rows, columns) in [(1, 1), (1, 70), (70, 1), (33, 65), (64, 32)] {
            let values: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            let mut out = vec![-1.0; values.len()];
            transpose(&values, rows, columns, &mut out);
            for (i, value) in out.iter().enumerate() {
                assert_eq!(*value as usize, (i % rows) * columns + i / rows);
            }
        }
    }
}
