//! The same ways from device to device: put on the stream of the ranks' work, not waited for.

use std::collections::BTreeMap;

use switchyard_comm::{CommError, DeviceCommunicator, Piece, ReduceOp};
use switchyard_config::partition::Part;
use switchyard_kernels::{DeviceFormat, DeviceValues, Values};

use super::{Bucket, Lane, Leg, OwnerExchange};
use crate::on_devices::{slice, stream};
use crate::sums::{Gradients, SumFormats};

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
    pub fn reduce_on_devices(&self, mut local: Gradients) -> Result<Gradients, CommError> {
        let mut owned = Gradients::new();
        for lane in [&self.dense, &self.expert] {
            if lane.group.size() > 1 {
                lane.reduce_on_devices(&local, &self.sums, self, &mut owned)?;
            } else {
                lane.keep(&mut local, &self.sums, &mut owned);
            }
        }
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

    /// Brings the values that the owners have now to all holders, as [`spread`](Self::spread) does: `owned`
    /// tells the values of the matrices that this rank owns, `held` has what its model computes with, in one
    /// format with those.
    ///
    /// # Errors
    /// As every collective.
    ///
    /// # Panics
    /// When a parameter is in neither, or the ranks have no devices.
    pub fn spread_on_devices(
        &self,
        owned: impl Fn(&str) -> DeviceValues,
        held: &BTreeMap<String, DeviceValues>,
    ) -> Result<(), CommError> {
        for lane in [&self.dense, &self.expert].into_iter().filter(|lane| lane.group.size() > 1) {
            let devices = lane.group.on_devices().expect(HAVE_DEVICES);
            for bucket in &lane.buckets {
                bucket.spread_on_devices(devices, &owned, held)?;
            }
        }
        Ok(())
    }
}

impl Lane {
    fn reduce_on_devices(
        &self,
        local: &Gradients,
        sums: &SumFormats,
        exchange: &OwnerExchange,
        owned: &mut Gradients,
    ) -> Result<(), CommError> {
        let devices = self.group.on_devices().expect(HAVE_DEVICES);
        for bucket in &self.buckets {
            for (leg, piece) in bucket.gradients_on_devices(devices, self.group.rank(), local)? {
                let sum = owned.entry(leg.name.clone()).or_insert_with(|| {
                    let format =
                        if sums.is_narrow(&leg.name) { DeviceFormat::Bf16 } else { DeviceFormat::F32 };
                    let len = exchange.units[&leg.name].part.num_elements();
                    Values::Device(piece.room_as(format, len))
                });
                let Part { start, shape } = &leg.landing;
                on_device(sum).write_part(&leg.unit_shape, [start, shape], &piece, !leg.first);
            }
        }
        Ok(())
    }
}

