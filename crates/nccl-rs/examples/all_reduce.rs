//! Sums values of all GPUs of this machine, and exchanges some, with a thread for each:
//! `cargo run --release --example all_reduce`.
#![allow(clippy::print_stdout, reason = "the result is what the example is for")]

use std::error::Error;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use nccl_rs::{
    Communicator, Config, DataType, Deadline, DeviceSlice, DeviceSliceMut, Library, ReduceOp, Stream,
    UniqueId,
};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Time for all ranks to come.
const PATIENCE: Duration = Duration::from_secs(60);

/// Floats of one GPU and the stream that uses them: where this crate's slices are made.
struct Floats {
    values: CudaSlice<f32>,
    stream: Arc<CudaStream>,
    device: i32,
}

impl Floats {
    fn of(stream: &Arc<CudaStream>, values: &[f32]) -> Outcome<Self> {
        let device = i32::try_from(stream.context().ordinal())?;
        Ok(Self { values: stream.clone_htod(values)?, stream: Arc::clone(stream), device })
    }

    fn lend(&self) -> DeviceSlice<'_> {
        let (address, _) = self.values.device_ptr(&self.stream);
        // SAFETY: the memory is the slice's, which frees it in the order of its stream, the only one in use.
        unsafe { DeviceSlice::from_raw_parts(address, self.values.len(), DataType::F32, self.device) }
    }

    fn lend_mut(&mut self) -> DeviceSliceMut<'_> {
        let len = self.values.len();
        let (address, _) = self.values.device_ptr_mut(&self.stream);
        // SAFETY: as above, and borrowed by nobody else.
        unsafe { DeviceSliceMut::from_raw_parts(address, len, DataType::F32, self.device) }
    }

    fn read(&self) -> Outcome<Vec<f32>> {
        Ok(self.stream.clone_dtoh(&self.values)?)
    }
}

fn main() -> Outcome<()> {
    // SAFETY: only looks whether the driver's library can be loaded.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err("no NVIDIA driver: libcuda.so.1 could not be loaded".into());
    }
    let library = Library::load()?;
    let count = usize::try_from(CudaContext::device_count()?)?;
    println!("NCCL {} ({}), {count} GPUs", library.version(), library.origin());
    let id = UniqueId::new(&library)?;
    thread::scope(|scope| {
        let start = |rank| {
            scope.spawn({
                let library = &library;
                move || one_rank(library, &id, rank, count)
            })
        };
        let ranks: Vec<_> = (0..count).map(start).collect();
        ranks.into_iter().try_for_each(|rank| rank.join().map_err(|_| "a rank panicked")?)
    })
}

fn one_rank(library: &Library, id: &UniqueId, rank: usize, count: usize) -> Outcome<()> {
    // Sets the device of this thread, which the communicator takes.
    let context = CudaContext::new(rank)?;
    let cuda_stream = context.new_stream()?;
    // SAFETY: the stream is dropped after the communicator, which ends or aborts all its work.
    let stream = unsafe { Stream::from_raw(cuda_stream.cu_stream().cast()) };

    let config = Config::new().name("example").non_blocking(PATIENCE);
    let communicator = Communicator::init(library, id, rank, count, &config)?;
    communicator.wait(Deadline::after(PATIENCE))?;

    let mut sums = Floats::of(&cuda_stream, &[rank as f32, 1.0])?;
    communicator.all_reduce_in_place(sums.lend_mut(), ReduceOp::Sum, stream)?;

    let own: Vec<f32> = (0..count).map(|peer| (100 * rank + peer) as f32).collect();
    let own = Floats::of(&cuda_stream, &own)?;
    let mut received = Floats::of(&cuda_stream, &vec![0.0; count])?;
    communicator.all_to_all(own.lend(), received.lend_mut(), stream)?;

    println!("rank {rank}: sums {:?}, received {:?}", sums.read()?, received.read()?);
    cuda_stream.synchronize()?;
    Ok(communicator.close(Deadline::after(PATIENCE))?)
}
