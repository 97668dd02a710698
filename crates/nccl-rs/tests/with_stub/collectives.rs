//! What operations leave in buffers, with and without blocking.

use nccl_rs::{
    Communicator, Config, DataType, DeviceSlice, DeviceSliceMut, Error, Mismatch, ReduceOp, Stream,
};

use crate::stub::{LONG, Stub, Value, lend, lend_mut};

const STREAM: Stream = Stream::DEFAULT;

fn both() -> [Config; 2] {
    [Config::new(), Config::new().non_blocking(LONG)]
}

/// Runs `rank` on three ranks that block and three that do not.
fn three(rank: impl Fn(&Communicator) -> Result<(), Error> + Sync) {
    for config in both() {
        for result in Stub::new().ranks(3, &config, |communicator| rank(&communicator)) {
            result.expect("all ranks call the same");
        }
    }
}

#[test]
fn all_reduce_combines_as_told() {
    three(|communicator| {
        let own = [communicator.rank() as f32 + 1.0, -4.0];
        for (op, expected) in [
            (ReduceOp::Sum, [6.0, -12.0]),
            (ReduceOp::Prod, [6.0, -64.0]),
            (ReduceOp::Max, [3.0, -4.0]),
            (ReduceOp::Min, [1.0, -4.0]),
            (ReduceOp::Avg, [2.0, -4.0]),
        ] {
            let mut result = [0.0; 2];
            communicator.all_reduce(lend(&own), lend_mut(&mut result), op, STREAM)?;
            assert_eq!(result, expected, "{op:?}");
            let mut values = own;
            communicator.all_reduce_in_place(lend_mut(&mut values), op, STREAM)?;
            assert_eq!(values, expected, "{op:?} in place");
        }
        Ok(())
    });
}

#[test]
fn types_have_the_numbers_of_the_header() {
    fn sum<T: Value + PartialEq + std::fmt::Debug>(communicator: &Communicator, one: T, three: T) {
        let mut values = [one];
        let summed = communicator.all_reduce_in_place(lend_mut(&mut values), ReduceOp::Sum, STREAM);
        summed.expect("all ranks call the same");
        assert_eq!(values, [three], "{}", T::TYPE);
    }
    three(|communicator| {
        sum(communicator, -1_i8, -3);
        sum(communicator, 85_u8, 255);
        sum(communicator, -100_000_i32, -300_000);
        sum(communicator, 1_u32 << 30, 3 << 30);
        sum(communicator, -(1_i64 << 40), -(3 << 40));
        sum(communicator, 1_u64 << 50, 3 << 50);
        sum(communicator, 0.5_f32, 1.5);
        sum(communicator, 0.1_f64, 0.1 + 0.1 + 0.1);
        // 1.0 and 3.0 in bfloat16.
        let mut bits = [0x3f80_u16];
        // SAFETY: the stand-in reads the host's memory, within the call.
        let bf16 = unsafe { DeviceSliceMut::from_raw_parts(bits.as_mut_ptr() as u64, 1, DataType::Bf16, 0) };
        communicator.all_reduce_in_place(bf16, ReduceOp::Sum, STREAM)?;
        assert_eq!(bits, [0x4040]);
        Ok(())
    });
}

#[test]
fn reduce_scatter_gives_each_rank_its_part() {
    three(|communicator| {
        let rank = communicator.rank() as i32;
        let own: Vec<i32> = (0..6).map(|at| at + 10 * rank).collect();
        let expected = [3 * (2 * rank) + 30, 3 * (2 * rank + 1) + 30];
        let mut part = [0; 2];
        communicator.reduce_scatter(lend(&own), lend_mut(&mut part), ReduceOp::Sum, STREAM)?;
        assert_eq!(part, expected);
        let mut values = own.clone();
        communicator.reduce_scatter_in_place(lend_mut(&mut values), ReduceOp::Sum, STREAM)?;
        let place = 2 * communicator.rank();
        assert_eq!(values[place..place + 2], expected);
        Ok(())
    });
}

#[test]
fn all_gather_puts_ranks_in_order() {
    three(|communicator| {
        let rank = communicator.rank();
        let own = [rank as u64 * 2, rank as u64 * 2 + 1];
        let mut all = [99_u64; 6];
        communicator.all_gather(lend(&own), lend_mut(&mut all), STREAM)?;
        assert_eq!(all, [0, 1, 2, 3, 4, 5]);
        let mut all = [99_u64; 6];
        all[2 * rank..2 * rank + 2].copy_from_slice(&own);
        communicator.all_gather_in_place(lend_mut(&mut all), STREAM)?;
        assert_eq!(all, [0, 1, 2, 3, 4, 5]);
        Ok(())
    });
}

