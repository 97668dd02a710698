//! Values and optimizers on other devices than the CPU, in builds that have none: nothing of these types exists.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ops::Range;

use burn::tensor::{Device, Int, Tensor};

use crate::device_work::DeviceMark;
use crate::expert_rows::{SlotsInUse, TokenPlaces};
use crate::host::{DeviceFormat, Values};
use crate::optimizer::{DeviceTensor, OptimizerRules, UpdateOutcome};

/// Values on a GPU; this build has none.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceValues(Infallible);

impl DeviceValues {
    /// A mark behind the work on them.
    pub fn mark(&self) -> DeviceMark {
        match self.0 {}
    }

    /// Whether they are the memory of `tensor` itself.
    pub fn lie_in<const D: usize>(&self, _: &Tensor<D>) -> bool {
        match self.0 {}
    }

    /// `None`: no tensor is on a GPU.
    pub fn of<const D: usize>(_: &Tensor<D>) -> Option<Self> {
        None
    }

    /// `None`: LibTorch has no tensor.
    pub fn in_torch<const D: usize>(_: &Tensor<D>) -> Option<Self> {
        None
    }

    /// `None`: no tensor is on a GPU.
    pub fn shared<const D: usize>(_: &Tensor<D>) -> Option<Self> {
        None
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self.0 {}
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        match self.0 {}
    }

    /// Room for other values.
    #[must_use]
    pub fn room(&self, _: usize) -> Self {
        match self.0 {}
    }

    /// Room for values of another format.
    #[must_use]
    pub fn room_as(&self, _: DeviceFormat, _: usize) -> Self {
        match self.0 {}
    }

    /// Values one behind the other.
    ///
    /// # Panics
    /// When there are none: no others exist.
    pub fn joined(parts: impl IntoIterator<Item = Self>) -> Self {
        parts.into_iter().next().expect("there are values to join")
    }

    /// Some of the values.
    #[must_use]
    pub fn part(&self, _: Range<usize>) -> Self {
        match self.0 {}
    }

    /// Some of the values along every axis.
    #[must_use]
    pub fn part_of(&self, _: &[usize], _: [&[usize]; 2]) -> Self {
        match self.0 {}
    }

    /// Puts values in the place of some, or adds them.
    pub fn write_part(&self, _: &[usize], _: [&[usize]; 2], _: &Self, _: bool) {
        match self.0 {}
    }

    /// So many zeros.
    #[must_use]
    pub fn zeros(&self, _: usize) -> Self {
        match self.0 {}
    }

    /// The values within bounds.
    #[must_use]
    pub fn clamped(&self, _: usize, _: usize) -> Self {
        match self.0 {}
    }

    /// The same values in memory of their own.
    #[must_use]
    pub fn copied(&self) -> Self {
        match self.0 {}
    }

    /// Values in another order.
    #[must_use]
    pub fn swapped(&self, _: [usize; 3]) -> Self {
        match self.0 {}
    }

    /// Some of the values.
    #[must_use]
    pub fn block(&self, _: [usize; 3], _: usize) -> Self {
        match self.0 {}
    }

    /// Puts values in the place of these in another order.
    pub fn write_swapped(&self, _: [usize; 3], _: &Self) {
        match self.0 {}
    }

    /// Where the first value lies.
    pub fn address(&self) -> u64 {
        match self.0 {}
    }

    /// Their format.
    pub fn format(&self) -> DeviceFormat {
        match self.0 {}
    }

    /// Handle of the stream of their work.
    pub fn stream(&self) -> u64 {
        match self.0 {}
    }

    /// A copy in main memory.
    pub fn to_host(&self) -> Values {
        match self.0 {}
    }

    /// Adds values.
    pub fn add(&mut self, _: &Self, _: bool) {
        match self.0 {}
    }

    /// Whether all are finite.
    pub fn all_finite(&self) -> bool {
        match self.0 {}
    }
}

impl From<DeviceValues> for SlotsInUse {
    fn from(used: DeviceValues) -> Self {
        match used.0 {}
    }
}

impl From<DeviceValues> for TokenPlaces {
    fn from(places: DeviceValues) -> Self {
        match places.0 {}
    }
}

/// Masters and moments on a GPU; this build has none.
#[derive(Debug)]
pub enum DeviceOptimizer {}

impl DeviceOptimizer {
    /// `None`: no parameter is on a GPU.
    pub fn new(_: OptimizerRules, _: Vec<DeviceTensor<'_>>, _: u64) -> Option<Self> {
        None
    }

    /// Sets the learning rate.
    pub fn set_learning_rate(&mut self, _: f64) {
        match *self {}
    }

