//! Gradients that stay on a GPU, and the optimizer that meets them there.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::Tensor;
use burn_tch::TchTensor;
use switchyard_cuda::{
    Address, Format, UpdateControl, UpdateMemory, UpdatePlan, UpdateRules, UpdatedTensor, gradient_squares,
    parameter_squares, prepare_update, update_means, update_part,
};
use tch::{Device, Kind, no_grad};

use crate::device_work::DeviceMark;
use crate::host::{DeviceFormat, Values};
use crate::optimizer::{DeviceTensor, OptimizerRules, UpdateOutcome};
use crate::torch::gpu::{at, format, queue, room, started};
use crate::torch::{floats, is_here, mark_behind};

/// Values on a GPU, or wherever LibTorch has them; a clone is the same memory.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceValues(TchTensor);

impl DeviceValues {
    /// The values of `tensor`, if they are on a GPU; not a copy unless they are strided.
    pub fn of<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        Self::in_torch(tensor).filter(|values| values.0.tensor.device().is_cuda())
    }

    /// The values of `tensor`, wherever LibTorch has them; not a copy unless they are strided.
    pub fn in_torch<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        is_here(&tensor.device()).then(|| Self(super::contiguous(&floats(tensor.clone()))))
    }

    /// The memory of `tensor` itself, if that is on a GPU, for writing.
    ///
    /// # Panics
    /// When its values do not lie row by row.
    pub fn shared<const D: usize>(tensor: &Tensor<D>) -> Option<Self> {
        let values = Self::of(tensor)?;
        assert!(values.lie_in(tensor), "parameters lie row by row");
        Some(values)
    }

    /// A mark behind the work on them.
    pub fn mark(&self) -> DeviceMark {
        DeviceMark::behind(mark_behind(&self.0.tensor))
    }

    /// Whether they are the memory of `tensor` itself.
    pub fn lie_in<const D: usize>(&self, tensor: &Tensor<D>) -> bool {
        is_here(&tensor.device()) && floats(tensor.clone()).tensor.data_ptr() == self.0.tensor.data_ptr()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.tensor.numel()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Values wherever LibTorch has them, row by row.
    pub(crate) fn there(tensor: &TchTensor) -> Self {
        Self(super::contiguous(tensor))
    }

    /// Them as a tensor.
    pub(crate) fn into_tensor(self) -> TchTensor {
        self.0
    }

    /// Room for `len` values of the same format, in the same place.
    #[must_use]
    pub fn room(&self, len: usize) -> Self {
        Self(TchTensor::new(room(&[len], self.0.tensor.kind(), &self.0.tensor)))
    }

    /// Room for `len` values of `format`, in the same place.
    #[must_use]
    pub fn room_as(&self, format: DeviceFormat, len: usize) -> Self {
        Self(TchTensor::new(room(&[len], kind_of(format), &self.0.tensor)))
    }

    /// Values one behind the other: them themselves if they are one, else a copy.
    ///
    /// # Panics
    /// When there are none, or their formats differ.
    pub fn joined(parts: impl IntoIterator<Item = Self>) -> Self {
        let parts: Vec<Self> = parts.into_iter().collect();
        let format = parts.first().expect("there are values to join").format();
        assert!(parts.iter().all(|part| part.format() == format), "values of one format are joined");
        match <[Self; 1]>::try_from(parts) {
            Ok([one]) => one,
            Err(parts) => {
                let flat: Vec<tch::Tensor> = parts.iter().map(|part| part.0.tensor.view([-1])).collect();
                Self(TchTensor::new(no_grad(|| tch::Tensor::cat(&flat, 0))))
            }
        }
    }

    /// Some of the values, where they lie.
    ///
    /// # Panics
    /// When `range` reaches beyond them.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of {} values", self.len());
        let flat = self.0.tensor.view([-1]);
        Self(self.sharing(&flat.narrow(0, range.start as i64, range.len() as i64)))
    }

    /// Of values of shape `shape` those that are `extent` from `start` on, along every axis: where they lie if
    /// they follow each other, else a copy.
    #[must_use]
    pub fn part_of(&self, shape: &[usize], [start, extent]: [&[usize]; 2]) -> Self {
        Self(self.sharing(&self.box_of(shape, [start, extent])))
    }

    /// Puts values in the place of those that [`part_of`](Self::part_of) tells, or adds them; whoever shares the
    /// memory sees it. Rounds sums to the format that is there, each time.
    pub fn write_part(&self, shape: &[usize], [start, extent]: [&[usize]; 2], values: &Self, add: bool) {
        let mut there = self.box_of(shape, [start, extent]);
        let values = values.0.tensor.view_as(&there);
        no_grad(|| if add { drop(there.g_add_(&values)) } else { there.copy_(&values) });
    }

    fn box_of(&self, shape: &[usize], [start, extent]: [&[usize]; 2]) -> tch::Tensor {
        let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        let axes = start.iter().zip(extent).enumerate();
        axes.fold(self.0.tensor.view(shape.as_slice()), |part, (axis, (&start, &extent))| {
            part.narrow(axis as i64, start as i64, extent as i64)
        })
    }

    /// So many zeros of the same format, in the same place.
    #[must_use]
    pub fn zeros(&self, len: usize) -> Self {
        Self(TchTensor::new(self.room(len).0.tensor.zeros_like()))
    }

    /// The values, none below `least` or above `most`.
    #[must_use]
    pub fn clamped(&self, least: usize, most: usize) -> Self {
        Self(TchTensor::new(self.0.tensor.clamp(least as i64, most as i64)))
    }

    /// The same values in memory of their own.
    #[must_use]
    pub fn copied(&self) -> Self {
        Self(TchTensor::new(self.0.tensor.copy()))
    }

    /// Values of shape `[a, b, c]` in the order of `[b, a, c]`.
    #[must_use]
    pub fn swapped(&self, [a, b, c]: [usize; 3]) -> Self {
        let blocks = self.0.tensor.view([a, b, c].map(|n| n as i64).as_slice());
        Self(self.sharing(&blocks.transpose(0, 1)))
    }

    /// Puts values of shape `[a, b, c]` in the place of all of these, in the order of `[b, a, c]`.
    pub fn write_swapped(&self, [a, b, c]: [usize; 3], values: &Self) {
        let view = |all: &Self, shape: [usize; 3]| all.0.tensor.view(shape.map(|n| n as i64).as_slice());
        no_grad(|| view(self, [b, a, c]).copy_(&view(values, [a, b, c]).transpose(0, 1)));
    }

    /// The `index`-th of `b` blocks in each of the `a` rows of values of shape `[a, b, c]`.
    #[must_use]
    pub fn block(&self, [a, b, c]: [usize; 3], index: usize) -> Self {
        let blocks = self.0.tensor.view([a, b, c].map(|n| n as i64).as_slice());
        Self(self.sharing(&blocks.select(1, index as i64)))
    }

    /// A view of the values, row by row: in their memory where it lies so.
    fn sharing(&self, view: &tch::Tensor) -> TchTensor {
        TchTensor::from_existing(view.contiguous().view([-1]), self.0.storage.clone())
    }

    /// Where the first value lies, for as long as there are clones, and until the stream is through.
    pub fn address(&self) -> u64 {
        at(&self.0.tensor).0
    }

    /// Their format.
    pub fn format(&self) -> DeviceFormat {
        match self.0.tensor.kind() {
            Kind::Float => DeviceFormat::F32,
            Kind::Double => DeviceFormat::F64,
            Kind::BFloat16 => DeviceFormat::Bf16,
            Kind::Int => DeviceFormat::I32,
            other => panic!("no operation takes {other:?}"),
        }
    }

    /// Handle of the stream to which LibTorch puts work on them; 0 where there is none.
    pub fn stream(&self) -> u64 {
        queue(&self.0.tensor).map_or(0, |queue| queue.stream.0 as u64)
    }

    /// A copy in main memory.
    pub fn to_host(&self) -> Values {
        let flat = TchTensor::new(self.0.tensor.view([-1]).to(Device::Cpu));
        const FORMATS: &str = "weights and their gradients are float32 or bfloat16";
        match self.0.tensor.kind() {
            Kind::BFloat16 => Values::Bf16(Vec::try_from(&flat).expect(FORMATS)),
            _ => Values::F32(Vec::try_from(&flat).expect(FORMATS)),
        }
    }

    /// Adds values; the sum becomes float32 unless it is to stay `narrow`.
    pub fn add(&mut self, other: &Self, narrow: bool) {
        let other = other.0.tensor.view_as(&self.0.tensor);
        if (narrow || self.0.tensor.kind() == Kind::Float) && self.0.can_mut() {
            let _ = self.0.tensor.g_add_(&other);
            return;
        }
        let sum = if narrow || self.0.tensor.kind() == Kind::Float {
            self.0.tensor.g_add(&other).to_kind(self.0.tensor.kind())
        } else {
            self.0.tensor.to_kind(Kind::Float).g_add(&other)
        };
        self.0 = TchTensor::new(sum);
    }

    /// Whether all are finite; waits for the device.
    pub fn all_finite(&self) -> bool {
        self.0.tensor.isfinite().all().int64_value(&[]) != 0
    }
}

