//! Collectives on devices' memory: in main memory, and with a stand-in for NCCL whose devices are the host.

use std::cell::Cell;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use switchyard_comm::bench::{MeasuredDevice, Measurement, collectives_on_devices};
use switchyard_comm::{
    CommError, Communicator, DeviceSlice, DeviceStream, Devices, ElementType, Piece, ReduceOp, threads,
    with_devices,
};

const PATIENCE: Duration = Duration::from_secs(60);

const STREAM: DeviceStream = DeviceStream::DEFAULT;

fn on_threads<T: Send>(size: usize, rank: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
    on_threads_for(PATIENCE, size, rank)
}

fn on_threads_for<T: Send>(
    timeout: Duration,
    size: usize,
    rank: impl Fn(Arc<dyn Communicator>) -> T + Sync,
) -> Vec<T> {
    thread::scope(|scope| {
        let start = |comm| {
            let rank = &rank;
            scope.spawn(move || rank(comm))
        };
        let ranks: Vec<_> = threads(size, timeout).into_iter().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    })
}

fn floats(values: &mut [f32]) -> DeviceSlice {
    // SAFETY: operations have ended when they return, and the tests keep the values until then.
    unsafe { DeviceSlice::from_raw_parts(values.as_mut_ptr() as u64, values.len(), ElementType::F32) }
}

fn integers(values: &mut [i32]) -> DeviceSlice {
    // SAFETY: as above.
    unsafe { DeviceSlice::from_raw_parts(values.as_mut_ptr() as u64, values.len(), ElementType::I32) }
}

/// What `from` sends `to` in piece `number` of two: as many values as the three add up to.
fn message(from: usize, to: usize, number: usize) -> Vec<f32> {
    vec![(from * 100 + to * 10 + number) as f32; from + to + number]
}

fn all_operations(group: &dyn Communicator) {
    let device = group.on_devices().expect("a group with devices");
    let (rank, size) = (group.rank(), group.size());

    let mut sum = [rank as f32, 1.0, -2.0];
    device.all_reduce(floats(&mut sum), ReduceOp::Sum, STREAM).expect("all come");
    let all = (0..size).sum::<usize>() as f32;
    assert_eq!(sum, [all, size as f32, -2.0 * size as f32]);
    let mut largest = [rank as i32, -(rank as i32)];
    device.all_reduce(integers(&mut largest), ReduceOp::Max, STREAM).expect("all come");
    assert_eq!(largest, [size as i32 - 1, 0]);

    let (mut own, mut gathered) = ([rank as i32, 7], vec![0; 2 * size]);
    device.all_gather(integers(&mut own), integers(&mut gathered), STREAM).expect("all come");
    let expected: Vec<i32> = (0..size as i32).flat_map(|rank| [rank, 7]).collect();
    assert_eq!(gathered, expected);

    let peers = || (0..size).flat_map(|peer| [(peer, 0), (peer, 1)]);
    let mut sent: Vec<Vec<f32>> = peers().map(|(peer, number)| message(rank, peer, number)).collect();
    let mut received: Vec<Vec<f32>> =
        peers().map(|(peer, number)| vec![0.0; message(peer, rank, number).len()]).collect();
    let pieces = |buffers: &mut Vec<Vec<f32>>| -> Vec<Piece> {
        peers().zip(buffers).map(|((peer, _), values)| Piece { peer, values: floats(values) }).collect()
    };
    device.exchange(&pieces(&mut sent), &pieces(&mut received), STREAM).expect("all come");
    for ((peer, number), values) in peers().zip(received) {
        assert_eq!(values, message(peer, rank, number));
    }
}

/// The operations of a group and of those that are split from it.
fn groups_work(size: usize, devices: &Devices) {
    on_threads(size, |group| {
        let group = with_devices(group, devices).expect("the devices are there");
        all_operations(&*group);
        let part = group.split(group.rank() % 2, "part").expect("all come");
        match part.size() {
            1 => assert!(part.on_devices().is_none(), "one rank has nobody to talk to"),
            _ => all_operations(&*part),
        }
        // The processes have their operations as before.
        let mut values = [1.0_f32];
        group.all_reduce(values.as_mut_slice().into(), ReduceOp::Sum).expect("all come");
        assert_eq!(values, [size as f32]);
    });
}