    /// Updates the parameters of a part.
    pub fn update_part(&self, _: usize) {
        match *self {}
    }

    /// Clips.
    pub fn begin_update(
        &mut self,
        _: &BTreeMap<String, Values>,
        _: &Tensor<1>,
        _: f64,
        _: bool,
        _: Option<&mut dyn FnMut(&DeviceValues)>,
    ) {
        match *self {}
    }

    /// The values of the matrices of a parameter.
    pub fn values(&self, _: &str) -> DeviceValues {
        match *self {}
    }

    /// Sends the places of gradients.
    pub fn point(&mut self) {
        match *self {}
    }

    /// Takes note that an update was left out.
    pub fn resume(&mut self) {
        match *self {}
    }

    /// Calls `take` with masters and moments.
    pub fn read(&self, _: impl FnMut(&str, Option<Vec<f32>>, [Option<Vec<f32>>; 2])) {
        match *self {}
    }
}

/// The stream of a GPU's work; this build has none.
#[derive(Debug)]
pub enum WorkStream {}

impl WorkStream {
    /// `None`: no device is a GPU.
    pub fn on(_: &Device) -> Option<Self> {
        None
    }

    /// Integers, at first 0.
    pub fn integers(&self, _: usize) -> DeviceIntegers {
        match *self {}
    }

    /// Room for a report and what an update did.
    pub fn readback(&self, _: usize) -> Readback {
        match *self {}
    }

    /// Puts a value in the place of the only one of a tensor.
    pub fn overwrite(&self, _: &Tensor<1>, _: f64) {
        match *self {}
    }

    /// Tells recorded work the step whose random numbers it is to draw.
    pub fn set_noise_step(&self, _: u32) {
        match *self {}
    }

    /// Does `work` and tells where in it the host waited for the GPU or sent it values.
    pub fn watched<R>(&self, _: impl FnOnce() -> R) -> (R, Option<&'static str>) {
        match *self {}
    }

    /// Records what `work` asks of the GPU.
    ///
    /// # Errors
    /// None: there is no such stream.
    pub fn record<R>(&self, _: impl FnOnce() -> R) -> Result<(Recording, R), String> {
        match *self {}
    }
}

/// What a step leaves for the host; this build has no steps that leave any.
#[derive(Debug)]
pub struct Readback(Infallible);

impl Readback {
    /// How many numbers of a report there is room for.
    pub fn len(&self) -> usize {
        match self.0 {}
    }

    /// Whether there is room for none.
    pub fn is_empty(&self) -> bool {
        match self.0 {}
    }

    /// Asks for a report and what the last update did.
    pub fn ask(&mut self, _: &Tensor<1>, _: &DeviceOptimizer) {
        match self.0 {}
    }

    /// Whether both are here.
    pub fn is_here(&self) -> bool {
        match self.0 {}
    }

    /// Both, once they are here.
    pub fn wait(&self) -> (Vec<f32>, UpdateOutcome) {
        match self.0 {}
    }
}

/// Gradients on a GPU that were put off; this build has none.
#[derive(Debug, Clone)]
pub enum DeferredGradients {}

impl DeferredGradients {
    /// None yet.
    ///
    /// # Panics
    /// Always: only steps on GPUs put gradients off.
    pub fn instead_of_sums(_: usize) -> Self {
        unreachable!("a step on a GPU needs LibTorch")
    }

    /// Where the gradients of a stack of experts wait.
    pub fn of(&self, _: u64, _: impl IntoIterator<Item = u64>) -> Deferral {
        match *self {}
    }

    /// Whether sums of the gradients would need less memory than another micro-batch.
    pub fn is_full(&self) -> bool {
        match *self {}
    }

    /// The sums of what waits, by the numbers of the parameters.
    pub fn take(&self) -> BTreeMap<u64, DeviceValues> {
        match *self {}
    }
}

/// Where the gradients of one stack of experts wait; nowhere in this build.
#[derive(Debug, Clone)]
pub enum Deferral {}

/// Recorded work of a GPU; this build has none.
#[derive(Debug)]
pub enum Recording {}

impl Recording {
    /// Whether `stream` may repeat it.
    pub fn is_of(&self, _: &WorkStream) -> bool {
        match *self {}
    }

    /// Lets the GPU do the work again.
    pub fn replay(&mut self, _: &WorkStream) {
        match *self {}
    }
}

/// Integers in a GPU's memory; this build has none.
#[derive(Debug)]
pub enum DeviceIntegers {}

impl DeviceIntegers {
    /// Replaces them all.
    pub fn write(&mut self, _: &[i32]) {
        match *self {}
    }

    /// They themselves. `[count]`
    pub fn tensor(&self) -> Tensor<1, Int> {
        match *self {}
    }
}
