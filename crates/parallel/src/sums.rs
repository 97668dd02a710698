//! Sums of gradients over micro-batches and ranks, and their formats.

use std::collections::{BTreeMap, BTreeSet};

use switchyard_config::RunPlan;
use switchyard_config::parameters::{ParameterSpec, parameters};
use switchyard_kernels::optimizer::add_assign;
use switchyard_kernels::{Element, Values, bf16};

/// Gradients by parameter, of the parts that a rank holds or of the matrices that it owns.
pub type Gradients = BTreeMap<String, Values>;

/// Formats of the sums of gradients.
#[derive(Debug, Default)]
pub struct SumFormats {
    /// Parameters whose sums are bfloat16, as their gradients are.
    narrow: BTreeSet<String>,
}

impl SumFormats {
    /// Those of a run.
    pub fn of(plan: &RunPlan) -> Self {
        let narrow = |spec: &ParameterSpec| plan.precision.sum_bytes(spec.kind, plan.accumulation) == 2;
        let names = parameters(&plan.model).into_iter().filter(narrow).map(|spec| spec.name);
        Self { narrow: names.collect() }
    }

    /// Sums of these parameters are bfloat16.
    #[cfg(test)]
    pub(crate) fn narrow<'a>(specs: impl Iterator<Item = &'a ParameterSpec>) -> Self {
        Self { narrow: specs.map(|spec| spec.name.clone()).collect() }
    }

    /// Whether sums of a parameter are bfloat16.
    pub(crate) fn is_narrow(&self, name: &str) -> bool {
        self.narrow.contains(name)
    }

    /// Adds a gradient to the sum of its parameter; the first one stays in its own format.
    pub fn add(&self, sums: &mut Gradients, name: &str, gradient: Values) {
        let Some(sum) = sums.get_mut(name) else {
            sums.insert(name.to_owned(), gradient);
            return;
        };
        match gradient {
            Values::Device(gradient) => match sum {
                Values::Device(sum) => sum.add(&gradient, self.is_narrow(name)),
                _ => self.add(sums, name, gradient.to_host()),
            },
            Values::Bf16(gradient) if self.is_narrow(name) => add_assign(bf16::of(sum), &gradient),
            Values::Bf16(gradient) => add_assign(f32::of(sum), &gradient),
            Values::F32(gradient) => add_assign(f32::of(sum), &gradient),
        }
    }
}

/// A format of sums.
pub(crate) trait Summand: Element + switchyard_comm::Element {
    /// The values in this format.
    fn of(values: &mut Values) -> &mut Vec<Self>;

    /// Some zeros.
    fn zeros(len: usize) -> Values;
}

impl Summand for f32 {
    fn of(values: &mut Values) -> &mut Vec<Self> {
        if let Values::Bf16(narrow) = values {
            *values = Values::F32(Values::Bf16(std::mem::take(narrow)).into_f32());
        }
        match values {
            Values::F32(values) => values,
            _ => unreachable!("just widened"),
        }
    }

    fn zeros(len: usize) -> Values {
        Values::F32(vec![0.0; len])
    }
}

impl Summand for bf16 {
    fn of(values: &mut Values) -> &mut Vec<Self> {
        match values {
            Values::Bf16(values) => values,
            _ => unreachable!("gradients of bfloat16 weights are bfloat16, and in main memory to be sent"),
        }
    }

    fn zeros(len: usize) -> Values {
        Values::Bf16(vec![Self::default(); len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn narrow(values: &[f32]) -> Values {
        Values::Bf16(values.iter().map(|&v| bf16::round(v)).collect())
    }

    #[test]
    fn one_gradient_keeps_its_format_and_a_sum_is_float32() {
        let (formats, mut sums) = (SumFormats::default(), Gradients::new());
        formats.add(&mut sums, "a", narrow(&[1.0, 2.0]));
        formats.add(&mut sums, "b", Values::F32(vec![2.0]));
        assert_eq!(sums["a"], narrow(&[1.0, 2.0]));
        formats.add(&mut sums, "a", narrow(&[0.0, 1.0 / 512.0]));
        assert_eq!(sums["a"], Values::F32(vec![1.0, 2.0 + 1.0 / 512.0]));
    }

    #[test]
    fn narrow_sums_stay_narrow() {
        let (formats, mut sums) = (SumFormats { narrow: ["a".to_owned()].into() }, Gradients::new());
        formats.add(&mut sums, "a", narrow(&[1.0, 2.0]));
        formats.add(&mut sums, "a", narrow(&[1.0, 1.0 / 512.0]));
        assert_eq!(sums["a"], narrow(&[2.0, 2.0]));
        formats.add(&mut sums, "norm", Values::F32(vec![1.0]));
        formats.add(&mut sums, "norm", Values::F32(vec![1.0 / 512.0]));
        assert_eq!(sums["norm"], Values::F32(vec![1.0 + 1.0 / 512.0]));
    }
}
