//! Which source a sample comes from, without a history of draws.
//!
//! Owns rates, quotas and slots. What a source's index means belongs to the loader.

use crate::permutation::{Permutation, StreamTag};

/// Rates of sources from their weights, the largest 1.
///
/// Above a temperature of 1 rates are closer together than weights, so small sources are seen more often.
///
/// # Source
/// T5, section 3.5.2 (arXiv:1910.10683): temperature-scaled mixing.
pub fn rates(weights: &[f64], temperature: f64) -> Vec<f64> {
    // Powers of numbers up to 1 cannot overflow, whatever the temperature.
    let largest = weights.iter().copied().fold(0.0, f64::max);
    weights.iter().map(|weight| (weight / largest).powf(1.0 / temperature)).collect()
}

/// An endless, exactly proportional interleaving of sources.
///
/// Samples fall into blocks of `slots`; each block holds every source exactly its quota of times,
/// in an order drawn for the block. Sample `g` is found in constant time.
#[derive(Debug, Clone)]
pub struct Mixture {
    quotas: Vec<u64>,
    starts: Vec<u64>,
    slots: u64,
    seed: u64,
}

impl Mixture {
    /// Slots of a block unless a test wants fewer.
    pub const SLOTS: u64 = 1 << 20;

    /// Mixes sources in proportion to `rates` (one of them positive), at least one slot each.
    pub fn new(rates: &[f64], slots: u64, seed: u64) -> Self {
        let quotas = quotas(rates, slots);
        let starts = quotas
            .iter()
            .scan(0, |next, quota| {
                let start = *next;
                *next += quota;
                Some(start)
            })
            .collect();
        Self { quotas, starts, slots, seed }
    }

    /// The source of global sample `sample` and its index within that source.
    pub fn locate(&self, sample: u64) -> (usize, u64) {
        let (block, position) = (sample / self.slots, sample % self.slots);
        let slot = Permutation::new(self.slots, self.seed, StreamTag::Mixture, block).apply(position);
        let source = self.starts.partition_point(|&start| start <= slot) - 1;
        (source, block * self.quotas[source] + slot - self.starts[source])
    }
}

/// Whole numbers of slots by largest remainder, every source at least one.
fn quotas(rates: &[f64], slots: u64) -> Vec<u64> {
    let total: f64 = rates.iter().sum();
    let exact: Vec<f64> = rates.iter().map(|rate| rate / total * slots as f64).collect();
    let mut quotas: Vec<u64> = exact.iter().map(|&share| share as u64).collect();

    let mut by_remainder: Vec<usize> = (0..rates.len()).collect();
    by_remainder.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
    let missing = slots.saturating_sub(quotas.iter().sum());
    for &source in by_remainder.iter().take(missing as usize) {
        quotas[source] += 1;
    }

    for quota in &mut quotas {
        *quota = (*quota).max(1);
    }
    while quotas.iter().sum::<u64>() > slots {
        let largest = quotas.iter_mut().reduce(|best, quota| if *quota > *best { quota } else { best });
        *largest.expect("there is a source") -= 1;
    }
    quotas
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::test_vectors::{section, u64_list};

    fn f64_list(value: &Value) -> Vec<f64> {
        value.as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number")).collect()
    }

    #[test]
    fn rates_equal_the_vectors() {
        let number = |case: &Value, key: &str| case[key].as_f64();
        // The scale and the largest rate of seqio's mixtures have no counterpart here.
        let plain = |case: &&Value| number(case, "scale") == Some(1.0) && case["maximum"].is_null();
        let vectors = section("mixture");
        let cases: Vec<&Value> = vectors.as_array().expect("a list").iter().filter(plain).collect();
        assert!(cases.len() >= 3);
        for case in cases {
            let found = rates(&f64_list(&case["sizes"]), number(case, "temperature").expect("a number"));
            let total: f64 = found.iter().sum();
            for (rate, expected) in found.iter().zip(f64_list(&case["probabilities"])) {
                assert!((rate / total - expected).abs() <= 1e-12 * expected, "{rate} {expected}");
            }
        }
    }

    #[test]
    fn rates_are_numbers_at_any_temperature() {
        let weights = [f64::MAX, 3.0, f64::MIN_POSITIVE];
        assert_eq!(rates(&[4.0, 1.0, 2.0], 1.0), [1.0, 0.25, 0.5]);
        for temperature in [f64::MIN_POSITIVE, 1e-3, 1.0, 3.33, 1e300] {
            let found = rates(&weights, temperature);
            assert!(found[0] == 1.0 && found.iter().all(|rate| (0.0..=1.0).contains(rate)), "{found:?}");
            let mixture = Mixture::new(&found, 64, 1);
            assert_eq!(mixture.quotas.iter().sum::<u64>(), 64);
        }
    }

    #[test]
    fn slots_equal_the_vectors() {
        for case in section("design")["mixture"].as_array().expect("a list") {
            let number = |key: &str| case[key].as_u64().expect("a number");
            let mixture = Mixture::new(&f64_list(&case["rates"]), number("slots"), number("seed"));
            assert_eq!(mixture.quotas, u64_list(&case["quotas"]));
            for (sample, expected) in case["first"].as_array().expect("a list").iter().enumerate() {
                let (source, index) = mixture.locate(sample as u64);
                assert_eq!(vec![source as u64, index], u64_list(expected));
            }
            for expected in case["at"].as_array().expect("a list") {
                let expected = u64_list(expected);
                let (source, index) = mixture.locate(expected[0]);
                assert_eq!([source as u64, index], expected[1..]);
            }
        }
    }

    #[test]
    fn every_index_of_every_source_comes_once() {
        let mixture = Mixture::new(&[5.0, 3.0, 0.01], 64, 11);
        let mut seen: Vec<Vec<u64>> = vec![Vec::new(); 3];
        for sample in 0..3 * 64 {
            let (source, index) = mixture.locate(sample);
            seen[source].push(index);
        }
        for (source, mut indices) in seen.into_iter().enumerate() {
            indices.sort_unstable();
            assert_eq!(indices, (0..3 * mixture.quotas[source]).collect::<Vec<_>>());
        }
    }
}
