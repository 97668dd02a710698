//! Gradients of experts' matrices that wait until several micro-batches are through.
//!
//! Experts see few tokens of a micro-batch, so that a product for their gradient is mostly writing the gradient, and
//! adding it to a sum is more of the same. Kept instead are the factors, and one product for all micro-batches takes
//! the place of one for each and of the sums between them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn_tch::TchTensor;
use tch::{Kind, Tensor, no_grad};

use crate::torch::products::Products;
use crate::torch::update::DeviceValues;

/// Gradients of experts' matrices on a GPU, put off; a clone is the same.
#[derive(Debug, Clone)]
pub struct DeferredGradients {
    waiting: Arc<Mutex<BTreeMap<u64, Deferred>>>,
    /// Bytes of a value of a sum over micro-batches.
    sum_bytes: usize,
}

/// Where the gradients of one stack of experts wait.
#[derive(Debug, Clone)]
pub struct Deferral {
    all: DeferredGradients,
    /// Numbers of the parameters: output matrices, then input matrices.
    parameters: Vec<u64>,
}

/// The gradients of one parameter.
#[derive(Debug)]
struct Deferred {
    products: Products,
    /// Of each micro-batch `[matrices, rows, inner]` and `[matrices, rows, cols]`, whose product over the rows is the
    /// gradient.
    factors: Vec<[TchTensor; 2]>,
}

/// Bytes of the factors of a micro-batch.
fn kept(factors: &[TchTensor; 2]) -> usize {
    factors.iter().map(|factor| factor.tensor.numel() * factor.tensor.kind().elt_size_in_bytes()).sum()
}

/// Values of the sum of a gradient.
fn summed([left, right]: &[TchTensor; 2]) -> usize {
    let ([matrices, _, inner], [_, _, cols]) = (sizes(&left.tensor), sizes(&right.tensor));
    matrices * inner * cols
}

fn sizes(stack: &Tensor) -> [usize; 3] {
    let size: [i64; 3] = stack.size().try_into().expect("a stack of matrices");
    size.map(|n| n as usize)
}

impl Deferred {
    fn gradient(self) -> Tensor {
        let all = |side: usize| {
            let parts: Vec<&Tensor> = self.factors.iter().map(|factors| &factors[side].tensor).collect();
            match parts[..] {
                [one] => one.shallow_clone(),
                _ => Tensor::cat(&parts, 1),
            }
        };
        self.products.of(&all(0).transpose(1, 2), &all(1))
    }
}

impl DeferredGradients {
    /// None yet; they are put off as long as that needs no more memory than sums of so many bytes a value.
    pub fn instead_of_sums(sum_bytes: usize) -> Self {
        Self { waiting: Arc::default(), sum_bytes }
    }

    /// Where the gradients of a stack of experts wait: of the output matrices, and of all input matrices, whose
    /// numbers these are.
    pub fn of(&self, output: u64, inputs: impl IntoIterator<Item = u64>) -> Deferral {
        Deferral { all: self.clone(), parameters: std::iter::once(output).chain(inputs).collect() }
    }

    /// Whether the factors of another micro-batch would need more memory than sums of the gradients.
    pub fn is_full(&self) -> bool {
        let all = self.lock();
        let with_another = |one: &Deferred| one.factors.first().map_or(0, kept) * (one.factors.len() + 1);
        let sum = |one: &Deferred| one.factors.first().map_or(0, summed);
        all.values().map(with_another).sum::<usize>() > self.sum_bytes * all.values().map(sum).sum::<usize>()
    }

    /// The sums of what waits, by the numbers of the parameters; then nothing does.
    pub fn take(&self) -> BTreeMap<u64, DeviceValues> {
        let waiting = std::mem::take(&mut *self.lock());
        let gradient = |one: Deferred| no_grad(|| DeviceValues::there(&TchTensor::new(one.gradient())));
        waiting.into_iter().map(|(parameter, one)| (parameter, gradient(one))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Deferred>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Deferral {
    /// Whether the factors of two micro-batches are no larger than sums of the gradients would be. Factors in float32
    /// never are worth it: their products take longer than the writing.
    pub(crate) fn is_worth_while(&self, factors: &[[TchTensor; 2]]) -> bool {
        let kept: usize = factors.iter().map(kept).sum();
        let narrow = factors.iter().flatten().all(|factor| factor.tensor.kind() == Kind::BFloat16);
        narrow && 2 * kept <= self.all.sum_bytes * factors.iter().map(summed).sum::<usize>()
    }

    /// Keeps the factors of a micro-batch's gradients, in the order of the parameters.
    pub(crate) fn keep(&self, products: Products, factors: Vec<[TchTensor; 2]>) {
        let mut all = self.all.lock();
        for (&parameter, factors) in self.parameters.iter().zip(factors) {
            let deferred = || Deferred { products, factors: Vec::new() };
            all.entry(parameter).or_insert_with(deferred).factors.push(factors);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(seed: i64, rows: i64) -> [TchTensor; 2] {
        tch::manual_seed(seed);
        let random = |cols| Tensor::randint_low(-3, 4, [2, rows, cols], (Kind::BFloat16, tch::Device::Cpu));
        [6, 10].map(|cols| TchTensor::new(random(cols)))
    }

    #[test]
    fn one_product_is_the_sum_over_micro_batches() {
        let all = DeferredGradients::instead_of_sums(4);
        let deferral = all.of(7, [3]);
        let parts: Vec<[[TchTensor; 2]; 2]> = (0..3).map(|i| [factors(i, 2), factors(10 + i, 2)]).collect();
        for part in &parts {
            assert!(!all.is_full());
            deferral.keep(Products { apart: false }, part.to_vec());
        }
        let found = all.take();
        assert!(all.take().is_empty());
        for (parameter, index) in [(7, 0), (3, 1)] {
            let wide = |factor: &TchTensor| factor.tensor.to_kind(Kind::Float);
            let products = parts.iter().map(|part| {
                let [left, right] = &part[index];
                wide(left).transpose(1, 2).bmm(&wide(right))
            });
            let expected = products.reduce(|a, b| a + b).expect("three micro-batches");
            assert_eq!(wide(&found[&parameter].clone().into_tensor()).view_as(&expected), expected);
        }
    }

    /// A sum has 2 x 6 x 10 x 4 bytes, or half as many, the factors of a row 2 x 16 x 2.
    #[test]
    fn factors_are_kept_while_they_are_smaller_than_sums() {
        let all = DeferredGradients::instead_of_sums(4);
        let worth_while = |all: &DeferredGradients, rows| all.of(0, []).is_worth_while(&[factors(0, rows)]);
        assert!(worth_while(&all, 3) && !worth_while(&all, 4));
        let narrow = DeferredGradients::instead_of_sums(2);
        assert!(worth_while(&narrow, 1) && !worth_while(&narrow, 2));
        let wide = factors(0, 1).map(|factor| TchTensor::new(factor.tensor.to_kind(Kind::Float)));
        assert!(!all.of(0, []).is_worth_while(&[wide]));
        let keep = || all.of(0, []).keep(Products { apart: false }, vec![factors(0, 2)]);
        for _ in 0..2 {
            keep();
            assert!(!all.is_full());
        }
        keep();
        assert!(all.is_full());
        assert_eq!(all.take().len(), 1);
        assert!(!all.is_full());
    }
}