#[test]
fn devices_in_main_memory_do_all_operations() {
    for size in [2, 3, 4] {
        groups_work(size, &Devices::MainMemory);
    }
}

#[test]
fn parts_lie_where_their_values_do() {
    let mut values = [0.0; 8];
    let whole = floats(&mut values);
    let part = whole.part(2..5);
    assert_eq!((part.address() - whole.address(), part.len(), part.bytes()), (8, 3, 12));
    assert!(whole.part(8..8).is_empty());
}

/// Main memory as a device on which an operation takes a second.
#[derive(Default)]
struct Slow {
    kept: Vec<Vec<f32>>,
    operations: Cell<usize>,
}

impl MeasuredDevice for Slow {
    fn zeros(&mut self, element: ElementType, len: usize) -> DeviceSlice {
        let mut values = vec![0.0_f32; (len * element.bytes()).div_ceil(4)];
        let address = values.as_mut_ptr() as u64;
        self.kept.push(values);
        // SAFETY: operations have ended when they return, and the values stay until the device goes.
        unsafe { DeviceSlice::from_raw_parts(address, len, element) }
    }

    fn stream(&self) -> DeviceStream {
        STREAM
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<(), CommError>) -> Result<f64, CommError> {
        work()?;
        self.operations.set(self.operations.get() + 1);
        Ok(1.0)
    }
}

/// What two ranks measure three times, and the operations that the first was asked for.
fn measured(devices: &Devices) -> (Vec<Measurement>, usize) {
    let mut ranks = on_threads(2, |group| {
        let group = with_devices(group, devices).expect("the devices are there");
        let mut device = Slow::default();
        let found = collectives_on_devices(&*group, devices, &mut device, &[5, 64], 3).expect("all come");
        (found, device.operations.get())
    });
    let (second, first) = (ranks.pop().expect("two ranks"), ranks.pop().expect("two ranks"));
    assert_eq!(first.0, second.0, "all ranks know the same");
    first
}

/// Operations, formats and sizes in the order of measurements.
fn expected(bare_seconds: Option<f64>) -> Vec<Measurement> {
    let of = |element: ElementType, bytes| {
        ["all_reduce", "all_to_all", "all_gather"].map(|operation| {
            let seconds = 1.0;
            Measurement { operation, element, bytes, ranks: 2, seconds, bare_seconds }
        })
    };
    // Five bytes become what both ranks can share: two values of bf16, two of f32.
    let (bf16, f32) = (ElementType::Bf16, ElementType::F32);
    [of(bf16, 4), of(bf16, 64), of(f32, 8), of(f32, 64)].concat()
}

#[test]
fn operations_of_devices_are_measured_in_every_format() {
    let (found, operations) = measured(&Devices::MainMemory);
    assert_eq!(found, expected(None));
    // Twice to begin with, then one round that does not count and three that do, one operation each.
    assert_eq!(operations, found.len() * 6);
}

#[test]
fn waits_end_when_what_they_wait_for_is_there() {
    on_threads(2, |group| {
        let group = with_devices(group, &Devices::MainMemory).expect("nobody is asked");
        let mut asked = 0;
        let mut hundredth = || {
            asked += 1;
            asked == 100
        };
        group.wait_for("a step", &mut hundredth).expect("nothing fails");
        assert_eq!(asked, 100);
        group.barrier().expect("both come");
    });
}