pub(crate) fn kind_of(format: DeviceFormat) -> Kind {
    match format {
        DeviceFormat::F32 => Kind::Float,
        DeviceFormat::F64 => Kind::Double,
        DeviceFormat::Bf16 => Kind::BFloat16,
        DeviceFormat::I32 => Kind::Int,
    }
}

/// Owned matrices of a parameter with all that belongs to them.
#[derive(Debug)]
struct Kept {
    shape: Vec<usize>,
    /// As the model computes with them.
    values: DeviceValues,
    /// What float32 values have beyond these, where these are bfloat16: see [`rest_of`]. int16
    rest: Option<tch::Tensor>,
    /// Whether the model holds only a part of them, or in fewer bits.
    has_master: bool,
    moments: [Option<tch::Tensor>; 2],
    /// Which part of an update has them.
    part: usize,
}

impl Kept {
    /// The float32 values, in main memory: joining them takes several times their room.
    fn master(&self) -> tch::Tensor {
        let host = |tensor: &tch::Tensor| tensor.view([-1]).to(Device::Cpu);
        let values = host(&self.values.0.tensor);
        match &self.rest {
            Some(rest) => joined(&values, &host(rest)),
            None => values,
        }
    }
}

/// What float32 values have beyond themselves rounded to bfloat16: their bits less those of the rounded values in
/// the upper half of 32. int16
///
/// Values halfway between an even bfloat16 and the next away from zero would need 17 bits and are taken for the next
/// float32 towards zero.
fn rest_of(master: &tch::Tensor) -> tch::Tensor {
    let bits = master.view_dtype(Kind::Int);
    let halfway = bits.bitwise_and(0x1_ffff).eq(0x8000).to_kind(Kind::Int);
    let kept: tch::Tensor = bits - halfway;
    ((kept + 0x8000).bitwise_and(0xffff) - 0x8000).to_kind(Kind::Int16)
}

