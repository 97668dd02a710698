//! Work that a GPU records once and repeats without the host (a CUDA graph), and the memory through which the
//! host reaches it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::thread::{self, ThreadId};

use burn::backend::LibTorch;
use burn::tensor::{Device, Int, Tensor as BurnTensor};
use burn_tch::TchTensor;
use switchyard_cuda::{CudaError, Mark, PinnedIntegers, PinnedWords, Queue, Stream};
use tch::{Kind, Tensor, no_grad};

use crate::device::GPU_FAILED;
use crate::device_work::SideKind;
use crate::optimizer::UpdateOutcome;
use crate::torch::gpu::{at, fill_noise_step, gpu, in_process, queue, started};
use crate::torch::place;
use crate::torch::update::{CONTROL_WORDS, DeviceOptimizer, DeviceValues, outcome_of};

/// Bytes of a message of the functions in graph.cpp.
const MESSAGE: usize = 512;

// SAFETY: these are the functions of graph.cpp.
unsafe extern "C" {
    fn switchyard_torch_empty_cache(error: *mut c_char) -> c_int;
    fn switchyard_torch_graph_new(graph: *mut *mut c_void, error: *mut c_char) -> c_int;
    fn switchyard_torch_graph_begin(graph: *mut c_void, error: *mut c_char) -> c_int;
    fn switchyard_torch_graph_end(graph: *mut c_void, error: *mut c_char) -> c_int;
    fn switchyard_torch_graph_replay(graph: *mut c_void, error: *mut c_char) -> c_int;
    fn switchyard_torch_graph_delete(graph: *mut c_void, error: *mut c_char) -> c_int;
}

/// Calls a function of graph.cpp, which returns 0 or writes why not.
fn ask(call: impl FnOnce(*mut c_char) -> c_int) -> Result<(), String> {
    let mut message = [0; MESSAGE];
    if call(message.as_mut_ptr()) == 0 {
        return Ok(());
    }
    // SAFETY: graph.cpp ends its messages with a zero.
    let said = unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy();
    Err(said.lines().next().unwrap_or_default().to_owned())
}

/// The number of the GPU that a device is.
fn index_of(device: &Device) -> Option<usize> {
    match place(device)? {
        tch::Device::Cuda(index) => Some(index),
        _ => None,
    }
}

thread_local! {
    static EXCHANGED: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Notes that the host waited for a device or sent it values: work that does cannot be recorded.
pub(crate) fn exchanged(what: &'static str) {
    EXCHANGED.with(|first| first.set(first.get().or(Some(what))));
}

/// Does `work` and tells where in it the host waited for a device or sent it values, if it did.
pub(crate) fn watched<R>(work: impl FnOnce() -> R) -> (R, Option<&'static str>) {
    EXCHANGED.set(None);
    let result = work();
    (result, EXCHANGED.take())
}

/// While it lives, this thread's work for a GPU goes to a stream that can be recorded.
///
/// What went to the GPU's default stream before is done first, and what goes there later waits.
#[derive(Debug)]
pub struct WorkStream {
    _guard: StreamGuard,
    index: usize,
}

/// What a stream of this thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Role {
    Work,
    Beside(SideKind),
}

/// While it lives, LibTorch puts this thread's work for a GPU on a stream.
#[derive(Debug)]
struct StreamGuard(*mut c_void);

impl StreamGuard {
    fn new(stream: Stream, index: usize) -> Self {
        let create = in_process::<CreateGuard>(b"aoti_torch_create_cuda_stream_guard\0");
        let mut guard = ptr::null_mut();
        // SAFETY: the stream lives as long as the process; `guard` takes one pointer.
        let code = unsafe { create(stream.0.cast(), index as i32, &raw mut guard) };
        assert_eq!(code, 0, "LibTorch takes streams of others");
        Self(guard)
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        let delete = in_process::<DeleteGuard>(b"aoti_torch_delete_cuda_stream_guard\0");
        // SAFETY: the guard was made in `new`, in this thread: it cannot be sent to others.
        unsafe { delete(self.0) };
    }
}

type CreateGuard = unsafe extern "C" fn(*mut c_void, i32, *mut *mut c_void) -> i32;
type DeleteGuard = unsafe extern "C" fn(*mut c_void) -> i32;

impl WorkStream {
    /// On `device`; `None` where that is no GPU.
    ///
    /// # Panics
    /// When the GPU fails.
    pub fn on(device: &Device) -> Option<Self> {
        let index = index_of(device)?;
        let stream = stream_of(index, Role::Work).unwrap_or_else(|error| panic!("{GPU_FAILED}{error}"));
        Some(Self { _guard: StreamGuard::new(stream, index), index })
    }

