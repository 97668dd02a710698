//! The same ways from device to device: put on the stream of the ranks' work, not waited for.

use std::collections::BTreeMap;
use std::sync::Arc;

use switchyard_comm::{CommError, DeviceCommunicator, Piece, ReduceOp};
use switchyard_config::partition::Part;
use switchyard_kernels::{DeviceFormat, DeviceValues, SideKind, SideWork, Values};

use super::overlap::{Overlap, Turn, turns};
use super::{Bucket, Lane, Leg, OwnerExchange, travelling};
use crate::on_devices::{slice, stream};
use crate::sums::Gradients;

/// Groups of several ranks have devices, or the gradients would be elsewhere.
const HAVE_DEVICES: &str = "the ranks exchange from device to device";

impl OwnerExchange {
    /// Sums of the gradients of all holders, of the matrices that this rank owns: what
    /// [`reduce`](Self::reduce) adds to nothing, where all of it lies on the ranks' devices.
    ///
    /// Every rank has gradients of the same parameters in the same formats.
    ///
    /// # Errors
    /// As every collective.
    ///
    /// # Panics
    /// When a gradient is not on the device, or the ranks have none.
    pub fn reduce_on_devices(
        &self,
        mut local: Gradients,
        overlap: Overlap<'_>,
    ) -> Result<Gradients, CommError> {
        let mut owned = Gradients::new();
        let (lanes, alone): (Vec<&Lane>, Vec<&Lane>) =
            [&self.dense, &self.expert].into_iter().partition(|lane| lane.group.size() > 1);
        alone.into_iter().for_each(|lane| lane.keep(&mut local, &self.sums, &mut owned));
        let Some(any) = local.values().next().map(on_device) else { return Ok(owned) };
        let rooms = || lanes.iter().map(|lane| SumRoom::new(&lane.buckets, &local, self)).collect::<Vec<_>>();
        let rank = |turn: &Turn<'_>| lanes[turn.lane].group.rank();
        let devices = |turn: &Turn<'_>| lanes[turn.lane].group.on_devices().expect(HAVE_DEVICES);
        let rooms = match overlap {
            Overlap::BackwardPass(marks) => {
                let turns = turns(&lanes, Some((marks, Arc::new(any.mark()))));
                let Some(first) = turns.first() else { return Ok(owned) };
                let side = SideWork::behind(
                    first.behind.as_ref().expect("there are marks"),
                    any,
                    SideKind::Exchange,
                );
                let rooms = rooms();
                let travelled = turns.iter().try_for_each(|turn| {
                    turn.behind.iter().for_each(|mark| mark.holds(any));
                    let cargo = turn.bucket.packed_gradients(rank(turn), &local);
                    cargo.travel(devices(turn), any)?;
                    rooms[turn.lane].add_all(&cargo.arrived);
                    Ok(())
                });
                // Before the gradients' memory goes to others, also after an error.
                side.leave().holds(any);
                travelled?;
                rooms
            }
            Overlap::Nothing | Overlap::Exchanges => {
                let (turns, rooms) = (turns(&lanes, None), rooms());
                let land = |turn: &Turn<'_>, cargo: Cargo<'_>| rooms[turn.lane].add_all(&cargo.arrived);
                overlap.travel(
                    &turns,
                    any,
                    devices,
                    |turn| turn.bucket.packed_gradients(rank(turn), &local),
                    || (),
                    land,
                )?;
                rooms
            }
        };
        owned.extend(rooms.into_iter().flat_map(SumRoom::into_gradients));
        Ok(owned)
    }

    /// Makes of `values` their sums over all ranks.
    ///
    /// # Errors
    /// As every collective.
    pub fn sum_over_ranks(&self, values: &DeviceValues) -> Result<(), CommError> {
        let Some(devices) = self.world.on_devices() else { return Ok(()) };
        devices.all_reduce(slice(values), ReduceOp::Sum, stream(values))
    }

