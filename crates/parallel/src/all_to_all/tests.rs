//! Machine by machine against straight, on machines that threads take themselves to be on.

use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use switchyard_comm::{Devices, ReduceOp, threads_on, with_devices};
use switchyard_kernels::bf16;

use super::*;

/// Machines and ranks of each.
const TOPOLOGIES: [(usize, usize); 3] = [(2, 2), (2, 4), (3, 2)];

const DIRECTIONS: [Direction; 2] = [Direction::ToExperts, Direction::ToTokens];

/// The machine of every rank.
fn machines((machines, ranks): (usize, usize)) -> Vec<usize> {
    (0..machines * ranks).map(|rank| rank / ranks).collect()
}

/// What every rank on `machines` makes of `rank`, with devices in main memory.
fn on_ranks<T: Send>(machines: &[usize], rank: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let start = |comm| {
            let rank = &rank;
            scope.spawn(move || rank(with_devices(comm, &Devices::MainMemory).expect("nobody is asked")))
        };
        let ranks = threads_on(machines, Duration::from_secs(60)).into_iter().map(start);
        ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().expect("no rank panics")).collect()
    })
}

/// A type of values with arbitrary bits.
trait Sample: Element {
    fn of(bits: u32) -> Self;
    fn bits(self) -> u32;
}

