//! [`crate::feed_forward`] and [`crate::expert_feed_forward`].
//!
//! On a GPU the products run over all slots of every expert. Kernels do the pointwise half and make hidden
//! values of empty slots 0, so that nothing else must know which slots hold a token. ReLU alone is done within
//! the first product where that can.

use std::sync::Arc;

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use switchyard_cuda::{
    ActivationGradients, Columns, ExpertNoise, Hidden, HiddenDropout, Queue, UsedRows, activate,
    activate_backward, clear_empty_rows,
};
use tch::{Kind, Tensor, no_grad};

use crate::activation::Activation;
use crate::expert_rows::{ExpertRows, Places, SlotsInUse, TokenPlaces, WeightGradients};
use crate::feed_forward::FeedForward;
use crate::host::Held;
use crate::noise::{Factor, TokenNoise, TokenPlace};
use crate::operation::{Operation, given};
use crate::torch::composed::{Graph, composed};
use crate::torch::gpu::{at, at_optional, format, in_pieces, narrow, noise_key, queue, started, token_noise};
use crate::torch::products::Products;
use crate::torch::{contiguous, exchanged, uploaded, wide};

/// Batch row and position of the token in each slot, any where none is. int32 `[slots, 2]`
pub(crate) fn places(token_of_slot: &TchTensor, noise: TokenNoise) -> TchTensor {
    no_grad(|| {
        let tokens = narrow(&token_of_slot.tensor).clamp_min(0);
        let row_tokens = noise.row_tokens as i64;
        let rows = tokens.floor_divide_scalar(row_tokens) + i64::from(noise.first_row);
        TchTensor::new(Tensor::stack(&[rows, tokens.remainder(row_tokens)], 1))
    })
}

/// The integers of a tensor on any device.
fn downloaded(tensor: &Tensor) -> Vec<i32> {
    exchanged("slots in use");
    let flat = tensor.to_kind(Kind::Int).contiguous().view([-1]);
    Vec::try_from(&flat).expect("one dimension of this kind")
}

/// Integers in main memory where `like` is; nothing waits for the device.
fn uploaded_integers(values: &[i32], like: &Tensor) -> TchTensor {
    exchanged("slots in use");
    TchTensor::new(Tensor::from_slice(values).to_device_(like.device(), Kind::Int, true, false))
}

/// The same rows with their numbers in main memory.
fn on_host(rows: &ExpertRows) -> ExpertRows {
    let used = match &rows.used.0 {
        Held::Torch(used) => SlotsInUse(Held::Host(Arc::new(downloaded(&used.tensor)))),
        Held::Host(_) => rows.used.clone(),
    };
    let places = rows.places.as_ref().map(|places| match &places.0 {
        Places::Listed(Held::Torch(places)) => {
            let words = downloaded(&places.tensor);
            let place = |pair: &[i32]| TokenPlace { row: pair[0] as u32, token: pair[1] as u32 };
            TokenPlaces::from(words.chunks_exact(2).map(place).collect::<Vec<_>>())
        }
        _ => places.clone(),
    });
    ExpertRows { used, places, ..*rows }
}

fn activated(activation: Activation, x: &Tensor) -> Tensor {
    match activation {
        Activation::Relu => x.relu(),
        Activation::GeluTanh => x.gelu("tanh"),
        Activation::Gelu => x.gelu("none"),
        Activation::Silu => x.silu(),
    }
}

impl FeedForward {
    /// Inputs in the order of the operation; weights have one matrix for each gradient.
    pub(crate) fn composed(&self, inputs: &[&Tensor]) -> Tensor {
        let [x, wo, wi, others @ ..] = inputs else { panic!("a layer has three tensors at least") };
        let (gate, residual) =
            if self.gated { (others.first(), others.get(1)) } else { (None, others.first()) };
        let (shape, matrices) = (x.size(), wi.size()[0]);
        let rows = x.view([matrices, -1, shape[2]]);
        let mut hidden = activated(self.activation, &wide(&rows.matmul(wi)));
        if let Some(gate) = gate {
            hidden = &hidden * wide(&rows.matmul(gate));
        }
        let factors = self.factors(shape[0] as usize, shape[1] as usize, wi.size()[2] as usize, x);
        if let Some(factors) = factors {
            hidden = &hidden * factors.view_as(&hidden);
        }
        let hidden = hidden.to_kind(x.kind());
        let out = match residual {
            Some(residual) => residual.view([matrices, -1, shape[2]]).baddbmm(&hidden, wo, 1.0, 1.0),
            None => hidden.matmul(wo),
        };
        out.view(shape.as_slice())
    }

