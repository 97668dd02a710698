//! The GPUs that tensors lie on, and what kernels take of a tensor.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

use burn_tch::TchTensor;
use switchyard_cuda::{Address, CudaError, Format, Gpu, NoiseKey, Queue, Stream};
use tch::{Device, Kind, Tensor};

use crate::device::GPU_FAILED;
use crate::noise;
use crate::torch::contiguous;

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

/// Where LibTorch puts work on this tensor now; `None` on its CPU device.
///
/// # Panics
/// When the GPU cannot run kernels, which [`crate::device`] checks before.
pub(crate) fn queue(tensor: &Tensor) -> Option<Queue<'static>> {
    queue_of(tensor.device())
}

/// Where LibTorch puts work for `device` now.
pub(crate) fn queue_of(device: Device) -> Option<Queue<'static>> {
    let Device::Cuda(index) = device else { return None };
    let gpu = gpu(index).unwrap_or_else(|error| panic!("{GPU_FAILED}{error}"));
    Some(Queue { gpu, stream: current_stream(index) })
}

type GetStream = unsafe extern "C" fn(i32, *mut *mut c_void) -> i32;

/// LibTorch's current stream of a GPU, through its C interface.
fn current_stream(index: usize) -> Stream {
    static GET: OnceLock<GetStream> = OnceLock::new();
    let get = *GET.get_or_init(|| in_process::<GetStream>(b"aoti_torch_get_current_cuda_stream\0"));
    let mut stream = ptr::null_mut();
    // SAFETY: `stream` takes one pointer.
    let code = unsafe { get(index as i32, &raw mut stream) };
    assert_eq!(code, 0, "LibTorch has a current stream for every GPU");
    Stream(stream.cast())
}

/// A function of LibTorch's C interface for CUDA (aoti_torch/c/shim.h), by its name with a zero behind it.
///
/// # Panics
/// When LibTorch was built without CUDA: there are no GPUs then that anything could be asked for.
pub(crate) fn in_process<F: Copy>(name: &[u8]) -> F {
    let process = libloading::os::unix::Library::this();
    // SAFETY: the signatures are those of the header.
    let found = unsafe { process.get::<F>(name) };
    *found.unwrap_or_else(|error| panic!("this LibTorch has no CUDA: {error}"))
}

/// What came of a call, or a panic with what keeps it from running: an operation inside automatic
/// differentiation cannot return an error.
pub(crate) fn started<T>(call: Result<T, CudaError>) -> T {
    #[cfg(test)]
    CALLS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    call.unwrap_or_else(|error| panic!("{GPU_FAILED}{error}"))
}

/// How often anything was asked of a GPU, so that tests see whether kernels ran at all.
#[cfg(test)]
pub(crate) static CALLS: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

/// Where the values of a contiguous tensor lie.
pub(crate) fn at(tensor: &Tensor) -> Address {
    assert!(tensor.is_contiguous(), "kernels take contiguous tensors");
    Address(tensor.data_ptr() as u64)
}

/// Where the values of a tensor lie that may be absent.
pub(crate) fn at_optional(tensor: Option<&Tensor>) -> Address {
    tensor.map_or(Address::NONE, at)
}

/// The matrix itself where kernels can read every row in pieces of 16 bytes, be they parts of longer ones, else
/// a copy.
pub(crate) fn by_rows(matrix: &TchTensor) -> TchTensor {
    let tensor = &matrix.tensor;
    let [stride, unit] = tensor.stride().try_into().expect("a matrix");
    let readable = unit == 1 && stride >= tensor.size()[1] && in_pieces(stride as usize, format(tensor));
    if readable && begins_a_piece(tensor) { matrix.clone() } else { contiguous(matrix) }
}

/// The format of a tensor's values.
pub(crate) fn format(tensor: &Tensor) -> Format {
    match tensor.kind() {
        Kind::BFloat16 => Format::Bf16,
        Kind::Float => Format::F32,
        other => panic!("no operation takes {other:?}: weights and activations are float32 or bfloat16"),
    }
}

/// Whether rows of `width` values are whole pieces of 16 bytes, as most kernels take them.
pub(crate) fn in_pieces(width: usize, format: Format) -> bool {
    width.is_multiple_of(16 / format.bytes())
}

/// Room for values of `kind` where `like` is.
pub(crate) fn room(shape: &[usize], kind: Kind, like: &Tensor) -> Tensor {
    let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
    Tensor::empty(shape, (kind, like.device()))
}

/// Room for `bytes` bytes where `like` is.
pub(crate) fn workspace(bytes: usize, like: &Tensor) -> Tensor {
    room(&[bytes.max(16)], Kind::Uint8, like)
}

/// Integers as kernels take them.
pub(crate) fn narrow(integers: &Tensor) -> Tensor {
    aligned(&integers.to_kind(Kind::Int))
}

/// The values row by row, and beginning where kernels may read 16 bytes at once: the tensor itself, or a copy.
pub(crate) fn aligned(tensor: &Tensor) -> Tensor {
    let tensor = tensor.contiguous();
    if begins_a_piece(&tensor) { tensor } else { tensor.copy() }
}

fn begins_a_piece(tensor: &Tensor) -> bool {
    (tensor.data_ptr() as usize).is_multiple_of(16)
}

/// A key of random numbers, whose step lies on the device.
pub(crate) fn noise_key(key: noise::NoiseKey, like: &Tensor) -> NoiseKey {
    let Device::Cuda(index) = like.device() else { panic!("keys are for kernels") };
    NoiseKey { seed: key.seed, step: fill_noise_step(key.step, index), site: key.site }
}

/// Where the step of random numbers lies on a GPU, after writing it there unless it is there.
///
/// It is the one that this thread asked for last; kernels of earlier ones have read theirs, in the order of the
/// stream.
pub(crate) fn fill_noise_step(step: u32, index: usize) -> Address {
    thread_local! {
        static STEPS: RefCell<HashMap<usize, (u32, Tensor)>> = RefCell::default();
    }
    let word = i64::from(step.cast_signed());
    STEPS.with_borrow_mut(|steps| {
        let fresh = || (step, Tensor::full([1], word, (Kind::Int, Device::Cuda(index))));
        let (there, tensor) = steps.entry(index).or_insert_with(fresh);
        if *there != step {
            let _ = tensor.fill_(word);
            *there = step;
        }
        at(tensor)
    })
}

/// Random numbers of a `[tokens, width]` tensor.
pub(crate) fn token_noise(noise: noise::TokenNoise, like: &Tensor) -> switchyard_cuda::TokenNoise {
    let columns =
        noise.columns.map(|columns| switchyard_cuda::Columns { first: columns.first, total: columns.total });
    switchyard_cuda::TokenNoise {
        key: noise_key(noise.key, like),
        first_row: noise.first_row,
        row_tokens: noise.row_tokens,
        columns,
    }
}