impl Sample for f32 {
    fn of(bits: u32) -> Self {
        Self::from_bits(bits)
    }
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Sample for bf16 {
    fn of(bits: u32) -> Self {
        Self::from_bits(bits as u16)
    }
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

impl Sample for i32 {
    fn of(bits: u32) -> Self {
        bits.cast_signed()
    }
    fn bits(self) -> u32 {
        self.cast_unsigned()
    }
}

fn bits<T: Sample>(values: &[T]) -> Vec<u32> {
    values.iter().map(|value| value.bits()).collect()
}

/// What rank `from` has for expert `expert` of rank `to`: `length` values that no other message has.
fn message<T: Sample>(from: usize, to: usize, expert: usize, length: usize) -> Vec<T> {
    let word = |at: usize| ((from * 16 + to) * 16 + expert) * 16 + at + 1;
    (0..length).map(|at| T::of((word(at) as u32).wrapping_mul(0x9e37_79b9) ^ 0x5bd1_e995)).collect()
}

/// Checks one exchange of the host against what each rank has for each other.
fn host_way<T: Sample>(all_to_all: &AllToAll, length: usize)
where
    for<'a> &'a [T]: Into<Buffer<'a>>,
    for<'a> &'a mut [T]: Into<BufferMut<'a>>,
{
    let (rank, size) = (all_to_all.group().rank(), all_to_all.group().size());
    let sent: Vec<T> = (0..size).flat_map(|to| message(rank, to, 0, length)).collect();
    let expected: Vec<T> = (0..size).flat_map(|from| message(from, rank, 0, length)).collect();
    assert_eq!(bits(&all_to_all.exchange(&sent).expect("all come")), bits(&expected));
}

fn slice<T: Sample>(values: &mut [T]) -> DeviceSlice {
    // SAFETY: exchanges have ended when they return, and the values are kept until then.
    unsafe { DeviceSlice::from_raw_parts(values.as_mut_ptr() as u64, values.len(), T::TYPE) }
}

/// Checks one exchange from device to device against what each rank has for each other.
fn device_way<T: Sample>(all_to_all: &AllToAll, direction: Direction, experts: usize, length: usize) {
    let (rank, size) = (all_to_all.group().rank(), all_to_all.group().size());
    let by_rank = || (0..size).flat_map(|rank| (0..experts).map(move |expert| (rank, expert)));
    let by_expert = || (0..experts).flat_map(|expert| (0..size).map(move |rank| (rank, expert)));
    let gives = |(to, expert): (usize, usize)| message::<T>(rank, to, expert, length);
    let gets = |(from, expert): (usize, usize)| message::<T>(from, rank, expert, length);
    let (mut sent, expected): (Vec<T>, Vec<T>) = match direction {
        Direction::ToExperts => (by_rank().flat_map(gives).collect(), by_expert().flat_map(gets).collect()),
        Direction::ToTokens => (by_expert().flat_map(gives).collect(), by_rank().flat_map(gets).collect()),
    };
    let mut staging = vec![T::default(); all_to_all.staged(sent.len())];
    let mut received = vec![T::default(); sent.len()];
    let (given, staging, received_at) = (slice(&mut sent), slice(&mut staging), slice(&mut received));
    let sizes = [size, experts];
    let (at_tokens, at_experts) = match direction {
        Direction::ToExperts => (Grid::by_rank(given, sizes), Grid::by_expert(received_at, sizes)),
        Direction::ToTokens => (Grid::by_rank(received_at, sizes), Grid::by_expert(given, sizes)),
    };
    let stream = DeviceStream::DEFAULT;
    all_to_all.exchange_on_devices(direction, at_tokens, staging, at_experts, stream).expect("all come");
    assert_eq!(bits(&received), bits(&expected), "{direction:?}, {experts} experts");
}

/// Checks an exchange of a chunk of `slots` slots of each of several experts: it takes what belongs to it and no more.
fn chunk_way(all_to_all: &AllToAll, direction: Direction, chunk: &SlotChunk, [experts, slots]: [usize; 2]) {
    const WIDTH: usize = 2;
    let (rank, size) = (all_to_all.group().rank(), all_to_all.group().size());
    let here = |slot: usize| slot * WIDTH..(slot + 1) * WIDTH;
    let of_expert = |from, to, expert| message::<i32>(from, to, expert, slots * WIDTH);
    let whole = || (0..size).flat_map(|peer| (0..experts).map(move |expert| (peer, expert)));
    let all: Vec<i32> = whole().flat_map(|(to, expert)| of_expert(rank, to, expert)).collect();
    let in_chunk = |(from, to): (usize, usize), expert: usize| {
        let slots = chunk.slots.clone().flat_map(here);
        let values = of_expert(from, to, expert);
        slots.map(|at| values[at]).collect::<Vec<_>>()
    };
    let at_experts: Vec<i32> = (chunk.experts.clone())
        .flat_map(|expert| (0..size).map(move |from| (from, expert)))
        .flat_map(|(from, expert)| in_chunk((from, rank), expert))
        .collect();
    let (mut tokens, mut there) = match direction {
        Direction::ToExperts => (all.clone(), vec![0; at_experts.len()]),
        Direction::ToTokens => (vec![-1; all.len()], at_experts.clone()),
    };
    let mut staging = vec![0; all_to_all.staged(there.len())];
    let at_tokens = Grid::chunk_by_rank(slice(&mut tokens), [size, experts, slots], chunk);
    let is_whole = chunk.experts.len() == experts && chunk.slots.len() == slots;
    assert_eq!(at_tokens.is_dense(), is_whole, "{chunk:?}");
    if chunk.slots.len() == slots {
        assert_eq!(at_tokens.as_one_expert().is_dense(), is_whole, "{chunk:?}");
    }
    let by_expert = Grid::by_expert(slice(&mut there), [size, chunk.experts.len()]);
    let stream = DeviceStream::DEFAULT;
    let staging = slice(&mut staging);
    all_to_all.exchange_on_devices(direction, at_tokens, staging, by_expert, stream).expect("all come");
    assert_eq!(there, at_experts, "{direction:?}, {chunk:?}");
    let slot_of = |at: usize| (at / WIDTH / slots % experts, at / WIDTH % slots);
    let belongs = |at: usize| {
        let (expert, slot) = slot_of(at);
        direction == Direction::ToExperts || chunk.experts.contains(&expert) && chunk.slots.contains(&slot)
    };
    let kept = |(at, &value): (usize, &i32)| if belongs(at) { value } else { -1 };
    let expected: Vec<i32> = all.iter().enumerate().map(kept).collect();
    assert_eq!(tokens, expected, "{direction:?}, {chunk:?}");
}

/// Checks every type, both on the host and from device to device.
fn all_ways(all_to_all: &AllToAll) {
    for length in [0, 1, 7] {
        host_way::<f32>(all_to_all, length);
        host_way::<bf16>(all_to_all, length);
        host_way::<i32>(all_to_all, length);
        for (direction, experts) in DIRECTIONS.into_iter().flat_map(|way| [(way, 1), (way, 3)]) {
            device_way::<f32>(all_to_all, direction, experts, length);
            device_way::<bf16>(all_to_all, direction, experts, length);
            device_way::<i32>(all_to_all, direction, experts, length);
        }
    }
    for direction in DIRECTIONS {
        for (experts, slots, sizes) in [(0..1, 0..3, [3, 3]), (1..3, 0..3, [3, 3]), (0..1, 1..4, [1, 5])] {
            chunk_way(all_to_all, direction, &SlotChunk { experts, slots }, sizes);
        }
    }
}

#[test]
fn both_ways_bring_every_bit_to_its_place() {
    for topology in TOPOLOGIES {
        on_ranks(&machines(topology), |group| {
            for choice in
                [HierarchicalAllToAll::Auto, HierarchicalAllToAll::Always, HierarchicalAllToAll::Never]
            {
                let all_to_all = AllToAll::new(Arc::clone(&group), choice).expect("all come");
                assert_eq!(all_to_all.is_hierarchical(), choice != HierarchicalAllToAll::Never);
                all_ways(&all_to_all);
            }
        });
    }
}

#[test]
fn ranks_that_stand_otherwise_send_straight() {
    for machines in [&[0, 0, 0, 0][..], &[0, 1, 2], &[0, 0, 0, 1], &[0, 1, 0, 1], &[0, 0, 1, 1, 2]] {
        on_ranks(machines, |group| {
            let all_to_all = AllToAll::new(group, HierarchicalAllToAll::Auto).expect("all come");
            assert!(!all_to_all.is_hierarchical(), "{machines:?}");
            all_ways(&all_to_all);
        });
    }
}

/// A group that notes what this rank sends to others, and holds pieces to what NCCL asks of them.
#[derive(Debug)]
struct Noted {
    group: Arc<dyn Communicator>,
    /// The group's ranks by their numbers in the whole one.
    members: Vec<usize>,
    /// Receiver and number of values of every message.
    sent: Arc<Mutex<Vec<(usize, usize)>>>,
}

impl Noted {
    fn new(group: Arc<dyn Communicator>) -> Self {
        let members = (0..group.size()).collect();
        Self { group, members, sent: Arc::default() }
    }

    fn note(&self, messages: impl Iterator<Item = (usize, usize)>) {
        let to_others = messages.filter(|&(peer, _)| peer != self.group.rank());
        let named = to_others.map(|(peer, values)| (self.members[peer], values));
        self.sent.lock().expect("no rank panics").extend(named);
    }

    /// What was sent since the last time, in the order of receivers.
    fn taken(&self) -> Vec<(usize, usize)> {
        let mut sent = std::mem::take(&mut *self.sent.lock().expect("no rank panics"));
        sent.sort_unstable();
        sent
    }
}

impl Communicator for Noted {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn label(&self) -> &str {
        self.group.label()
    }

    fn machines(&self) -> &[usize] {
        self.group.machines()
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.group.barrier()
    }

    fn broadcast(&self, buffer: BufferMut<'_>, root: usize) -> Result<(), CommError> {
        self.group.broadcast(buffer, root)
    }

    fn all_reduce(&self, buffer: BufferMut<'_>, op: ReduceOp) -> Result<(), CommError> {
        self.group.all_reduce(buffer, op)
    }

    fn reduce_scatter(
        &self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        op: ReduceOp,
    ) -> Result<(), CommError> {
        self.group.reduce_scatter(input, output, op)
    }

    fn all_gather(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError> {
        self.group.all_gather(input, output)
    }

    fn all_gather_v(
        &self,
        input: Buffer<'_>,
        output: BufferMut<'_>,
        counts: &[usize],
    ) -> Result<(), CommError> {
        self.group.all_gather_v(input, output, counts)
    }

    fn all_to_all(&self, input: Buffer<'_>, output: BufferMut<'_>) -> Result<(), CommError> {
        self.note((0..self.size()).map(|peer| (peer, input.len() / self.size())));
        self.group.all_to_all(input, output)
    }

    fn all_to_all_v(
        &self,
        input: Buffer<'_>,
        sends: &[usize],
        output: BufferMut<'_>,
        receives: &[usize],
    ) -> Result<(), CommError> {
        self.note(sends.iter().copied().enumerate());
        self.group.all_to_all_v(input, sends, output, receives)
    }

    fn split(&self, color: usize, label: &str) -> Result<Arc<dyn Communicator>, CommError> {
        let group = self.group.split(color, label)?;
        let mut members = vec![0_u64; group.size()];
        let own = self.members[self.rank()] as u64;
        group.all_gather([own].as_slice().into(), members.as_mut_slice().into())?;
        let members = members.into_iter().map(|member| member as usize).collect();
        Ok(Arc::new(Self { group, members, sent: Arc::clone(&self.sent) }))
    }

    fn on_devices(&self) -> Option<&dyn DeviceCommunicator> {
        Some(self)
    }
}

impl DeviceCommunicator for Noted {
    fn all_reduce(&self, values: DeviceSlice, op: ReduceOp, stream: DeviceStream) -> Result<(), CommError> {
        on_devices(&*self.group).all_reduce(values, op, stream)
    }

    fn all_gather(
        &self,
        input: DeviceSlice,
        output: DeviceSlice,
        stream: DeviceStream,
    ) -> Result<(), CommError> {
        on_devices(&*self.group).all_gather(input, output, stream)
    }

    /// A send and the receive that answers it have one size.
    fn exchange(&self, sends: &[Piece], receives: &[Piece], stream: DeviceStream) -> Result<(), CommError> {
        let sizes = |pieces: &[Piece]| -> Vec<Vec<u64>> {
            let of_peer = |peer| pieces.iter().filter(move |piece| piece.peer == peer);
            let sizes = |peer| of_peer(peer).map(|piece| piece.values.len() as u64).collect();
            (0..self.size()).map(sizes).collect()
        };
        let counts = |sizes: &[Vec<u64>]| sizes.iter().map(Vec::len).collect::<Vec<_>>();
        let (sent, awaited) = (sizes(sends), sizes(receives));
        let mut announced = vec![0_u64; awaited.concat().len()];
        let room = announced.as_mut_slice().into();
        self.group.all_to_all_v(sent.concat().as_slice().into(), &counts(&sent), room, &counts(&awaited))?;
        assert_eq!(announced, awaited.concat(), "sizes of pieces");
        self.note(sends.iter().map(|piece| (piece.peer, piece.values.len())));
        on_devices(&*self.group).exchange(sends, receives, stream)
    }

    fn check(&self) -> Result<(), CommError> {
        on_devices(&*self.group).check()
    }
}

#[test]
fn a_rank_sends_one_message_to_each_other_machine() {
    const LENGTH: usize = 5;
    const EXPERTS: usize = 3;
    for topology in TOPOLOGIES {
        let (machines_of_all, ranks) = (machines(topology), topology.1);
        on_ranks(&machines_of_all, |group| {
            let rank = group.rank();
            let elsewhere = |other: &usize| machines_of_all[*other] != machines_of_all[rank];
            let others: Vec<usize> = (0..group.size()).filter(elsewhere).collect();
            let counterparts = others.iter().copied().filter(|other| other % ranks == rank % ranks);
            let counterparts: Vec<usize> = counterparts.collect();
            let noted = Arc::new(Noted::new(group));
            let sent = |choice, exchange: &dyn Fn(&AllToAll)| {
                let all_to_all = AllToAll::new(Arc::clone(&noted) as _, choice).expect("all come");
                assert_eq!(noted.taken(), [], "splitting sends nothing that counts");
                exchange(&all_to_all);
                let mut to_machines = noted.taken();
                to_machines.retain(|(to, _)| elsewhere(to));
                to_machines
            };
            let each = |to: &[usize], values: usize| to.iter().map(|&to| (to, values)).collect::<Vec<_>>();

            let host = |all_to_all: &AllToAll| host_way::<f32>(all_to_all, LENGTH);
            assert_eq!(sent(HierarchicalAllToAll::Auto, &host), each(&counterparts, ranks * LENGTH));
            assert_eq!(sent(HierarchicalAllToAll::Never, &host), each(&others, LENGTH));

            for direction in DIRECTIONS {
                let device = |all_to_all: &AllToAll| {
                    device_way::<f32>(all_to_all, direction, EXPERTS, LENGTH);
                };
                let whole = ranks * EXPERTS * LENGTH;
                assert_eq!(sent(HierarchicalAllToAll::Auto, &device), each(&counterparts, whole));
                let pieces: Vec<usize> = others.iter().flat_map(|&other| [other; EXPERTS]).collect();
                assert_eq!(sent(HierarchicalAllToAll::Never, &device), each(&pieces, LENGTH));
            }
        });
    }
}
