//! Buffers to work on and the time that an operation takes.

use std::sync::Arc;

use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use switchyard_cuda::{Address, CudaError, Gpu, Queue, Stream};
use switchyard_random::{Philox, normal_pair};

/// Launches that are timed together, and how often: the median counts.
const LAUNCHES: usize = 10;
const ROUNDS: usize = 7;

/// A device and what shall be timed on it.
pub(crate) struct Clock {
    gpu: Gpu,
    /// The same device as if it were an older one, if it has instructions that older ones have not.
    older: Option<Gpu>,
    /// And with attention backward in two passes always.
    two_passes: Option<Gpu>,
    stream: Arc<CudaStream>,
    wanted: String,
}

/// Memory of the device.
pub(crate) struct Room(CudaSlice<u8>, Arc<CudaStream>);

impl Room {
    pub(crate) fn at(&self) -> Address {
        Address(self.0.device_ptr(&self.1).0)
    }
}

impl Clock {
    pub(crate) fn open(wanted: &str) -> Self {
        let open = || Gpu::open(0).unwrap_or_else(|e| panic!("{e}"));
        let gpu = open();
        let has_others = gpu.has_warpgroup_products();
        let older = has_others.then(|| open().without_warpgroup_products());
        let two_passes = has_others.then(|| open().with_one_pass_attention(false));
        let stream = gpu.context().default_stream();
        Self { gpu, older, two_passes, stream, wanted: wanted.to_owned() }
    }

    /// Says which device it is.
    #[expect(clippy::print_stdout, reason = "an example prints")]
    pub(crate) fn report(&self) {
        println!("{}, {} multiprocessors", self.gpu.name(), self.gpu.multiprocessors());
    }

    pub(crate) fn queue(&self) -> Queue<'_> {
        Queue { gpu: &self.gpu, stream: Stream::DEFAULT }
    }

    /// Whether operations whose names begin with `name` may be timed.
    pub(crate) fn wants(&self, name: &str) -> bool {
        name.contains(&self.wanted) || self.wanted.contains(name)
    }

    /// Whether the operation of this name is timed.
    pub(crate) fn times(&self, name: &str) -> bool {
        name.contains(&self.wanted)
    }

    /// Room for `bytes` bytes of zeros.
    pub(crate) fn zeros(&self, bytes: usize) -> Room {
        Room(self.stream.alloc_zeros(bytes).expect("room on the device"), Arc::clone(&self.stream))
    }

    /// The bytes of `values`.
    pub(crate) fn of<T: bytemuck::Pod>(&self, values: &[T]) -> Room {
        let bytes =
            self.stream.clone_htod(bytemuck::cast_slice::<T, u8>(values)).expect("room on the device");
        Room(bytes, Arc::clone(&self.stream))
    }

    /// `len` bfloat16 values with standard deviation `deviation`; a pattern of 65,536 that repeats.
    pub(crate) fn normal_bf16(&self, len: usize, deviation: f64, seed: u64) -> Room {
        let mut words = Philox::new(seed).stream([0, 0, 0]);
        let pattern: Vec<u16> = (0..1 << 16)
            .map(|_| {
                half::bf16::from_f64(deviation * normal_pair(words.next_u32(), words.next_u32()).0).to_bits()
            })
            .collect();
        let values: Vec<u16> = pattern.iter().copied().cycle().take(len).collect();
        self.of(&values)
    }

    /// Times `launch` and prints milliseconds, and of `flops` and `bytes`, unless 0, what that is a second.
    pub(crate) fn time(
        &self,
        name: &str,
        flops: f64,
        bytes: f64,
        launch: impl FnMut(Queue<'_>) -> Result<(), CudaError>,
    ) {
        self.time_on(self.queue(), name, flops, bytes, launch);
    }

    /// As [`Self::time`], and again with the kernels of older devices where this one has others.
    pub(crate) fn time_both(
        &self,
        name: &str,
        flops: f64,
        bytes: f64,
        mut launch: impl FnMut(Queue<'_>) -> Result<(), CudaError>,
    ) {
        self.time(name, flops, bytes, &mut launch);
        if let Some(gpu) = &self.older {
            let queue = Queue { gpu, stream: Stream::DEFAULT };
            self.time_on(queue, &format!("{name}, as before Hopper"), flops, bytes, launch);
        }
    }

    /// As [`Self::time_both`], and again with attention backward in two passes.
    pub(crate) fn time_all(
        &self,
        name: &str,
        flops: f64,
        bytes: f64,
        mut launch: impl FnMut(Queue<'_>) -> Result<(), CudaError>,
    ) {
        self.time_both(name, flops, bytes, &mut launch);
        if let Some(gpu) = &self.two_passes {
            let queue = Queue { gpu, stream: Stream::DEFAULT };
            self.time_on(queue, &format!("{name}, in two passes"), flops, bytes, launch);
        }
    }

    #[expect(clippy::print_stdout, reason = "an example prints")]
    fn time_on(
        &self,
        queue: Queue<'_>,
        name: &str,
        flops: f64,
        bytes: f64,
        mut launch: impl FnMut(Queue<'_>) -> Result<(), CudaError>,
    ) {
        if !self.times(name) {
            return;
        }
        let event = || self.gpu.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).expect("an event");
        let mut rounds: Vec<f32> = (0..=ROUNDS)
            .map(|_| {
                let (start, end) = (event(), event());
                start.record(&self.stream).expect("recorded");
                for _ in 0..LAUNCHES {
                    launch(queue).unwrap_or_else(|e| panic!("{name}: {e}"));
                }
                end.record(&self.stream).expect("recorded");
                end.synchronize().unwrap_or_else(|e| panic!("{name}: {e}"));
                start.elapsed_ms(&end).expect("timed") / LAUNCHES as f32
            })
            .skip(1)
            .collect();
        rounds.sort_by(f32::total_cmp);
        let ms = f64::from(rounds[ROUNDS / 2]);
        let mut line = format!("{name:<64} {ms:9.4} ms");
        if flops > 0.0 {
            line += &format!("  {:7.1} TFLOP/s", flops / ms * 1e-9);
        }
        if bytes > 0.0 {
            line += &format!("  {:7.1} GB/s", bytes / ms * 1e-6);
        }
        println!("{line}");
    }
}
