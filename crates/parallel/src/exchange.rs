//! Gradients to the owner of each matrix, and its new values back to every holder.
//!
//! Owners update whole matrices, so an optimizer never sees a part of one: clipping, parameter
//! scale and factored moments are those of one rank. Sums are taken in rank order, in buckets that
//! bound the memory of the exchange.

mod on_devices;
mod overlap;

pub use overlap::Overlap;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use switchyard_comm::{Buffer, BufferMut, CommError, Communicator};
use switchyard_config::ModelConfig;
use switchyard_config::parameters::{ParameterSpec, parameters};
use switchyard_config::partition::{OwnedMatrices, Part, held_part, owners};
use switchyard_kernels::optimizer::{add_assign, sum_of_squares};
use switchyard_kernels::{Element, Values, bf16};
use switchyard_model::{SwitchTransformer, block_number};

use crate::mesh::Mesh;
use crate::sums::{Gradients, SumFormats, Summand};

/// Values of the matrices that a rank owns, by parameter; row-major in their order.
pub type Owned = BTreeMap<String, Vec<f32>>;

/// One rank alone leaves gradients on a GPU, and its optimizer takes their norm.
const ON_DEVICE: &str = "gradients on a device do not come here";

/// Values that the fullest owner receives in one bucket.
const BUCKET_VALUES: usize = 1 << 24;

/// Who owns which matrix, and the way between owners and holders.
#[derive(Debug)]
pub struct OwnerExchange {
    units: BTreeMap<String, Unit>,
    dense: Lane,
    expert: Lane,
    world: Arc<dyn Communicator>,
    sums: SumFormats,
    /// For each rank, where its matrices stand in the order of all.
    matrix_order: Vec<Vec<usize>>,
}

/// The matrices of one parameter that this rank owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Shape of the whole parameter.
    pub whole: Vec<usize>,
    /// The owned matrices within it.
    pub part: Part,
    /// Where they begin within what this rank holds; `None` when it holds only a part of each, so
    /// that their values are kept beside the model.
    pub in_held: Option<usize>,
    /// Which bucket of new values has the first of its own; for those that go to nobody the number of buckets.
    pub bucket: usize,
}

impl Unit {
    /// Elements of one matrix.
    pub fn matrix_len(&self) -> usize {
        self.part.num_elements() / self.matrices()
    }

    /// Owned matrices.
    fn matrices(&self) -> usize {
        if self.part.shape.len() == 3 { self.part.shape[0] } else { 1 }
    }
}

/// The parameters that the ranks of one group share.
#[derive(Debug)]
struct Lane {
    group: Arc<dyn Communicator>,
    buckets: Vec<Bucket>,
}

/// Matrices, or rows of matrices, that travel together.
#[derive(Debug, Default)]
struct Bucket {
    /// What this rank holds of each owner's matrices, by owner.
    held: Vec<Vec<Leg>>,
    /// What each holder has of this rank's matrices, by holder.
    owned: Vec<Vec<Leg>>,
    /// Which formats of sums are in it, on any rank: float32, bfloat16.
    formats: [bool; 2],
    /// Parameters of which it has something, on any rank, with their [blocks](block_number).
    parameters: BTreeMap<String, Option<usize>>,
}

/// Where new values of a parameter go in what this rank holds, and the values.
type Arrival<'a> = (Range<usize>, &'a [f32]);

/// What one holder and one owner share of a parameter.
#[derive(Debug, Clone)]
struct Leg {
    name: String,
    /// Where it lies in what the holder holds.
    held: Range<usize>,
    /// Where it lies in what the owner owns, and the shape of that.
    landing: Part,
    unit_shape: Vec<usize>,
    /// Whether the holder's gradient counts; copies of it on tensor-parallel neighbours do not.
    adds: bool,
    /// Whether it is the first that counts.
    first: bool,
    /// Whether owner and holder are one rank that keeps the values in the model.
    stays: bool,
}

