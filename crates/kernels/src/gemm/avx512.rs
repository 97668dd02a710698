//! Micro-kernels on 512-bit registers: 28 sums of 16 values, and two words of the right factor.

use std::arch::x86_64::{
    __m256bh, __m256i, __m512, __m512bh, __m512i, __mmask16, _CMP_GT_OQ, _CMP_LT_OQ, _CMP_UNORD_Q,
    _MM_HINT_T0, _mm_prefetch, _mm256_mask_storeu_epi16, _mm256_maskz_loadu_epi16, _mm512_add_epi32,
    _mm512_add_ps, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi256_si512, _mm512_castsi512_ps,
    _mm512_cmp_ps_mask, _mm512_cvtepi32_epi16, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh,
    _mm512_cvtneps_pbh, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_inserti64x4, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_mask_mov_epi32, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
    _mm512_maskz_mov_ps, _mm512_or_si512, _mm512_permutex2var_epi16, _mm512_set_epi16, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_si512, _mm512_stream_si512,
};
use std::mem::transmute;

use super::tile::{Finish, MicroKernel, Other, Tile};

const ROWS: usize = 14;
const COLS: usize = 32;

pub(super) const F32: MicroKernel = of_rows(ROWS, f32_tile);
pub(super) const WIDENED_TO_F32: MicroKernel = of_rows(ROWS - 2, widened_to_f32);
pub(super) const WIDENED_TO_BF16: MicroKernel = of_rows(ROWS - 2, widened_to_bf16);
pub(super) const DOT_TO_F32: MicroKernel = of_rows(ROWS, dot_to_f32);
pub(super) const DOT_TO_BF16: MicroKernel = of_rows(ROWS, dot_to_bf16);

const fn of_rows(rows: usize, run: unsafe fn(&Tile)) -> MicroKernel {
    MicroKernel { rows, cols: COLS, reads_rows: true, run }
}

/// Where a tile's factors are.
const PACKED: u8 = 0;
/// The left one in place, the right one packed.
const LEFT_IN_PLACE: u8 = 1;
/// The left one in place and read once, the right one packed.
const LEFT_STREAMED: u8 = 2;
/// Both in place.
const IN_PLACE: u8 = 3;

fn places(tile: &Tile) -> u8 {
    match (tile.a_word, tile.b_row) {
        (4, 0) if tile.ahead.is_null() => LEFT_IN_PLACE,
        (4, 0) => LEFT_STREAMED,
        (4, _) => IN_PLACE,
        _ => PACKED,
    }
}