    /// 0 for hidden values of slots that hold no token, and dropout of the others; `None` where all are 1.
    fn factors(&self, experts: usize, slots: usize, width: usize, like: &Tensor) -> Option<Tensor> {
        let rows = on_host(&self.rows);
        let used = |expert| rows.runs(expert, slots).map(|run| run.len()).sum::<usize>();
        if self.dropout.rate == 0.0 && (0..experts).all(|expert| used(expert) == slots) {
            return None;
        }
        let mut factors = vec![0.0; experts * slots * width];
        for (expert, factors) in factors.chunks_mut((slots * width).max(1)).enumerate().take(experts) {
            for run in rows.runs(expert, slots) {
                let part = &mut factors[run.start * width..run.end * width];
                part.fill(1.0);
                self.drop_factors(&rows, expert * slots + run.start, expert, width, part);
            }
        }
        Some(uploaded(&factors, &[experts as i64, slots as i64, width as i64], like))
    }

    fn drop_factors(
        &self,
        rows: &ExpertRows,
        first: usize,
        expert: usize,
        width: usize,
        factors: &mut [f32],
    ) {
        let dropout = self.dropout;
        if dropout.rate == 0.0 {
            return;
        }
        let factor = Factor::Dropout { rate: dropout.rate as f32 };
        let expert = (rows.first_expert + expert) as u32;
        let mut words = vec![0; width];
        for (row, factors) in factors.chunks_exact_mut(width).enumerate() {
            rows.place(first + row).fill(dropout.key, expert, dropout.columns, &mut words);
            factors.iter_mut().zip(&words).for_each(|(value, &word)| *value = factor.of(word));
        }
    }

    /// The inputs with each expert's matrices as often as they get gradients.
    pub(crate) fn repeated<const N: usize>(&self, inputs: &[TchTensor; N]) -> [TchTensor; N] {
        let parts = self.rows.gradients() as i64;
        let weights = if self.gated { 1..4 } else { 1..3 };
        std::array::from_fn(|i| {
            if parts > 1 && weights.contains(&i) {
                return TchTensor::new(inputs[i].tensor.repeat_interleave_self_int(parts, 0, None));
            }
            inputs[i].clone()
        })
    }
}

/// What the backward pass needs.
#[derive(Debug)]
pub(crate) enum Saved {
    Composed(Graph),
    Kernel(Kept),
}

/// What the backward pass on a GPU needs.
#[derive(Debug)]
pub(crate) struct Kept {
    x: TchTensor,
    /// Output matrices, then input matrices.
    weights: Vec<TchTensor>,
    /// `x wi` of every input matrix; of an ungated ReLU layer the hidden values instead.
    projected: Vec<TchTensor>,
    rows: DeviceRows,
    has_residual: bool,
}

/// Hidden values on the way back.
#[derive(Debug)]
pub(crate) struct HiddenRoom {
    /// What the activation was computed of; of an ungated ReLU layer its values.
    before: Vec<Tensor>,
    /// The values that were multiplied with the output matrices.
    values: Tensor,
    /// Of what the activation was computed of.
    gradients: Vec<Tensor>,
}

impl HiddenRoom {
    /// A part of each.
    pub(crate) fn part(&self, of: impl Fn(&Tensor) -> Tensor) -> Self {
        let parts = |all: &[Tensor]| all.iter().map(&of).collect();
        Self { before: parts(&self.before), values: of(&self.values), gradients: parts(&self.gradients) }
    }
}

/// What kernels read of the rows.
#[derive(Debug)]
pub(crate) struct DeviceRows {
    /// Absent where every slot holds a token.
    used: Option<TchTensor>,
    /// Absent without dropout, and where slots hold the tokens in order.
    places: Option<TchTensor>,
}

/// Whether the kernels have hidden values as wide as these matrices make them.
pub(crate) fn has_kernel(inputs: &[TchTensor]) -> bool {
    let [x, _, wi, ..] = inputs else { return false };
    in_pieces(wi.tensor.size()[2] as usize, format(&x.tensor))
}

/// Room for what every input matrix makes of `slots` slots of each expert.
pub(crate) fn projected_room(slots: usize, wi: &[TchTensor]) -> Vec<Tensor> {
    let room = |wi: &Tensor| {
        let [experts, _, d_ff] = wi.size().try_into().expect("a stack of matrices");
        Tensor::empty([experts, slots as i64, d_ff], (wi.kind(), wi.device()))
    };
    wi.iter().map(|wi| room(&wi.tensor)).collect()
}