/// [`rest_of`] what is `rounded` in the model, 0 where that is something else.
fn rest_beside(rounded: &tch::Tensor, master: &tch::Tensor) -> tch::Tensor {
    let known = master.to_kind(Kind::BFloat16).view([-1]).eq_tensor(&rounded.view([-1]));
    rest_of(&master.view([-1])) * known.to_kind(Kind::Int16)
}

/// The float32 values of which these are the rounded ones and the rests.
fn joined(rounded: &tch::Tensor, rest: &tch::Tensor) -> tch::Tensor {
    let upper = rounded.view_dtype(Kind::Int16).to_kind(Kind::Int) * (1 << 16);
    (upper + rest.to_kind(Kind::Int)).view_dtype(Kind::Float)
}

/// Masters and moments on a GPU, and updates of all parameters there.
#[derive(Debug)]
pub struct DeviceOptimizer {
    rules: UpdateRules,
    kept: BTreeMap<String, Kept>,
    control: tch::Tensor,
    planned: Option<Planned>,
}

// SAFETY: tensors are handles whose counts are atomic; whoever has the optimizer is the only one to use
// those that belong to it, and parameters are written in the order of the stream.
unsafe impl Send for DeviceOptimizer {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for DeviceOptimizer {}

/// The plan for one set of gradients.
#[derive(Debug)]
struct Planned {
    /// Names and formats of the gradients.
    gradients: Vec<(String, Format)>,
    plan: UpdatePlan,
    /// The part of the table that says where the gradients are.
    described: Vec<u32>,
    table: tch::Tensor,
    workspace: tch::Tensor,
}

impl DeviceOptimizer {
    /// For parameters on a GPU, with the state that they have in main memory; `None` when they are elsewhere.
    /// A parameter in bfloat16 that is not its master rounded has been changed since, and becomes the master.
    ///
    /// Of `rules` what changes from step to step does not count.
    pub fn new(rules: OptimizerRules, tensors: Vec<DeviceTensor<'_>>, updates: u64) -> Option<Self> {
        let device = tensors.first()?.parameter.0.tensor.device();
        let upload = |values: &[f32]| tch::Tensor::from_slice(values).to(device);
        let control = UpdateControl { updates, ..UpdateControl::default() };
        let kept = tensors.into_iter().map(|tensor| {
            let DeviceTensor { name, shape, parameter, start, master, moments, part } = tensor;
            let (master, kind) = (master.map(upload), parameter.0.tensor.kind());
            let values = match (start, &master) {
                (Some(start), _) => parameter.part(start..start + shape.iter().product::<usize>()),
                (None, Some(master)) => DeviceValues(TchTensor::new(master.to_kind(kind))),
                (None, None) => panic!("{name} is kept beside the model, or in it"),
            };
            let has_master = master.is_some();
            let rest = master
                .filter(|_| kind == Kind::BFloat16)
                .map(|master| no_grad(|| rest_beside(&values.0.tensor, &master)));
            let moments = moments.map(|moment| moment.map(upload));
            (name, Kept { shape, values, rest, has_master, moments, part })
        });
        Some(Self {
            rules: of_cuda(rules),
            kept: kept.collect(),
            control: words(control).to(device),
            planned: None,
        })
    }

