//! Values on the device and what came of them.

use std::sync::{Arc, OnceLock};

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use half::bf16;
use switchyard_cuda::{Address, Format, Gpu, Queue, Stream};
use switchyard_random::{Philox, normal_pair};

/// The device that all tests share.
pub(crate) fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    GPU.get_or_init(|| Gpu::open(0).expect("these tests need a device"))
}

/// The same device and stream: as they are, and on Hopper also with attention backward in one pass, and as if it
/// were an older device, whose kernels it can run as well.
pub(crate) fn queues() -> impl Iterator<Item = Queue<'static>> {
    static OTHERS: OnceLock<Vec<Gpu>> = OnceLock::new();
    let others = OTHERS.get_or_init(|| {
        if !gpu().has_warpgroup_products() {
            return Vec::new();
        }
        let open = || Gpu::open(0).expect("these tests need a device");
        vec![open().with_one_pass_attention(true), open().without_warpgroup_products()]
    });
    std::iter::once(gpu()).chain(others).map(|gpu| Queue { gpu, stream: Stream::DEFAULT })
}

/// The default stream of the device.
pub(crate) fn queue() -> Queue<'static> {
    Queue { gpu: gpu(), stream: Stream::DEFAULT }
}

fn stream() -> Arc<CudaStream> {
    gpu().context().default_stream()
}

/// Bytes on the device, with a rim behind them that no kernel may touch.
pub(crate) struct Buffer {
    bytes: CudaSlice<u8>,
    len: usize,
}

const RIM: usize = 256;
const POISON: u8 = 0xFF;

impl Buffer {
    /// `values` in format `format`, rounded to nearest.
    pub(crate) fn floats(values: &[f64], format: Format) -> Self {
        match format {
            Format::F32 => Self::of(&values.iter().map(|&v| v as f32).collect::<Vec<_>>()),
            Format::Bf16 => {
                Self::of(&values.iter().map(|&v| bf16::from_f32(v as f32).to_bits()).collect::<Vec<_>>())
            }
        }
    }

    /// Plain numbers.
    pub(crate) fn of<T: bytemuck::Pod>(values: &[T]) -> Self {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len() + RIM, POISON);
        Self { bytes: stream().clone_htod(&padded).expect("room on the device"), len: bytes.len() }
    }

    /// Room for `len` values of `format`, every one of them NaN.
    pub(crate) fn poisoned(len: usize, format: Format) -> Self {
        Self::of(&vec![POISON; len * format.bytes()])
    }

    /// Where it lies.
    pub(crate) fn at(&self) -> Address {
        Address(self.bytes.device_ptr(&stream()).0)
    }

    /// The values as plain numbers, once everything that was started has ended.
    pub(crate) fn read<T: bytemuck::Pod>(&self) -> Vec<T> {
        gpu().context().synchronize().expect("no kernel failed");
        let bytes = stream().clone_dtoh(&self.bytes).expect("the device answers");
        assert!(bytes[self.len..].iter().all(|&byte| byte == POISON), "a kernel wrote past the end");
        bytes[..self.len].chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
    }

    /// The values of `format`.
    pub(crate) fn read_floats(&self, format: Format) -> Vec<f64> {
        match format {
            Format::F32 => self.read::<f32>().into_iter().map(f64::from).collect(),
            Format::Bf16 => self.read::<u16>().into_iter().map(|v| bf16::from_bits(v).to_f64()).collect(),
        }
    }
}

/// `len` standard normal values, as `format` holds them.
pub(crate) fn normal(seed: u64, len: usize, format: Format) -> Vec<f64> {
    let mut words = Philox::new(seed).stream([0, 0, 0]);
    let mut values = Vec::with_capacity(len + 1);
    while values.len() < len {
        let (a, b) = normal_pair(words.next_u32(), words.next_u32());
        values.extend([a, b]);
    }
    values.truncate(len);
    values.into_iter().map(|value| held(value, format)).collect()
}

/// `value` as `format` holds it.
pub(crate) fn held(value: f64, format: Format) -> f64 {
    match format {
        Format::F32 => f64::from(value as f32),
        Format::Bf16 => bf16::from_f32(value as f32).to_f64(),
    }
}

/// Whether `found` is `expected` within `tolerance` of the root mean square of `expected`, and within
/// half a unit in the last place of `format` for each value.
pub(crate) fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64, format: Format) {
    assert_rounded(what, found, expected, tolerance, 1, format);
}

/// The same for values that are rounded `roundings` times on their way, where `expected` never was.
pub(crate) fn assert_rounded(
    what: &str,
    found: &[f64],
    expected: &[f64],
    tolerance: f64,
    roundings: i32,
    format: Format,
) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let mean = expected.iter().map(|e| e * e).sum::<f64>() / expected.len().max(1) as f64;
    let ulp = match format {
        Format::F32 => f64::from(f32::EPSILON),
        Format::Bf16 => 1.0 / 256.0,
    };
    let rounding = (1.0_f64 + ulp).powi(roundings) - 1.0;
    let mut worst = (0.0, 0);
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let excess = (f - e).abs() / (tolerance * mean.sqrt() + rounding * e.abs() + f64::MIN_POSITIVE);
        if excess.is_nan() || excess > worst.0 {
            worst = (excess, i);
            if excess.is_nan() {
                break;
            }
        }
    }
    let (excess, at) = worst;
    assert!(
        excess <= 1.0,
        "{what}: value {at} is {}, expected {} ({excess:.2} times the tolerance)",
        found[at],
        expected[at]
    );
}
