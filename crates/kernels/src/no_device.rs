//! Values and optimizers on other devices than the CPU, in builds that have none: nothing of these types exists.

use std::collections::BTreeMap;

use burn::tensor::Tensor;

use crate::host::Values;
use crate::optimizer::{DeviceTensor, OptimizerRules};

/// Values on a GPU; this build has none.
#[derive(Debug, Clone, PartialEq)]
pub enum DeviceValues {}

impl DeviceValues {
    /// `None`: no tensor is on a GPU.
    pub fn of<const D: usize>(_: &Tensor<D>) -> Option<Self> {
        None
    }

    /// `None`: no tensor is on a GPU.
    pub fn shared<const D: usize>(_: &Tensor<D>) -> Option<Self> {
        None
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match *self {}
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        match *self {}
    }

    /// A copy in main memory.
    pub fn to_host(&self) -> Values {
        match *self {}
    }

    /// Adds values.
    pub fn add(&mut self, _: &Self, _: bool) {
        match *self {}
    }

    /// Whether all are finite.
    pub fn all_finite(&self) -> bool {
        match *self {}
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

    /// The norm of all gradients.
    pub fn gradient_norm(&mut self, _: &BTreeMap<String, Values>) -> f64 {
        match *self {}
    }

    /// Clips and updates.
    pub fn update(&mut self, _: &BTreeMap<String, Values>, _: f64, _: f64) {
        match *self {}
    }

    /// Calls `take` with masters and moments.
    pub fn read(&self, _: impl FnMut(&str, Option<Vec<f32>>, [Option<Vec<f32>>; 2])) {
        match *self {}
    }
}
