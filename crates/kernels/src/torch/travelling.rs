//! [`crate::expert_feed_forward`] of slots that travel to their experts and back.
//!
//! A second stream brings chunks while products of others are computed; in the backward pass gradients of the weights
//! are computed, at once for all chunks, while the last is on its way back. The products of a chunk are those that
//! [`FeedForward`] would compute of it.

use burn::backend::LibTorch;
use burn_tch::TchTensor;
use switchyard_cuda::Queue;
use tch::{Tensor, no_grad};

use crate::device_work::{DeviceMark, SideKind, SideWork};
use crate::expert_rows::{ExpertRows, Places, SlotsInUse, TokenPlaces};
use crate::feed_forward::FeedForward;
use crate::host::Held;
use crate::operation::{Operation, given};
use crate::slot_travel::{SlotChunk, SlotWay};
use crate::torch::composed::{Graph, composed};
use crate::torch::contiguous;
use crate::torch::feed_forward::{DeviceRows, has_kernel, projected_room};
use crate::torch::gpu::{queue, room};
use crate::torch::update::DeviceValues;

/// Experts whose slots are where their tokens are, `[num_experts, slots, d_model]`, and whose outputs go there.
#[derive(Debug)]
pub(crate) struct TravellingExperts {
    pub(crate) layer: FeedForward,
    pub(crate) way: SlotWay,
}

/// What the backward pass needs.
#[derive(Debug)]
pub(crate) struct Saved {
    /// The experts of each chunk as a layer of their own.
    layers: Vec<FeedForward>,
    computed: Computed,
}

#[derive(Debug)]
enum Computed {
    /// Of each chunk.
    Composed(Vec<Graph>),
    Kernel(Kept),
}

/// What the backward pass on a GPU needs, of all chunks one behind the other.
#[derive(Debug)]
struct Kept {
    x: TchTensor,
    weights: Vec<TchTensor>,
    projected: Vec<TchTensor>,
    /// Of each chunk.
    rows: Vec<DeviceRows>,
}

/// A chunk at its experts, and these as a layer of their own.
struct Part<'a> {
    number: usize,
    chunk: &'a SlotChunk,
    layer: &'a FeedForward,
}

impl Part<'_> {
    /// What of `[l, rows, width]` belongs to it; lies in one piece.
    fn of(&self, all: &Tensor) -> Tensor {
        let [start, rows] = [self.chunk.slots.start, self.chunk.slots.len()];
        let senders = self.layer.rows.segments;
        self.of_experts(all).narrow(1, (senders * start) as i64, (senders * rows) as i64)
    }

    /// The same, for whoever writes there.
    fn values(&self, all: &TchTensor) -> DeviceValues {
        let [_, rows, width] = sizes(&all.tensor);
        let SlotChunk { experts, slots } = self.chunk;
        let first = experts.start * rows + self.layer.rows.segments * slots.start;
        let count = self.chunk.len(self.layer.rows.segments);
        DeviceValues::there(all).part(first * width..(first + count) * width)
    }

    /// The matrices of its experts.
    fn of_experts(&self, matrices: &Tensor) -> Tensor {
        matrices.narrow(0, self.chunk.experts.start as i64, self.chunk.experts.len() as i64)
    }

    /// Values in the order of the gradients of weights.
    fn by_gradient(&self, all: &Tensor) -> Tensor {
        self.layer.by_gradient(&self.of(all))
    }

    /// Output and input matrices of its experts.
    fn weights(&self, weights: &[TchTensor]) -> Vec<TchTensor> {
        let part =
            |all: &TchTensor| TchTensor::from_existing(self.of_experts(&all.tensor), all.storage.clone());
        weights.iter().map(part).collect()
    }
}

/// The rows of a chunk, of `slots` of each sender.
fn rows_of(rows: &ExpertRows, chunk: &SlotChunk, slots: usize) -> ExpertRows {
    let [first, count] = [chunk.experts.start as i64, chunk.experts.len() as i64];
    let [start, length] = [chunk.slots.start as i64, chunk.slots.len() as i64];
    let [senders, slots] = [rows.segments as i64, slots as i64];
    let Held::Torch(used) = &rows.used.0 else { panic!("{ROWS}") };
    let used = used.tensor.view([-1, senders]).narrow(0, first, count);
    let used = if length == slots { used } else { used.clamp(start, start + length) - start };
    let places = rows.places.as_ref().map(|places| {
        let Places::Listed(Held::Torch(places)) = &places.0 else { panic!("{ROWS}") };
        let places = places.tensor.view([-1, senders, slots, 2]).narrow(0, first, count);
        let places = places.narrow(2, start, length).reshape([-1, 2]);
        TokenPlaces(Places::Listed(Held::Torch(TchTensor::new(places))))
    });
    ExpertRows {
        first_expert: rows.first_expert + chunk.experts.start,
        used: SlotsInUse(Held::Torch(TchTensor::new(used.reshape([-1])))),
        places,
        ..*rows
    }
}