fn transposed(matrices: &Tensor) -> Tensor {
    matrices.transpose(1, 2)
}

impl FeedForward {
    pub(crate) fn products(&self) -> Products {
        Products { apart: self.rows.weight_gradients == WeightGradients::PerSegment }
    }

    /// Rows of slots as one matrix for each gradient of an expert's weights.
    pub(crate) fn by_gradient(&self, slots: &Tensor) -> Tensor {
        let (size, parts) = (slots.size(), self.rows.gradients() as i64);
        slots.view([size[0] * parts, size[1] / parts, size[2]])
    }

    /// The same, of a tensor whose memory may be shared.
    fn part_by_gradient(&self, slots: &TchTensor) -> TchTensor {
        TchTensor::from_existing(self.by_gradient(&slots.tensor), slots.storage.clone())
    }

    pub(crate) fn device_rows(&self, x: &Tensor) -> DeviceRows {
        let segment_rows = x.size()[1] / self.rows.segments as i64;
        let used = match &self.rows.used.0 {
            Held::Torch(used) => Some(TchTensor::from_existing(narrow(&used.tensor), used.storage.clone())),
            Held::Host(used) if used.iter().all(|&used| i64::from(used) == segment_rows) => None,
            Held::Host(used) => Some(uploaded_integers(used, x)),
        };
        let places = match self.rows.places.as_ref().map(|places| &places.0) {
            Some(Places::Listed(places)) if self.dropout.rate > 0.0 => Some(match places {
                Held::Torch(places) => places.clone(),
                Held::Host(places) => {
                    let words = places.iter().flat_map(|place| [place.row as i32, place.token as i32]);
                    uploaded_integers(&words.collect::<Vec<_>>(), x)
                }
            }),
            _ => None,
        };
        DeviceRows { used, places }
    }

    /// The hidden values as the kernels see them.
    fn pointwise(&self, x: &Tensor, wi: &Tensor, rows: &DeviceRows) -> Hidden {
        let (size, d_ff) = (x.size(), wi.size()[2] as usize);
        let slots = size[1] as usize;
        let segment_rows = (slots / self.rows.segments).max(1);
        Hidden {
            rows: size[0] as usize * slots,
            d_ff,
            format: format(x),
            activation: match self.activation {
                Activation::Relu => switchyard_cuda::Activation::Relu,
                Activation::GeluTanh => switchyard_cuda::Activation::GeluTanh,
                Activation::Gelu => switchyard_cuda::Activation::Gelu,
                Activation::Silu => switchyard_cuda::Activation::Silu,
            },
            stride: d_ff,
            used: rows.used.as_ref().map(|used| UsedRows { counts: at(&used.tensor), segment_rows }),
            dropout: (self.dropout.rate > 0.0).then(|| self.drawn(x, rows, slots)),
        }
    }

    fn drawn(&self, x: &Tensor, rows: &DeviceRows, slots: usize) -> HiddenDropout {
        let crate::feed_forward::HiddenDropout { rate, key, columns } = self.dropout;
        let places = self.rows.places.as_ref().expect("rows come with places where dropout needs them");
        if let Places::InOrder(noise) = places.0 {
            return HiddenDropout::Tokens(rate, token_noise(TokenNoise { key, columns, ..noise }, x));
        }
        let noise = ExpertNoise {
            key: noise_key(key, x),
            places: at_optional(rows.places.as_ref().map(|places| &places.tensor)),
            slots,
            first_expert: self.rows.first_expert as u32,
            columns: columns.map(|columns| Columns { first: columns.first, total: columns.total }),
        };
        HiddenDropout::Experts(rate, noise)
    }

