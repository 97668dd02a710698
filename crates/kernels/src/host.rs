//! Tensors of the CPU device as plain slices.

use std::borrow::Cow;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::ops::Range;
use std::sync::Arc;

use burn::backend::Flex;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::DeviceValues;
use crate::element::{Element, bf16, round_all};

/// Runs `$body` with `$E` the format of the tensor's values.
macro_rules! by_format {
    ($tensor:expr, $E:ident => $body:expr) => {
        match $tensor.dtype() {
            burn::tensor::DType::F32 => {
                type $E = f32;
                $body
            }
            burn::tensor::DType::BF16 => {
                type $E = crate::element::bf16;
                $body
            }
            other => panic!("no operation takes {other:?}: weights and activations are float32 or bfloat16"),
        }
    };
}
pub(crate) use by_format;

/// Values that one thread copies before it looks for more.
const COPIED_AT_ONCE: usize = 1 << 18;

/// Room for `len` values, of which the caller writes every one before it reads any.
///
/// Zeros would cost a pass over memory on one thread. In this crate's tests the values are NaN, so
/// that one which nobody wrote shows.
pub(crate) fn uninit<T: bytemuck::Pod>(len: usize) -> Vec<T> {
    if cfg!(test) {
        let mut values = vec![T::zeroed(); len];
        bytemuck::cast_slice_mut::<T, u8>(&mut values).fill(0xFF);
        return values;
    }
    let mut values = Vec::<MaybeUninit<T>>::with_capacity(len);
    // SAFETY: the capacity is `len`, and these elements need not be initialized.
    unsafe { values.set_len(len) };
    let mut values = ManuallyDrop::new(values);
    // SAFETY: `MaybeUninit<T>` has the layout of `T`, the allocation changes owner once, and every
    // caller fills the whole slice, by products and maps that only write, before a value is read.
    unsafe { Vec::from_raw_parts(values.as_mut_ptr().cast::<T>(), len, values.capacity()) }
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
pub(crate) fn tensor<E: Element, const D: usize>(values: Vec<E>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

/// Makes the values of `tensor` one slice, copying only when they are strided.
pub(crate) fn contiguous(tensor: &FlexTensor) -> FlexTensor {
    tensor.to_contiguous()
}

/// The values of a contiguous tensor of format `E`.
pub(crate) fn values<E: Element>(tensor: &FlexTensor) -> &[E] {
    assert!(tensor.dtype() == E::FORMAT, "operations choose their form by the formats of their inputs");
    tensor.as_slice::<E>().expect("operations receive contiguous tensors")
}

/// The values of any float tensor as float32, copied only where they have another format.
pub(crate) fn widened(tensor: &FlexTensor) -> Cow<'_, [f32]> {
    by_format!(tensor, E => {
        let values = values::<E>(tensor);
        match bytemuck::try_cast_slice(values) {
            Ok(same) if E::PER_WORD == 1 => Cow::Borrowed(same),
            _ => Cow::Owned(values.iter().map(|value| value.widen()).collect()),
        }
    })
}

/// A tensor in the format of `like`, rounded from float32.
pub(crate) fn rounded<const D: usize>(values: Vec<f32>, shape: [usize; D], like: DType) -> FlexTensor {
    match like {
        DType::BF16 => tensor(values.into_iter().map(bf16::round).collect(), shape),
        _ => tensor(values, shape),
    }
}

/// The values of `tensor` for writing: its own buffer where nothing shares it, else a copy.
pub(crate) fn writable<E: Element>(tensor: &mut FlexTensor) -> &mut [E] {
    assert!(tensor.dtype() == E::FORMAT && tensor.is_contiguous(), "operations receive what they ask for");
    if tensor.layout().start_offset() != 0 {
        let shape = tensor.layout().shape().clone();
        *tensor = FlexTensor::from_data(TensorData::new(values::<E>(tensor).to_vec(), shape));
    }
    tensor.storage_mut::<E>()
}

/// The integers of a tensor made by [`int_tensor`].
pub fn integers<const D: usize>(tensor: &Tensor<D, Int>) -> Vec<i32> {
    #[cfg(feature = "libtorch")]
    if crate::torch::is_here(&tensor.device()) {
        crate::torch::exchanged("integers read");
    }
    let data = tensor.clone().inner().into_data().convert::<i32>();
    data.try_into_vec().expect("just converted")
}

/// Integers on `device`, in the format that it computes with.
pub fn int_tensor<const D: usize>(values: Vec<i32>, shape: [usize; D], device: &Device) -> Tensor<D, Int> {
    #[cfg(feature = "libtorch")]
    if crate::torch::is_here(device) {
        crate::torch::exchanged("integers sent");
        return Tensor::from_data(TensorData::new(values, shape), (device, DType::I64));
    }
    Tensor::from_data(TensorData::new(values, shape), (device, DType::I32))
}

/// Values that an operation takes beside its inputs, where these are.
#[derive(Debug, Clone)]
pub(crate) enum Held<T> {
    Host(Arc<Vec<T>>),
    #[cfg(feature = "libtorch")]
    Torch(burn_tch::TchTensor),
}

impl<T> Held<T> {
    /// The values, if they are in main memory.
    pub(crate) fn if_on_host(&self) -> Option<&Arc<Vec<T>>> {
        match self {
            Self::Host(values) => Some(values),
            #[cfg(feature = "libtorch")]
            Self::Torch(_) => None,
        }
    }

    /// The values, for the form of an operation whose inputs are in main memory.
    pub(crate) fn on_host(&self) -> &Arc<Vec<T>> {
        match self {
            Self::Host(values) => values,
            #[cfg(feature = "libtorch")]
            Self::Torch(_) => panic!("all tensors of an operation lie on one device"),
        }
    }

    /// The values, for the form of an operation whose inputs are LibTorch's.
    #[cfg(feature = "libtorch")]
    pub(crate) fn in_torch(&self) -> &tch::Tensor {
        match self {
            Self::Torch(values) => &values.tensor,
            Self::Host(_) => panic!("all tensors of an operation lie on one device"),
        }
    }
}

impl Held<i32> {
    pub(crate) fn integers<const D: usize>(tensor: &Tensor<D, Int>) -> Self {
        #[cfg(feature = "libtorch")]
        if crate::torch::is_here(&tensor.device()) {
            return Self::Torch(crate::torch::integers(tensor));
        }
        Self::Host(Arc::new(integers(tensor)))
    }
}

impl Held<f32> {
    pub(crate) fn floats<const D: usize>(tensor: Tensor<D>) -> Self {
        #[cfg(feature = "libtorch")]
        if crate::torch::is_here(&tensor.device()) {
            return Self::Torch(crate::torch::floats(tensor));
        }
        Self::Host(Arc::new(with_values(tensor, <[f32]>::to_vec)))
    }
}

/// Calls `read` with the values of `tensor` as float32, row-major.
pub fn with_values<const D: usize, R>(tensor: Tensor<D>, read: impl FnOnce(&[f32]) -> R) -> R {
    read(&widened(&contiguous(&on_host(tensor))))
}

/// The tensor in main memory: itself, or a copy of one that is elsewhere.
pub(crate) fn on_host<const D: usize>(tensor: Tensor<D>) -> FlexTensor {
    let tensor = tensor.inner();
    #[cfg(feature = "libtorch")]
    if crate::torch::is_here(&tensor.device()) {
        crate::torch::exchanged("values read");
        return FlexTensor::from_data(tensor.into_data());
    }
    let tensor = tensor.try_into_primitive::<Flex>();
    tensor.expect("every device that a run can choose has a form of this operation")
}

/// Values for writing, in the format that they are kept in.
#[derive(Debug)]
pub enum ValuesMut<'a> {
    /// float32.
    F32(&'a mut [f32]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
}

impl ValuesMut<'_> {
    /// Some of the values.
    pub fn part(&mut self, range: Range<usize>) -> ValuesMut<'_> {
        match self {
            Self::F32(values) => ValuesMut::F32(&mut values[range]),
            Self::Bf16(values) => ValuesMut::Bf16(&mut values[range]),
        }
    }

    /// Replaces all values, rounded to the format.
    ///
    /// # Panics
    /// When there are not as many.
    pub fn set(&mut self, values: &[f32]) {
        match self {
            Self::F32(old) => old.copy_from_slice(values),
            Self::Bf16(old) => {
                assert_eq!(old.len(), values.len(), "as many values as there were");
                let parts = old.par_chunks_mut(COPIED_AT_ONCE).zip(values.par_chunks(COPIED_AT_ONCE));
                parts.for_each(|(old, values)| round_all(values, old));
            }
        }
    }
}

