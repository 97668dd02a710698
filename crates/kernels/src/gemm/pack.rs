//! Strips of a factor in the order in which micro-kernels read them: word by word, all lines of a word
//! side by side.

use std::ops::Range;

use multiversion::multiversion;

use crate::element::Element;

/// One factor, seen from a product: lines (rows of the left, columns of the right) along the inner
/// dimension.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lines<'a, E> {
    pub(super) data: &'a [E],
    /// Elements of a line.
    pub(super) inner: usize,
    /// Distance of neighbours in a line.
    pub(super) inner_stride: usize,
    /// Distance of neighbouring lines.
    pub(super) line_stride: usize,
}

impl<'a, E: Element> Lines<'a, E> {
    pub(super) fn words(&self) -> usize {
        self.inner.div_ceil(E::PER_WORD)
    }

    /// The same lines over some of their words.
    pub(super) fn block(&self, words: Range<usize>) -> Self {
        let (start, end) = (words.start * E::PER_WORD, self.inner.min(words.end * E::PER_WORD));
        let data = self.data.get(start * self.inner_stride..).unwrap_or_default();
        Self { data, inner: end - start, ..*self }
    }

    /// Writes `lines` as `words x width` words, zeros where a line or an element is missing.
    pub(super) fn pack(&self, lines: Range<usize>, width: usize, out: &mut [u32]) {
        debug_assert!(out.len() == self.words() * width && lines.len() <= width);
        if lines.len() < width {
            out.fill(0);
        }
        if self.line_stride == 1 {
            self.pack_side_by_side(lines, width, out);
        } else {
            assert!(self.inner_stride == 1, "a view has one stride of 1");
            self.pack_transposed(lines, width, out);
        }
    }

    /// Lines are neighbours in memory.
    fn pack_side_by_side(&self, lines: Range<usize>, width: usize, out: &mut [u32]) {
        #[cfg(target_arch = "x86_64")]
        if E::PER_WORD == 2 && lines.len() <= 2 * SQUARE && is_x86_feature_detected!("avx512bw") {
            let last = self.inner.saturating_sub(1) * self.inner_stride + lines.end;
            assert!(self.inner == 0 || last <= self.data.len(), "lines lie in their slice");
            // SAFETY: the CPU has the instructions; every element of these lines lies in the slice, as was
            // just asserted, and the output has a row of `width` words for every word.
            unsafe {
                let from = self.data.as_ptr().wrapping_add(lines.start).cast::<u16>();
                join_rows(from, self.inner, self.inner_stride, lines.len(), width, out);
            }
            return;
        }
        for (word, out) in out.chunks_exact_mut(width).enumerate() {
            let part = |element: usize| -> &[E] {
                if element < self.inner {
                    &self.data[element * self.inner_stride + lines.start..][..lines.len()]
                } else {
                    &[]
                }
            };
            let first = word * E::PER_WORD;
            if E::PER_WORD == 1 {
                copy(bytemuck::cast_slice(part(first)), out);
            } else {
                join(bytemuck::cast_slice(part(first)), bytemuck::cast_slice(part(first + 1)), out);
            }
        }
    }

    /// Elements of a line are neighbours in memory.
    fn pack_transposed(&self, lines: Range<usize>, width: usize, out: &mut [u32]) {
        let whole = self.inner / E::PER_WORD;
        let mut begun = 0;
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") {
            begun = whole / SQUARE * SQUARE;
            for first in (0..lines.len()).step_by(SQUARE) {
                let count = (lines.len() - first).min(SQUARE);
                let start = (lines.start + first) * self.line_stride;
                let last = start + (count - 1) * self.line_stride + begun * E::PER_WORD;
                assert!(last <= self.data.len() || begun == 0, "lines lie in their slice");
                for word in (0..begun).step_by(SQUARE) {
                    // SAFETY: the CPU has AVX-512; `count` lines have 16 words from here on, as was just
                    // asserted, and the output has `count` of `width` columns in each of 16 rows.
                    unsafe {
                        let from = self.data.as_ptr().add(start + word * E::PER_WORD).cast::<u8>();
                        let to = out.as_mut_ptr().add(word * width + first);
                        transpose(from, self.line_stride * size_of::<E>(), count, to, width);
                    }
                }
            }
        }
        for (column, line) in lines.enumerate() {
            let line = &self.data[line * self.line_stride..][..self.inner];
            for word in begun..self.words() {
                let mut bytes = [0; 4];
                let elements = &line[word * E::PER_WORD..self.inner.min((word + 1) * E::PER_WORD)];
                let elements: &[u8] = bytemuck::cast_slice(elements);
                bytes[..elements.len()].copy_from_slice(elements);
                out[word * width + column] = u32::from_le_bytes(bytes);
            }
        }
    }
}

fn copy(from: &[u32], out: &mut [u32]) {
    out[..from.len()].copy_from_slice(from);
}