    fn launch(&self, queue: Queue<'_>, inputs: &[TchTensor], tracked: bool) -> (TchTensor, Kept) {
        let mut inputs = inputs.iter().map(contiguous);
        let mut next = || inputs.next().expect("a layer has three tensors at least");
        let (x, wo, mut wi) = (next(), next(), vec![next()]);
        if self.gated {
            wi.push(next());
        }
        let residual = inputs.next();
        let (products, rows) = (self.products(), self.device_rows(&x.tensor));
        let slots = x.tensor.size()[1] as usize;
        let projected: Vec<Tensor> =
            projected_room(slots, &wi).iter().map(|all| self.by_gradient(all)).collect();
        let hidden = self.hidden_into(queue, &x.tensor, &wi, &rows, &projected, tracked);
        let out = match &residual {
            Some(residual) => products.onto(&self.by_gradient(&residual.tensor), &hidden, &wo.tensor),
            None => products.of(&hidden, &wo.tensor),
        };
        let out = TchTensor::new(out.view_as(&x.tensor));
        let weights = std::iter::once(wo).chain(wi).collect();
        let projected = projected.into_iter().map(TchTensor::new).collect();
        (out, Kept { x, weights, projected, rows, has_residual: residual.is_some() })
    }

    /// Writes what every input matrix makes of `x`, `[experts, slots, d_model]`, to `projected`, or of an ungated ReLU
    /// layer the hidden values. Returns these, which may lie in the same place.
    pub(crate) fn hidden_into(
        &self,
        queue: Queue<'_>,
        x: &Tensor,
        wi: &[TchTensor],
        rows: &DeviceRows,
        projected: &[Tensor],
        tracked: bool,
    ) -> Tensor {
        let pointwise = self.pointwise(x, &wi[0].tensor, rows);
        let (x, products) = (self.by_gradient(x), self.products());
        let within_product = self.keeps_activated() && self.dropout.rate == 0.0;
        if within_product && products.relu_into(&projected[0], &x, &wi[0].tensor) {
            // SAFETY: the hidden values have the sizes of `pointwise`.
            started(unsafe { clear_empty_rows(queue, at(&projected[0]), pointwise) });
            return projected[0].shallow_clone();
        }
        wi.iter().zip(projected).for_each(|(wi, out)| products.into(out, &x, &wi.tensor));
        let in_place = self.keeps_activated() || !tracked;
        let hidden = if in_place { projected[0].shallow_clone() } else { projected[0].empty_like() };
        // SAFETY: all tensors have the sizes of `pointwise`; the hidden values may be written where they are read.
        started(unsafe {
            activate(queue, at(&projected[0]), at_optional(projected.get(1)), at(&hidden), pointwise)
        });
        hidden
    }

    /// Gradients of `x`, `wo` and every `wi`; those of weights are left out if they wait.
    fn launch_backward(&self, kept: &Kept, gradient: &TchTensor) -> Vec<Option<TchTensor>> {
        let Kept { x, weights, projected, rows, .. } = kept;
        let gradient = contiguous(gradient);
        let queue = queue(&gradient.tensor).expect("kernels were chosen on a GPU");
        let (hidden, of_x) = (self.hidden_room(projected), x.tensor.empty_like());
        self.through(queue, &gradient.tensor, weights, rows, &hidden, &of_x);
        let of_weights = self.of_weights(self.weight_factors(x, &gradient, hidden));
        std::iter::once(Some(TchTensor::new(of_x))).chain(of_weights).collect()
    }

    /// Room for the backward pass through hidden values, whose `projected` it reads.
    pub(crate) fn hidden_room(&self, projected: &[TchTensor]) -> HiddenRoom {
        let before: Vec<Tensor> = projected.iter().map(|all| all.tensor.shallow_clone()).collect();
        let values = if self.keeps_activated() { before[0].shallow_clone() } else { before[0].empty_like() };
        let gradients = before.iter().map(Tensor::empty_like).collect();
        HiddenRoom { before, values, gradients }
    }

    /// The way of `gradient` through a layer of these `weights`, output matrices first: fills `hidden`, and writes the
    /// gradient of its input to `of_x`. Both are `[experts, slots, d_model]`.
    pub(crate) fn through(
        &self,
        queue: Queue<'_>,
        gradient: &Tensor,
        weights: &[TchTensor],
        rows: &DeviceRows,
        hidden: &HiddenRoom,
        of_x: &Tensor,
    ) {
        let HiddenRoom { before, values, gradients } = hidden;
        let (products, pointwise) = (self.products(), self.pointwise(gradient, &weights[1].tensor, rows));
        if !self.keeps_activated() {
            // SAFETY: as in the forward pass.
            started(unsafe {
                activate(queue, at(&before[0]), at_optional(before.get(1)), at(values), pointwise)
            });
        }
        products.into(&gradients[0], &self.by_gradient(gradient), &transposed(&weights[0].tensor));
        self.through_activation(queue, before, gradients, pointwise);
        let mut of_x = self.by_gradient(of_x);
        products.into(&of_x, &gradients[0], &transposed(&weights[1].tensor));
        if let Some(of_linear) = gradients.get(1) {
            products.add_to(&mut of_x, of_linear, &transposed(&weights[2].tensor));
        }
    }

