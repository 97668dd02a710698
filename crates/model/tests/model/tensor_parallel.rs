//! Two tensor-parallel ranks, as threads, compute what one rank computes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Barrier, Mutex};
use switchyard_kernels::test_device;

use burn::tensor::{Device, Tensor};
use switchyard_config::parameters::parameters;
use switchyard_config::partition::held_part;
use switchyard_config::plan::{PrecisionMode, RouterKind, RoutingConfig};
use switchyard_config::{Activation, MeshShape, ModelConfig};
use switchyard_kernels::{Columns, LinearMap, VocabularyGroup, VocabularyShard, linear_map};
use switchyard_model::generate::greedy;
use switchyard_model::{
    Capacity, ForwardContext, Seq2SeqBatch, SwitchTransformer, TensorParallel, WholeTensors,
};

use super::gradients::{gradients, total};
use super::{largest_difference, paper_routing, random_batch, scalar, small_model, values};

const SIZE: usize = 2;
const MESH: MeshShape = MeshShape { data: 1, expert: 1, tensor: SIZE };

/// Where the ranks meet.
#[derive(Debug)]
struct Meeting {
    barrier: Barrier,
    values: Mutex<[Vec<f32>; SIZE]>,
}

#[derive(Debug, Clone)]
struct Rank {
    number: usize,
    meeting: Arc<Meeting>,
}

impl Rank {
    /// The values of all ranks, in rank order.
    fn gather(&self, values: &[f32]) -> [Vec<f32>; SIZE] {
        let met = || self.meeting.values.lock().expect("no rank panics here");
        met()[self.number] = values.to_vec();
        self.meeting.barrier.wait();
        let all = met().clone();
        self.meeting.barrier.wait();
        all
    }

    fn join(&self, values: &[f32], join: fn(f32, f32) -> f32) -> Vec<f32> {
        let [first, second] = self.gather(values);
        first.into_iter().zip(second).map(|(a, b)| join(a, b)).collect()
    }

    fn sum(&self, values: &[f32]) -> Vec<f32> {
        self.join(values, |a, b| a + b)
    }
}

impl VocabularyGroup for Rank {
    fn max(&self, values: &mut [f32]) {
        values.copy_from_slice(&self.join(values, f32::max));
    }

    fn sum(&self, values: &mut [f32]) {
        values.copy_from_slice(&Rank::sum(self, values));
    }
}

/// A sum over ranks forward or backward, nothing in the other direction.
#[derive(Debug)]
enum Border {
    CopyIn(Rank),
    ReduceOut(Rank),
}

impl LinearMap for Border {
    fn forward(&self, x: &[f32]) -> Option<Vec<f32>> {
        match self {
            Self::CopyIn(_) => None,
            Self::ReduceOut(rank) => Some(rank.sum(x)),
        }
    }

    fn backward(&self, gradient: &[f32]) -> Option<Vec<f32>> {
        match self {
            Self::CopyIn(rank) => Some(rank.sum(gradient)),
            Self::ReduceOut(_) => None,
        }
    }
}

impl TensorParallel for Rank {
    fn splits(&self) -> bool {
        true
    }

    fn copy_in(&self, x_nd: Tensor<2>) -> Tensor<2> {
        let shape = x_nd.dims();
        linear_map(x_nd, Arc::new(Border::CopyIn(self.clone())), shape)
    }

    fn copy_in_gates(&self, gates: Tensor<1>) -> Tensor<1> {
        let shape = gates.dims();
        linear_map(gates, Arc::new(Border::CopyIn(self.clone())), shape)
    }

    fn reduce_out(&self, x_nd: Tensor<2>) -> Tensor<2> {
        let shape = x_nd.dims();
        linear_map(x_nd, Arc::new(Border::ReduceOut(self.clone())), shape)
    }

    fn vocabulary(&self, vocab_size: usize) -> Range<usize> {
        let local = vocab_size / SIZE;
        self.number * local..(self.number + 1) * local
    }

    fn vocabulary_shard(&self, vocab_size: usize) -> Option<VocabularyShard> {
        let first = self.vocabulary(vocab_size).start;
        Some(VocabularyShard { first, group: Arc::new(self.clone()) })
    }

    fn gather_vocabulary(&self, logits_nv: Tensor<2>) -> Tensor<2> {
        let ([rows, local], device) = (logits_nv.dims(), logits_nv.device());
        let parts = self.gather(&values(logits_nv));
        let parts = parts.map(|part| Tensor::<1>::from_data(part.as_slice(), &device).reshape([rows, local]));
        Tensor::cat(parts.to_vec(), 1)
    }

    fn columns(&self, local: usize) -> Columns {
        Columns { first: self.number * local, total: SIZE * local }
    }
}

/// What every rank returns, in rank order.
fn on_ranks<R: Send>(run: impl Fn(Rank) -> R + Sync) -> Vec<R> {
    let meeting = Arc::new(Meeting { barrier: Barrier::new(SIZE), values: Mutex::default() });
    std::thread::scope(|scope| {
        let run = &run;
        let ranks = (0..SIZE).map(|number| Rank { number, meeting: meeting.clone() });
        let threads: Vec<_> = ranks.map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank")).collect()
    })
}