    /// Integers, at first 0, at one place of the GPU's memory.
    pub fn integers(&self, count: usize) -> DeviceIntegers {
        let here = Tensor::zeros([count as i64], (Kind::Int64, tch::Device::Cuda(self.index)));
        let pinned = started(gpu(self.index).and_then(|gpu| PinnedIntegers::new(gpu, count)));
        DeviceIntegers { here: TchTensor::new(here), pinned }
    }

    /// Room in the host's memory for a report of `len` numbers and what an update did.
    pub fn readback(&self, len: usize) -> Readback {
        let words = started(gpu(self.index).and_then(|gpu| PinnedWords::new(gpu, len + CONTROL_WORDS)));
        Readback { words, len }
    }

    /// Puts `value` in the place of the only one of a float32 tensor; whoever shares its memory sees it.
    pub fn overwrite(&self, tensor: &BurnTensor<1>, value: f64) {
        no_grad(|| drop(super::floats(tensor.clone()).tensor.fill_(value)));
    }

    /// Tells recorded work the step whose random numbers it is to draw.
    pub fn set_noise_step(&self, step: u32) {
        fill_noise_step(step, self.index);
    }

    /// Does `work` and tells where in it the host waited for the GPU or sent it values, if it did.
    pub fn watched<R>(&self, work: impl FnOnce() -> R) -> (R, Option<&'static str>) {
        watched(work)
    }

    /// Records what `work` asks of the GPU, which does nothing of it yet. Tensors that `work` returns keep their
    /// memory and get their values with each [`replay`](Recording::replay).
    ///
    /// # Errors
    /// When this LibTorch or the GPU cannot; why.
    ///
    /// # Panics
    /// When `work` lets the host wait for the GPU.
    pub fn record<R>(&self, work: impl FnOnce() -> R) -> Result<(Recording, R), String> {
        // A recording has memory of its own; what lies free for others would be there twice.
        // SAFETY: nothing is demanded of the caller.
        ask(|error| unsafe { switchyard_torch_empty_cache(error) })?;
        let mut graph = ptr::null_mut();
        // SAFETY: `graph` takes one pointer.
        ask(|error| unsafe { switchyard_torch_graph_new(&raw mut graph, error) })?;
        let stream = stream_of(self.index, Role::Work).map_err(|error| error.to_string())?;
        let recording = Recording { graph, index: self.index, stream, thread: thread::current().id() };
        // SAFETY: the graph was just made.
        ask(|error| unsafe { switchyard_torch_graph_begin(recording.graph, error) })?;
        let open = Open(&recording);
        let result = work();
        open.end()?;
        Ok((recording, result))
    }
}

/// While it lives, this thread's work for a GPU goes to another stream.
#[derive(Debug)]
pub(crate) struct SideStream {
    guard: StreamGuard,
    index: usize,
    side: Stream,
}

impl SideStream {
    /// Beside the work on `values`, if they are on a GPU.
    pub(crate) fn beside(values: &DeviceValues, kind: SideKind) -> Option<Self> {
        let tensor = values.clone().into_tensor().tensor;
        let tch::Device::Cuda(index) = tensor.device() else { return None };
        let side = stream_of(index, Role::Beside(kind)).unwrap_or_else(|error| panic!("{GPU_FAILED}{error}"));
        Some(Self { guard: StreamGuard::new(side, index), index, side })
    }

    /// Ends it; the mark is behind its work.
    pub(crate) fn leave(self) -> Mark {
        let Self { guard, index, side } = self;
        let end = started(Mark::after(Queue { gpu: started(gpu(index)), stream: side }));
        drop(guard);
        end
    }
}

/// This thread's stream of a GPU, made when first asked for and kept until the process ends: nobody else may
/// use a stream that records.
fn stream_of(index: usize, role: Role) -> Result<Stream, CudaError> {
    thread_local! {
        static STREAMS: RefCell<HashMap<(usize, Role), Stream>> = RefCell::default();
    }
    STREAMS.with_borrow_mut(|streams| match streams.entry((index, role)) {
        Entry::Occupied(made) => Ok(*made.get()),
        Entry::Vacant(place) => {
            // What travels has to be on its way before the work that it goes on beside takes all multiprocessors.
            Ok(*place.insert(gpu(index)?.new_stream(role != Role::Work)?))
        }
    })
}

/// A recording that goes on; ends with a panic, too, which would otherwise leave the stream of no use.
struct Open<'a>(&'a Recording);

