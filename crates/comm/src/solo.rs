//! A group of one: every operation is a copy.

use std::sync::Arc;

use crate::buffer::{Buffer, BufferMut, Element, with_values};
use crate::call::Call;
use crate::communicator::{Communicator, ReduceOp};
use crate::error::CommError;

/// The only rank of its group.
#[derive(Debug, Clone)]
pub struct Solo {
    label: String,
}

impl Solo {
    /// The group called `label`.
    pub fn new(label: &str) -> Self {
        Self { label: label.to_owned() }
    }

    fn check(&self, call: &Call) -> Result<(), CommError> {
        call.wrong_buffer(&self.label).map_or(Ok(()), Err)
    }

    fn copy(&self, call: &Call, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError> {
        self.check(call)?;
        with_values!(output, to => copy_values(input, to));
        Ok(())
    }
}

fn copy_values<T: Element>(input: Buffer<'_>, output: &mut [T]) {
    output.copy_from_slice(T::values(input).expect("a checked call has buffers of one type"));
}

impl Communicator for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn label(&self) -> &str {
        &self.label
    }

    fn machines(&self) -> &[usize] {
        &[0]
    }

    fn barrier(&self) -> Result<(), CommError> {
        Ok(())
    }

    fn broadcast(&self, buffer: BufferMut<'_>, root: usize) -> Result<(), CommError> {
        self.check(&Call::broadcast(1, buffer.as_buffer(), root))
    }

    fn all_reduce(&self, _: BufferMut<'_>, _: ReduceOp) -> Result<(), CommError> {
        Ok(())
    }

    fn reduce_scatter(
        &self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        op: ReduceOp,
    ) -> Result<(), CommError> {
        self.copy(&Call::reduce_scatter(1, input, &output, op), input, output)
    }

    fn all_gather(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError> {
        self.copy(&Call::all_gather(1, input, &output), input, output)
    }

    fn all_gather_v(
        &self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        counts: &[usize],
    ) -> Result<(), CommError> {
        self.copy(&Call::all_gather_v((0, 1), input, &output, counts), input, output)
    }

    fn all_to_all(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError> {
        self.copy(&Call::all_to_all(1, input, &output), input, output)
    }

    fn all_to_all_v(
        &self,
        input: Buffer<'_>,
        sends: &[usize],
        output: BufferMut<'_>,
        receives: &[usize],
    ) -> Result<(), CommError> {
        self.copy(&Call::all_to_all_v(1, input, sends, &output, receives), input, output)
    }

    fn split(&self, _: usize, label: &str) -> Result<Arc<dyn Communicator>, CommError> {
        Ok(Arc::new(Self::new(label)))
    }
}
