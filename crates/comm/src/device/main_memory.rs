//! Devices whose memory is the host's: LibTorch's CPU device.

use std::sync::Arc;
use std::{ptr, slice};

use super::siblings::DeviceGroup;
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
///
/// # Safety
/// Nothing writes them while the result lives.
unsafe fn bytes<'a>(values: DeviceSlice) -> &'a [u8] {
    if values.is_empty() {
        return &[];
    }
    // SAFETY: there are so many, promised when the slice was made; bytes have no invalid values.
    unsafe { slice::from_raw_parts(pointer(values.address()), values.bytes()) }
}

/// Replaces the values.
fn write(values: DeviceSlice, bytes: &[u8]) {
    assert_eq!(values.bytes(), bytes.len(), "as many as there is room for");
    // SAFETY: promised when the slice was made, and `bytes` is memory of our own.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), pointer(values.address()), bytes.len()) };
}

/// The values by their type.
///
/// # Safety
/// There are some, and nothing else uses them while the result lives.
unsafe fn buffer_mut<'a>(values: DeviceSlice) -> BufferMut<'a> {
    let (at, len) = (values.address(), values.len());
    // SAFETY: promised; values of that type lie at the address.
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
    ptr::with_exposed_provenance_mut(address as usize)
}

impl DeviceCommunicator for MainMemory {
    fn all_reduce(&self, values: DeviceSlice, op: ReduceOp, _: DeviceStream) -> Result<(), CommError> {
        if values.is_empty() {
            return self.group.all_reduce(BufferMut::U8(&mut []), op);
        }
        // SAFETY: nothing uses them while the operation runs, promised when the slice was made.
        self.group.all_reduce(unsafe { buffer_mut(values) }, op)
    }

    fn all_gather(&self, input: DeviceSlice, output: DeviceSlice, _: DeviceStream) -> Result<(), CommError> {
        let mut gathered = vec![0_u8; output.bytes()];
        // SAFETY: nothing writes them while the operation runs, promised when the slice was made.
        self.group.all_gather(unsafe { bytes(input) }.into(), gathered.as_mut_slice().into())?;
        write(output, &gathered);
        Ok(())
    }

    fn exchange(&self, sends: &[Piece], receives: &[Piece], _: DeviceStream) -> Result<(), CommError> {
        let within = |piece: &Piece| piece.peer < self.group.size();
        assert!(sends.iter().chain(receives).all(within), "pieces are for ranks of the group");
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
            for values in of_peer(sends, peer) {
                // SAFETY: as above.
                sent.extend_from_slice(unsafe { bytes(values) });
            }
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
            for values in of_peer(receives, peer) {
                let (arrived, after) = rest.split_at(values.bytes());
                rest = after;
                write(values, arrived);
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), CommError> {
        Ok(())
    }
}

impl DeviceGroup for MainMemory {
    /// The group of processes has met the error already, and nothing is under way.
    fn give_up(&self, _: &CommError) {}
}