impl Open<'_> {
    fn end(self) -> Result<(), String> {
        let graph = self.0.graph;
        std::mem::forget(self);
        // SAFETY: the graph has begun.
        ask(|error| unsafe { switchyard_torch_graph_end(graph, error) })
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        // SAFETY: the graph has begun. What went wrong is on its way already.
        let _ = ask(|error| unsafe { switchyard_torch_graph_end(self.0.graph, error) });
    }
}

/// Recorded work.
#[derive(Debug)]
pub struct Recording {
    graph: *mut c_void,
    index: usize,
    /// Where it is repeated.
    stream: Stream,
    /// Whose stream, step of random numbers and constants the work reads.
    thread: ThreadId,
}

// SAFETY: a graph may be destroyed by any thread; it is repeated by the one that recorded it alone.
unsafe impl Send for Recording {}
// SAFETY: shared references only read plain values.
unsafe impl Sync for Recording {}

impl Recording {
    /// Whether `stream` may repeat it: this thread's, of the GPU that has recorded it.
    pub fn is_of(&self, stream: &WorkStream) -> bool {
        self.index == stream.index && self.thread == thread::current().id()
    }

    /// Lets the GPU do the work again; does not wait for it.
    ///
    /// # Panics
    /// When the stream may not, or the GPU fails.
    pub fn replay(&mut self, stream: &WorkStream) {
        assert!(self.is_of(stream), "a recording is repeated by the thread and on the GPU that made it");
        // SAFETY: the graph is complete.
        let replayed = ask(|error| unsafe { switchyard_torch_graph_replay(self.graph, error) });
        replayed.unwrap_or_else(|error| panic!("{GPU_FAILED}{error}"));
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        // A failure has been met, or will be, by whoever waits for the results.
        let _ = gpu(self.index).and_then(|gpu| gpu.finish(self.stream));
        // SAFETY: the graph is not used again, and all repetitions are done.
        let _ = ask(|error| unsafe { switchyard_torch_graph_delete(self.graph, error) });
    }
}

/// Integers at one place of a GPU's memory, for the host to replace between replays.
#[derive(Debug)]
pub struct DeviceIntegers {
    here: TchTensor,
    pinned: PinnedIntegers,
}

impl DeviceIntegers {
    /// Replaces them all, once the ones before are on the GPU.
    ///
    /// # Panics
    /// When there are others in number, or the GPU fails.
    pub fn write(&mut self, values: &[i32]) {
        let here = &self.here.tensor;
        assert_eq!(here.numel(), values.len(), "all integers are replaced");
        let queue = queue(here).expect("they are on a GPU");
        // SAFETY: there is room for as many.
        started(unsafe { self.pinned.send(queue, values, at(here)) });
    }

    /// They themselves, not a copy. `[count]`
    pub fn tensor(&self) -> BurnTensor<1, Int> {
        BurnTensor::from_primitive::<LibTorch>(self.here.clone())
    }
}

/// What a step leaves for the host, on its way there while the GPU goes on.
#[derive(Debug)]
pub struct Readback {
    words: PinnedWords,
    /// Numbers of the report.
    len: usize,
}

impl Readback {
    /// How many numbers of a report there is room for.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is room for none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Asks for a float32 report and what the last update of `optimizer` did, as they are when the GPU comes to
    /// it.
    ///
    /// # Panics
    /// When there is no room for the report, or the GPU fails.
    pub fn ask(&mut self, report: &BurnTensor<1>, optimizer: &DeviceOptimizer) {
        let report = super::floats(report.clone()).tensor;
        assert_eq!((report.numel(), report.kind()), (self.len, Kind::Float), "the report that was announced");
        let queue = queue(&report).expect("reports are on a GPU");
        let parts = [(at(&report), self.len), (optimizer.control(), CONTROL_WORDS)];
        // SAFETY: both are as long, and memory that is freed afterwards is reused in the order of the stream.
        started(unsafe { self.words.fetch(queue, &parts) });
    }

    /// Whether report and outcome are here.
    ///
    /// # Panics
    /// When the GPU has failed meanwhile.
    pub fn is_here(&self) -> bool {
        started(self.words.are_here())
    }

    /// The report and what the update did, once they are here.
    ///
    /// # Panics
    /// When the GPU has failed meanwhile.
    pub fn wait(&self) -> (Vec<f32>, UpdateOutcome) {
        let (report, control) = started(self.words.wait()).split_at(self.len);
        (report.iter().map(|&word| f32::from_bits(word)).collect(), outcome_of(control))
    }
}

// SAFETY: tensors are handles whose counts are atomic, and writing needs the only reference.
unsafe impl Send for DeviceIntegers {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for DeviceIntegers {}