    /// Brings new values from the owners to all holders, as [`spread`](Self::spread) does. `renew` makes those of what
    /// this rank owns and has a [bucket](super::Unit::bucket) of this number, one after the other; those of the bucket
    /// before travel meanwhile. `owned` tells the values of the matrices that this rank owns, `held` has what its model
    /// computes with, in one
    /// format with those.
    ///
    /// # Errors
    /// As every collective.
    ///
    /// # Panics
    /// When a parameter is in neither, or the ranks have no devices.
    pub fn spread_on_devices(
        &self,
        renew: impl Fn(usize),
        owned: impl Fn(&str) -> DeviceValues,
        held: &BTreeMap<String, DeviceValues>,
        overlap: Overlap<'_>,
    ) -> Result<(), CommError> {
        let lanes = travelling([&self.dense, &self.expert]);
        let Some(any) = held.values().next() else { return Ok(()) };
        let devices = |turn: &Turn<'_>| lanes[turn.lane].group.on_devices().expect(HAVE_DEVICES);
        let land =
            |_: &Turn<'_>, cargo: Cargo<'_>| cargo.arrived.iter().for_each(|message| message.land(held));
        let turns = turns(&lanes, None);
        overlap.travel(
            &turns,
            any,
            devices,
            |turn| {
                renew(turn.number);
                turn.bucket.packed_values(&owned, held)
            },
            || renew(turns.len()),
            land,
        )
    }
}

/// Values that go from one rank to another as one.
struct Message<'a> {
    peer: usize,
    /// What they belong to, one behind the other.
    legs: Vec<&'a Leg>,
    values: DeviceValues,
}

impl Message<'_> {
    fn piece(&self) -> Piece {
        Piece { peer: self.peer, values: slice(&self.values) }
    }

    /// Writes new values where they belong.
    fn land(&self, held: &BTreeMap<String, DeviceValues>) {
        let mut from = 0;
        for leg in &self.legs {
            let (there, len) = (&held[&leg.name], leg.held.len());
            let new = self.values.part(from..from + len);
            there.write_part(&[there.len()], [&[leg.held.start], &[len]], &new, false);
            from += len;
        }
    }
}

/// What of a bucket goes to others and what comes, of this rank too.
pub(super) struct Cargo<'a> {
    sent: Vec<Message<'a>>,
    arrived: Vec<Message<'a>>,
    /// This rank, if what arrives from it is there already.
    here: Option<usize>,
}

impl Cargo<'_> {
    /// Asks for the exchange, on the stream of work on `any`.
    pub(super) fn travel(
        &self,
        devices: &dyn DeviceCommunicator,
        any: &DeviceValues,
    ) -> Result<(), CommError> {
        let sends: Vec<Piece> = self.sent.iter().map(Message::piece).collect();
        let others = self.arrived.iter().filter(|message| Some(message.peer) != self.here);
        let receives: Vec<Piece> = others.map(Message::piece).collect();
        devices.exchange(&sends, &receives, stream(any))
    }
}

/// Legs that travel together since their values have one format.
fn by_format<'a>(
    legs: impl Iterator<Item = &'a Leg>,
    format: impl Fn(&Leg) -> DeviceFormat,
) -> impl Iterator<Item = Vec<&'a Leg>> {
    let (narrow, wide): (Vec<&Leg>, Vec<&Leg>) = legs.partition(|leg| format(leg) == DeviceFormat::Bf16);
    [narrow, wide].into_iter().filter(|legs| !legs.is_empty())
}

