//! Tensors of the CPU device as plain slices.

use std::mem::{ManuallyDrop, MaybeUninit};

use burn::backend::Flex;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;

/// Values that one thread copies before it looks for more.
const COPIED_AT_ONCE: usize = 1 << 18;

/// Room for `len` values, of which the caller writes every one before it reads any.
///
/// Zeros would cost a pass over memory on one thread. In this crate's tests the values are NaN, so
/// that one which nobody wrote shows.
pub(crate) fn uninit(len: usize) -> Vec<f32> {
    if cfg!(test) {
        return vec![f32::NAN; len];
    }
    let mut values = Vec::<MaybeUninit<f32>>::with_capacity(len);
    // SAFETY: the capacity is `len`, and these elements need not be initialized.
    unsafe { values.set_len(len) };
    let mut values = ManuallyDrop::new(values);
    // SAFETY: `MaybeUninit<f32>` has the layout of `f32`, the allocation changes owner once, and every
    // caller fills the whole slice, by products and maps that only write, before a value is read.
    unsafe { Vec::from_raw_parts(values.as_mut_ptr().cast::<f32>(), len, values.capacity()) }
}

/// Makes `copy` one of `values`, by all threads, in the memory that it has if that is as large.
pub fn copy_into(copy: &mut Vec<f32>, values: &[f32]) {
    if copy.len() != values.len() {
        *copy = uninit(values.len());
    }
    let from = values.par_chunks(COPIED_AT_ONCE);
    copy.par_chunks_mut(COPIED_AT_ONCE).zip(from).for_each(|(to, from)| to.copy_from_slice(from));
}

/// A fresh tensor from its values.
pub(crate) fn tensor<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

/// Makes the values of `tensor` one slice, copying only when they are strided.
pub(crate) fn contiguous(tensor: &FlexTensor) -> FlexTensor {
    tensor.to_contiguous()
}

/// The values of a contiguous tensor.
pub(crate) fn values(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice::<f32>().expect("operations receive contiguous float32 tensors")
}

/// The integers of a tensor made by [`int_tensor`].
pub fn integers<const D: usize>(tensor: &Tensor<D, Int>) -> Vec<i32> {
    let primitive = tensor
        .clone()
        .inner()
        .try_into_primitive::<Flex>()
        .expect("every device that a run can choose has a form of this operation")
        .to_contiguous();
    primitive.as_slice::<i32>().expect("integers are 32 bits wide").to_vec()
}

/// 32-bit integers on `device`.
pub fn int_tensor<const D: usize>(values: Vec<i32>, shape: [usize; D], device: &Device) -> Tensor<D, Int> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::I32))
}

/// Calls `read` with the values of `tensor`, row-major.
pub fn with_values<const D: usize, R>(tensor: Tensor<D>, read: impl FnOnce(&[f32]) -> R) -> R {
    let tensor = contiguous(
        &tensor
            .inner()
            .try_into_primitive::<Flex>()
            .expect("every device that a run can choose has a form of this operation"),
    );
    read(values(&tensor))
}

/// The values of `tensor`, row-major, without a copy when nothing shares its buffer.
pub fn into_values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("float32 tensors hold float32 values")
}

/// Calls `update` with the values of `tensor` for writing, in place unless the buffer is shared.
///
/// The returned tensor is a leaf without gradient.
pub fn update_in_place<const D: usize>(tensor: Tensor<D>, update: impl FnOnce(&mut [f32])) -> Tensor<D> {
    let primitive = tensor
        .inner()
        .try_into_primitive::<Flex>()
        .expect("every device that a run can choose has a form of this operation");
    let mut primitive = if primitive.is_contiguous() && primitive.layout().start_offset() == 0 {
        primitive
    } else {
        primitive.to_contiguous()
    };
    update(primitive.storage_mut::<f32>());
    Tensor::from_primitive::<Flex>(primitive)
}