const ROWS: &str = "what is said of slots that travel from device to device is there too";

impl TravellingExperts {
    /// The experts of each chunk as a layer of their own, for `slots` slots of each sender.
    fn layers(&self, slots: usize) -> Vec<FeedForward> {
        let layer = |chunk| FeedForward {
            rows: no_grad(|| rows_of(&self.layer.rows, chunk, slots)),
            ..self.layer.clone()
        };
        self.way.chunks.iter().map(layer).collect()
    }

    /// Brings `sent` to its experts chunk by chunk, lets `compute` make of each what goes back, and then `meanwhile`
    /// something of what came, while the last goes back. Returns what came back.
    fn journey<R>(
        &self,
        sent: &TchTensor,
        layers: &[FeedForward],
        mut compute: impl FnMut(&Part<'_>, [&Tensor; 2]),
        meanwhile: impl FnOnce(&TchTensor) -> R,
    ) -> (TchTensor, R) {
        let [all, slots, width] = sizes(&sent.tensor);
        let senders = self.layer.rows.segments;
        let shape = [all / senders, senders * slots, width];
        let new = || TchTensor::new(room(&shape, sent.tensor.kind(), &sent.tensor));
        let (arrived, returning, back) = (new(), new(), TchTensor::new(sent.tensor.empty_like()));
        let [here, home] = [sent, &back].map(DeviceValues::there);
        let parts: Vec<Part<'_>> = (self.way.chunks.iter().zip(layers).enumerate())
            .map(|(number, (chunk, layer))| Part { number, chunk, layer })
            .collect();
        let beside = |work: &dyn Fn()| -> DeviceMark {
            let side = SideWork::behind(&here.mark(), &here, SideKind::Tokens);
            work();
            side.leave()
        };
        let arrivals: Vec<DeviceMark> = parts
            .iter()
            .map(|part| beside(&|| self.way.travel.to_experts(part.chunk, &here, &part.values(&arrived))))
            .collect();
        let mut last = None;
        for (part, arrival) in parts.iter().zip(&arrivals) {
            arrival.holds(&here);
            let views = [&arrived, &returning].map(|all| part.of(&all.tensor));
            compute(part, views.each_ref());
            last = Some(beside(&|| self.way.travel.to_tokens(part.chunk, &part.values(&returning), &home)));
        }
        let made = meanwhile(&arrived);
        // Memory of what has travelled may go to others from here on.
        last.iter().for_each(|mark| mark.holds(&here));
        (back, made)
    }

    fn compute<const N: usize>(&self, inputs: &[TchTensor; N], tracked: bool) -> (TchTensor, Saved) {
        let inputs = inputs.each_ref().map(contiguous);
        let [_, slots, _] = sizes(&inputs[0].tensor);
        let layers = self.layers(slots);
        let (out, computed) = match queue(&inputs[0].tensor).filter(|_| has_kernel(&inputs)) {
            Some(queue) => no_grad(|| self.launch(queue, &layers, &inputs, tracked)),
            None => self.compose(&layers, &inputs, tracked),
        };
        (out, Saved { layers, computed })
    }

    fn gradients<const N: usize>(&self, saved: &Saved, gradient: &TchTensor) -> [Option<TchTensor>; N] {
        let gradient = contiguous(gradient);
        let Saved { layers, computed } = saved;
        match computed {
            Computed::Composed(graphs) => self.composed_backward(layers, graphs, &gradient).map(Some),
            Computed::Kernel(kept) => {
                let mut all = no_grad(|| self.launch_backward(layers, kept, &gradient)).into_iter();
                std::array::from_fn(|_| all.next().flatten())
            }
        }
    }

    fn launch(
        &self,
        queue: Queue<'_>,
        layers: &[FeedForward],
        inputs: &[TchTensor],
        tracked: bool,
    ) -> (TchTensor, Computed) {
        let (sent, weights) = (&inputs[0], &inputs[1..]);
        let [_, slots, _] = sizes(&sent.tensor);
        let projected = projected_room(self.layer.rows.segments * slots, &weights[1..]);
        let mut rows = Vec::new();
        let compute = |part: &Part<'_>, [x, out]: [&Tensor; 2]| {
            let (layer, weights) = (part.layer, part.weights(weights));
            let of_part = layer.device_rows(x);
            let projected: Vec<Tensor> = projected.iter().map(|all| part.by_gradient(all)).collect();
            let hidden = layer.hidden_into(queue, x, &weights[1..], &of_part, &projected, tracked);
            layer.products().into(&layer.by_gradient(out), &hidden, &weights[0].tensor);
            rows.push(of_part);
        };
        let (out, x) = self.journey(sent, layers, compute, TchTensor::clone);
        let projected = projected.into_iter().map(TchTensor::new).collect();
        (out, Computed::Kernel(Kept { x, weights: weights.to_vec(), projected, rows }))
    }

