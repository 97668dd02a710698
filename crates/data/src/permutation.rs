//! Orders that can be computed at a single index.
//!
//! Owns the bijection on `0..n` and the counter layout of the pipeline's random streams. Which
//! samples are put in which order is decided by the loader.

use switchyard_random::Philox;

/// Purpose of a random stream; keeps streams of equal seed, epoch and index apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum StreamTag {
    /// Order of chunks within an epoch.
    Shuffle = 1,
    /// Noise masks.
    Noise = 2,
    /// Order of sources within a block of a mixture.
    Mixture = 4,
    /// Order of documents within a segment of the token cache.
    Documents = 8,
}

impl StreamTag {
    /// Counter word 1 of the stream: the tag in the upper 8 bits, the epoch modulo `2^24` below.
    pub fn epoch_word(self, epoch: u64) -> u32 {
        (self as u32) << 24 | (epoch as u32 & 0x00ff_ffff)
    }
}

const ROUNDS: u32 = 6;

/// A pseudo-random bijection on `0..n`: a Feistel network over Philox, walked until it lands below `n`.
///
/// Costs a few hundred nanoseconds an index and no memory.
#[derive(Debug, Clone, Copy)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    philox: Philox,
    epoch_word: u32,
}

impl Permutation {
    /// The order of `n` things in `epoch` under `seed`.
    pub fn new(n: u64, seed: u64, tag: StreamTag, epoch: u64) -> Self {
        let bits = (u64::BITS - n.saturating_sub(1).leading_zeros()).max(2);
        Self { n, half_bits: bits.div_ceil(2), philox: Philox::new(seed), epoch_word: tag.epoch_word(epoch) }
    }

    /// Where `index` (below `n`) goes.
    pub fn apply(&self, index: u64) -> u64 {
        debug_assert!(index < self.n);
        if self.n == 1 {
            return 0;
        }
        let mut x = self.encrypt(index);
        while x >= self.n {
            x = self.encrypt(x);
        }
        x
    }

    fn encrypt(&self, x: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in 0..ROUNDS {
            let counter = [round, self.epoch_word, right as u32, (right >> 32) as u32];
            let word = u64::from(self.philox.block(counter)[0]);
            (left, right) = (right, left ^ (word & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::test_vectors::{section, u64_list};

    #[test]
    fn equals_the_vectors() {
        for case in section("design")["permutation"].as_array().expect("a list") {
            let number = |key: &str| case[key].as_u64().expect("a number");
            assert_eq!(number("tag"), StreamTag::Shuffle as u64);
            let order = Permutation::new(number("n"), number("seed"), StreamTag::Shuffle, number("epoch"));
            let first = u64_list(&case["first"]);
            let found: Vec<u64> = (0..first.len() as u64).map(|i| order.apply(i)).collect();
            assert_eq!(found, first, "n = {}", number("n"));
        }
    }

    #[test]
    fn philox_equals_the_vectors() {
        for case in section("design")["philox4x32_10"].as_array().expect("a list") {
            let words = |value: &Value| u64_list(value).iter().map(|&w| w as u32).collect::<Vec<_>>();
            let (counter, key, out) = (words(&case["counter"]), words(&case["key"]), words(&case["out"]));
            let philox = Philox::new(u64::from(key[1]) << 32 | u64::from(key[0]));
            let counter = counter.try_into().expect("four words");
            assert_eq!(philox.block(counter).to_vec(), out);
        }
    }

    proptest! {
        #[test]
        fn visits_every_index_once(n in 1_u64..5000, seed: u64, epoch in 0_u64..1000) {
            let order = Permutation::new(n, seed, StreamTag::Shuffle, epoch);
            let mut seen = vec![false; n as usize];
            for i in 0..n {
                let at = order.apply(i) as usize;
                prop_assert!(!seen[at]);
                seen[at] = true;
            }
        }
    }
}
