//! Gradients of one step, summed over its micro-batches.

use std::collections::BTreeMap;

use switchyard_kernels::optimizer::{add_assign, sum_of_squares};

/// Gradients by parameter name.
#[derive(Debug, Default)]
pub struct GradientSums {
    values: BTreeMap<String, Vec<f32>>,
}

impl GradientSums {
    /// Adds the gradient of one micro-batch.
    pub fn add(&mut self, name: &str, gradient: Vec<f32>) {
        match self.values.get_mut(name) {
            Some(sum) => add_assign(sum, &gradient),
            None => {
                self.values.insert(name.to_owned(), gradient);
            }
        }
    }

    /// Euclidean norm over all parameters, each expert counted once.
    pub fn global_norm(&self) -> f64 {
        self.values.values().map(|gradient| sum_of_squares(gradient)).sum::<f64>().sqrt()
    }

    /// First parameter, by name, whose gradient is not finite.
    pub fn first_non_finite(&self) -> Option<&str> {
        let bad = self.values.iter().find(|(_, gradient)| !sum_of_squares(gradient).is_finite());
        bad.map(|(name, _)| name.as_str())
    }

    /// The gradient of `name`; `None` when the loss does not depend on it.
    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.values.get(name).map(Vec::as_slice)
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
        assert_eq!(sums.get("a"), Some(&[1.0, 4.0][..]));
        assert!((sums.global_norm() - 21_f64.sqrt()).abs() < 1e-9);
        assert_eq!(sums.first_non_finite(), None);
        sums.add("b", vec![f32::NAN]);
        assert_eq!(sums.first_non_finite(), Some("b"));
    }
}
