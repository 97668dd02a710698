//! One tile of a product: what a micro-kernel reads and writes, and which micro-kernels there are.

use std::sync::OnceLock;

use crate::element::Element;

/// Most rows that any micro-kernel takes.
pub(super) const MOST_ROWS: usize = 14;

/// Instructions that products run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CpuPath {
    /// Whatever the compiler makes of plain loops.
    Portable,
    /// 256-bit fused multiply-add; bfloat16 is widened to float32.
    Avx2,
    /// 512-bit fused multiply-add; bfloat16 is widened to float32.
    Avx512,
    /// As `Avx512`, with the dot products of bfloat16 pairs that the CPU has.
    Avx512Bf16,
}

impl CpuPath {
    /// The fastest one that this CPU has.
    pub fn best() -> Self {
        static BEST: OnceLock<CpuPath> = OnceLock::new();
        *BEST.get_or_init(|| *Self::available().last().expect("plain loops run anywhere"))
    }

    /// All that this CPU has, the fastest last.
    pub fn available() -> Vec<Self> {
        let mut paths = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                paths.push(Self::Avx2);
            }
            let wide = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if wide {
                paths.push(Self::Avx512);
                if is_x86_feature_detected!("avx512bf16") {
                    paths.push(Self::Avx512Bf16);
                }
            }
        }
        paths
    }

    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable loops",
            Self::Avx2 => "AVX2 and FMA, bfloat16 widened",
            Self::Avx512 => "AVX-512, bfloat16 widened",
            Self::Avx512Bf16 => "AVX-512 with bfloat16 dot products",
        }
    }
}

/// What a tile does with its sums.
#[derive(Debug, Clone, Copy)]
pub(super) enum Finish {
    /// `out = sum`
    Store,
    /// As `Store`, without a copy in the caches; every row of the output begins with a cache line.
    StorePastCaches,
    /// `out += sum`
    Add,
    /// `out = other + sum`
    Onto(Other),
    /// `out = max(sum, 0)`, NaN where the sum is
    Relu,
    /// `out = sum` where `other > 0`, else 0
    Mask(Other),
}

/// A matrix of the output's format and shape, at the tile's first element.
#[derive(Debug, Clone, Copy)]
pub(super) struct Other {
    pub(super) data: *const u8,
    pub(super) row_bytes: usize,
}

/// `rows x cols` sums over `words` words of the inner dimension, which go on from those at `start` and are
/// then added to those that came `earlier`.
///
/// Word `p` of row `i` of the left factor is at `a + i * a_row + p * a_word` bytes. Of a packed right
/// factor, word `p` of column `j` is number `p * COLS + j` from `b`; of one in place, row `k` begins at
/// `b + k * b_row` bytes, and the panel is whole.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    pub(super) words: usize,
    pub(super) a: *const u8,
    pub(super) a_row: usize,
    pub(super) a_word: usize,
    pub(super) b: *const u8,
    /// Bytes from one row of a right factor in place to the next; 0 if it is packed.
    pub(super) b_row: usize,
    /// What will be read soon of a factor in place; null if all is likely to be in the cache.
    pub(super) ahead: *const u8,
    /// Bytes from what is fetched beside one row of a right factor in place to what is beside the next.
    pub(super) ahead_row: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) out: *mut u8,
    pub(super) out_row: usize,
    pub(super) finish: Finish,
    /// Sums to go on from, row after row as wide as a panel; none if null.
    pub(super) start: *const f32,
    /// Sums to be added, laid out likewise; none if null.
    pub(super) earlier: *const f32,
}

impl Tile {
    /// The sums to go on from, for micro-kernels that keep theirs in memory.
    ///
    /// # Safety
    /// As [`MicroKernel::run`].
    pub(super) unsafe fn beginning<const COLS: usize>(&self) -> [[f32; COLS]; MOST_ROWS] {
        let mut sums = [[0.0; COLS]; MOST_ROWS];
        if !self.start.is_null() {
            for (i, sums) in sums.iter_mut().enumerate().take(self.rows) {
                // SAFETY: every row of sums is as wide as a panel.
                *sums = unsafe { self.start.cast::<[f32; COLS]>().add(i).read() };
            }
        }
        sums
    }
}