impl Bucket {
    /// Gradients for their owners, and room for what all holders have of those that this rank owns, in the order of
    /// their ranks.
    fn packed_gradients<'a>(&'a self, own_rank: usize, local: &Gradients) -> Cargo<'a> {
        let there = |leg: &&Leg| leg.adds && local.contains_key(&leg.name);
        let here = |leg: &Leg| on_device(&local[&leg.name]);
        let messages_with = |peer: usize, legs: &'a [Leg], values: &dyn Fn(&[&Leg]) -> DeviceValues| {
            let groups = by_format(legs.iter().filter(there), |leg| here(leg).format());
            groups.map(|legs| Message { peer, values: values(&legs), legs }).collect::<Vec<_>>()
        };
        let packed =
            |legs: &[&Leg]| DeviceValues::joined(legs.iter().map(|leg| here(leg).part(leg.held.clone())));
        let room = |legs: &[&Leg]| here(legs[0]).room(legs.iter().map(|leg| leg.held.len()).sum());
        let (mut sent, mut arrived) = (Vec::new(), Vec::new());
        for (owner, legs) in self.held.iter().enumerate().filter(|(owner, _)| *owner != own_rank) {
            sent.extend(messages_with(owner, legs, &packed));
        }
        for (holder, legs) in self.owned.iter().enumerate() {
            let values: &dyn Fn(&[&Leg]) -> DeviceValues = if holder == own_rank { &packed } else { &room };
            arrived.extend(messages_with(holder, legs, values));
        }
        Cargo { sent, arrived, here: Some(own_rank) }
    }

    /// New values for their holders, and room for those that this rank holds.
    fn packed_values<'a>(
        &'a self,
        owned: &impl Fn(&str) -> DeviceValues,
        held: &BTreeMap<String, DeviceValues>,
    ) -> Cargo<'a> {
        let travels = |leg: &&Leg| !leg.stays;
        let format = |leg: &Leg| held[&leg.name].format();
        let mut sent: Vec<Message<'_>> = Vec::new();
        for (peer, legs) in self.owned.iter().enumerate() {
            for legs in by_format(legs.iter().filter(travels), format) {
                // Holders of the same parts get the same values.
                let packed = sent.iter().find(|earlier| same_parts(&earlier.legs, &legs));
                let packed = packed.map(|earlier| earlier.values.clone());
                let values = packed.unwrap_or_else(|| {
                    DeviceValues::joined(legs.iter().map(|leg| {
                        let Part { start, shape } = &leg.landing;
                        owned(&leg.name).part_of(&leg.unit_shape, [start, shape])
                    }))
                });
                sent.push(Message { peer, legs, values });
            }
        }
        let mut arrived: Vec<Message<'_>> = Vec::new();
        for (peer, legs) in self.held.iter().enumerate() {
            for legs in by_format(legs.iter().filter(travels), format) {
                let len = legs.iter().map(|leg| leg.held.len()).sum();
                let values = held[&legs[0].name].room(len);
                arrived.push(Message { peer, legs, values });
            }
        }
        Cargo { sent, arrived, here: None }
    }
}

fn same_parts(some: &[&Leg], others: &[&Leg]) -> bool {
    some.len() == others.len()
        && some.iter().zip(others).all(|(a, b)| (&a.name, &a.landing) == (&b.name, &b.landing))
}

/// Memory for the sums of what this rank owns: all of one pair of formats, of sums and gradients, in one piece, so
/// that what arrives as one message is added as one.
struct SumRoom<'a> {
    sums: Vec<DeviceValues>,
    places: BTreeMap<&'a str, SumPlace>,
}

/// Where the sum of a parameter lies.
#[derive(Debug, Clone, Copy)]
struct SumPlace {
    /// Number of its pair of formats.
    room: usize,
    start: usize,
    len: usize,
}

/// Kernels read pieces of 16 bytes, so sums begin at multiples of so many values.
const ALIGNMENT: usize = 8;

impl<'a> SumRoom<'a> {
    fn new(buckets: &'a [Bucket], local: &Gradients, exchange: &OwnerExchange) -> Self {
        let (mut places, mut rooms) = (BTreeMap::new(), Vec::<([DeviceFormat; 2], usize)>::new());
        for leg in buckets.iter().flat_map(|bucket| bucket.owned.iter().flatten()) {
            let Some(gradient) = local.get(&leg.name) else { continue };
            if places.contains_key(leg.name.as_str()) {
                continue;
            }
            let sum = if exchange.sums.is_narrow(&leg.name) { DeviceFormat::Bf16 } else { DeviceFormat::F32 };
            let formats = [sum, on_device(gradient).format()];
            let room = rooms.iter().position(|(known, _)| *known == formats).unwrap_or_else(|| {
                rooms.push((formats, 0));
                rooms.len() - 1
            });
            let (start, len) = (rooms[room].1, exchange.units[&leg.name].part.num_elements());
            rooms[room].1 = (start + len).next_multiple_of(ALIGNMENT);
            places.insert(leg.name.as_str(), SumPlace { room, start, len });
        }
        let any = local.values().next().map(on_device);
        let sums =
            any.into_iter().flat_map(|any| rooms.iter().map(|([sum, _], len)| any.room_as(*sum, *len)));
        Self { sums: sums.collect(), places }
    }