impl Bucket {
    /// The pieces of all holders of what this rank owns, in the order of their ranks.
    fn gradients_on_devices<'a>(
        &'a self,
        devices: &dyn DeviceCommunicator,
        own_rank: usize,
        local: &Gradients,
    ) -> Result<Vec<(&'a Leg, DeviceValues)>, CommError> {
        let there = |leg: &&Leg| leg.adds && local.contains_key(&leg.name);
        let here = |leg: &Leg| on_device(&local[&leg.name]);
        let mut sends = Vec::new();
        for (owner, legs) in self.held.iter().enumerate().filter(|(owner, _)| *owner != own_rank) {
            let piece = |leg: &Leg| Piece { peer: owner, values: slice(here(leg)).part(leg.held.clone()) };
            sends.extend(legs.iter().filter(there).map(piece));
        }
        let mut pieces = Vec::new();
        for (holder, legs) in self.owned.iter().enumerate() {
            let piece = |leg: &'a Leg| match holder == own_rank {
                true => (leg, here(leg).part(leg.held.clone())),
                false => (leg, here(leg).room(leg.held.len())),
            };
            pieces.push(legs.iter().filter(there).map(piece).collect::<Vec<_>>());
        }
        let others = pieces.iter().enumerate().filter(|(holder, _)| *holder != own_rank);
        let receives = others.flat_map(|(peer, pieces)| {
            pieces.iter().map(move |(_, values)| Piece { peer, values: slice(values) })
        });
        let receives: Vec<Piece> = receives.collect();
        if let Some(any) = local.values().next() {
            devices.exchange(&sends, &receives, stream(on_device(any)))?;
        }
        Ok(pieces.into_iter().flatten().collect())
    }

    fn spread_on_devices(
        &self,
        devices: &dyn DeviceCommunicator,
        owned: &impl Fn(&str) -> DeviceValues,
        held: &BTreeMap<String, DeviceValues>,
    ) -> Result<(), CommError> {
        let travels = |leg: &&Leg| !leg.stays;
        let mut sent: Vec<(usize, DeviceValues)> = Vec::new();
        for (holder, legs) in self.owned.iter().enumerate() {
            let values = |leg: &Leg| {
                let Part { start, shape } = &leg.landing;
                (holder, owned(&leg.name).part_of(&leg.unit_shape, [start, shape]))
            };
            sent.extend(legs.iter().filter(travels).map(values));
        }
        let sends = sent.iter().map(|(peer, values)| Piece { peer: *peer, values: slice(values) });
        let mut receives = Vec::new();
        for (owner, legs) in self.held.iter().enumerate() {
            let place = |leg: &Leg| slice(&held[&leg.name]).part(leg.held.clone());
            receives.extend(legs.iter().filter(travels).map(|leg| Piece { peer: owner, values: place(leg) }));
        }
        let Some(any) = held.values().next() else { return Ok(()) };
        devices.exchange(&sends.collect::<Vec<_>>(), &receives, stream(any))
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
    use std::thread;
    use std::time::Duration;

    use burn::tensor::{DType, Tensor};
    use switchyard_comm::threads;
    use switchyard_config::parameters::{ParameterSpec, parameters};
    use switchyard_config::partition::held_part;
    use switchyard_config::{HierarchicalAllToAll, MeshShape, ModelConfig, preset};
    use switchyard_kernels::{Place, place_of, test_device};
    use switchyard_random::{Philox, unit_f32};

    use super::*;
    use crate::{Mesh, world_on};

    const MESHES: [MeshShape; 4] = [
        MeshShape { data: 4, expert: 1, tensor: 1 },
        MeshShape { data: 4, expert: 4, tensor: 1 },
        MeshShape { data: 4, expert: 2, tensor: 1 },
        MeshShape { data: 2, expert: 2, tensor: 2 },
    ];

    fn model() -> ModelConfig {
        let mut model = preset("tiny").expect("a preset");
        (model.vocab_size, model.d_model, model.d_ff, model.d_kv) = (64, 16, 24, 4);
        (model.num_layers, model.num_decoder_layers, model.num_experts) = (2, 2, 4);
        model
    }

    /// Asks every rank of `shape` something; nothing where LibTorch has no device.
    fn on_ranks(shape: MeshShape, narrow: bool, ask: fn(&Mesh, &OwnerExchange)) {
        if place_of(&test_device()) == Place::Host {
            return;
        }
        let ranks = threads(shape.ranks(), Duration::from_secs(60)).into_iter().map(|world| {
            thread::spawn(move || {
                let world = world_on(world, &test_device()).expect("nobody is asked");
                let mesh =
                    Mesh::new(world, shape, false, HierarchicalAllToAll::Auto).expect("ranks that talk");
                let sums =
                    SumFormats::narrow(parameters(&model()).iter().filter(|spec| narrow && is_narrow(spec)));
                ask(&mesh, &OwnerExchange::new(&model(), &mesh, sums));
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

    fn reduces_as_the_host_does(mesh: &Mesh, exchange: &OwnerExchange) {
        let mut local = Gradients::new();
        for (number, spec) in (0..).zip(parameters(&model())) {
            let len = held_part(&spec, mesh.shape(), mesh.at()).num_elements();
            let words = [number, mesh.world().rank() as u32, 0];
            local.insert(spec.name.clone(), Values::Device(values(len, words, is_narrow(&spec))));
        }
        let mut expected = Gradients::new();
        exchange.reduce(local.clone(), 1, &mut expected).expect("it works");
        let found = exchange.reduce_on_devices(local).expect("it works");
        assert!(found.keys().eq(expected.keys()));
        for (name, values) in found {
            assert!(values.into_host() == expected[&name].clone().into_host(), "{name}");
        }
    }

    fn brings_new_values_to_all(mesh: &Mesh, exchange: &OwnerExchange) {
        let mut held = BTreeMap::new();
        let mut wholes = BTreeMap::new();
        for (number, spec) in (0..).zip(parameters(&model())) {
            let part = held_part(&spec, mesh.shape(), mesh.at());
            let whole = values(spec.num_elements() as usize, [number, 0, 1], is_narrow(&spec));
            let own_rank = mesh.world().rank() as u32;
            held.insert(
                spec.name.clone(),
                values(part.num_elements(), [number, own_rank, 2], is_narrow(&spec)),
            );
            wholes.insert(spec.name.clone(), (spec, part, whole));
        }
        // What a rank owns in the model itself has its new values there already.
        for (name, unit) in exchange.units() {
            let (spec, _, whole) = &wholes[name];
            if let Some(start) = unit.in_held {
                let new = whole.part_of(&spec.shape, [&unit.part.start, &unit.part.shape]);
                let len = held[name].len();
                held[name].write_part(&[len], [&[start], &[new.len()]], &new, false);
            }
        }
        let owned = |name: &str| {
            let (unit, (spec, _, whole)) = (&exchange.units()[name], &wholes[name]);
            whole.part_of(&spec.shape, [&unit.part.start, &unit.part.shape]).copied()
        };
        exchange.spread_on_devices(owned, &held).expect("it works");
        for (name, (spec, part, whole)) in &wholes {
            let expected = whole.part_of(&spec.shape, [&part.start, &part.shape]);
            assert!(held[name].to_host() == expected.to_host(), "{name}");
        }
    }

    #[test]
    fn devices_reduce_to_the_bits_of_the_host() {
        for (shape, narrow) in MESHES.into_iter().flat_map(|shape| [(shape, false), (shape, true)]) {
            on_ranks(shape, narrow, reduces_as_the_host_does);
        }
    }

    #[test]
    fn every_holder_gets_what_the_owners_have() {
        MESHES.into_iter().for_each(|shape| on_ranks(shape, false, brings_new_values_to_all));
    }

    #[test]
    fn sums_are_those_of_all_ranks() {
        on_ranks(MESHES[0], false, |mesh, exchange| {
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
