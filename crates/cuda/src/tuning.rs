//! Which of cuBLASLt's algorithms computes a product.
//!
//! The library's own expectation is often not the fastest. Where algorithms are timed, the choice is kept on
//! the disk beside the compiled kernels, and every later process on the same kind of GPU with the same version of the
//! library takes it from there: algorithms differ in the order of sums, so that a choice by the clock alone
//! would make a run differ from the one before it.

use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::sys::CUstreamCaptureStatus_enum::CU_STREAM_CAPTURE_STATUS_NONE;
use cudarc::driver::{result, sys};
use xxhash_rust::xxh3::xxh3_128;

use crate::address::Address;
use crate::blas_lt::{Algorithm, BlasLt, Described};
use crate::compile::cache_directory;
use crate::error::CudaError;
use crate::gpu::{Queue, Stream, failed};
use crate::product::{PRODUCT_WORKSPACE, Product, ProductAt};

/// Launches that are timed together, and how often; the shortest time counts.
const LAUNCHES: usize = 4;
const ROUNDS: usize = 3;

/// Multiplications of a product that is worth it: those of about a microsecond. Smaller ones come in many sizes,
/// as prompts and the rests of batches do.
const TUNED_FROM: usize = 1 << 28;

/// What an algorithm must save of the time of those that the library prefers to it.
const WORTH: f32 = 0.02;

/// The algorithm for a product; `None` where there are none.
///
/// # Safety
/// The addresses must be as [`crate::product`] demands.
pub(crate) unsafe fn choose(
    queue: Queue<'_>,
    lt: &BlasLt,
    described: &Described,
    algorithms: &[Algorithm],
    at: ProductAt,
    product: &Product,
) -> Result<Option<Algorithm>, CudaError> {
    let [first, _, ..] = algorithms else { return Ok(algorithms.first().copied()) };
    if product.multiplications() < TUNED_FROM {
        return Ok(Some(*first));
    }
    let Some(directory) = directory() else { return Ok(Some(*first)) };
    let kept = Kept::new(&directory, queue, lt, product);
    // Asked before reading: what another process writes in between is not taken for something of no use.
    let was_there = kept.path.exists();
    if let Some(algorithm) = kept.read(lt, described) {
        return Ok(Some(algorithm));
    }
    if was_there {
        // What cannot be removed cannot be replaced either; then the first is taken below.
        let _ = std::fs::remove_file(&kept.path);
    }
    if is_capturing(queue.stream)? {
        return Ok(Some(*first));
    }
    // SAFETY: promised by the caller.
    let Some(fastest) = (unsafe { fastest(queue, lt, described, algorithms, at, product)? }) else {
        return Ok(Some(*first));
    };
    Ok(Some(match kept.write(&fastest) {
        Ok(true) => fastest,
        Ok(false) => kept.read(lt, described).unwrap_or(*first),
        // What cannot be kept would be another one in the next process.
        Err(_) => *first,
    }))
}

/// Where choices are kept; `None` where none are made: without a directory for them, and with `SWITCHYARD_TUNE=0`.
fn directory() -> Option<PathBuf> {
    if std::env::var_os("SWITCHYARD_TUNE").is_some_and(|value| value == "0") {
        return None;
    }
    cache_directory()
}

fn is_capturing(stream: Stream) -> Result<bool, CudaError> {
    // SAFETY: the stream is one of the device's.
    let status = unsafe { result::stream::is_capturing(stream.0) };
    Ok(status.map_err(failed("asking whether a stream is captured"))? != CU_STREAM_CAPTURE_STATUS_NONE)
}

/// The choice for one product.
struct Kept {
    path: PathBuf,
    /// Everything that the choice depends on.
    key: String,
}

impl Kept {
    fn new(directory: &Path, queue: Queue<'_>, lt: &BlasLt, product: &Product) -> Self {
        let key = format!(
            "{}, {} multiprocessors\ncuBLASLt {}, {PRODUCT_WORKSPACE} bytes of workspace\n{product:?}\n",
            queue.gpu.name(),
            queue.gpu.multiprocessors(),
            lt.version(),
        );
        let path = directory.join(format!("product-{:032x}.txt", xxh3_128(key.as_bytes())));
        Self { path, key }
    }

    /// What a process has written; `None` where none has, or something that is of no use.
    fn read(&self, lt: &BlasLt, described: &Described) -> Option<Algorithm> {
        let text = std::fs::read_to_string(&self.path).ok()?;
        let words = text.strip_prefix(&self.key)?.lines().next()?.split(' ');
        let words: Vec<u64> =
            words.map(|word| u64::from_str_radix(word, 16)).collect::<Result<_, _>>().ok()?;
        lt.algorithm_of(described, words.try_into().ok()?, PRODUCT_WORKSPACE)
    }