    /// Sets the learning rate of the updates from here on, recorded ones too.
    pub fn set_learning_rate(&mut self, learning_rate: f64) {
        no_grad(|| drop(self.control.narrow(0, 0, 1).fill_(learning_rate.to_bits().cast_signed())));
    }

    /// Clips `gradients` to `max_norm`, 0 for not at all, and lets [`update_part`](Self::update_part) update
    /// parameters by them, unless their norm or `loss`, `[1]`, is not finite, or an update was left out before and
    /// nobody took [note](Self::resume) yet. They must be kept until then. Nothing waits for the device but, outside of
    /// recordings, the copy of where gradients are.
    ///
    /// `sum_over_ranks`, where there are several, makes of float64 values their sums over all ranks: the norm is
    /// that of all ranks' gradients, and no loss of theirs may be other than finite.
    ///
    /// Inside a recording the gradients must be those of an update before by name and format, and
    /// [`point`](Self::point) must follow it.
    ///
    /// # Panics
    /// When a gradient is not on the device, or not that of a parameter.
    pub fn begin_update(
        &mut self,
        gradients: &BTreeMap<String, Values>,
        loss: &Tensor<1>,
        max_norm: f64,
        recording: bool,
        sum_over_ranks: Option<&mut dyn FnMut(&DeviceValues)>,
    ) {
        no_grad(|| self.describe(gradients));
        if !recording {
            self.point();
        }
        let planned = self.planned.as_ref().expect("just planned");
        let queue = queue(&self.control).expect("the optimizer is on a GPU");
        let (memory, mut loss) = (self.memory(planned), floats(loss.clone()).tensor);
        // SAFETY: the plan's tensors, table and workspace are kept here; gradients are borrowed, and memory that
        // is freed after a launch is reused in the order of the stream.
        started(unsafe { gradient_squares(queue, &planned.plan, memory) });
        if let Some(sum) = sum_over_ranks {
            loss = no_grad(|| self.over_ranks(&loss, sum));
        }
        // SAFETY: as above.
        started(unsafe { prepare_update(queue, &planned.plan, memory, max_norm, at(&loss)) });
        // SAFETY: as above.
        started(unsafe { update_means(queue, &planned.plan, memory) });
    }

    /// Updates the parameters of a part, after [`begin_update`](Self::begin_update).
    pub fn update_part(&self, part: usize) {
        let Some(planned) = &self.planned else { return };
        let queue = queue(&self.control).expect("the optimizer is on a GPU");
        // SAFETY: as above; the gradients that were borrowed then are kept until the step is done.
        started(unsafe { update_part(queue, &planned.plan, self.memory(planned), part) });
    }