    fn add_all(&self, messages: &[Message<'_>]) {
        messages.iter().for_each(|message| self.add(message));
    }

    /// Adds what a holder has sent, or begins sums with it.
    fn add(&self, message: &Message<'_>) {
        let mut runs: Vec<Run> = Vec::new();
        let mut from = 0;
        for leg in &message.legs {
            let (place, len) = (self.places[leg.name.as_str()], leg.held.len());
            let Part { start, shape } = &leg.landing;
            if shape[1..] == leg.unit_shape[1..] {
                let row: usize = shape[1..].iter().product();
                let to = place.start + start[0] * row;
                let run = Run { room: place.room, from, to, len, begins: leg.first };
                match runs.last_mut().filter(|last| last.goes_on_with(&run)) {
                    Some(last) => last.len += len,
                    None => runs.push(run),
                }
            } else {
                let sum = self.sums[place.room].part(place.start..place.start + place.len);
                let values = message.values.part(from..from + len);
                sum.write_part(&leg.unit_shape, [start, shape], &values, !leg.first);
            }
            from += len;
        }
        for Run { room, from, to, len, begins } in runs {
            let sums = &self.sums[room];
            let values = message.values.part(from..from + len);
            sums.write_part(&[sums.len()], [&[to], &[len]], &values, !begins);
        }
    }

    fn into_gradients(self) -> impl Iterator<Item = (String, Values)> {
        let Self { sums, places } = self;
        places.into_iter().map(move |(name, SumPlace { room, start, len })| {
            (name.to_owned(), Values::Device(sums[room].part(start..start + len)))
        })
    }
}

/// Values of a message that are added in one go.
#[derive(Debug)]
struct Run {
    room: usize,
    from: usize,
    to: usize,
    len: usize,
    /// Whether sums begin with them.
    begins: bool,
}

impl Run {
    fn goes_on_with(&self, next: &Self) -> bool {
        (self.room, self.from + self.len, self.to + self.len, self.begins)
            == (next.room, next.from, next.to, next.begins)
    }
}

fn on_device(gradient: &Values) -> &DeviceValues {
    match gradient {
        Values::Device(values) => values,
        _ => panic!("gradients that travel between devices lie there"),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeSet;
    use std::thread;
    use std::time::Duration;

    use burn::tensor::{DType, Tensor};
    use switchyard_comm::threads;
    use switchyard_config::parameters::{ParameterSpec, parameters};
    use switchyard_config::partition::held_part;
    use switchyard_config::{MeshShape, ModelConfig, preset};
    use switchyard_kernels::{DeviceMark, GradientMarks, Place, mark_gradients, place_of, test_device};
    use switchyard_model::block_number;
    use switchyard_random::{Philox, unit_f32};

    use super::*;
    use crate::sums::SumFormats;
    use crate::{Mesh, TokenTravel, world_on};

    const MESHES: [MeshShape; 4] = [
        MeshShape { data: 4, expert: 1, tensor: 1 },
        MeshShape { data: 4, expert: 4, tensor: 1 },
        MeshShape { data: 4, expert: 2, tensor: 1 },
        MeshShape { data: 2, expert: 2, tensor: 2 },
    ];

    fn model(vocab_size: usize) -> ModelConfig {
        let mut model = preset("tiny").expect("a preset");
        (model.vocab_size, model.d_model, model.d_ff, model.d_kv) = (vocab_size, 16, 24, 4);
        (model.num_layers, model.num_decoder_layers, model.num_experts) = (2, 2, 4);
        model
    }

    /// Asks every rank of `shape` something of a model; nothing where LibTorch has no device.
    fn on_ranks(
        shape: MeshShape,
        vocab_size: usize,
        narrow: bool,
        ask: fn(&ModelConfig, &Mesh, &OwnerExchange),
    ) {
        if place_of(&test_device()) == Place::Host {
            return;
        }
        let ranks = threads(shape.ranks(), Duration::from_secs(60)).into_iter().map(|world| {
            thread::spawn(move || {
                let world = world_on(world, &test_device()).expect("nobody is asked");
                let mesh = Mesh::new(world, shape, TokenTravel::default()).expect("ranks that talk");
                let model = model(vocab_size);
                let specs = parameters(&model);
                let sums = SumFormats::narrow(specs.iter().filter(|spec| narrow && is_narrow(spec)));
                ask(&model, &mesh, &OwnerExchange::new(&model, &mesh, sums));
            })
        });
        ranks.collect::<Vec<_>>().into_iter().for_each(|rank| rank.join().expect("no panic"));
    }

    fn is_narrow(spec: &ParameterSpec) -> bool {
        spec.shape.len() > 1
    }

    /// Values of no importance, the same for the same words, as LibTorch has them.
    fn values(count: usize, words: [u32; 3], narrow: bool) -> DeviceValues {
        let mut random = Philox::new(5).stream(words);
        let values: Vec<f32> = (0..count).map(|_| unit_f32(random.next_u32()) - 0.5).collect();
        let tensor = Tensor::<1>::from_data(values.as_slice(), &test_device());
        let tensor = if narrow { tensor.cast(DType::BF16) } else { tensor };
        DeviceValues::in_torch(&tensor).expect("LibTorch has them")
    }

    fn reduces_as_the_host_does(model: &ModelConfig, mesh: &Mesh, exchange: &OwnerExchange) {
        let mut local = Gradients::new();
        for (number, spec) in (0..).zip(parameters(model)) {
            let len = held_part(&spec, mesh.shape(), mesh.at()).num_elements();
            let words = [number, mesh.world().rank() as u32, 0];
            local.insert(spec.name.clone(), Values::Device(values(len, words, is_narrow(&spec))));
        }
        let mut expected = Gradients::new();
        exchange.reduce(local.clone(), 1, &mut expected).expect("it works");
        let marks = backward_pass(model);
        for overlap in [Overlap::Nothing, Overlap::Exchanges, Overlap::BackwardPass(&marks)] {
            let found = exchange.reduce_on_devices(local.clone(), overlap).expect("it works");
            assert!(found.keys().eq(expected.keys()));
            for (name, values) in found {
                assert!(values.into_host() == expected[&name].clone().into_host(), "{name}");
            }
        }
    }

    /// Marks of a backward pass through the blocks of both stacks, of which the decoder's first comes last.
    fn backward_pass(model: &ModelConfig) -> GradientMarks {
        let marks = GradientMarks::default();
        let mut x = Tensor::<1>::ones([1], &test_device().autodiff()).require_grad();
        let first = model.num_layers;
        for place in [first].into_iter().chain(0..first).chain(first + 1..first + model.num_decoder_layers) {
            x = mark_gradients(x, &marks, place);
        }
        let _ = x.sum().backward();
        marks
    }

    #[test]
    fn buckets_travel_in_the_order_of_the_backward_pass() {
        on_ranks(MESHES[3], 64, false, |model, _, exchange| {
            let marks = backward_pass(model);
            let end = Arc::new(DeviceMark::after(&test_device()));
            let bucket = |names: &[&str]| Bucket {
                parameters: names.iter().map(|&name| (name.to_owned(), block_number(name, model))).collect(),
                ..Bucket::default()
            };
            let group = Arc::clone(&exchange.dense.group);
            let buckets = vec![
                bucket(&["embedding", "decoder.block.1.self_attention.q"]),
                bucket(&["decoder.block.0.self_attention.q"]),
                bucket(&["encoder.block.1.self_attention.q", "decoder.block.1.self_attention.q"]),
                bucket(&["decoder.final_norm", "decoder.block.1.self_attention.k"]),
                bucket(&["encoder.block.0.self_attention.q", "encoder.final_norm"]),
            ];
            let lane = Lane { group, buckets };
            let order = |marks: &GradientMarks| {
                let turns = turns(&[&lane], Some((marks, Arc::clone(&end))));
                let place = |turn: &Turn<'_>| {
                    let at = lane.buckets.iter().position(|bucket| std::ptr::eq(bucket, turn.bucket));
                    (at.unwrap(), Arc::ptr_eq(turn.behind.as_ref().unwrap(), &end))
                };
                turns.iter().map(place).collect::<Vec<_>>()
            };
            assert_eq!(order(&marks), [(3, false), (2, false), (4, false), (1, false), (0, true)]);
            marks.note_late("encoder.block.1.self_attention.q");
            assert_eq!(order(&marks), [(3, false), (4, false), (1, false), (0, true), (2, true)]);
            assert!(turns(&[&lane], None).iter().all(|turn| turn.behind.is_none()));
        });
    }

    fn brings_new_values_to_all(model: &ModelConfig, mesh: &Mesh, exchange: &OwnerExchange) {
        for overlap in [Overlap::Nothing, Overlap::Exchanges] {
            brings_new_values(model, mesh, exchange, overlap);
        }
    }

    fn brings_new_values(model: &ModelConfig, mesh: &Mesh, exchange: &OwnerExchange, overlap: Overlap<'_>) {
        let mut held = BTreeMap::new();
        let mut wholes = BTreeMap::new();
        for (number, spec) in (0..).zip(parameters(model)) {
            let part = held_part(&spec, mesh.shape(), mesh.at());
            let whole = values(spec.num_elements() as usize, [number, 0, 1], is_narrow(&spec));
            let own_rank = mesh.world().rank() as u32;
            held.insert(
                spec.name.clone(),
                values(part.num_elements(), [number, own_rank, 2], is_narrow(&spec)),
            );
            wholes.insert(spec.name.clone(), (spec, part, whole));
        }
        let renewed = RefCell::new(BTreeSet::new());
        let renew = |bucket: usize| {
            for (name, unit) in exchange.units().iter().filter(|(_, unit)| unit.bucket == bucket) {
                assert!(renewed.borrow_mut().insert(name.clone()), "{name} is renewed once");
                // What a rank owns in the model itself gets its new values there.
                let (Some(start), (spec, _, whole)) = (unit.in_held, &wholes[name]) else { continue };
                let new = whole.part_of(&spec.shape, [&unit.part.start, &unit.part.shape]);
                let len = held[name].len();
                held[name].write_part(&[len], [&[start], &[new.len()]], &new, false);
            }
        };
        let owned = |name: &str| {
            assert!(renewed.borrow().contains(name), "{name} is sent before it is renewed");
            let (unit, (spec, _, whole)) = (&exchange.units()[name], &wholes[name]);
            whole.part_of(&spec.shape, [&unit.part.start, &unit.part.shape]).copied()
        };
        exchange.spread_on_devices(renew, owned, &held, overlap).expect("it works");
        assert_eq!(renewed.borrow().len(), exchange.units().len(), "all are renewed");
        for (name, (spec, part, whole)) in &wholes {
            let expected = whole.part_of(&spec.shape, [&part.start, &part.shape]);
            assert!(held[name].to_host() == expected.to_host(), "{name}");
        }
    }

    #[test]
    fn devices_reduce_to_the_bits_of_the_host() {
        for (shape, narrow) in MESHES.into_iter().flat_map(|shape| [(shape, false), (shape, true)]) {
            on_ranks(shape, 64, narrow, reduces_as_the_host_does);
        }
    }

    #[test]
    fn every_holder_gets_what_the_owners_have() {
        MESHES.into_iter().for_each(|shape| on_ranks(shape, 64, false, brings_new_values_to_all));
    }

    #[test]
    fn a_matrix_may_travel_in_several_buckets() {
        on_ranks(MESHES[0], 300_000, false, |model, mesh, exchange| {
            assert!(exchange.dense.buckets.len() > 1);
            reduces_as_the_host_does(model, mesh, exchange);
            brings_new_values_to_all(model, mesh, exchange);
        });
    }

    #[test]
    fn sums_are_those_of_all_ranks() {
        on_ranks(MESHES[0], 64, false, |_, mesh, exchange| {
            let values = values(1, [0; 3], false);
            let sum = values.room_as(DeviceFormat::F64, 2);
            sum.write_part(&[2], [&[0], &[1]], &values, false);
            sum.write_part(&[2], [&[1], &[1]], &values, false);
            exchange.sum_over_ranks(&sum).expect("it works");
            let Values::F32(one) = values.to_host() else { panic!("a float32 value") };
            let sums = sum.room_as(DeviceFormat::F32, 2);
            sums.write_part(&[2], [&[0], &[2]], &sum, false);
            assert_eq!(sums.to_host(), Values::F32(vec![one[0] * mesh.world().size() as f32; 2]));
        });
    }
}