/// A format of values on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceFormat {
    /// float32.
    F32,
    /// float64.
    F64,
    /// bfloat16.
    Bf16,
    /// 32-bit integers.
    I32,
}

/// Gradients, or other values that are made once and read a few times, in the format they came in.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// float32.
    F32(Vec<f32>),
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// On a GPU, in either format.
    Device(DeviceValues),
}

impl Values {
    /// Takes the values out of `tensor`, without a copy when nothing shares its buffer; those on a GPU stay
    /// there.
    pub fn of<const D: usize>(tensor: Tensor<D>) -> Self {
        if let Some(values) = DeviceValues::of(&tensor) {
            return Self::Device(values);
        }
        const FORMATS: &str = "weights and their gradients are float32 or bfloat16";
        let data = tensor.into_data();
        match data.dtype() {
            DType::BF16 => Self::Bf16(data.try_into_vec().expect(FORMATS)),
            _ => Self::F32(data.try_into_vec().expect(FORMATS)),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::Device(values) => values.len(),
        }
    }

    /// The same values in main memory.
    #[must_use]
    pub fn into_host(self) -> Self {
        match self {
            Self::Device(values) => values.to_host(),
            held => held,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same numbers as float32, without a copy where they are.
    pub fn into_f32(self) -> Vec<f32> {
        match self {
            Self::Device(values) => values.to_host().into_f32(),
            Self::F32(values) => values,
            Self::Bf16(values) => {
                let mut wide = uninit(values.len());
                let parts = wide.par_chunks_mut(COPIED_AT_ONCE).zip(values.par_chunks(COPIED_AT_ONCE));
                parts
                    .for_each(|(wide, values)| wide.iter_mut().zip(values).for_each(|(w, v)| *w = v.widen()));
                wide
            }
        }
    }
}

/// Calls `update` with the values of `tensor` for writing, in place unless the buffer is shared.
///
/// The returned tensor is a leaf without gradient.
pub fn update_in_place<const D: usize>(tensor: Tensor<D>, update: impl FnOnce(ValuesMut<'_>)) -> Tensor<D> {
    #[cfg(feature = "libtorch")]
    if crate::torch::is_here(&tensor.device()) {
        return crate::torch::update_in_place(tensor, update);
    }
    let mut primitive = contiguous(&on_host(tensor));
    match primitive.dtype() {
        DType::BF16 => update(ValuesMut::Bf16(writable(&mut primitive))),
        _ => update(ValuesMut::F32(writable(&mut primitive))),
    }
    Tensor::from_primitive::<Flex>(primitive)
}