    /// Makes of this rank's sum of squares that of all ranks; returns the sum of their losses.
    fn over_ranks(&self, loss: &tch::Tensor, sum: &mut dyn FnMut(&DeviceValues)) -> tch::Tensor {
        let mut squares = self.control.view_dtype(Kind::Double).narrow(0, UpdateControl::SQUARES, 1);
        let both = tch::Tensor::cat(&[&squares, &loss.to_kind(Kind::Double)], 0);
        sum(&DeviceValues(TchTensor::new(both.shallow_clone())));
        squares.copy_(&both.narrow(0, 0, 1));
        both.narrow(0, 1, 1).to_kind(Kind::Float)
    }

    /// The values of the matrices of parameter `name`, as the model computes with them; updates write there.
    ///
    /// # Panics
    /// When there are none.
    pub fn values(&self, name: &str) -> DeviceValues {
        self.kept.get(name).unwrap_or_else(|| panic!("{name} is not updated here")).values.clone()
    }

    /// Sends the device the places of the gradients of the last [`begin_update`](Self::begin_update).
    pub fn point(&mut self) {
        let Some(planned) = &mut self.planned else { return };
        let described: Vec<i32> = planned.described.iter().map(|word| word.cast_signed()).collect();
        let mut start = planned.table.narrow(0, 0, described.len() as i64);
        no_grad(|| start.copy_(&tch::Tensor::from_slice(&described)));
    }

    /// Takes note that an update was left out: the next one may be made.
    pub fn resume(&mut self) {
        no_grad(|| drop(self.control.narrow(0, UpdateControl::LEFT_OUT, 1).fill_(0)));
    }

    /// Where an [`UpdateControl`] says what the last update did.
    pub(crate) fn control(&self) -> Address {
        at(&self.control)
    }

    /// Calls `take` with the name, the masters, if there are any, and the moments of every parameter. Masters of
    /// bfloat16 values are those that [`rest_of`] keeps.
    pub fn read(&self, mut take: impl FnMut(&str, Option<Vec<f32>>, [Option<Vec<f32>>; 2])) {
        let download = |tensor: &tch::Tensor| -> Vec<f32> {
            Vec::try_from(tensor.view([-1]).to(Device::Cpu)).expect("masters and moments are float32")
        };
        for (name, kept) in &self.kept {
            let moments = kept.moments.each_ref().map(|moment| moment.as_ref().map(download));
            let master = kept.has_master.then(|| no_grad(|| download(&kept.master())));
            take(name, master, moments);
        }
    }

    fn memory(&self, planned: &Planned) -> UpdateMemory {
        UpdateMemory {
            table: at(&planned.table),
            workspace: at(&planned.workspace),
            control: at(&self.control),
        }
    }

    /// Notes where gradients are; makes a plan when there is none for them.
    fn describe(&mut self, gradients: &BTreeMap<String, Values>) {
        let found: Vec<(&String, &TchTensor)> = on_device(gradients).collect();
        match &mut self.planned {
            Some(planned) if planned.fits(&found) => {
                for (index, (_, gradient)) in found.iter().enumerate() {
                    planned.plan.point_gradient(&mut planned.described, index, at(&gradient.tensor));
                }
            }
            _ => self.planned = Some(self.plan(&found)),
        }
    }