impl OwnerExchange {
    /// The ways between the ranks of `mesh` for a model, whose gradients are summed in `sums`.
    pub fn new(model: &ModelConfig, mesh: &Mesh, sums: SumFormats) -> Self {
        let specs = parameters(model);
        let owners = owners(&specs, mesh.shape());
        let rank = mesh.world().rank();
        let lane = |group: &Arc<dyn Communicator>, members: Vec<usize>, experts: bool| {
            let mut builder = LaneBuilder::new(model, mesh, members, &sums);
            for spec in specs.iter().filter(|spec| spec.kind.is_expert() == experts) {
                for owned in &owners[&spec.name] {
                    builder.add(spec, owned);
                }
            }
            Lane { group: Arc::clone(group), buckets: builder.finish() }
        };
        let dense = lane(mesh.world(), (0..mesh.shape().ranks()).collect(), false);
        let expert = lane(mesh.expert_holders(), mesh.shape().expert_holders(mesh.at().expert), true);
        let unit_of = |spec: &ParameterSpec| {
            let mine = owners[&spec.name].iter().find(|owned| owned.owner == rank)?;
            let held = held_part(spec, mesh.shape(), mesh.at());
            let part = unit_part(spec, mine);
            let complete = part.shape[1..] == held.shape[1..] && part.shape[0] <= held.shape[0];
            let row: usize = held.shape[1..].iter().product();
            let in_held = complete.then(|| (part.start[0] - held.start[0]) * row);
            let whole = spec.shape.clone();
            let bucket = bucket_of(&spec.name, &travelling([&dense, &expert]));
            Some((spec.name.clone(), Unit { whole, part, in_held, bucket }))
        };
        Self {
            units: specs.iter().filter_map(unit_of).collect(),
            dense,
            expert,
            world: Arc::clone(mesh.world()),
            sums,
            matrix_order: matrix_order(&owners, mesh.shape().ranks()),
        }
    }

    /// What this rank owns, by parameter.
    pub fn units(&self) -> &BTreeMap<String, Unit> {
        &self.units
    }

    /// The formats of sums.
    pub fn sums(&self) -> &SumFormats {
        &self.sums
    }

    /// Adds the gradients of all holders to those that this rank owns.
    ///
    /// Gradients of experts hold `segments` summands each, in the order of their senders.
    ///
    /// # Errors
    /// As every collective.
    pub fn reduce(
        &self,
        mut local: Gradients,
        segments: usize,
        into: &mut Gradients,
    ) -> Result<(), CommError> {
        for (lane, segments) in [(&self.dense, 1), (&self.expert, segments)] {
            if lane.group.size() > 1 || segments > 1 {
                local = local.into_iter().map(|(name, values)| (name, values.into_host())).collect();
                lane.reduce::<f32>(&mut local, segments, into, self)?;
                lane.reduce::<bf16>(&mut local, segments, into, self)?;
                continue;
            }
            lane.keep(&mut local, &self.sums, into);
        }
        Ok(())
    }

    /// Sum of squares over all matrices of all ranks, each counted once and added in one order.
    ///
    /// # Errors
    /// As every collective.
    pub fn sum_of_squares(&self, owned: &Gradients) -> Result<f64, CommError> {
        let mut squares = Vec::new();
        for (name, unit) in &self.units {
            match owned.get(name) {
                Some(Values::F32(values)) => {
                    squares.extend(values.chunks(unit.matrix_len()).map(sum_of_squares));
                }
                Some(Values::Bf16(values)) => {
                    squares.extend(values.chunks(unit.matrix_len()).map(sum_of_squares));
                }
                Some(Values::Device(_)) => unreachable!("{ON_DEVICE}"),
                None => squares.resize(squares.len() + unit.matrices(), 0.0),
            }
        }
        let counts: Vec<usize> = self.matrix_order.iter().map(Vec::len).collect();
        let mut gathered = vec![0.0; counts.iter().sum()];
        self.world.all_gather_v(squares.as_slice().into(), gathered.as_mut_slice().into(), &counts)?;
        let mut ordered = vec![0.0; gathered.len()];
        for (square, &at) in gathered.iter().zip(self.matrix_order.iter().flatten()) {
            ordered[at] = *square;
        }
        Ok(ordered.iter().sum())
    }

    /// `model` with the values that the owners have now; `masters` holds those that are kept beside
    /// the model.
    ///
    /// # Errors
    /// As every collective; the model that comes back is then a mixture of old and new.
    pub fn spread(
        &self,
        mut model: SwitchTransformer,
        masters: &Owned,
    ) -> (SwitchTransformer, Result<(), CommError>) {
        // One rank alone holds what it owns, in the model itself.
        for lane in travelling([&self.dense, &self.expert]) {
            for bucket in &lane.buckets {
                let (next, outcome) = bucket.spread(&*lane.group, model, masters, &self.units);
                model = next;
                if outcome.is_err() {
                    return (model, outcome);
                }
            }
        }
        (model, Ok(()))
    }
}