    /// The factors of the gradients of the weights, that of `wo` first.
    pub(crate) fn weight_factors(
        &self,
        x: &TchTensor,
        gradient: &TchTensor,
        hidden: HiddenRoom,
    ) -> Vec<[TchTensor; 2]> {
        let rows_of_x = self.part_by_gradient(x);
        let of_output = [TchTensor::new(hidden.values), self.part_by_gradient(gradient)];
        let of_inputs =
            hidden.gradients.into_iter().map(|gradient| [rows_of_x.clone(), TchTensor::new(gradient)]);
        std::iter::once(of_output).chain(of_inputs).collect()
    }

    /// Gradients of the weights by their factors, that of `wo` first; `None` for those that wait.
    pub(crate) fn of_weights(&self, factors: Vec<[TchTensor; 2]>) -> Vec<Option<TchTensor>> {
        let (matrices, products) = (factors.len(), self.products());
        match &self.deferral {
            Some(deferral) if deferral.is_worth_while(&factors) => {
                deferral.keep(products, factors);
                vec![None; matrices]
            }
            _ => {
                let product =
                    |[left, right]: &[TchTensor; 2]| products.of(&transposed(&left.tensor), &right.tensor);
                factors.iter().map(|factors| Some(TchTensor::new(product(factors)))).collect()
            }
        }
    }

    /// Turns the gradient of the hidden values, the first of `gradients`, into that of the activated factor; writes that
    /// of the linear one.
    fn through_activation(
        &self,
        queue: Queue<'_>,
        before: &[Tensor],
        gradients: &[Tensor],
        mut pointwise: Hidden,
    ) {
        if self.keeps_activated() {
            pointwise.dropout = Some(HiddenDropout::Done(self.dropout.rate));
        }
        let addresses = ActivationGradients {
            gradient: at(&gradients[0]),
            x: at(&before[0]),
            linear: at_optional(before.get(1)),
            x_gradient: at(&gradients[0]),
            linear_gradient: at_optional(gradients.get(1)),
        };
        // SAFETY: all tensors have the sizes of `pointwise`; a gradient may be written where it is read.
        started(unsafe { activate_backward(queue, addresses, pointwise) });
    }
}

macro_rules! operation {
    ($inputs:literal) => {
        impl Operation<LibTorch, $inputs, 1> for FeedForward {
            type Saved = Saved;

            fn forward(&self, inputs: &[TchTensor; $inputs], tracked: bool) -> ([TchTensor; 1], Saved) {
                if let Some(queue) = queue(&inputs[0].tensor).filter(|_| has_kernel(inputs)) {
                    let (out, kept) = no_grad(|| self.launch(queue, inputs, tracked));
                    return ([out], Saved::Kernel(kept));
                }
                let (out, graph) =
                    composed(&self.repeated(inputs), tracked, |inputs| [self.composed(&inputs)]);
                (out, Saved::Composed(graph))
            }

            fn backward(
                &self,
                saved: &Saved,
                gradients: [Option<TchTensor>; 1],
                wanted: [bool; $inputs],
            ) -> [Option<TchTensor>; $inputs] {
                match saved {
                    Saved::Composed(graph) => graph.gradients(gradients, wanted),
                    Saved::Kernel(kept) => {
                        let [gradient] = given(gradients);
                        let computed = no_grad(|| self.launch_backward(kept, &gradient));
                        let residual = kept.has_residual.then_some(Some(gradient));
                        let mut all = computed.into_iter().chain(residual);
                        std::array::from_fn(|_| all.next().flatten())
                    }
                }
            }
        }
    };
}

operation!(3);
operation!(4);
operation!(5);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::NoiseKey;

    #[test]
    fn places_are_those_of_the_noise() {
        let key = NoiseKey { seed: 0, step: 0, site: 0 };
        let noise = TokenNoise { key, first_row: 3, row_tokens: 5, columns: None };
        let slots = [7_i64, 0, -1, 24];
        let found = downloaded(&places(&TchTensor::new(Tensor::from_slice(&slots)), noise).tensor);
        for (pair, token) in found.chunks(2).zip(slots) {
            let place = TokenPlace { row: pair[0] as u32, token: pair[1] as u32 };
            assert_eq!(place, noise.place(token.max(0) as usize));
        }
    }
}