    fn plan(&self, gradients: &[(&String, &TchTensor)]) -> Planned {
        let updated: Vec<UpdatedTensor> = gradients
            .iter()
            .map(|(name, gradient)| {
                let kept = self.kept.get(*name).unwrap_or_else(|| panic!("{name} is no parameter"));
                UpdatedTensor {
                    shape: kept.shape.clone(),
                    values: at(&kept.values.0.tensor),
                    rest: kept.rest.as_ref().map_or(Address::NONE, at),
                    gradient: at(&gradient.tensor),
                    gradient_format: format(&gradient.tensor),
                    moments: kept.moments.each_ref().map(|moment| moment.as_ref().map_or(Address::NONE, at)),
                    part: kept.part,
                }
            })
            .collect();
        let (plan, words) = started(UpdatePlan::new(self.rules, &updated));
        let device = self.control.device();
        let signed: Vec<i32> = words.iter().map(|word| word.cast_signed()).collect();
        let described = words[..plan.described_words()].to_vec();
        let planned = Planned {
            gradients: gradients.iter().map(|(name, g)| ((*name).clone(), format(&g.tensor))).collect(),
            workspace: tch::Tensor::zeros([plan.workspace().max(16) as i64], (Kind::Uint8, device)),
            table: tch::Tensor::from_slice(&signed).to(device),
            plan,
            described,
        };
        let queue = queue(&self.control).expect("the optimizer is on a GPU");
        // SAFETY: the plan's tensors are kept by the optimizer, the rest by what is returned.
        started(unsafe { parameter_squares(queue, &planned.plan, self.memory(&planned)) });
        planned
    }
}

impl Planned {
    /// Whether these are the gradients of the plan, in their formats.
    fn fits(&self, gradients: &[(&String, &TchTensor)]) -> bool {
        let found = gradients.iter().map(|(name, gradient)| (name.as_str(), format(&gradient.tensor)));
        found.eq(self.gradients.iter().map(|(name, format)| (name.as_str(), *format)))
    }
}

fn on_device(gradients: &BTreeMap<String, Values>) -> impl Iterator<Item = (&String, &TchTensor)> {
    gradients.iter().map(|(name, values)| match values {
        Values::Device(values) => (name, &values.0),
        _ => panic!("the gradient of {name} is not on the device"),
    })
}

/// 32-bit words of an [`UpdateControl`].
pub(crate) const CONTROL_WORDS: usize = 16;

/// What the words of an [`UpdateControl`] say.
pub(crate) fn outcome_of(control: &[u32]) -> UpdateOutcome {
    let (pairs, _) = control.as_chunks::<2>();
    let words: Vec<u64> = pairs.iter().map(|&[low, high]| u64::from(low) | u64::from(high) << 32).collect();
    let control = UpdateControl::from_words(words.try_into().expect("eight words"));
    UpdateOutcome { grad_norm: control.squares.sqrt(), applied: control.applied != 0 }
}

fn words(control: UpdateControl) -> tch::Tensor {
    tch::Tensor::from_slice(&control.to_words().map(u64::cast_signed))
}

fn of_cuda(rules: OptimizerRules) -> UpdateRules {
    match rules {
        OptimizerRules::Adafactor(rules) => UpdateRules::Adafactor {
            decay_exponent: rules.decay_exponent,
            eps: rules.eps,
            update_clip: rules.update_clip,
            weight_decay: rules.weight_decay,
            parameter_scale: rules.parameter_scale,
        },
        OptimizerRules::Adamw(rules) => UpdateRules::Adamw {
            beta1: rules.beta1,
            beta2: rules.beta2,
            eps: rules.eps,
            weight_decay: rules.weight_decay,
            parameter_scale: rules.parameter_scale,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::{Element, bf16};

    #[test]
    fn float32_values_come_back_from_bfloat16_and_rest() {
        let edges = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1_7fff, 0x1_8000, 0x1_8001, 0x1_ffff];
        let tops = [0, 0x3f80_0000, 0x42f6_0000, 0x7f7e_0000, 0x8000_0000, 0xbf80_0000, 0xff7e_0000_u32];
        let values: Vec<f32> =
            tops.iter().flat_map(|top| edges.map(|edge| f32::from_bits(top + edge))).collect();
        let rounded: Vec<bf16> = values.iter().map(|&value| bf16::round(value)).collect();
        let rest = rest_of(&tch::Tensor::from_slice(&values));
        let upper = tch::Tensor::from_slice(&values).to_kind(Kind::BFloat16);
        let found: Vec<f32> = joined(&upper, &rest).try_into().unwrap();
        assert!(rest_beside(&upper, &tch::Tensor::from_slice(&values)).equal(&rest));
        let changed = &upper * 2.0;
        let beside: Vec<f32> =
            joined(&changed, &rest_beside(&changed, &tch::Tensor::from_slice(&values))).try_into().unwrap();
        for ((beside, value), found) in beside.into_iter().zip(&values).zip(&found) {
            let twice = bf16::round(*value).widen() * 2.0;
            assert_eq!(beside, if twice == bf16::round(*value).widen() { *found } else { twice }, "{value}");
        }
        assert_eq!(DeviceValues(TchTensor::new(upper)).to_host(), Values::Bf16(rounded.clone()));
        for ((found, value), rounded) in found.iter().zip(&values).zip(rounded) {
            let halfway = value.to_bits() & 0x1_ffff == 0x8000;
            assert_eq!(found.to_bits(), value.to_bits() - u32::from(halfway), "{value}");
            assert_eq!(bf16::round(*found), rounded, "{value}");
        }
    }
}
