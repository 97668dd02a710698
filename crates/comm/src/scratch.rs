//! Working memory that outlives a call: fresh pages would cost more than the sums made in them.

use std::sync::{Mutex, PoisonError};

use half::bf16;

use crate::buffer::Element;

/// Vectors that no call uses at the moment, by type.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    f32: Mutex<Vec<Vec<f32>>>,
    f64: Mutex<Vec<Vec<f64>>>,
    bf16: Mutex<Vec<Vec<bf16>>>,
    i32: Mutex<Vec<Vec<i32>>>,
    u64: Mutex<Vec<Vec<u64>>>,
    u8: Mutex<Vec<Vec<u8>>>,
}

/// Types that have working memory.
pub(crate) trait Pooled: Element {
    /// The vectors of this type.
    fn pool(scratch: &Scratch) -> &Mutex<Vec<Vec<Self>>>;
}

macro_rules! pooled {
    ($($type:ty: $field:ident),+ $(,)?) => {$(
        impl Pooled for $type {
            fn pool(scratch: &Scratch) -> &Mutex<Vec<Vec<Self>>> {
                &scratch.$field
            }
        }
    )+};
}

pooled!(f32: f32, f64: f64, bf16: bf16, i32: i32, u64: u64, u8: u8);

impl Scratch {
    /// Lends `length` values, which hold anything.
    pub(crate) fn lend<T: Pooled, R>(&self, length: usize, work: impl FnOnce(&mut [T]) -> R) -> R {
        let pool = T::pool(self);
        let taken = pool.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut memory = taken.unwrap_or_default();
        if memory.len() < length {
            memory.resize(length, T::default());
        }
        let result = work(&mut memory[..length]);
        pool.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        result
    }
}