/// Context with every noise on.
fn noisy<'a>(
    config: &'a ModelConfig,
    routing: &'a RoutingConfig,
    parallel: &'a dyn TensorParallel,
) -> ForwardContext<'a> {
    ForwardContext {
        capacity: Capacity::Training,
        dropout_rate: 0.1,
        expert_dropout: 0.3,
        router_jitter_noise: 0.05,
        seed: 9,
        step: 4,
        first_row: 2,
        tensor_parallel: parallel,
        ..ForwardContext::evaluation(config, routing)
    }
}

fn loss_and_gradients(
    model: &SwitchTransformer,
    batch: &Seq2SeqBatch,
    context: &ForwardContext<'_>,
) -> (f64, BTreeMap<String, Vec<f32>>) {
    let loss = total(&model.loss(batch, 1e-2, context));
    (scalar(loss.clone()), gradients(model, &loss))
}

fn assert_split_changes_nothing(config: &ModelConfig, routing: &RoutingConfig) {
    let device = test_device().autodiff();
    let batch = random_batch(3, 7, 5, config.vocab_size);
    let whole = SwitchTransformer::new(config, 6, &device);
    let (loss, whole) = loss_and_gradients(&whole, &batch, &noisy(config, routing, &WholeTensors));
    let ranks = on_ranks(|rank| {
        let model = part(config, &device, rank.number);
        loss_and_gradients(&model, &batch, &noisy(config, routing, &rank))
    });
    for (number, (loss_of_rank, gradients)) in ranks.iter().enumerate() {
        assert!((loss_of_rank - loss).abs() < 1e-6 * loss, "{loss_of_rank} of rank {number}, {loss}");
        assert_eq!(gradients.len(), parameters(config).len(), "every parameter is in the graph");
        for spec in parameters(config) {
            let (name, whole) = (&spec.name, &whole[&spec.name]);
            let part = held_part(&spec, MESH, MESH.coordinates(number));
            if part.is_whole(&spec.shape) {
                assert!(gradients[name] == ranks[0].1[name], "{name} differs between the ranks");
            }
            let largest = whole.iter().fold(0.0_f32, |largest, g| largest.max(g.abs()));
            assert!(largest > 0.0, "{name} has a gradient");
            let difference = largest_difference(&gradients[name], &part.cut(&spec.shape, whole));
            assert!(difference <= 1e-5 * largest, "{name} on rank {number}: {difference} of {largest}");
        }
    }
}

fn part(config: &ModelConfig, device: &Device, rank: usize) -> SwitchTransformer {
    SwitchTransformer::part(config, 6, device, MESH, MESH.coordinates(rank), PrecisionMode::Fp32)
}

#[test]
fn a_split_switch_transformer_has_the_loss_and_the_gradients_of_the_whole() {
    for router in [RouterKind::Top1, RouterKind::Top2, RouterKind::ExpertChoice] {
        let config = ModelConfig { num_heads: 4, router_bias: true, ..small_model() };
        assert_split_changes_nothing(&config, &RoutingConfig { router, ..paper_routing() });
    }
    let gated = ModelConfig {
        num_heads: 4,
        activation: Activation::GeluTanh,
        gated: true,
        tie_word_embeddings: false,
        ..small_model()
    };
    assert_split_changes_nothing(&gated, &paper_routing());
}

#[test]
fn split_dense_models_have_the_loss_and_the_gradients_of_the_whole() {
    let tied = ModelConfig { num_heads: 4, num_experts: 0, ..small_model() };
    assert_split_changes_nothing(&tied, &paper_routing());
    let v1_1 = ModelConfig {
        activation: Activation::GeluTanh,
        gated: true,
        tie_word_embeddings: false,
        scale_decoder_outputs: false,
        ..tied
    };
    assert_split_changes_nothing(&v1_1, &paper_routing());
}

#[test]
fn ranks_that_split_a_model_decode_what_the_whole_decodes() {
    let device = test_device();
    let (config, routing) = (ModelConfig { num_heads: 4, ..small_model() }, paper_routing());
    let batch = random_batch(3, 7, 1, config.vocab_size);
    let decode = |model: &SwitchTransformer, parallel: &dyn TensorParallel| {
        let context = ForwardContext {
            capacity: Capacity::Unlimited,
            tensor_parallel: parallel,
            ..ForwardContext::evaluation(&config, &routing)
        };
        let (ids, mask) = (batch.input_ids.clone(), batch.input_mask.clone());
        greedy(model, ids, mask, 12, &context, |step| {
            assert_eq!(step.logits.len(), 3 * config.vocab_size);
            true
        })
    };
    let whole = decode(&SwitchTransformer::new(&config, 6, &device), &WholeTensors);
    let ranks = on_ranks(|rank| {
        let model = part(&config, &device, rank.number);
        decode(&model, &rank)
    });
    assert_eq!(ranks, [whole.clone(), whole]);
}
