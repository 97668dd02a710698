//! Devices whose memory is the host's: LibTorch's CPU device.

use std::slice;
use std::sync::Arc;

use super::{DeviceCommunicator, DeviceSlice, DeviceStream, Piece};
use crate::buffer::{BufferMut, ElementType};
use crate::communicator::{Communicator, ReduceOp};
use crate::error::CommError;

/// Operations by way of the group of processes; done when they return.
#[derive(Debug)]
pub(super) struct MainMemory {
    group: Arc<dyn Communicator>,
}

impl MainMemory {
    pub(super) fn new(group: Arc<dyn Communicator>) -> Self {
        Self { group }
    }
}

/// The values as they lie there.
fn bytes(values: &DeviceSlice) -> &[u8] {
    if values.is_empty() {
        return &[];
    }
    // SAFETY: promised when the slice was made; bytes have no invalid values.
    unsafe { slice::from_raw_parts(pointer(values.address()), values.bytes()) }
}

fn bytes_mut(values: &mut DeviceSlice) -> &mut [u8] {
    if values.is_empty() {
        return &mut [];
    }
    // SAFETY: as above, and nothing else uses them until the operation has ended.
    unsafe { slice::from_raw_parts_mut(pointer(values.address()), values.bytes()) }
}

/// The values by their type.
fn buffer_mut(values: &mut DeviceSlice) -> BufferMut<'_> {
    let (at, len) = (values.address(), values.len());
    // SAFETY: as above; values of that type lie at the address.
    unsafe {
        match values.element_type() {
            ElementType::F32 => BufferMut::F32(slice::from_raw_parts_mut(pointer(at), len)),
            ElementType::F64 => BufferMut::F64(slice::from_raw_parts_mut(pointer(at), len)),
            ElementType::Bf16 => BufferMut::Bf16(slice::from_raw_parts_mut(pointer(at), len)),
            ElementType::I32 => BufferMut::I32(slice::from_raw_parts_mut(pointer(at), len)),
            ElementType::U64 => BufferMut::U64(slice::from_raw_parts_mut(pointer(at), len)),
            ElementType::U8 => BufferMut::U8(slice::from_raw_parts_mut(pointer(at), len)),
        }
    }
}

fn pointer<T>(address: u64) -> *mut T {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

impl DeviceCommunicator for MainMemory {
    fn all_reduce(&self, mut values: DeviceSlice, op: ReduceOp, _: DeviceStream) -> Result<(), CommError> {
        match values.is_empty() {
            true => self.group.all_reduce(BufferMut::U8(&mut []), op),
            false => self.group.all_reduce(buffer_mut(&mut values), op),
        }
    }

    fn all_gather(
        &self,
        input: DeviceSlice,
        mut output: DeviceSlice,
        _: DeviceStream,
    ) -> Result<(), CommError> {
        self.group.all_gather(bytes(&input).into(), bytes_mut(&mut output).into())
    }

    fn exchange(&self, sends: &[Piece], receives: &[Piece], _: DeviceStream) -> Result<(), CommError> {
        let of_peer = |pieces: &[Piece], peer: usize| {
            pieces.iter().filter(|piece| piece.peer == peer).map(|piece| piece.values).collect::<Vec<_>>()
        };
        let peers = 0..self.group.size();
        let count = |pieces: &[Piece]| -> Vec<usize> {
            let total = |peer| of_peer(pieces, peer).iter().map(DeviceSlice::bytes).sum();
            peers.clone().map(total).collect()
        };
        let (sent_to, received_from) = (count(sends), count(receives));
        let mut sent = Vec::with_capacity(sent_to.iter().sum());
        for peer in peers.clone() {
            of_peer(sends, peer).iter().for_each(|values| sent.extend_from_slice(bytes(values)));
        }
        let mut received = vec![0_u8; received_from.iter().sum()];
        self.group.all_to_all_v(
            sent.as_slice().into(),
            &sent_to,
            received.as_mut_slice().into(),
            &received_from,
        )?;
        let mut rest = received.as_slice();
        for peer in peers {
            for mut values in of_peer(receives, peer) {
                let (arrived, after) = rest.split_at(values.bytes());
                rest = after;
                bytes_mut(&mut values).copy_from_slice(arrived);
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), CommError> {
        Ok(())
    }
}
