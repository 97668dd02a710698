//! Gradients of one rank, summed over its micro-batches.

use switchyard_kernels::optimizer::add_assign;
use switchyard_parallel::Values;

/// Gradients by parameter name.
#[derive(Debug, Default)]
pub(crate) struct GradientSums {
    values: Values,
}

impl GradientSums {
    /// Adds the gradient of one micro-batch.
    pub(crate) fn add(&mut self, name: &str, gradient: Vec<f32>) {
        match self.values.get_mut(name) {
            Some(sum) => add_assign(sum, &gradient),
            None => drop(self.values.insert(name.to_owned(), gradient)),
        }
    }

    /// The sums so far; begins anew.
    pub(crate) fn take(&mut self) -> Values {
        std::mem::take(&mut self.values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn micro_batches_add_up() {
        let mut sums = GradientSums::default();
        sums.add("a", vec![1.0, 2.0]);
        sums.add("b", vec![2.0]);
        sums.add("a", vec![0.0, 2.0]);
        assert_eq!(sums.take()["a"], [1.0, 4.0]);
        assert!(sums.take().is_empty());
    }
}
