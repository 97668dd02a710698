//! How far a backward pass has come, for work beside it that needs some of the gradients only.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::backend::Flex;
#[cfg(feature = "libtorch")]
use burn::backend::LibTorch;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

use crate::device_work::DeviceMark;
use crate::operation::{Operand, Operation, apply};

/// Marks that a backward pass leaves when it comes past [places](mark_gradients) of the forward pass; a clone is the
/// same.
#[derive(Debug, Clone, Default)]
pub struct GradientMarks(Arc<Mutex<Passed>>);

#[derive(Debug, Default)]
struct Passed {
    /// Places in the order of the backward pass.
    marks: Vec<(usize, Arc<DeviceMark>)>,
    late: BTreeSet<String>,
}

impl GradientMarks {
    /// Notes that the gradient of a parameter was written after the backward pass: no mark is behind it.
    pub fn note_late(&self, parameter: &str) {
        self.lock().late.insert(parameter.to_owned());
    }

    /// The number of the first mark behind the gradient of a parameter that nothing before `place` uses, counted in
    /// the order of the backward pass; `None` if it has left none.
    pub fn number(&self, parameter: &str, place: usize) -> Option<usize> {
        let passed = self.lock();
        let is_late = passed.late.contains(parameter);
        passed.marks.iter().position(|(marked, _)| *marked == place && !is_late)
    }

    /// A mark by its number. The work of one stream is done in order, so those with lower numbers come before it.
    ///
    /// # Panics
    /// When there are not as many.
    pub fn mark(&self, number: usize) -> Arc<DeviceMark> {
        Arc::clone(&self.lock().marks[number].1)
    }

    fn passed(&self, place: usize, mark: DeviceMark) {
        self.lock().marks.push((place, Arc::new(mark)));
    }

    fn lock(&self) -> MutexGuard<'_, Passed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `x` itself; when the backward pass comes past it, `marks` has a mark behind the gradients of everything that was
/// computed from it.
pub fn mark_gradients<const D: usize>(x: Tensor<D>, marks: &GradientMarks, place: usize) -> Tensor<D> {
    let [out] = apply(Place { marks: marks.clone(), place }, [Operand::from(x)]);
    out.into_tensor()
}

#[derive(Debug)]
struct Place {
    marks: GradientMarks,
    place: usize,
}

impl Operation<Flex, 1, 1> for Place {
    type Saved = ();
    const ANY_STRIDES: bool = true;

    fn forward(&self, [x]: &[FlexTensor; 1], _: bool) -> ([FlexTensor; 1], ()) {
        ([x.clone()], ())
    }

    fn backward(&self, (): &(), gradients: [Option<FlexTensor>; 1], _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        self.marks.passed(self.place, DeviceMark::of_host());
        gradients
    }
}

#[cfg(feature = "libtorch")]
impl Operation<LibTorch, 1, 1> for Place {
    type Saved = ();
    const ANY_STRIDES: bool = true;

    fn forward(&self, [x]: &[burn_tch::TchTensor; 1], _: bool) -> ([burn_tch::TchTensor; 1], ()) {
        ([x.clone()], ())
    }

    fn backward(
        &self,
        (): &(),
        gradients: [Option<burn_tch::TchTensor>; 1],
        _: [bool; 1],
    ) -> [Option<burn_tch::TchTensor>; 1] {
        if let [Some(gradient)] = &gradients {
            self.marks.passed(self.place, DeviceMark::behind(crate::torch::mark_behind(&gradient.tensor)));
        }
        gradients
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_device;

    #[test]
    fn marks_come_in_the_order_of_the_backward_pass_and_change_nothing() {
        let marks = GradientMarks::default();
        let x = Tensor::<1>::from_data([1.0, -2.0], &test_device().autodiff()).require_grad();
        let first = mark_gradients(x.clone() * 2.0, &marks, 0);
        let second = mark_gradients(first.square(), &marks, 1);
        assert_eq!(marks.number("w", 1), None);
        let gradients = second.sum().backward();
        let gradient = x.grad(&gradients).expect("leaf").into_data();
        assert_eq!(gradient.try_to_vec::<f32>().unwrap(), [8.0, -16.0]);
        assert_eq!([1, 0, 7].map(|place| marks.number("w", place)), [Some(0), Some(1), None]);
        marks.note_late("w");
        assert_eq!([marks.number("w", 1), marks.number("v", 1)], [None, Some(0)]);
        while !marks.mark(1).is_past() {}
        assert!(marks.mark(0).is_past());
    }
}
