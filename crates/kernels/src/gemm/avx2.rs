//! Micro-kernels on 256-bit fused multiply-add.

use std::arch::x86_64::{
    __m256, _mm256_and_si256, _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256,
    _mm256_set1_epi32, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps,
};

use super::tile::{MOST_ROWS, MicroKernel, Tile, finish_plainly};
use crate::element::{Element, bf16};

const COLS: usize = 16;

pub(super) const F32: MicroKernel = MicroKernel { rows: 6, cols: COLS, reads_rows: false, run: f32_tile };
pub(super) const BF16_TO_F32: MicroKernel =
    MicroKernel { rows: 4, cols: COLS, reads_rows: false, run: bf16_tile::<f32> };
pub(super) const BF16_TO_BF16: MicroKernel =
    MicroKernel { rows: 4, cols: COLS, reads_rows: false, run: bf16_tile::<bf16> };

macro_rules! tile {
    ($name:ident<$($out:ident)?>, $to:ty, $most:literal, [$($rows:literal)*], |$sums:ident, $a:ident, $b:ident| $step:expr) => {
        #[doc = "# Safety\nAs [`MicroKernel::run`]."]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn $name<$($out: Element)?>(tile: &Tile) {
            #[target_feature(enable = "avx2,fma")]
            unsafe fn sums<const R: usize>(tile: &Tile, out: &mut [[f32; COLS]; MOST_ROWS]) {
                let mut all = [[_mm256_setzero_ps(); 2]; R];
                for (all, out) in all.iter_mut().zip(&mut *out) {
                    // SAFETY: a row of sums has room for two vectors.
                    *all = unsafe { [_mm256_loadu_ps(out.as_ptr()), _mm256_loadu_ps(out.as_ptr().add(8))] };
                }
                for p in 0..tile.words {
                    // SAFETY: a packed panel has `COLS` words for each word of the inner dimension.
                    let $b = unsafe {
                        let b = tile.b.cast::<u32>().add(p * COLS);
                        [_mm256_loadu_si256(b.cast()), _mm256_loadu_si256(b.add(8).cast())]
                    };
                    for (i, $sums) in all.iter_mut().enumerate() {
                        // SAFETY: the left factor has this word.
                        let word = unsafe {
                            tile.a.add(i * tile.a_row + p * tile.a_word).cast::<i32>().read_unaligned()
                        };
                        let $a = _mm256_set1_epi32(word);
                        $step
                    }
                }
                for (out, sums) in out.iter_mut().zip(all) {
                    // SAFETY: a row of sums has room for two vectors.
                    unsafe {
                        _mm256_storeu_ps(out.as_mut_ptr(), sums[0]);
                        _mm256_storeu_ps(out.as_mut_ptr().add(8), sums[1]);
                    }
                }
            }
            // SAFETY: the caller's promise.
            unsafe {
                let mut out = tile.beginning::<COLS>();
                match tile.rows {
                    $($rows => sums::<$rows>(tile, &mut out),)*
                    _ => sums::<$most>(tile, &mut out),
                }
                finish_plainly::<$to, COLS>(tile, &out);
            }
        }
    };
}

tile!(f32_tile<>, f32, 6, [1 2 3 4 5], |sums, a, b| {
    for (sum, b) in sums.iter_mut().zip(b) {
        *sum = _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), *sum);
    }
});

tile!(bf16_tile<Out>, Out, 4, [1 2 3], |sums, a, b| {
    let high = _mm256_set1_epi32(0xFFFF_0000_u32 as i32);
    let wide = |word| -> [__m256; 2] {
        [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(word)), _mm256_castsi256_ps(_mm256_and_si256(word, high))]
    };
    let a = wide(a);
    for (sum, b) in sums.iter_mut().zip(b) {
        let b = wide(b);
        *sum = _mm256_fmadd_ps(a[1], b[1], _mm256_fmadd_ps(a[0], b[0], *sum));
    }
});
