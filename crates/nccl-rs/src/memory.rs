//! Memory of devices, lent to operations, and streams that order them.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Range;

use crate::types::DataType;

/// A place in the memory of a device and what lies there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) address: u64,
    /// Number of values.
    pub(crate) len: usize,
    pub(crate) data_type: DataType,
    pub(crate) device: i32,
}

impl Region {
    /// The values of `range`; `None` where it reaches beyond the end.
    pub(crate) fn part(self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.len {
            return None;
        }
        let offset = range.start * self.data_type.bytes();
        Some(Self { address: self.address.wrapping_add(offset as u64), len: range.len(), ..self })
    }
}

/// Values in the memory of a device that operations read.
///
/// What `&[T]` is to memory of the host, with the type known at run time. A library of tensors makes one
/// of its tensors in one place, where its `unsafe` stays:
///
/// ```
/// use nccl_rs::{DataType, DeviceSlice};
///
/// struct Tensor { address: u64, len: usize, device: i32 }
///
/// impl<'a> From<&'a Tensor> for DeviceSlice<'a> {
///     fn from(tensor: &'a Tensor) -> Self {
///         // SAFETY: a tensor owns its memory, and its allocator gives memory back in the order of streams.
///         unsafe { DeviceSlice::from_raw_parts(tensor.address, tensor.len, DataType::F32, tensor.device) }
///     }
/// }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct DeviceSlice<'a> {
    pub(crate) region: Region,
    lent: PhantomData<&'a ()>,
}

impl<'a> DeviceSlice<'a> {
    /// The `len` values of `data_type` at `address`, which device `device` can read.
    ///
    /// `device` is the CUDA runtime's number of the device. Memory of the host that is pinned or managed
    /// takes the number of the device that will use it.
    ///
    /// # Safety
    /// - The memory is there, device `device` can read it, and `address` is aligned for the type. Without
    ///   values, `address` may be anything.
    /// - It stays so for `'a`, and after `'a` until all work has run that was put on streams within `'a`.
    ///   Freeing memory with `cudaFreeAsync` on the stream of the operations keeps this promise; a caching
    ///   allocator keeps it when it is told of streams other than its own (`record_stream` in LibTorch).
    /// - Safe code of the host that can see the memory writes none of it in that time.
    pub const unsafe fn from_raw_parts(address: u64, len: usize, data_type: DataType, device: i32) -> Self {
        Self { region: Region { address, len, data_type, device }, lent: PhantomData }
    }

    pub(crate) const fn of(region: Region) -> Self {
        Self { region, lent: PhantomData }
    }

    /// Number of values.
    pub const fn len(&self) -> usize {
        self.region.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.region.len == 0
    }

    /// Type of the values.
    pub const fn data_type(&self) -> DataType {
        self.region.data_type
    }

    /// The device.
    pub const fn device(&self) -> i32 {
        self.region.device
    }

    /// Where the first value lies.
    pub const fn address(&self) -> u64 {
        self.region.address
    }

    /// The values of `range`; `None` where it reaches beyond the end.
    #[must_use]
    pub fn get(self, range: Range<usize>) -> Option<Self> {
        self.region.part(range).map(Self::of)
    }
}

/// Values in the memory of a device that operations write, and may read.
///
/// What `&mut [T]` is to memory of the host: nothing else uses them meanwhile.
#[derive(Debug)]
pub struct DeviceSliceMut<'a> {
    pub(crate) region: Region,
    lent: PhantomData<&'a mut ()>,
}

impl<'a> DeviceSliceMut<'a> {
    /// The `len` values of `data_type` at `address`, which device `device` can read and write.
    ///
    /// # Safety
    /// As [`DeviceSlice::from_raw_parts`], and:
    /// - the device can also write the memory;
    /// - no other slice of it is used in that time, and no safe code of the host reads it.
    pub const unsafe fn from_raw_parts(address: u64, len: usize, data_type: DataType, device: i32) -> Self {
        Self { region: Region { address, len, data_type, device }, lent: PhantomData }
    }

    const fn of(region: Region) -> Self {
        Self { region, lent: PhantomData }
    }

    /// Number of values.
    pub const fn len(&self) -> usize {
        self.region.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.region.len == 0
    }

    /// Type of the values.
    pub const fn data_type(&self) -> DataType {
        self.region.data_type
    }

    /// The device.
    pub const fn device(&self) -> i32 {
        self.region.device
    }

    /// Where the first value lies.
    pub const fn address(&self) -> u64 {
        self.region.address
    }

    /// The same values, lent for a shorter time.
    pub const fn reborrow(&mut self) -> DeviceSliceMut<'_> {
        DeviceSliceMut::of(self.region)
    }

    /// The same values, to read.
    pub const fn as_slice(&self) -> DeviceSlice<'_> {
        DeviceSlice::of(self.region)
    }

    /// The values of `range`; `None` where it reaches beyond the end.
    #[must_use]
    pub fn get(self, range: Range<usize>) -> Option<Self> {
        self.region.part(range).map(Self::of)
    }

    /// A second name of the values of `range`, which lies inside: for operations whose output is part of
    /// their input.
    pub(crate) fn alias(&self, range: Range<usize>) -> DeviceSliceMut<'_> {
        DeviceSliceMut::of(self.region.part(range).expect("callers cut ranges of the slice's own length"))
    }

    /// The first `middle` values and the others; `None` where there are not so many.
    #[must_use]
    pub fn split_at(self, middle: usize) -> Option<(Self, Self)> {
        let first = self.region.part(0..middle)?;
        let second = self.region.part(middle..self.region.len)?;
        Some((Self::of(first), Self::of(second)))
    }
}

/// A stream of CUDA, `cudaStream_t` or `CUstream`. Operations on one stream run one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stream(usize);

impl Stream {
    /// The default stream.
    pub const DEFAULT: Self = Self(0);

    /// The stream with this handle.
    ///
    /// # Safety
    /// The stream is one of the communicators' device that it is used with, and lives until all work that
    /// is put on it through this value or a copy has run.
    pub unsafe fn from_raw(handle: *mut c_void) -> Self {
        Self(handle.expose_provenance())
    }

    /// Its handle.
    pub fn as_raw(self) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION: Region = Region { address: 4096, len: 10, data_type: DataType::Bf16, device: 3 };

    #[test]
    fn parts_lie_where_their_values_do() {
        let part = DeviceSlice::of(REGION).get(4..7).expect("it is inside");
        assert_eq!((part.address(), part.len(), part.device()), (4104, 3, 3));
        assert!(DeviceSlice::of(REGION).get(10..10).is_some_and(|part| part.is_empty()));
        let backwards = Range { start: 4, end: 3 };
        assert!(DeviceSlice::of(REGION).get(backwards).is_none());
        assert!(DeviceSlice::of(REGION).get(8..11).is_none());
    }

    #[test]
    fn halves_make_the_whole() {
        let (first, second) = DeviceSliceMut::of(REGION).split_at(4).expect("it is inside");
        assert_eq!((first.address(), first.len()), (4096, 4));
        assert_eq!((second.address(), second.len()), (4104, 6));
        assert!(DeviceSliceMut::of(REGION).split_at(11).is_none());
    }
}
