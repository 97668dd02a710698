//! Collectives on devices' memory: in main memory, and with a stand-in for NCCL whose devices are the host.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use switchyard_comm::{
    Communicator, DeviceSlice, DeviceStream, Devices, ElementType, Piece, ReduceOp, threads, with_devices,
};

const PATIENCE: Duration = Duration::from_secs(60);

const STREAM: DeviceStream = DeviceStream::DEFAULT;

fn on_threads<T: Send>(size: usize, rank: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let start = |comm| {
            let rank = &rank;
            scope.spawn(move || rank(comm))
        };
        let ranks: Vec<_> = threads(size, PATIENCE).into_iter().map(start).collect();
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

#[cfg(feature = "nccl")]
mod nccl {
    use std::process::Command;

    use nccl_rs::Library;
    use switchyard_comm::CommError;

    use super::*;

    /// The stand-in that nccl-rs is tested with, built anew.
    fn stand_in() -> (Library, tempfile::TempDir) {
        let directory = tempfile::tempdir().expect("a directory for the build");
        let file = directory.path().join("libnccl-stub.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../nccl-rs/tests/with_stub/stub.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-std=gnu11", "-O1", "-shared", "-fPIC", "-pthread", source, "-o"]).arg(&file);
        let output = compiler.output().expect("a C compiler called `cc` is on the path");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        (Library::open(&file).expect("the stand-in has all functions"), directory)
    }

    fn devices(
        library: &Library,
        timeout: Duration,
        bind: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    ) -> Devices {
        Devices::Nccl { library: library.clone(), bind: Arc::new(bind), timeout }
    }

    #[test]
    fn gpus_do_all_operations() {
        let (library, _directory) = stand_in();
        for size in [2, 3, 4] {
            groups_work(size, &devices(&library, PATIENCE, || Ok(())));
        }
    }

    #[test]
    fn a_rank_without_its_gpu_says_so_and_the_others_do_not_wait_for_ever() {
        let (library, _directory) = stand_in();
        let errors = on_threads(2, |group| {
            let broken = group.rank() == 1;
            let bind = move || if broken { Err("no GPU here".to_owned()) } else { Ok(()) };
            let patience = if broken { PATIENCE } else { Duration::from_millis(200) };
            with_devices(group, &devices(&library, patience, bind)).map(|_| ())
        });
        let [first, second] = errors.try_into().expect("two ranks");
        let (first, second) = (first.unwrap_err(), second.unwrap_err());
        assert!(matches!(first, CommError::Timeout { operation: "joining NCCL", .. }), "{first}");
        assert_eq!(second.to_string(), "joining NCCL of group `world` failed: no GPU here");
    }

    #[test]
    fn what_the_library_refuses_is_told() {
        let (library, _directory) = stand_in();
        let errors = on_threads(2, |group| {
            let group = with_devices(group, &devices(&library, PATIENCE, || Ok(()))).expect("both come");
            let device = group.on_devices().expect("two ranks");
            let (mut two, mut three) = ([0.0; 2], [0.0; 3]);
            device.all_gather(floats(&mut two), floats(&mut three), STREAM).unwrap_err()
        });
        for error in errors {
            let text = error.to_string();
            assert!(text.starts_with("all_gather of group `world` failed: "), "{text}");
        }
    }
}