#[test]
fn broadcast_and_reduce_know_their_root() {
    three(|communicator| {
        let rank = communicator.rank();
        for root in 0..communicator.count() {
            let mut values = [rank as u8; 3];
            communicator.broadcast(lend_mut(&mut values), root, STREAM)?;
            assert_eq!(values, [root as u8; 3]);

            let own = [rank as f64, 1.0];
            let mut result = [-1.0; 2];
            let to = Some(lend_mut(&mut result));
            communicator.reduce(lend(&own), to, (ReduceOp::Sum, root), STREAM)?;
            assert_eq!(result, if rank == root { [3.0, 3.0] } else { [-1.0; 2] });

            let to = (rank == root).then(|| lend_mut(&mut result));
            communicator.reduce(lend(&own), to, (ReduceOp::Max, root), STREAM)?;
            assert_eq!(result, if rank == root { [2.0, 1.0] } else { [-1.0; 2] });

            let mut values = own;
            communicator.reduce_in_place(lend_mut(&mut values), (ReduceOp::Sum, root), STREAM)?;
            assert_eq!(values, if rank == root { [3.0, 3.0] } else { own });
        }
        Ok(())
    });
}

#[test]
fn a_sent_value_arrives() {
    three(|communicator| {
        let mut value = [7_i64];
        match communicator.rank() {
            0 => communicator.send(lend(&value), 2, STREAM),
            2 => {
                value = [0];
                communicator.recv(lend_mut(&mut value), 0, STREAM)?;
                assert_eq!(value, [7]);
                Ok(())
            }
            _ => Ok(()),
        }
    });
}

#[test]
fn a_group_lets_ranks_send_in_a_ring() {
    three(|communicator| {
        let (rank, count) = (communicator.rank(), communicator.count());
        let from = [rank as i32; 4];
        let mut to = [-1; 4];
        communicator.library().group(|group| {
            group.send(communicator, lend(&from), (rank + 1) % count, STREAM)?;
            group.recv(communicator, lend_mut(&mut to), (rank + count - 1) % count, STREAM)
        })?;
        assert_eq!(to, [((rank + count - 1) % count) as i32; 4]);
        Ok(())
    });
}

#[test]
fn all_to_all_transposes() {
    three(|communicator| {
        let rank = communicator.rank() as i32;
        // Values r0 r0+1 for rank 0, and so on: which rank sent them, and to whom, shows.
        let from: Vec<i32> = (0..6).map(|at| 100 * rank + at).collect();
        let mut to = [-1; 6];
        communicator.all_to_all(lend(&from), lend_mut(&mut to), STREAM)?;
        let place = 2 * rank;
        assert_eq!(to, [place, place + 1, 100 + place, 101 + place, 200 + place, 201 + place]);
        Ok(())
    });
}

#[test]
fn all_to_all_v_moves_parts_of_any_size() {
    // What rank (row) sends to rank (column).
    const COUNTS: [[usize; 3]; 3] = [[2, 0, 1], [0, 0, 3], [4, 1, 0]];
    three(|communicator| {
        let rank = communicator.rank();
        let sends = COUNTS[rank];
        let receives = COUNTS.map(|row| row[rank]);
        let part =
            |from: usize, to: usize| (0..COUNTS[from][to]).map(move |at| (100 * from + 10 * to + at) as u32);
        let from: Vec<u32> = (0..3).flat_map(|peer| part(rank, peer)).collect();
        let expected: Vec<u32> = (0..3).flat_map(|peer| part(peer, rank)).collect();
        let mut to = vec![999; expected.len()];
        communicator.all_to_all_v((lend(&from), &sends), (lend_mut(&mut to), &receives), STREAM)?;
        assert_eq!(to, expected);
        Ok(())
    });
}

#[test]
fn parts_of_a_split_are_communicators() {
    three(|communicator| {
        let rank = communicator.rank();
        // Rank 1 alone; 2 before 0 by their keys.
        let part = communicator.split(Some((rank % 2) as u32), -(rank as i32), None)?;
        let part = part.expect("every rank has a color");
        assert_eq!((part.rank(), part.count()), [(1, 2), (0, 1), (0, 2)][rank]);
        let mut sum = [rank as i32 + 1];
        part.all_reduce_in_place(lend_mut(&mut sum), ReduceOp::Sum, STREAM)?;
        assert_eq!(sum, [if rank == 1 { 2 } else { 4 }]);

        let color = (rank == 0).then_some(0);
        let part = communicator.split(color, 0, Some(&Config::new().name("first")))?;
        assert_eq!(part.as_ref().and_then(Communicator::name), color.map(|_| "first"));
        Ok(())
    });
}

#[test]
fn a_group_spans_communicators() {
    three(|communicator| {
        let copy = communicator.split(Some(0), 0, None)?.expect("every rank has a color");
        let (mut sums, mut greatest) = ([1_i32; 2], [communicator.rank() as i32]);
        communicator.library().group(|group| {
            group.all_reduce_in_place(communicator, lend_mut(&mut sums), ReduceOp::Sum, STREAM)?;
            group.all_reduce_in_place(&copy, lend_mut(&mut greatest), ReduceOp::Max, STREAM)
        })?;
        assert_eq!((sums, greatest), ([3; 2], [2]));
        Ok(())
    });
}