/// Those of some lanes that have something to exchange.
fn travelling(lanes: [&Lane; 2]) -> Vec<&Lane> {
    lanes.into_iter().filter(|lane| lane.group.size() > 1).collect()
}

/// Number of the first bucket of some lanes that has something of a parameter; that of all buckets if none has.
fn bucket_of(name: &str, lanes: &[&Lane]) -> usize {
    let buckets = || lanes.iter().flat_map(|lane| &lane.buckets);
    buckets().position(|bucket| bucket.parameters.contains_key(name)).unwrap_or_else(|| buckets().count())
}

/// The owned matrices as a part of the whole parameter.
fn unit_part(spec: &ParameterSpec, owned: &OwnedMatrices) -> Part {
    let mut part = Part::whole(&spec.shape);
    if spec.kind.is_expert() {
        part.start[0] = owned.matrices.start;
        part.shape[0] = owned.matrices.len();
    }
    part
}

/// For each rank, the places of its matrices in the order of names and matrices.
fn matrix_order(owners: &BTreeMap<String, Vec<OwnedMatrices>>, ranks: usize) -> Vec<Vec<usize>> {
    let mut order = vec![Vec::new(); ranks];
    let mut next = 0;
    for owned in owners.values() {
        let mut all: Vec<(usize, usize)> = owned
            .iter()
            .flat_map(|owned| owned.matrices.clone().map(|matrix| (matrix, owned.owner)))
            .collect();
        all.sort_unstable();
        for (_, owner) in all {
            order[owner].push(next);
            next += 1;
        }
    }
    order
}

/// Cuts the matrices of a lane into buckets.
struct LaneBuilder<'a> {
    model: &'a ModelConfig,
    mesh: &'a Mesh,
    sums: &'a SumFormats,
    members: Vec<usize>,
    /// Values that each owner receives in the last bucket.
    loads: Vec<usize>,
    buckets: Vec<Bucket>,
}

impl<'a> LaneBuilder<'a> {
    fn new(model: &'a ModelConfig, mesh: &'a Mesh, members: Vec<usize>, sums: &'a SumFormats) -> Self {
        Self { model, mesh, sums, loads: vec![0; members.len()], members, buckets: Vec::new() }
    }

    /// Adds owned matrices, in as many pieces along their first axis as buckets need.
    fn add(&mut self, spec: &ParameterSpec, owned: &OwnedMatrices) {
        let Some(owner) = self.members.iter().position(|&member| member == owned.owner) else { return };
        let unit = unit_part(spec, owned);
        let row: usize = unit.shape[1..].iter().product::<usize>() * self.members.len();
        let mut start = 0;
        while start < unit.shape[0] {
            let room = (BUCKET_VALUES - self.loads[owner].min(BUCKET_VALUES)) / row;
            if self.buckets.is_empty() || (room == 0 && self.loads[owner] > 0) {
                let n = self.members.len();
                let legs = vec![Vec::new(); n];
                self.buckets.push(Bucket { held: legs.clone(), owned: legs, ..Bucket::default() });
                self.loads.fill(0);
                continue;
            }
            let rows = room.clamp(1, unit.shape[0] - start);
            self.loads[owner] += rows * row;
            let narrow = self.sums.is_narrow(&spec.name);
            let bucket = self.buckets.last_mut().expect("opened above");
            bucket.formats[usize::from(narrow)] = true;
            bucket.parameters.insert(spec.name.clone(), block_number(&spec.name, self.model));
            self.add_rows(spec, &unit, owner, start..start + rows);
            start += rows;
        }
    }

