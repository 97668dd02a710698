//! Forms of the operations on LibTorch: its CPU device and NVIDIA GPUs.
//!
//! Most operations have a form composed of LibTorch's own, whose backward is LibTorch's automatic
//! differentiation inside one step of burn's ([`composed`]). It serves every device and is the
//! reference of the hand-written kernels ([`with_kernels`]).

mod attention;
mod composed;
mod cross_entropy;
pub(crate) mod deferred;
mod dispatch;
mod embedding;
mod feed_forward;
mod gpu;
#[cfg(test)]
mod kernel_tests;
mod noise;
mod norm;
mod operations;
mod packed;
mod products;
mod projection;
pub(crate) mod recording;
mod route;
pub(crate) mod settings;
pub(crate) mod travelling;
pub(crate) mod update;
mod with_kernels;

use burn::backend::tensor::FloatTensor;
use burn::backend::{DispatchDevice, LibTorch};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_tch::TchTensor;
use tch::Kind;

pub(crate) use feed_forward::places;
pub(crate) use gpu::{gpu, started};
pub(crate) use recording::exchanged;
pub(crate) use route::route;

use crate::cross_entropy::HeadLayout;
use crate::host::{DeviceFormat, ValuesMut};
use crate::operation::Substrate;

const ONE_DEVICE: &str = "all tensors of an operation lie on one device";

impl Substrate for LibTorch {
    fn contiguous(tensor: FloatTensor<Self>) -> FloatTensor<Self> {
        TchTensor::from_existing(gpu::aligned(&tensor.tensor), tensor.storage)
    }
}

/// Whether tensors on `device` are LibTorch's.
pub(crate) fn is_here(device: &Device) -> bool {
    matches!(device.clone().inner().as_dispatch(), DispatchDevice::LibTorch(_))
}

/// Where LibTorch has the tensors of `device`, if they are its own.
pub(crate) fn place(device: &Device) -> Option<tch::Device> {
    match device.clone().inner().as_dispatch() {
        DispatchDevice::LibTorch(device) => Some((*device).into()),
        _ => None,
    }
}

/// A mark behind the work of a GPU; `None` for other devices.
pub(crate) fn mark(device: &Device) -> Option<switchyard_cuda::Mark> {
    Some(started(switchyard_cuda::Mark::after(gpu::queue_of(place(device)?)?)))
}

/// A mark behind the work on a tensor; `None` where that is not on a GPU.
pub(crate) fn mark_behind(tensor: &tch::Tensor) -> Option<switchyard_cuda::Mark> {
    Some(started(switchyard_cuda::Mark::after(gpu::queue(tensor)?)))
}

/// Lets further work on values wait for a mark.
pub(crate) fn hold(mark: &switchyard_cuda::Mark, values: &update::DeviceValues) {
    if let Some(queue) = gpu::queue(&values.clone().into_tensor().tensor) {
        started(mark.holds(queue));
    }
}

/// [`crate::device_zeros`].
pub(crate) fn zeros(device: &Device, len: usize, format: DeviceFormat) -> Option<update::DeviceValues> {
    let zeros = tch::Tensor::zeros([len as i64], (update::kind_of(format), place(device)?));
    Some(update::DeviceValues::there(&TchTensor::new(zeros)))
}

pub(crate) fn integers<const D: usize>(tensor: &Tensor<D, Int>) -> TchTensor {
    tensor.clone().inner().try_into_primitive::<LibTorch>().expect(ONE_DEVICE)
}

pub(crate) fn floats<const D: usize>(tensor: Tensor<D>) -> TchTensor {
    tensor.inner().try_into_primitive::<LibTorch>().expect(ONE_DEVICE)
}

/// Calls `update` with a copy of the values in main memory, which then replace those on the device.
pub(crate) fn update_in_place<const D: usize>(
    tensor: Tensor<D>,
    update: impl FnOnce(ValuesMut<'_>),
) -> Tensor<D> {
    const FORMATS: &str = "weights are float32 or bfloat16";
    let (shape, device) = (tensor.dims(), tensor.device().inner());
    let data = tensor.inner().into_data();
    let (data, format) = match data.dtype() {
        DType::BF16 => {
            let mut values = data.try_into_vec().expect(FORMATS);
            update(ValuesMut::Bf16(&mut values));
            (TensorData::new(values, shape), DType::BF16)
        }
        _ => {
            let mut values = data.try_into_vec().expect(FORMATS);
            update(ValuesMut::F32(&mut values));
            (TensorData::new(values, shape), DType::F32)
        }
    };
    Tensor::from_data(data, (&device, format))
}

/// [`crate::logits`].
pub(crate) fn logits(hidden: Tensor<2>, head: Tensor<2>, layout: HeadLayout) -> Tensor<2> {
    let (hidden, head) = (floats(hidden).tensor, floats(head).tensor);
    let head = if layout == HeadLayout::VocabularyByModel { head.tr() } else { head };
    Tensor::from_primitive::<LibTorch>(TchTensor::new(products::product(&hidden, &head).to_kind(Kind::Float)))
}

/// The number of rows with a value that is not negative. int32 `[rows, columns]` to float32 `[1]`
pub(crate) fn rows_with_any(table: &TchTensor) -> Tensor<1> {
    let any = table.tensor.amax([-1_i64].as_slice(), false).ge(0);
    Tensor::from_primitive::<LibTorch>(TchTensor::new(any.sum(Kind::Float).view([1])))
}

/// Integers as kernels take them.
pub(crate) fn int32(integers: &TchTensor) -> update::DeviceValues {
    update::DeviceValues::there(&TchTensor::new(gpu::narrow(&integers.tensor)))
}

/// As float32.
fn wide(tensor: &tch::Tensor) -> tch::Tensor {
    tensor.to_kind(Kind::Float)
}

/// Values in main memory as a float32 tensor where `like` is.
fn uploaded(values: &[f32], shape: &[i64], like: &tch::Tensor) -> tch::Tensor {
    exchanged("values of an operation");
    tch::Tensor::from_slice(values).view(shape).to(like.device())
}

/// The tensor with its values row by row, in its own memory where they are.
fn contiguous(tensor: &TchTensor) -> TchTensor {
    LibTorch::contiguous(tensor.clone())
}