#[test]
fn buffers_that_do_not_fit_are_refused_before_anything_starts() {
    let stub = Stub::new();
    for result in stub.ranks(2, &Config::new().name("misfits"), |communicator| misfits(&communicator)) {
        for (error, expected) in result {
            let Error::Buffer { who, mismatch, .. } = &error else { panic!("{error}") };
            assert_eq!(*mismatch, expected, "{error}");
            assert_eq!(who.name.as_deref(), Some("misfits"));
        }
    }
    for call in [
        "ncclAllReduce",
        "ncclReduceScatter",
        "ncclAllGather",
        "ncclReduce",
        "ncclSend",
        "ncclRecv",
        "ncclCommRegister",
    ] {
        assert_eq!(stub.calls(call), 0, "{call}");
    }
}

/// What a rank of two gets for buffers that do not fit, and what it should get.
fn misfits(communicator: &Communicator) -> Vec<(Error, Mismatch)> {
    let (three, mut room) = ([0_f32; 3], [0_f32; 4]);
    let mut bytes = [0_u8; 3];
    let mut found = Vec::new();
    let mut refused = |result: Result<(), Error>, expected| {
        found.push((result.expect_err("it does not fit"), expected));
    };
    let sum = ReduceOp::Sum;
    let uneven = Mismatch::Uneven { found: 3, count: 2 };

    let types = Mismatch::Types { sent: DataType::F32, received: DataType::U8 };
    refused(communicator.all_reduce(lend(&three), lend_mut(&mut bytes), sum, STREAM), types.clone());
    let length = Mismatch::Length { buffer: "output", found: 4, expected: 3 };
    refused(communicator.all_reduce(lend(&three), lend_mut(&mut room), sum, STREAM), length.clone());
    refused(communicator.all_to_all(lend(&three), lend_mut(&mut room), STREAM), length.clone());
    refused(communicator.reduce_scatter(lend(&three), lend_mut(&mut room), sum, STREAM), uneven.clone());
    refused(communicator.reduce_scatter_in_place(lend_mut(&mut room[..3]), sum, STREAM), uneven.clone());
    refused(communicator.all_to_all(lend(&three), lend_mut(&mut room[..3]), STREAM), uneven.clone());
    refused(communicator.all_gather_in_place(lend_mut(&mut room[..3]), STREAM), uneven);
    let length = Mismatch::Length { buffer: "input", found: 3, expected: 2 };
    refused(communicator.all_gather(lend(&three), lend_mut(&mut room), STREAM), length);
    refused(communicator.all_to_all(lend(&three[..2]), lend_mut(&mut bytes[..2]), STREAM), types);

    let parts = Mismatch::Parts { buffer: "input", found: 1, count: 2 };
    let to = (lend_mut(&mut room), &[2, 2][..]);
    refused(communicator.all_to_all_v((lend(&three), &[3]), to, STREAM), parts);
    let length = Mismatch::Length { buffer: "output", found: 4, expected: usize::MAX };
    let to = (lend_mut(&mut room), &[usize::MAX, 2][..]);
    refused(communicator.all_to_all_v((lend(&three), &[1, 2]), to, STREAM), length);

    let own = (sum, communicator.rank());
    refused(communicator.reduce(lend(&three), None, own, STREAM), Mismatch::NoOutput);
    // SAFETY: refused before anything is read.
    let elsewhere = unsafe { DeviceSlice::from_raw_parts(0, 3, DataType::F32, 5) };
    let device = Mismatch::Device { found: 5, expected: 0 };
    refused(communicator.all_reduce(elsewhere, lend_mut(&mut room[..3]), sum, STREAM), device.clone());
    // SAFETY: refused before the memory is used.
    refused(unsafe { communicator.register(elsewhere) }.map(|_| ()), device);
    found
}

#[test]
fn ranks_that_do_not_exist_are_refused() {
    let stub = Stub::new();
    let communicator = stub.alone(&Config::new());
    let (value, mut room) = ([1_u8], [0_u8]);
    let own = lend(&value);
    let results = [
        communicator.send(own, 1, STREAM),
        communicator.recv(lend_mut(&mut room), usize::MAX, STREAM),
        communicator.broadcast(lend_mut(&mut room), 1, STREAM),
        communicator.reduce(own, None, (ReduceOp::Sum, 1), STREAM),
        communicator.reduce_in_place(lend_mut(&mut room), (ReduceOp::Sum, 1), STREAM),
    ];
    for result in results {
        let error = result.expect_err("there is one rank");
        assert!(matches!(error, Error::NoSuchRank { count: 1, .. }), "{error}");
    }
}