    /// Adds `rows` of a unit, counted from its start, to the last bucket.
    fn add_rows(&mut self, spec: &ParameterSpec, unit: &Part, owner: usize, rows: Range<usize>) {
        let shape = self.mesh.shape();
        let owner_rank = self.members[owner];
        let owner_at = shape.coordinates(owner_rank);
        let me = self.mesh.world().rank();
        let mut first_of = BTreeMap::new();
        for (index, &holder) in self.members.iter().enumerate() {
            let at = shape.coordinates(holder);
            let held = held_part(spec, shape, at);
            let begin = held.start[0].max(unit.start[0] + rows.start);
            let end = (held.start[0] + held.shape[0]).min(unit.start[0] + rows.end);
            if begin >= end {
                continue;
            }
            let replicated = held.is_whole(&spec.shape) && shape.tensor > 1;
            let adds = !replicated || at.tensor == owner_at.tensor;
            let first = adds && *first_of.entry(at.tensor).or_insert(index) == index;
            if me != holder && me != owner_rank {
                continue;
            }
            let row: usize = held.shape[1..].iter().product();
            let mut landing = held.clone();
            landing.start[0] = begin - unit.start[0];
            landing.shape[0] = end - begin;
            let leg = Leg {
                name: spec.name.clone(),
                held: (begin - held.start[0]) * row..(end - held.start[0]) * row,
                stays: holder == owner_rank
                    && held.shape[1..] == unit.shape[1..]
                    && held.shape[0] >= unit.shape[0],
                landing,
                unit_shape: unit.shape.clone(),
                adds,
                first,
            };
            let bucket = self.buckets.last_mut().expect("`add` opens a bucket first");
            if me == holder {
                bucket.held[owner].push(leg.clone());
            }
            if me == owner_rank {
                bucket.owned[index].push(leg);
            }
        }
    }

    fn finish(self) -> Vec<Bucket> {
        self.buckets
    }
}

impl Lane {
    /// Adds the gradients of a rank that is its own owner.
    fn keep(&self, local: &mut Gradients, sums: &SumFormats, into: &mut Gradients) {
        let here = self.buckets.iter().flat_map(|bucket| bucket.owned.iter().flatten());
        for name in here.map(|leg| &leg.name) {
            // Parameters without a gradient stay without one; large ones come in several legs.
            let Some(gradient) = local.remove(name) else { continue };
            sums.add(into, name, gradient);
        }
    }

    /// Reduces the gradients whose sums have format `E`.
    fn reduce<E: Summand>(
        &self,
        local: &mut Gradients,
        segments: usize,
        into: &mut Gradients,
        exchange: &OwnerExchange,
    ) -> Result<(), CommError>
    where
        for<'a> &'a [E]: Into<Buffer<'a>>,
        for<'a> &'a mut [E]: Into<BufferMut<'a>>,
    {
        let narrow = E::FORMAT == bf16::FORMAT;
        let travels = |leg: &&Leg| leg.adds && exchange.sums.is_narrow(&leg.name) == narrow;
        let owned = || self.buckets.iter().flat_map(|bucket| bucket.owned.iter().flatten());
        let mut fresh = BTreeSet::new();
        for leg in owned().filter(travels).filter(|leg| !into.contains_key(&leg.name)) {
            fresh.insert(leg.name.as_str());
        }
        for &name in &fresh {
            into.insert(name.to_owned(), E::zeros(exchange.units[name].part.num_elements()));
        }
        for bucket in self.buckets.iter().filter(|bucket| bucket.formats[usize::from(narrow)]) {
            let received = bucket.send_gradients::<E>(&*self.group, local, segments, travels)?;
            let mut rest = received.as_slice();
            for leg in bucket.owned.iter().flatten().filter(travels) {
                let (piece, after) = rest.split_at(leg.held.len() * segments);
                rest = after;
                let sum = E::of(into.get_mut(&leg.name).expect("entered above"));
                leg.add(sum, piece, segments, leg.first && fresh.contains(leg.name.as_str()));
            }
        }
        Ok(())
    }
}

impl Leg {
    /// Adds a piece to the owner's sum, or begins the sum with it.
    fn add<E: Summand>(&self, sum: &mut [E], piece: &[E], segments: usize, begins: bool) {
        let rows = self.landing.shape[0];
        // Segments lie inside each expert, so experts go one by one where there are several.
        let groups = if segments == 1 { 1 } else { rows };
        let part_len = self.held.len() / groups;
        for (number, summands) in piece.chunks_exact(part_len * segments).enumerate() {
            let mut part = self.landing.clone();
            if groups > 1 {
                part.start[0] += number;
                part.shape[0] = 1;
            }
            for (segment, summand) in summands.chunks_exact(part_len).enumerate() {
                let mut rest = summand;
                for run in part.runs(&self.unit_shape) {
                    let (values, after) = rest.split_at(run.len());
                    rest = after;
                    if begins && segment == 0 {
                        sum[run].copy_from_slice(values);
                    } else {
                        add_assign(&mut sum[run], values);
                    }
                }
            }
        }
    }
}

