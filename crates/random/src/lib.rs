//! Counter-based random numbers: the value at a counter depends on nothing but key and counter.
//!
//! Everything random in Switchyard (shuffling, noise masks, dropout, jitter, initialisation) is
//! drawn here, so a run repeats bit for bit after any restart and on any number of ranks. This
//! crate owns the generator and its conversions; what a key or counter word *means* belongs to
//! the caller.

use std::array::from_fn;

/// Philox4x32-10, keyed by 64 bits, one block of four words for every 128-bit counter.
///
/// # Source
/// Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
}

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

impl Philox {
    /// Keys the generator by a seed, low word first.
    pub const fn new(seed: u64) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32] }
    }

    /// A generator of its own for one purpose.
    ///
    /// The new key is half of the block at the tag, so two tags may share one, with a chance of `2^-64`
    /// for each pair: below `10^-7` for a million tags.
    pub fn derive(self, tag: u64) -> Self {
        let words = self.block([tag as u32, (tag >> 32) as u32, 0x5357_4954, 0x4348_5944]);
        Self { key: [words[0], words[1]] }
    }

    /// The four words at `counter`.
    #[inline]
    pub fn block(self, counter: [u32; 4]) -> [u32; 4] {
        let mut c = counter;
        let mut k = self.key;
        for _ in 0..10 {
            let p0 = u64::from(MULTIPLIERS[0]) * u64::from(c[0]);
            let p1 = u64::from(MULTIPLIERS[1]) * u64::from(c[2]);
            c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
            k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        }
        c
    }

    /// The blocks at `N` consecutive counters: word `w` of block `i` is `[w][i]`.
    ///
    /// `first` counts in its lower two words; they carry from one into the other. Inlined, so that callers
    /// compiled for wide registers compute many blocks at once.
    #[inline(always)]
    pub fn blocks<const N: usize>(self, first: u64, tail: [u32; 2]) -> [[u32; N]; 4] {
        let counters: [u64; N] = from_fn(|i| first.wrapping_add(i as u64));
        let mut c =
            [counters.map(|c| c as u32), counters.map(|c| (c >> 32) as u32), [tail[0]; N], [tail[1]; N]];
        let mut k = self.key;
        for _ in 0..10 {
            let p0: [u64; N] = from_fn(|i| u64::from(MULTIPLIERS[0]) * u64::from(c[0][i]));
            let p1: [u64; N] = from_fn(|i| u64::from(MULTIPLIERS[1]) * u64::from(c[2][i]));
            c = [
                from_fn(|i| (p1[i] >> 32) as u32 ^ c[1][i] ^ k[0]),
                p1.map(|p| p as u32),
                from_fn(|i| (p0[i] >> 32) as u32 ^ c[3][i] ^ k[1]),
                p0.map(|p| p as u32),
            ];
            k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        }
        c
    }

    /// The words of consecutive blocks, counter word 0 running from 0 and the rest fixed.
    pub fn stream(self, tail: [u32; 3]) -> Stream {
        Stream { philox: self, tail, block: 0, words: [0; 4], next: 4 }
    }
}

/// Sequential reader over the blocks of one stream.
#[derive(Debug, Clone)]
pub struct Stream {
    philox: Philox,
    tail: [u32; 3],
    block: u32,
    words: [u32; 4],
    next: usize,
}

impl Stream {
    /// The next 32 random bits.
    #[inline]
    pub fn next_u32(&mut self) -> u32 {
        if self.next == 4 {
            let [a, b, c] = self.tail;
            self.words = self.philox.block([self.block, a, b, c]);
            self.block = self.block.wrapping_add(1);
            self.next = 0;
        }
        let word = self.words[self.next];
        self.next += 1;
        word
    }

    /// A number below `n`; the bias is under `n / 2^32`.
    #[inline]
    pub fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.next_u32()) * u64::from(n)) >> 32) as u32
    }
}

/// A word as a float in `[0, 1)`, from its upper 24 bits.
#[inline]
pub fn unit_f32(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Two words as a pair of independent standard normal values (Box and Muller).
pub fn normal_pair(a: u32, b: u32) -> (f64, f64) {
    let u = (f64::from(a) + 0.5) / 4_294_967_296.0;
    let angle = std::f64::consts::TAU * (f64::from(b) / 4_294_967_296.0);
    let radius = (-2.0 * u.ln()).sqrt();
    (radius * angle.cos(), radius * angle.sin())
}

/// 64-bit FNV-1a of a name: turns names of tensors and data sources into stream tags.
pub const fn fnv1a64(name: &str) -> u64 {
    let bytes = name.as_bytes();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_blocks_at_once_are_those_one_by_one() {
        let philox = Philox::new(7);
        for first in [0, 5, u64::from(u32::MAX) - 3, u64::MAX - 2] {
            let many = philox.blocks::<8>(first, [11, 12]);
            for (word, of_blocks) in many.iter().enumerate() {
                for (i, &value) in of_blocks.iter().enumerate() {
                    let counter = first.wrapping_add(i as u64);
                    assert_eq!(value, philox.block([counter as u32, (counter >> 32) as u32, 11, 12])[word]);
                }
            }
        }
    }

    #[test]
    fn equals_the_published_known_answers() {
        assert_eq!(Philox::new(0).block([0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            Philox::new(u64::MAX).block([u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            Philox::new(0x299f_31d0_a409_3822).block([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn fnv_equals_the_published_value() {
        assert_eq!(fnv1a64("en"), 0x088e_3807_b539_46aa);
    }

    #[test]
    fn normals_have_unit_variance() {
        let philox = Philox::new(7);
        let (mut sum, mut squares) = (0.0, 0.0);
        for i in 0..20_000 {
            let w = philox.block([i, 0, 0, 0]);
            let (a, b) = normal_pair(w[0], w[1]);
            sum += a + b;
            squares += a * a + b * b;
        }
        assert!((sum / 40_000.0).abs() < 0.02);
        assert!((squares / 40_000.0 - 1.0).abs() < 0.03);
    }
}