/// Makes what was stored past the caches visible before whatever this thread does next.
pub(super) fn publish() {
    // SAFETY: every x86-64 CPU has the fence.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Sizes of a micro-kernel and its entry.
#[derive(Debug, Clone, Copy)]
pub(super) struct MicroKernel {
    /// Most rows of a tile.
    pub(super) rows: usize,
    /// Columns of a tile and of a packed panel.
    pub(super) cols: usize,
    /// Whether it can read whole panels of the right factor in place, if the left one is in place too.
    pub(super) reads_rows: bool,
    /// Computes one tile.
    ///
    /// # Safety
    /// Every address that the tile names must be valid for its sizes, the CPU must have the path's
    /// instructions, and nobody else may touch the output tile.
    pub(super) run: unsafe fn(&Tile),
}

/// Formats whose products have micro-kernels, from `Self` to `Out`.
pub trait Multiply<Out: Element>: Element {
    #[doc(hidden)]
    fn micro_kernel(path: CpuPath) -> Kernel;
}

/// A micro-kernel, opaque outside of this module.
#[derive(Debug, Clone, Copy)]
pub struct Kernel(pub(super) MicroKernel);

macro_rules! multiply {
    ($from:ty, $to:ty, $portable:ident, $avx2:ident, $avx512:ident, $bf16:ident) => {
        impl Multiply<$to> for $from {
            fn micro_kernel(path: CpuPath) -> Kernel {
                Kernel(match path {
                    CpuPath::Portable => super::portable::$portable,
                    #[cfg(target_arch = "x86_64")]
                    CpuPath::Avx2 => super::avx2::$avx2,
                    #[cfg(target_arch = "x86_64")]
                    CpuPath::Avx512 => super::avx512::$avx512,
                    #[cfg(target_arch = "x86_64")]
                    CpuPath::Avx512Bf16 => super::avx512::$bf16,
                    #[cfg(not(target_arch = "x86_64"))]
                    _ => unreachable!("only available paths are asked for"),
                })
            }
        }
    };
}

use crate::element::bf16;
multiply!(f32, f32, F32, F32, F32, F32);
multiply!(bf16, f32, BF16_TO_F32, BF16_TO_F32, WIDENED_TO_F32, DOT_TO_F32);
multiply!(bf16, bf16, BF16_TO_BF16, BF16_TO_BF16, WIDENED_TO_BF16, DOT_TO_BF16);

/// Finishes a tile of sums that lie in memory.
///
/// # Safety
/// As [`MicroKernel::run`].
#[inline(always)]
pub(super) unsafe fn finish_plainly<Out: Element, const COLS: usize>(
    tile: &Tile,
    sums: &[[f32; COLS]; MOST_ROWS],
) {
    let at = |other: Other, i: usize, j: usize| {
        // SAFETY: `other` has the output's format and covers the tile.
        unsafe { other.data.add(i * other.row_bytes).cast::<Out>().add(j).read_unaligned().widen() }
    };
    for (i, sums) in sums.iter().enumerate().take(tile.rows) {
        // SAFETY: rows and columns lie within the output tile.
        let out = unsafe { tile.out.add(i * tile.out_row).cast::<Out>() };
        for (j, &sum) in sums.iter().enumerate().take(tile.cols) {
            // SAFETY: every row of sums is as wide as a panel.
            let earlier = (!tile.earlier.is_null()).then(|| unsafe { *tile.earlier.add(i * COLS + j) });
            let sum = earlier.map_or(sum, |earlier| earlier + sum);
            let here = Other { data: tile.out, row_bytes: tile.out_row };
            let value = match tile.finish {
                Finish::Store | Finish::StorePastCaches => sum,
                Finish::Add => at(here, i, j) + sum,
                Finish::Onto(other) => at(other, i, j) + sum,
                Finish::Relu if sum < 0.0 => 0.0,
                Finish::Relu => sum,
                Finish::Mask(other) if at(other, i, j) > 0.0 => sum,
                Finish::Mask(_) => 0.0,
            };
            // SAFETY: as above.
            unsafe { out.add(j).write_unaligned(Out::round(value)) };
        }
    }
}
