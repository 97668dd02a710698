//! Micro-kernels in plain loops, for any CPU.

use super::tile::{MicroKernel, Tile, finish_plainly};
use crate::element::{Element, bf16};

const ROWS: usize = 4;
const COLS: usize = 16;

pub(super) const F32: MicroKernel =
    MicroKernel { rows: ROWS, cols: COLS, reads_rows: false, run: tile::<f32, f32> };
pub(super) const BF16_TO_F32: MicroKernel =
    MicroKernel { rows: ROWS, cols: COLS, reads_rows: false, run: tile::<bf16, f32> };
pub(super) const BF16_TO_BF16: MicroKernel =
    MicroKernel { rows: ROWS, cols: COLS, reads_rows: false, run: tile::<bf16, bf16> };

/// # Safety
/// As [`MicroKernel::run`].
unsafe fn tile<In: Element, Out: Element>(tile: &Tile) {
    // SAFETY: the caller's promise.
    let mut sums = unsafe { tile.beginning::<COLS>() };
    for p in 0..tile.words {
        // SAFETY: a packed panel has `COLS` words for each word of the inner dimension.
        let b = unsafe { &*tile.b.cast::<[u32; COLS]>().add(p) };
        for (i, sums) in sums.iter_mut().enumerate().take(tile.rows) {
            // SAFETY: the left factor has this word.
            let a = unsafe { tile.a.add(i * tile.a_row + p * tile.a_word).cast::<u32>().read_unaligned() };
            for (sum, &b) in sums.iter_mut().zip(b) {
                *sum += if In::PER_WORD == 1 {
                    f32::from_bits(a) * f32::from_bits(b)
                } else {
                    let low = f32::from_bits(a << 16) * f32::from_bits(b << 16);
                    low + f32::from_bits(a & 0xFFFF_0000) * f32::from_bits(b & 0xFFFF_0000)
                };
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { finish_plainly::<Out, COLS>(tile, &sums) }
}