/// Words of two neighbours along the inner dimension, the first in the low half.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2+fma"))]
fn join(low: &[u16], high: &[u16], out: &mut [u32]) {
    if high.is_empty() {
        for (out, &low) in out.iter_mut().zip(low) {
            *out = u32::from(low);
        }
    } else {
        for ((out, &low), &high) in out.iter_mut().zip(low).zip(high) {
            *out = u32::from(low) | u32::from(high) << 16;
        }
    }
}

/// Joins neighbours along the inner dimension of up to 32 lines, which lie side by side.
///
/// # Safety
/// Element `i` of line `l` is at `from + i * stride + l`, and `out` has `width >= count` words for every
/// two elements.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn join_rows(
    from: *const u16,
    inner: usize,
    stride: usize,
    count: usize,
    width: usize,
    out: &mut [u32],
) {
    use std::arch::x86_64::{
        __m512i, __mmask16, __mmask32, _MM_HINT_T0, _mm_prefetch, _mm512_mask_storeu_epi32,
        _mm512_maskz_loadu_epi16, _mm512_setzero_si512,
    };
    let load = ((1_u64 << count) - 1) as __mmask32;
    let [store_low, store_high] = [load as __mmask16, (load >> 16) as __mmask16];
    let row = |element: usize| -> __m512i {
        if element < inner {
            // SAFETY: the caller's promise; lines that do not exist are masked off.
            unsafe { _mm512_maskz_loadu_epi16(load, from.add(element * stride).cast()) }
        } else {
            _mm512_setzero_si512()
        }
    };
    for (word, out) in out.chunks_exact_mut(width).enumerate() {
        let (first, second) = (row(2 * word), row(2 * word + 1));
        for element in [2 * word + AHEAD_ROWS, 2 * word + AHEAD_ROWS + 1] {
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(element * stride).cast());
        }
        // SAFETY: stores beyond `count` words are masked off.
        unsafe {
            let out = out.as_mut_ptr();
            let [low, high] = super::avx512::join(first, second);
            _mm512_mask_storeu_epi32(out.cast(), store_low, low);
            if store_high != 0 {
                _mm512_mask_storeu_epi32(out.add(16).cast(), store_high, high);
            }
        }
    }
}

/// Rows from one that is packed to one that is fetched: a stride as long as a page hides them from the CPU.
#[cfg(target_arch = "x86_64")]
const AHEAD_ROWS: usize = 64;

/// Bytes of a line from what is transposed to what is fetched.
#[cfg(target_arch = "x86_64")]
const AHEAD_BYTES: usize = 512;

/// Lines and words that are transposed at once.
#[cfg(target_arch = "x86_64")]
const SQUARE: usize = 16;

/// Writes word `w` of line `l` to `to[w * width + l]`, for 16 words of `count` lines.
///
/// # Safety
/// Line `l` has 16 words at `from + l * line_bytes`, and the output places exist.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn transpose(from: *const u8, line_bytes: usize, count: usize, to: *mut u32, width: usize) {
    use std::arch::x86_64::{
        __m512i, __mmask16, _MM_HINT_T0, _mm_prefetch, _mm512_loadu_si512, _mm512_mask_storeu_epi32,
        _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64,
        _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
    };
    let mut r: [__m512i; 16] = [_mm512_setzero_si512(); 16];
    for (l, r) in r.iter_mut().enumerate().take(count) {
        // SAFETY: the caller's promise; what is only fetched need not be there.
        unsafe {
            let line = from.add(l * line_bytes);
            *r = _mm512_loadu_si512(line.cast());
            _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(AHEAD_BYTES).cast());
        }
    }
    let mut t = r;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for i in 0..4 {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    // Now r[4 q + c] holds, in its 128-bit lane a, word 4 a + c of lines 4 q to 4 q + 3.
    let mask = ((1_u32 << count) - 1) as __mmask16;
    for c in 0..4 {
        let (q0, q1, q2, q3) = (r[c], r[4 + c], r[8 + c], r[12 + c]);
        let low01 = _mm512_shuffle_i32x4::<0b01_00_01_00>(q0, q1);
        let low23 = _mm512_shuffle_i32x4::<0b01_00_01_00>(q2, q3);
        let high01 = _mm512_shuffle_i32x4::<0b11_10_11_10>(q0, q1);
        let high23 = _mm512_shuffle_i32x4::<0b11_10_11_10>(q2, q3);
        let words = [
            _mm512_shuffle_i32x4::<0b10_00_10_00>(low01, low23),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(low01, low23),
            _mm512_shuffle_i32x4::<0b10_00_10_00>(high01, high23),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(high01, high23),
        ];
        for (a, word) in words.into_iter().enumerate() {
            // SAFETY: the caller's promise; lines that do not exist are masked off.
            unsafe { _mm512_mask_storeu_epi32(to.add((4 * a + c) * width).cast(), mask, word) };
        }
    }
}
