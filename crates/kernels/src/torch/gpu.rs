//! The GPUs that tensors lie on.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use switchyard_cuda::{CudaError, Gpu};

/// GPU number `index`, opened when first asked for and kept until the process ends.
pub(crate) fn gpu(index: usize) -> Result<&'static Gpu, CudaError> {
    static OPEN: Mutex<Option<HashMap<usize, &'static Gpu>>> = Mutex::new(None);
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let open = open.get_or_insert_default();
    if let Some(gpu) = open.get(&index) {
        return Ok(gpu);
    }
    let gpu: &'static Gpu = Box::leak(Box::new(Gpu::open(index)?));
    open.insert(index, gpu);
    Ok(gpu)
}
