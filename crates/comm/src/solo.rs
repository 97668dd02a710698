//! A group of one: every operation is a copy.

use std::sync::Arc;

use crate::buffer::{Buffer, BufferMut};
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

    fn copy(
        &self,
        operation: &'static str,
        input: Buffer<'_>,
        output: BufferMut<'_>,
    ) -> Result<(), CommError> {
        let problem = match (input, output) {
            (from, to) if from.len() != to.len() => {
                format!("{} values do not fill room for {}", from.len(), to.len())
            }
            (Buffer::F32(from), BufferMut::F32(to)) => return done(to.copy_from_slice(from)),
            (Buffer::F64(from), BufferMut::F64(to)) => return done(to.copy_from_slice(from)),
            (Buffer::Bf16(from), BufferMut::Bf16(to)) => return done(to.copy_from_slice(from)),
            (Buffer::I32(from), BufferMut::I32(to)) => return done(to.copy_from_slice(from)),
            (Buffer::U64(from), BufferMut::U64(to)) => return done(to.copy_from_slice(from)),
            (Buffer::U8(from), BufferMut::U8(to)) => return done(to.copy_from_slice(from)),
            (from, to) => format!("{:?} cannot be received as {:?}", from.element_type(), to.element_type()),
        };
        Err(CommError::WrongBuffer { operation, group: self.label.clone(), problem })
    }
}

fn done((): ()) -> Result<(), CommError> {
    Ok(())
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

    fn barrier(&self) -> Result<(), CommError> {
        Ok(())
    }

    fn broadcast(&self, _: BufferMut<'_>, _: usize) -> Result<(), CommError> {
        Ok(())
    }

    fn all_reduce(&self, _: BufferMut<'_>, _: ReduceOp) -> Result<(), CommError> {
        Ok(())
    }

    fn reduce_scatter(&self, input: Buffer<'_>, output: BufferMut<'_>, _: ReduceOp) -> Result<(), CommError> {
        self.copy("reduce_scatter", input, output)
    }

    fn all_gather(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError> {
        self.copy("all_gather", input, output)
    }

    fn all_gather_v(&self, input: Buffer<'_>, output: BufferMut<'_>, _: &[usize]) -> Result<(), CommError> {
        self.copy("all_gather_v", input, output)
    }

    fn all_to_all(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError> {
        self.copy("all_to_all", input, output)
    }

    fn all_to_all_v(
        &self,
        input: Buffer<'_>,
        _: &[usize],
        output: BufferMut<'_>,
        _: &[usize],
    ) -> Result<(), CommError> {
        self.copy("all_to_all_v", input, output)
    }

    fn split(&self, _: usize, label: &str) -> Result<Arc<dyn Communicator>, CommError> {
        Ok(Arc::new(Self::new(label)))
    }
}