impl Bucket {
    /// Sends what `travels` to the owners and returns what this rank receives as one.
    fn send_gradients<E: Summand>(
        &self,
        group: &dyn Communicator,
        local: &mut Gradients,
        segments: usize,
        travels: impl Fn(&&Leg) -> bool,
    ) -> Result<Vec<E>, CommError>
    where
        for<'a> &'a [E]: Into<Buffer<'a>>,
        for<'a> &'a mut [E]: Into<BufferMut<'a>>,
    {
        let count = |legs: &Vec<Leg>| {
            legs.iter().filter(&travels).map(|leg| leg.held.len() * segments).sum::<usize>()
        };
        let sends: Vec<usize> = self.held.iter().map(count).collect();
        let receives: Vec<usize> = self.owned.iter().map(count).collect();
        let zero: E = Default::default();
        let mut sent = Vec::with_capacity(sends.iter().sum());
        for leg in self.held.iter().flatten().filter(&travels) {
            match local.get_mut(&leg.name) {
                Some(values) => {
                    sent.extend_from_slice(
                        &E::of(values)[leg.held.start * segments..leg.held.end * segments],
                    );
                }
                None => sent.resize(sent.len() + leg.held.len() * segments, zero),
            }
        }
        if group.size() == 1 {
            return Ok(sent);
        }
        let mut received = vec![zero; receives.iter().sum()];
        group.all_to_all_v(sent.as_slice().into(), &sends, received.as_mut_slice().into(), &receives)?;
        Ok(received)
    }

    fn spread(
        &self,
        group: &dyn Communicator,
        model: SwitchTransformer,
        masters: &Owned,
        units: &BTreeMap<String, Unit>,
    ) -> (SwitchTransformer, Result<(), CommError>) {
        let count = |legs: &Vec<Leg>| legs.iter().filter(|leg| !leg.stays).map(|leg| leg.held.len()).sum();
        let sends: Vec<usize> = self.owned.iter().map(count).collect();
        let receives: Vec<usize> = self.held.iter().map(count).collect();
        let mut sent = vec![0.0; sends.iter().sum()];
        self.fill(&mut sent, &model, masters, units);
        let mut received = vec![0.0; receives.iter().sum()];
        let outcome =
            group.all_to_all_v(sent.as_slice().into(), &sends, received.as_mut_slice().into(), &receives);
        if outcome.is_err() {
            return (model, outcome);
        }
        let mut arrived: BTreeMap<&str, Vec<Arrival<'_>>> = BTreeMap::new();
        let mut rest = received.as_slice();
        for leg in self.held.iter().flatten().filter(|leg| !leg.stays) {
            let (values, after) = rest.split_at(leg.held.len());
            rest = after;
            arrived.entry(&leg.name).or_default().push((leg.held.clone(), values));
        }
        let model = model.update_parameters(|name, _, mut held| {
            for (range, values) in arrived.get(name).into_iter().flatten() {
                held.part(range.clone()).set(values);
            }
        });
        (model, Ok(()))
    }

    /// Writes what this rank owns into the message to each holder.
    fn fill(
        &self,
        sent: &mut [f32],
        model: &SwitchTransformer,
        masters: &Owned,
        units: &BTreeMap<String, Unit>,
    ) {
        let mut targets: BTreeMap<&str, Vec<(&Leg, &mut [f32])>> = BTreeMap::new();
        let mut rest = sent;
        for leg in self.owned.iter().flatten().filter(|leg| !leg.stays) {
            let (here, after) = rest.split_at_mut(leg.held.len());
            rest = after;
            targets.entry(&leg.name).or_default().push((leg, here));
        }
        let mut write = |name: &str, unit: &[f32]| {
            for (leg, to) in targets.get_mut(name).into_iter().flatten() {
                let mut at = 0;
                for run in leg.landing.runs(&leg.unit_shape) {
                    to[at..at + run.len()].copy_from_slice(&unit[run.clone()]);
                    at += run.len();
                }
            }
        };
        for (name, values) in masters {
            write(name, values);
        }
        let here: BTreeSet<&str> =
            self.owned.iter().flatten().filter(|leg| !leg.stays).map(|leg| leg.name.as_str()).collect();
        model.visit_parameters(
            |name| here.contains(name) && !masters.contains_key(name),
            |name, held| {
                if let Some(Unit { part, in_held: Some(start), .. }) = units.get(name) {
                    write(name, &held[*start..start + part.num_elements()]);
                }
            },
        );
    }
}