#[test]
fn a_deadline_that_passes_ends_waits_and_breaks_the_group() {
    on_threads_for(Duration::from_millis(200), 2, |group| {
        let group = with_devices(group, &Devices::MainMemory).expect("nobody is asked");
        let error = match group.rank() {
            0 => group.wait_for("a step", &mut || false).unwrap_err(),
            _ => loop {
                // Until the other rank's wait has ended.
                if let Err(error) = group.wait_for("a step", &mut || true) {
                    break error;
                }
            },
        };
        assert!(matches!(error, CommError::Timeout { operation: "a step", .. }), "{error}");
        assert_eq!(group.barrier(), Err(error));
    });
}

#[cfg(feature = "nccl")]
mod nccl {
    use std::ffi::{CString, c_char, c_int};
    use std::process::Command;
    use std::time::Instant;

    use nccl_rs::Library;

    use super::*;

    /// The stand-in that nccl-rs is tested with, built anew.
    struct StandIn {
        library: Library,
        raw: libloading::Library,
        _directory: tempfile::TempDir,
    }

    impl StandIn {
        /// # Safety
        /// `F` is the type of the function in `stub.c`.
        unsafe fn function<F: Copy>(&self, name: &str) -> F {
            // SAFETY: promised by the caller.
            *unsafe { self.raw.get::<F>(name) }.expect("the stand-in has it")
        }

        fn calls(&self, name: &str) -> c_int {
            let name = CString::new(name).expect("no zero byte");
            // SAFETY: the type is that of `stub.c`.
            unsafe {
                self.function::<unsafe extern "C" fn(*const c_char) -> c_int>("stub_calls")(name.as_ptr())
            }
        }

        /// Lets communicators of this name meet a fault in the background.
        fn breaks(&self, group: &str) {
            const REMOTE_ERROR: c_int = 6;
            let name = CString::new(group).expect("no zero byte");
            // SAFETY: as above.
            unsafe {
                let set = self.function::<unsafe extern "C" fn(c_int, *const c_char)>("stub_set_async_error");
                set(REMOTE_ERROR, name.as_ptr());
            }
        }

        /// Lets ranks be refused when they join, in these words.
        fn refuses(&self, warning: &str) {
            const INVALID_USAGE: c_int = 5;
            let warning = CString::new(warning).expect("no zero byte");
            // SAFETY: as above.
            unsafe {
                self.function::<unsafe extern "C" fn(*const c_char)>("stub_set_warning")(warning.as_ptr());
                let fail = self.function::<unsafe extern "C" fn(*const c_char, c_int)>("stub_fail");
                fail(c"joining".as_ptr(), INVALID_USAGE);
            }
        }
    }

