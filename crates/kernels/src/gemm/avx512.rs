//! Micro-kernels on 512-bit registers: 28 sums of 16 values, and two words of the right factor.

use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, __mmask16, _CMP_GT_OQ, _CMP_LT_OQ, _CMP_UNORD_Q,
    _mm256_mask_storeu_epi16, _mm256_maskz_loadu_epi16, _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512,
    _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cvtepi32_epi16,
    _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_mask_mov_epi32, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
    _mm512_maskz_mov_ps, _mm512_or_si512, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_slli_epi32,
    _mm512_srli_epi32,
};
use std::mem::transmute;

use super::tile::{Finish, MicroKernel, Other, Tile};

const ROWS: usize = 14;
const COLS: usize = 32;

pub(super) const F32: MicroKernel = MicroKernel { rows: ROWS, cols: COLS, run: f32_tile };
pub(super) const WIDENED_TO_F32: MicroKernel =
    MicroKernel { rows: ROWS - 2, cols: COLS, run: widened_to_f32 };
pub(super) const WIDENED_TO_BF16: MicroKernel =
    MicroKernel { rows: ROWS - 2, cols: COLS, run: widened_to_bf16 };
pub(super) const DOT_TO_F32: MicroKernel = MicroKernel { rows: ROWS, cols: COLS, run: dot_to_f32 };
pub(super) const DOT_TO_BF16: MicroKernel = MicroKernel { rows: ROWS, cols: COLS, run: dot_to_bf16 };

/// A kernel of one way to multiply words and one format of the output.
macro_rules! kernel {
    (
        $name:ident, $features:literal, [$($rows:literal)*], $most:literal,
        multiply: |$sum:ident, $a:ident, $b:ident| $multiply:expr,
        read: |$from:ident, $read_mask:ident| $read:expr,
        write: |$to:ident, $write_mask:ident, $value:ident| $write:expr,
        bytes: $bytes:literal
    ) => {
        #[doc = "# Safety\nAs [`MicroKernel::run`]."]
        #[target_feature(enable = $features)]
        unsafe fn $name(tile: &Tile) {
            #[target_feature(enable = $features)]
            unsafe fn sums<const R: usize, const PACKED: bool>(tile: &Tile) {
                let mut all = [[_mm512_setzero_ps(); 2]; R];
                if !tile.start.is_null() {
                    for (i, sums) in all.iter_mut().enumerate() {
                        // SAFETY: every row of earlier sums is as wide as a panel.
                        unsafe {
                            let start = tile.start.add(i * tile.start_row);
                            *sums = [_mm512_loadu_ps(start), _mm512_loadu_ps(start.add(16))];
                        }
                    }
                }
                let (mut a, mut b) = (tile.a, tile.b);
                let row = if PACKED { 4 } else { tile.a_row };
                let word = if PACKED { R * 4 } else { 4 };
                for _ in 0..tile.words {
                    // SAFETY: a packed panel has `COLS` words for each word of the inner dimension, and
                    // the left factor has this word of every row.
                    unsafe {
                        let $b = [_mm512_loadu_si512(b.cast()), _mm512_loadu_si512(b.add(16).cast())];
                        for (i, sums) in all.iter_mut().enumerate() {
                            let $a = _mm512_set1_epi32(a.add(i * row).cast::<i32>().read_unaligned());
                            for (j, sum) in sums.iter_mut().enumerate() {
                                let ($sum, $b) = (*sum, $b[j]);
                                *sum = $multiply;
                            }
                        }
                        (a, b) = (a.add(word), b.add(COLS));
                    }
                }
                let columns = |j: usize| {
                    let here = tile.cols.saturating_sub(16 * j).min(16);
                    ((1_u32 << here) - 1) as __mmask16
                };
                let masks = [columns(0), columns(1)];
                let read = |other: Other, i: usize, j: usize| {
                    // SAFETY: masked-off columns are not touched; the others are the tile's.
                    unsafe {
                        let from = other.data.wrapping_add(i * other.row_bytes + j * 16 * $bytes);
                        let ($from, $read_mask) = (from, masks[j]);
                        $read
                    }
                };
                let here = Other { data: tile.out, row_bytes: tile.out_row };
                for (i, sums) in all.into_iter().enumerate() {
                    for (j, sum) in sums.into_iter().enumerate() {
                        let $value = match tile.finish {
                            Finish::Store => sum,
                            Finish::Add => _mm512_add_ps(read(here, i, j), sum),
                            Finish::Onto(other) => _mm512_add_ps(read(other, i, j), sum),
                            Finish::Relu => {
                                _mm512_maskz_mov_ps(!_mm512_cmp_ps_mask::<_CMP_LT_OQ>(sum, _mm512_setzero_ps()), sum)
                            }
                            Finish::Mask(other) => {
                                let over = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(read(other, i, j), _mm512_setzero_ps());
                                _mm512_maskz_mov_ps(over, sum)
                            }
                        };
                        // SAFETY: as for reading.
                        unsafe {
                            let to = tile.out.wrapping_add(i * tile.out_row + j * 16 * $bytes);
                            let ($to, $write_mask) = (to, masks[j]);
                            $write;
                        }
                    }
                }
            }
            let packed = tile.a_word != 4;
            // SAFETY: the caller's promise.
            unsafe {
                match (tile.rows, packed) {
                    $(($rows, true) => sums::<$rows, true>(tile), ($rows, false) => sums::<$rows, false>(tile),)*
                    (_, true) => sums::<$most, true>(tile),
                    (_, false) => sums::<$most, false>(tile),
                }
            }
        }
    };
}