/// A kernel of one way to multiply words and one format of the output.
macro_rules! kernel {
    (
        $name:ident, $features:literal, [$($rows:literal)*], $most:literal, $elements:literal,
        rows: |$rows_at:ident, $stride:ident| $words:expr,
        multiply: |$sum:ident, $a:ident, $b:ident| $multiply:expr,
        read: |$from:ident, $read_mask:ident| $read:expr,
        write: |$to:ident, $write_mask:ident, $value:ident| $write:expr,
        whole: |$sums:ident| $whole:expr,
        bytes: $bytes:literal
    ) => {
        #[doc = "# Safety\nAs [`MicroKernel::run`]."]
        #[target_feature(enable = $features)]
        unsafe fn $name(tile: &Tile) {
            #[target_feature(enable = $features)]
            unsafe fn sums<const R: usize, const V: usize, const PLACES: u8>(tile: &Tile) {
                let mut all = [[_mm512_setzero_ps(); V]; R];
                if !tile.start.is_null() {
                    for (i, sums) in all.iter_mut().enumerate() {
                        for (j, sum) in sums.iter_mut().enumerate() {
                            // SAFETY: every row of sums is as wide as a panel.
                            *sum = unsafe { _mm512_loadu_ps(tile.start.add(i * COLS + 16 * j)) };
                        }
                    }
                }
                let (mut a, mut b, mut ahead) = (tile.a, tile.b, tile.ahead);
                let row = if PLACES == PACKED { 4 } else { tile.a_row };
                let word = if PLACES == PACKED { R * 4 } else { 4 };
                for _ in 0..tile.words {
                    // SAFETY: a packed panel has `COLS` words for each word of the inner dimension, one in
                    // place as many elements for each element, and the left factor has this word of every
                    // row.
                    unsafe {
                        if PLACES == LEFT_STREAMED {
                            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                            ahead = ahead.wrapping_add(4 * R);
                        } else if PLACES == IN_PLACE {
                            for _ in 0..$elements {
                                for line in 0..2 / $elements {
                                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(64 * line).cast());
                                }
                                ahead = ahead.wrapping_add(tile.ahead_row);
                            }
                        }
                        let words: [__m512i; V] = if PLACES == IN_PLACE {
                            let ($rows_at, $stride) = (b, tile.b_row);
                            let words: [__m512i; 2] = $words;
                            std::array::from_fn(|j| words[j])
                        } else {
                            std::array::from_fn(|j| _mm512_loadu_si512(b.add(64 * j).cast()))
                        };
                        for (i, sums) in all.iter_mut().enumerate() {
                            let $a = _mm512_set1_epi32(a.add(i * row).cast::<i32>().read_unaligned());
                            for (sum, $b) in sums.iter_mut().zip(words) {
                                let $sum = *sum;
                                *sum = $multiply;
                            }
                        }
                        a = a.add(word);
                        b = b.wrapping_add(if PLACES == IN_PLACE { $elements * tile.b_row } else { 4 * COLS });
                    }
                }
                if !tile.earlier.is_null() {
                    for (i, sums) in all.iter_mut().enumerate() {
                        for (j, sum) in sums.iter_mut().enumerate() {
                            // SAFETY: as above.
                            let earlier = unsafe { _mm512_loadu_ps(tile.earlier.add(i * COLS + 16 * j)) };
                            *sum = _mm512_add_ps(earlier, *sum);
                        }
                    }
                }
                let past_caches = matches!(tile.finish, Finish::StorePastCaches);
                if V == 2 && tile.cols == COLS && (past_caches || matches!(tile.finish, Finish::Store)) {
                    for (i, sums) in all.into_iter().enumerate() {
                        let $sums = [sums[0], sums[V - 1]];
                        for (j, line) in $whole.into_iter().enumerate() {
                            // SAFETY: the tile has this row, as wide as a panel; what goes past the caches
                            // is aligned.
                            unsafe {
                                let to = tile.out.add(i * tile.out_row + 64 * j).cast();
                                if past_caches {
                                    _mm512_stream_si512(to, line);
                                } else {
                                    _mm512_storeu_si512(to, line);
                                }
                            }
                        }
                    }
                    return;
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
                            Finish::Store | Finish::StorePastCaches => sum,
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
            // SAFETY: the caller's promise.
            unsafe {
                match (tile.rows, places(tile), tile.cols <= 16) {
                    $(
                        ($rows, LEFT_STREAMED, true) => sums::<$rows, 1, LEFT_STREAMED>(tile),
                        ($rows, LEFT_STREAMED, false) => sums::<$rows, 2, LEFT_STREAMED>(tile),
                        ($rows, LEFT_IN_PLACE, _) => sums::<$rows, 2, LEFT_IN_PLACE>(tile),
                        ($rows, IN_PLACE, _) => sums::<$rows, 2, IN_PLACE>(tile),
                        ($rows, _, _) => sums::<$rows, 2, PACKED>(tile),
                    )*
                    (_, LEFT_STREAMED, true) => sums::<$most, 1, LEFT_STREAMED>(tile),
                    (_, LEFT_STREAMED, false) => sums::<$most, 2, LEFT_STREAMED>(tile),
                    (_, LEFT_IN_PLACE, _) => sums::<$most, 2, LEFT_IN_PLACE>(tile),
                    (_, IN_PLACE, _) => sums::<$most, 2, IN_PLACE>(tile),
                    _ => sums::<$most, 2, PACKED>(tile),
                }
            }
        }
    };
}

macro_rules! to_f32 {
    ($name:ident, $features:literal, $rows:tt, $most:literal, $elements:literal, |$from:ident, $stride:ident| $words:expr, |$sum:ident, $a:ident, $b:ident| $multiply:expr) => {
        kernel!(
            $name, $features, $rows, $most, $elements,
            rows: |$from, $stride| $words,
            multiply: |$sum, $a, $b| $multiply,
            read: |from, mask| _mm512_maskz_loadu_ps(mask, from.cast()),
            write: |to, mask, value| _mm512_mask_storeu_ps(to.cast(), mask, value),
            whole: |sums| [_mm512_castps_si512(sums[0]), _mm512_castps_si512(sums[1])],
            bytes: 4
        );
    };
}

macro_rules! to_bf16 {
    ($name:ident, $features:literal, $rows:tt, $most:literal, |$sum:ident, $a:ident, $b:ident| $multiply:expr, |$value:ident| $round:expr, |$sums:ident| $line:expr) => {
        kernel!(
            $name, $features, $rows, $most, 2,
            rows: |from, stride| pairs(from, stride),
            multiply: |$sum, $a, $b| $multiply,
            read: |from, mask| {
                let halves = _mm256_maskz_loadu_epi16(mask, from.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
            },
            write: |to, mask, $value| _mm256_mask_storeu_epi16(to.cast(), mask, $round),
            whole: |$sums| [$line],
            bytes: 2
        );
    };
}

to_f32!(f32_tile, "avx512f,avx512bw,avx512dq,avx512vl", [1 2 3 4 5 6 7 8 9 10 11 12 13], 14, 1, |from, _stride| {
    [_mm512_loadu_si512(from.cast()), _mm512_loadu_si512(from.add(64).cast())]
}, |sum, a, b| {
    _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum)
});
to_f32!(widened_to_f32, "avx512f,avx512bw,avx512dq,avx512vl", [1 2 3 4 5 6 7 8 9 10 11], 12, 2, |from, stride| pairs(from, stride), |sum, a, b| {
    widened(sum, a, b)
});
to_bf16!(
    widened_to_bf16, "avx512f,avx512bw,avx512dq,avx512vl", [1 2 3 4 5 6 7 8 9 10 11], 12,
    |sum, a, b| widened(sum, a, b),
    |value| rounded(value),
    |sums| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(rounded(sums[0])), rounded(sums[1]))
);
to_f32!(
    dot_to_f32, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16", [1 2 3 4 5 6 7 8 9 10 11 12 13], 14, 2,
    |from, stride| pairs(from, stride),
    |sum, a, b| _mm512_dpbf16_ps(sum, transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b))
);
to_bf16!(
    dot_to_bf16, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16", [1 2 3 4 5 6 7 8 9 10 11 12 13], 14,
    |sum, a, b| _mm512_dpbf16_ps(sum, transmute::<__m512i, __m512bh>(a), transmute::<__m512i, __m512bh>(b)),
    |value| transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(value)),
    |sums| {
        // SAFETY: the two types are the same 512 bits.
        unsafe { transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(sums[1], sums[0])) }
    }
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

/// Words of 32 columns from two rows of bfloat16, which are `stride` bytes apart.
///
/// # Safety
/// Both rows have 32 elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn pairs(from: *const u8, stride: usize) -> [__m512i; 2] {
    // SAFETY: the caller's promise.
    let (first, second) =
        unsafe { (_mm512_loadu_si512(from.cast()), _mm512_loadu_si512(from.add(stride).cast())) };
    join(first, second)
}

/// Words of 32 columns: element `j` of `first` in the low half, of `second` in the high half of word `j`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn join(first: __m512i, second: __m512i) -> [__m512i; 2] {
    let low = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34,
        2, 33, 1, 32, 0,
    );
    let high = _mm512_set_epi16(
        63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22, 53, 21, 52, 20, 51,
        19, 50, 18, 49, 17, 48, 16,
    );
    [_mm512_permutex2var_epi16(first, low, second), _mm512_permutex2var_epi16(first, high, second)]
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