    fn launch_backward(
        &self,
        layers: &[FeedForward],
        kept: &Kept,
        gradient: &TchTensor,
    ) -> Vec<Option<TchTensor>> {
        let Kept { x, weights, projected, rows } = kept;
        let queue = queue(&gradient.tensor).expect("kernels were chosen on a GPU");
        let hidden = self.layer.hidden_room(projected);
        let compute = |part: &Part<'_>, [gradient, of_x]: [&Tensor; 2]| {
            let hidden = hidden.part(|all| part.by_gradient(all));
            let rows = &rows[part.number];
            part.layer.through(queue, gradient, &part.weights(weights), rows, &hidden, of_x);
        };
        let of_weights = |gradient: &TchTensor| {
            let hidden = hidden.part(|all| self.layer.by_gradient(all));
            self.layer.of_weights(self.layer.weight_factors(x, gradient, hidden))
        };
        let (of_sent, of_weights) = self.journey(gradient, layers, compute, of_weights);
        std::iter::once(Some(of_sent)).chain(of_weights).collect()
    }

    fn compose<const N: usize>(
        &self,
        layers: &[FeedForward],
        inputs: &[TchTensor; N],
        tracked: bool,
    ) -> (TchTensor, Computed) {
        let (sent, weights) = (&inputs[0], &inputs[1..]);
        let mut graphs = Vec::new();
        let compute = |part: &Part<'_>, [x, out]: [&Tensor; 2]| {
            let weights = part.weights(weights);
            let x = TchTensor::new(x.shallow_clone());
            let inputs: [TchTensor; N] =
                std::array::from_fn(|i| if i == 0 { x.clone() } else { weights[i - 1].clone() });
            let layer = part.layer;
            let ([of_part], graph) =
                composed(&layer.repeated(&inputs), tracked, |inputs| [layer.composed(&inputs)]);
            out.shallow_clone().copy_(&of_part.tensor);
            graphs.push(graph);
        };
        let (out, ()) = self.journey(sent, layers, compute, |_| ());
        (out, Computed::Composed(graphs))
    }

    fn composed_backward<const N: usize>(
        &self,
        layers: &[FeedForward],
        graphs: &[Graph],
        gradient: &TchTensor,
    ) -> [TchTensor; N] {
        let mut of_parts: Vec<[TchTensor; N]> = Vec::new();
        let compute = |part: &Part<'_>, [gradient, of_x]: [&Tensor; 2]| {
            let gradient = TchTensor::new(gradient.shallow_clone());
            let computed = graphs[part.number].gradients([Some(gradient)], [true; N]);
            let computed: [TchTensor; N] = given(computed);
            of_x.shallow_clone().copy_(&computed[0].tensor);
            of_parts.push(computed);
        };
        let (of_sent, ()) = self.journey(gradient, layers, compute, |_| ());
        let chunks = &self.way.chunks;
        let joined = |number: usize| {
            let parts: Vec<&Tensor> = of_parts.iter().map(|of_part| &of_part[number].tensor).collect();
            if chunks.iter().any(|chunk| chunk.experts != chunks[0].experts) {
                return Tensor::cat(&parts, 0);
            }
            parts.into_iter().map(Tensor::shallow_clone).reduce(|a, b| a + b).expect("there is a chunk")
        };
        std::array::from_fn(|i| if i == 0 { of_sent.clone() } else { TchTensor::new(joined(i)) })
    }
}

fn sizes(stack: &Tensor) -> [usize; 3] {
    let sizes: [i64; 3] = stack.size().try_into().expect("a stack of matrices");
    sizes.map(|size| size as usize)
}

macro_rules! operation {
    ($inputs:literal) => {
        impl Operation<LibTorch, $inputs, 1> for TravellingExperts {
            type Saved = Saved;

            fn forward(&self, inputs: &[TchTensor; $inputs], tracked: bool) -> ([TchTensor; 1], Saved) {
                let (out, saved) = self.compute(inputs, tracked);
                ([out], saved)
            }

            fn backward(
                &self,
                saved: &Saved,
                gradients: [Option<TchTensor>; 1],
                _: [bool; $inputs],
            ) -> [Option<TchTensor>; $inputs] {
                let [gradient] = given(gradients);
                self.gradients(saved, &gradient)
            }
        }
    };
}

operation!(3);
operation!(4);