macro_rules! to_f32 {
    ($name:ident, $features:literal, $rows:tt, $most:literal, |$sum:ident, $a:ident, $b:ident| $multiply:expr) => {
        kernel!(
            $name, $features, $rows, $most,
            multiply: |$sum, $a, $b| $multiply,
            read: |from, mask| _mm512_maskz_loadu_ps(mask, from.cast()),
            write: |to, mask, value| _mm512_mask_storeu_ps(to.cast(), mask, value),
            bytes: 4
        );
    };
}

macro_rules! to_bf16 {
    ($name:ident, $features:literal, $rows:tt, $most:literal, |$sum:ident, $a:ident, $b:ident| $multiply:expr, |$value:ident| $round:expr) => {
        kernel!(
            $name, $features, $rows, $most,
            multiply: |$sum, $a, $b| $multiply,
            read: |from, mask| {
                let halves = _mm256_maskz_loadu_epi16(mask, from.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
            },
            write: |to, mask, $value| _mm256_mask_storeu_epi16(to.cast(), mask, $round),
            bytes: 2
        );
    };
}

to_f32!(f32_tile, "avx512f,avx512bw,avx512dq,avx512vl", [1 2 3 4 5 6 7 8 9 10 11 12 13], 14, |sum, a, b| {
    _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum)
});
to_f32!(widened_to_f32, "avx512f,avx512bw,avx512dq,avx512vl", [1 2 3 4 5 6 7 8 9 10 11], 12, |sum, a, b| {
    widened(sum, a, b)
});
to_bf16!(
    widened_to_bf16, "avx512f,avx512bw,avx512dq,avx512vl", [1 2 3 4 5 6 7 8 9 10 11], 12,
    |sum, a, b| widened(sum, a, b),
    |value| rounded(value)
);
to_f32!(
    dot_to_f32, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16", [1 2 3 4 5 6 7 8 9 10 11 12 13], 14,
    |sum, a, b| _mm512_dpbf16_ps(sum, transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b))
);
to_bf16!(
    dot_to_bf16, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16", [1 2 3 4 5 6 7 8 9 10 11 12 13], 14,
    |sum, a, b| _mm512_dpbf16_ps(sum, transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b)),
    |value| transmute::<std::arch::x86_64::__m256bh, __m256i>(_mm512_cvtneps_pbh(value))
);

/// Both products of a pair of bfloat16 words, each in one rounding with the sum.
#[inline]
#[target_feature(enable = "avx512f")]
fn widened(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    let high = _mm512_set1_epi32(0xFFFF_0000_u32 as i32);
    let low = |word| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(word));
    let sum = _mm512_fmadd_ps(low(a), low(b), sum);
    let high = |word| _mm512_castsi512_ps(_mm512_and_si512(word, high));
    _mm512_fmadd_ps(high(a), high(b), sum)
}

/// As `bf16::round`.
#[inline]
#[target_feature(enable = "avx512f")]
fn rounded(value: __m512) -> __m256i {
    let bits = _mm512_castps_si512(value);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(nearest, nan, quiet)))
}

/// Rounds of dot products of bfloat16 pairs into 24 sums; returns the floating-point operations.
///
/// # Safety
/// The CPU must have the instructions.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn dots_on_registers(rounds: usize) -> f64 {
    let word = std::hint::black_box(_mm512_set1_epi32(0x3F80_3F80));
    let mut sums = [_mm512_setzero_ps(); 24];
    for _ in 0..rounds {
        for sum in &mut sums {
            // SAFETY: the two types are the same 512 bits.
            let word = unsafe { transmute::<__m512i, __m512bh>(word) };
            *sum = _mm512_dpbf16_ps(*sum, word, word);
        }
    }
    std::hint::black_box(sums);
    (rounds * 24 * 64) as f64
}

/// Rounds of multiply-adds of float32 into 24 sums; returns the floating-point operations.
///
/// # Safety
/// The CPU must have the instructions.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn fmas_on_registers(rounds: usize) -> f64 {
    let word = std::hint::black_box(_mm512_setzero_ps());
    let mut sums = [_mm512_setzero_ps(); 24];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(word, word, *sum);
        }
    }
    std::hint::black_box(sums);
    (rounds * 24 * 32) as f64
}