    /// Whether this process was the first to write; another's choice stands, so that ranks on one machine agree.
    fn write(&self, algorithm: &Algorithm) -> std::io::Result<bool> {
        let directory = self.path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(directory)?;
        let words: Vec<String> = algorithm.data().iter().map(|word| format!("{word:016x}")).collect();
        let mut draft = tempfile::NamedTempFile::new_in(directory)?;
        write!(draft, "{}{}\n{algorithm}\n", self.key, words.join(" "))?;
        match draft.persist_noclobber(&self.path) {
            Ok(_) => Ok(true),
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error.error),
        }
    }
}

/// The algorithm that takes least time on these values; `None` where they cannot be timed.
///
/// Launches write what the true one will write over, but where that is added to: then all go elsewhere.
///
/// # Safety
/// The addresses must be as [`crate::product`] demands.
unsafe fn fastest(
    queue: Queue<'_>,
    lt: &BlasLt,
    described: &Described,
    algorithms: &[Algorithm],
    mut at: ProductAt,
    product: &Product,
) -> Result<Option<Algorithm>, CudaError> {
    let elsewhere = if product.onto.is_some() && at.onto == at.out {
        let Some(memory) = Memory::new(product.out_extent() * product.format.bytes()) else {
            return Ok(None);
        };
        at.out = Address(memory.0);
        Some(memory)
    } else {
        None
    };
    let (start, end) = (Event::new()?, Event::new()?);
    // Work on other streams would take multiprocessors from some algorithms and not from others.
    queue.gpu.finish_all()?;
    let mut times = vec![f32::INFINITY; algorithms.len()];
    for round in 0..=ROUNDS {
        for (algorithm, time) in algorithms.iter().zip(&mut times) {
            // What fails once is not tried again.
            if round > 0 && time.is_nan() {
                continue;
            }
            start.record(queue.stream)?;
            // SAFETY: promised by the caller, or memory of as many values.
            let started = (0..if round == 0 { 1 } else { LAUNCHES })
                .try_for_each(|_| unsafe { lt.launch(described, algorithm, at, queue.stream) });
            end.record(queue.stream)?;
            let took = end.since(&start)?;
            match started {
                Err(_) => *time = f32::NAN,
                // The first round loads code.
                Ok(()) if round > 0 => *time = time.min(took),
                Ok(()) => {}
            }
        }
    }
    drop(elsewhere);
    Ok(least(&times).map(|i| algorithms[i]))
}

/// Which time is least, an earlier one unless a later saves more than [`WORTH`] of it.
fn least(times: &[f32]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (i, time) in times.iter().enumerate().filter(|(_, time)| time.is_finite()) {
        if best.is_none_or(|best| *time < times[best] * (1.0 - WORTH)) {
            best = Some(i);
        }
    }
    best
}

struct Event(sys::CUevent);

impl Event {
    fn new() -> Result<Self, CudaError> {
        result::event::create(CU_EVENT_DEFAULT).map(Self).map_err(failed("making an event"))
    }

    fn record(&self, stream: Stream) -> Result<(), CudaError> {
        // SAFETY: the event is alive, and the stream one of the device's.
        unsafe { result::event::record(self.0, stream.0) }.map_err(failed("recording an event"))
    }

    /// Milliseconds, once both have come to pass.
    fn since(&self, start: &Self) -> Result<f32, CudaError> {
        // SAFETY: both events are alive and were recorded in this order on one stream.
        let elapsed = unsafe {
            result::event::synchronize(self.0).and_then(|()| result::event::elapsed(start.0, self.0))
        };
        elapsed.map_err(failed("timing a product"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made once and destroyed once. An error leaves nothing to be done.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

struct Memory(sys::CUdeviceptr);

impl Memory {
    fn new(bytes: usize) -> Option<Self> {
        // SAFETY: what lies there is written before it is read.
        unsafe { result::malloc_sync(bytes) }.ok().map(Self)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made once and freed once, when all that was started on it has ended. An error leaves nothing
        // to be done.
        let _ = unsafe { result::free_sync(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_algorithm_must_be_worth_it() {
        assert_eq!(least(&[]), None);
        assert_eq!(least(&[f32::NAN, f32::INFINITY]), None);
        assert_eq!(least(&[1.0, 0.99]), Some(0));
        assert_eq!(least(&[f32::NAN, 1.0, 0.9, 0.89, 0.5]), Some(4));
    }
}