    fn stand_in() -> StandIn {
        let directory = tempfile::tempdir().expect("a directory for the build");
        let file = directory.path().join("libnccl-stub.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../nccl-rs/tests/with_stub/stub.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-std=gnu11", "-O1", "-shared", "-fPIC", "-pthread", source, "-o"]).arg(&file);
        let output = compiler.output().expect("a C compiler called `cc` is on the path");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // SAFETY: its initialisers do nothing.
        let raw = unsafe { libloading::Library::new(&file) }.expect("it can be loaded");
        let library = Library::open(&file).expect("the stand-in has all functions");
        StandIn { library, raw, _directory: directory }
    }

    fn devices(StandIn { library, .. }: &StandIn) -> Devices {
        Devices::Nccl { library: library.clone(), bind: Arc::new(|| Ok(())) }
    }

    #[test]
    fn gpus_do_all_operations() {
        let stand_in = stand_in();
        for size in [2, 3, 4] {
            groups_work(size, &devices(&stand_in));
        }
    }

    #[test]
    fn a_rank_without_its_gpu_says_so_and_the_others_do_not_wait_for_ever() {
        let stand_in = stand_in();
        let join = |group: Arc<dyn Communicator>| {
            let broken = group.rank() == 1;
            let bind = move || if broken { Err("no GPU here".to_owned()) } else { Ok(()) };
            let devices = Devices::Nccl { library: stand_in.library.clone(), bind: Arc::new(bind) };
            with_devices(group, &devices).map(drop)
        };
        let errors = on_threads_for(Duration::from_secs(2), 2, join);
        let [first, second] = errors.try_into().expect("two ranks");
        let (first, second) = (first.unwrap_err(), second.unwrap_err());
        assert!(matches!(first, CommError::Timeout { operation: "joining NCCL", .. }), "{first}");
        assert_eq!(second.to_string(), "joining NCCL of group `world` failed: no GPU here");
    }

    #[test]
    fn what_the_library_refuses_is_told() {
        let stand_in = stand_in();
        let errors = on_threads(2, |group| {
            let group = with_devices(group, &devices(&stand_in)).expect("both come");
            let device = group.on_devices().expect("two ranks");
            let (mut two, mut three) = ([0.0; 2], [0.0; 3]);
            device.all_gather(floats(&mut two), floats(&mut three), STREAM).unwrap_err()
        });
        for error in errors {
            let text = error.to_string();
            assert!(text.starts_with("all_gather on GPUs of group `world` failed: "), "{text}");
        }
    }

    #[test]
    fn ranks_that_share_a_gpu_are_told_how_not_to() {
        let stand_in = stand_in();
        stand_in.refuses("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000");
        let errors = on_threads(2, |group| with_devices(group, &devices(&stand_in)).map(|_| ()).unwrap_err());
        for error in errors {
            assert!(!error.may_pass(), "{error}");
            let text = error.to_string();
            for part in ["group `world` share a GPU", "both on CUDA device 1b000", "--device cuda"] {
                assert!(text.contains(part), "{part} in {text}");
            }
        }
        stand_in.refuses("the network is down");
        let errors = on_threads(2, |group| with_devices(group, &devices(&stand_in)).map(|_| ()).unwrap_err());
        assert!(errors.iter().all(|error| matches!(error, CommError::Library { .. }) && error.may_pass()));
    }

    #[test]
    fn a_fault_of_any_group_ends_a_wait_and_all_groups() {
        let stand_in = stand_in();
        on_threads(2, |world| {
            let world = with_devices(world, &devices(&stand_in)).expect("both come");
            let [expert, data] = ["expert", "data"].map(|label| world.split(0, label).expect("both come"));
            let on = |group: &Arc<dyn Communicator>| group.on_devices().map(|device| device.check());
            assert_eq!([&world, &expert, &data].map(on), [const { Some(Ok(())) }; 3]);
            world.barrier().expect("both come");
            stand_in.breaks("expert");
            let error = world.wait_for("a step", &mut || false).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "an operation on GPUs of group `expert` failed: NCCL, rank {} of 2 in `expert`: an operation \
                     broke in the background: remote process exited or there was a network error",
                    world.rank()
                )
            );
            // None of them is of use now, and what their streams waited for has ended.
            assert_eq!([&world, &expert, &data].map(on), [(); 3].map(|()| Some(Err(error.clone()))));
            let mut values = [1.0];
            let refused =
                data.on_devices().expect("two ranks").all_reduce(floats(&mut values), ReduceOp::Sum, STREAM);
            assert_eq!((refused, values), (Err(error), [1.0]));
        });
        let began = Instant::now();
        while stand_in.calls("ncclCommAbort") < 6 {
            assert!(began.elapsed() < PATIENCE, "{} of 6 are given up", stand_in.calls("ncclCommAbort"));
            thread::yield_now();
        }
    }

    #[test]
    fn nccl_is_measured_by_itself_in_turns() {
        let stand_in = stand_in();
        let (found, operations) = measured(&devices(&stand_in));
        assert_eq!(found, expected(Some(1.0)));
        assert_eq!(operations, found.len() * 12);
        // On two ranks, half of them bare; each is asked for in four formats and sizes.
        let expected = 2 * 4 * 12;
        assert_eq!([stand_in.calls("ncclAllReduce"), stand_in.calls("ncclAllGather")], [expected; 2]);
        assert_eq!([stand_in.calls("ncclSend"), stand_in.calls("ncclRecv")], [2 * expected; 2]);
    }
}
