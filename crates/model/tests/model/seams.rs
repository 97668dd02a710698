//! What the seams promise to devices that hold a part, and what routing asks of its callers.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use switchyard_kernels::test_device;

use burn::tensor::Tensor;
use switchyard_config::plan::RoutingConfig;
use switchyard_config::{ModelConfig, StackKind};
use switchyard_kernels::{
    Columns, DispatchPlan, GradientMarks, LinearMap, TokenNoise, VocabularyShard, int_tensor, linear_map,
};
use switchyard_model::generate::greedy;
use switchyard_model::{
    Capacity, Dispatched, ForwardContext, LocalDispatcher, SenderCounts, SwitchTransformer, TensorParallel,
    TokenDispatcher, WholeTensors, block_number,
};

use super::{paper_routing, random_batch, random_ids, small_model, values};

/// A device that holds some rows of the vocabulary and whose gates meet outputs of three devices.
struct Part(Range<usize>);

impl TensorParallel for Part {
    fn splits(&self) -> bool {
        true
    }

    fn copy_in(&self, x_nd: Tensor<2>) -> Tensor<2> {
        x_nd
    }

    fn copy_in_gates(&self, gates: Tensor<1>) -> Tensor<1> {
        gates * 3.0
    }

    fn reduce_out(&self, x_nd: Tensor<2>) -> Tensor<2> {
        x_nd
    }

    fn vocabulary(&self, _: usize) -> Range<usize> {
        self.0.clone()
    }

    fn vocabulary_shard(&self, vocab_size: usize) -> Option<VocabularyShard> {
        WholeTensors.vocabulary_shard(vocab_size)
    }

    fn gather_vocabulary(&self, logits_nv: Tensor<2>) -> Tensor<2> {
        logits_nv
    }

    fn columns(&self, local: usize) -> Columns {
        WholeTensors.columns(local)
    }
}

/// Notes at which place of the forward pass each product began, and which marks its backward pass finds.
#[derive(Debug, Clone, Default)]
struct Watched {
    marks: GradientMarks,
    /// Rows of each product's input, in the order of the forward pass.
    rows: Arc<Mutex<Vec<usize>>>,
    /// In the order of the backward pass.
    products: Arc<Mutex<Vec<Product>>>,
}

/// A product by its number in the forward pass, and the blocks whose marks its backward pass found.
#[derive(Debug)]
struct Product {
    number: usize,
    passed: Vec<usize>,
}

const UNPOISONED: &str = "no test thread panics while it holds this";

#[derive(Debug)]
struct Probe(Watched, usize);

impl LinearMap for Probe {
    fn forward(&self, _: &[f32]) -> Option<Vec<f32>> {
        None
    }

    fn backward(&self, _: &[f32]) -> Option<Vec<f32>> {
        let passed = (0..9).filter(|&block| self.0.marks.number("any", block).is_some()).collect();
        self.0.products.lock().expect(UNPOISONED).push(Product { number: self.1, passed });
        None
    }
}

impl TensorParallel for Watched {
    fn splits(&self) -> bool {
        false
    }

    fn copy_in(&self, x_nd: Tensor<2>) -> Tensor<2> {
        let (shape, mut rows) = (x_nd.dims(), self.rows.lock().expect(UNPOISONED));
        rows.push(shape[0]);
        linear_map(x_nd, Arc::new(Probe(self.clone(), rows.len() - 1)), shape)
    }

    fn copy_in_gates(&self, gates: Tensor<1>) -> Tensor<1> {
        gates
    }

    fn reduce_out(&self, x_nd: Tensor<2>) -> Tensor<2> {
        x_nd
    }

    fn vocabulary(&self, vocab_size: usize) -> Range<usize> {
        WholeTensors.vocabulary(vocab_size)
    }

    fn vocabulary_shard(&self, vocab_size: usize) -> Option<VocabularyShard> {
        WholeTensors.vocabulary_shard(vocab_size)
    }

    fn gather_vocabulary(&self, logits_nv: Tensor<2>) -> Tensor<2> {
        logits_nv
    }

    fn columns(&self, local: usize) -> Columns {
        WholeTensors.columns(local)
    }
}

/// The mark of a parameter's block is behind its gradient: the backward pass of what its product reads comes first.
#[test]
fn marks_are_behind_the_gradients_of_their_blocks() {
    let (config, routing) = (small_model(), paper_routing());
    let watched = Watched::default();
    let context = ForwardContext {
        marks: Some(&watched.marks),
        tensor_parallel: &watched,
        ..ForwardContext::evaluation(&config, &routing)
    };
    let model = SwitchTransformer::new(&config, 3, &test_device().autodiff());
    let output = model.loss(&random_batch(2, 8, 4, 40), 0.0, &context);
    let _ = output.cross_entropy.loss_sum.backward();
    let (rows, products) =
        (watched.rows.lock().expect(UNPOISONED), watched.products.lock().expect(UNPOISONED));
    let first_of_decoder = rows.iter().position(|&rows| rows == 8).unwrap();
    let of_block = [
        first_of_decoder / config.layers(StackKind::Encoder),
        (rows.len() - first_of_decoder) / config.layers(StackKind::Decoder),
    ];
    assert_eq!(products.len(), rows.len());
    for Product { number, passed } in products.iter() {
        let name = if *number < first_of_decoder {
            format!("encoder.block.{}.self_attention.q", number / of_block[0])
        } else {
            let block = (number - first_of_decoder) / of_block[1];
            let part = if rows[*number] == 16 { "cross_attention.k" } else { "self_attention.q" };
            format!("decoder.block.{block}.{part}")
        };
        // The head comes behind the last block.
        let Some(block) = block_number(&name, &config) else {
            assert_eq!(*number, rows.len() - 1, "{name}");
            continue;
        };
        assert!(!passed.contains(&block), "{name}: the mark of block {block} comes before its gradient");
    }
}

#[test]
fn embeddings_of_a_split_vocabulary_add_up() {
    let device = test_device();
    let (config, routing) = (small_model(), paper_routing());
    let context = ForwardContext::evaluation(&config, &routing);
    let whole = SwitchTransformer::new(&config, 3, &device);
    let table = whole.parameter("shared.embedding").unwrap();
    let ids = || int_tensor(random_ids(30, 40, 1), [30], &device);
    let parts = [0..16, 16..40].map(|rows: Range<usize>| {
        let mut part =
            SwitchTransformer::new(&ModelConfig { vocab_size: rows.len(), ..config.clone() }, 3, &device);
        let own = table[rows.start * 16..rows.end * 16].to_vec();
        part.set_parameter("shared.embedding", own).unwrap();
        part.embed(ids(), &ForwardContext { tensor_parallel: &Part(rows), ..context })
    });
    let sum = parts.into_iter().reduce(|a, b| a + b).unwrap();
    assert_eq!(values(sum), values(whole.embed(ids(), &context)));
}

#[test]
fn gates_cross_the_border_before_they_meet_the_experts() {
    let device = test_device();
    let (config, routing) = (small_model(), paper_routing());
    let context = ForwardContext::evaluation(&config, &routing);
    let model = SwitchTransformer::new(&config, 3, &device);
    let batch = random_batch(2, 8, 4, 40);
    let inputs = model.encoder_inputs(&batch.input_mask, &context);
    let embedded = model.embed(batch.input_ids.clone(), &context);
    let run = |model: &SwitchTransformer, parallel: &dyn TensorParallel| {
        let context = ForwardContext { tensor_parallel: parallel, ..context };
        values(model.encoder().blocks()[1].forward(1, embedded.clone(), &inputs, None, &context).0)
    };
    let mut silent = model.clone();
    silent.set_parameter("encoder.block.1.moe.experts.wo", vec![0.0; 4 * 24 * 16]).unwrap();
    let attended = run(&silent, &WholeTensors);
    let (once, thrice) = (run(&model, &WholeTensors), run(&model, &Part(0..40)));
    for ((attended, once), thrice) in attended.iter().zip(once).zip(thrice) {
        assert!((thrice - attended - 3.0 * (once - attended)).abs() < 1e-5);
    }
}

fn encode_three_rows_in_groups_of_two(capacity: Capacity) -> usize {
    let (config, routing) = (small_model(), RoutingConfig { group_rows: 2, ..paper_routing() });
    let model = SwitchTransformer::new(&config, 3, &test_device());
    let context = ForwardContext { capacity, ..ForwardContext::evaluation(&config, &routing) };
    let batch = random_batch(3, 8, 4, 40);
    model.encode(batch.input_ids, batch.input_mask, &context).routers.len()
}

#[test]
#[should_panic(expected = "3 batch rows are not whole routing groups of 2")]
fn rows_that_are_no_whole_group_are_refused() {
    encode_three_rows_in_groups_of_two(Capacity::Evaluation);
}

#[test]
fn any_number_of_rows_decodes() {
    assert_eq!(encode_three_rows_in_groups_of_two(Capacity::Unlimited), 1);
}

/// All experts here, beside ranks of which one needs 20 slots an expert and one decodes 7 tokens.
#[derive(Default)]
struct Beside {
    asked: AtomicUsize,
}

impl TokenDispatcher for Beside {
    fn slots(&self, plan: &DispatchPlan) -> usize {
        if plan.fixed_capacity { plan.slots_per_expert } else { plan.slots_per_expert.max(20) }
    }

    fn dispatch(&self, tokens_nd: Tensor<2>, plan: &DispatchPlan, noise: Option<TokenNoise>) -> Dispatched {
        let dispatched = LocalDispatcher.dispatch(tokens_nd, plan, noise);
        assert_eq!(dispatched.slots_lcd.dims(), [4, 20, 16], "ranks send slots of one number");
        dispatched
    }

    fn combine(
        &self,
        outputs_lcd: Tensor<3>,
        gates: Tensor<1>,
        plan: &DispatchPlan,
        counts: &SenderCounts,
        residual_nd: Option<Tensor<2>>,
    ) -> Tensor<2> {
        LocalDispatcher.combine(outputs_lcd, gates, plan, counts, residual_nd)
    }

    fn any(&self, here: bool) -> bool {
        here || self.asked.fetch_add(1, Ordering::Relaxed) + 1 < 7
    }
}

/// Each row's ids and the number of steps that `greedy` reported, when told to stop at `stop_after`.
fn decode(dispatcher: &dyn TokenDispatcher, stop_after: usize, limit: usize) -> (Vec<Vec<i32>>, usize) {
    let (config, routing) = (small_model(), paper_routing());
    let model = SwitchTransformer::new(&config, 3, &test_device());
    let capacity = Capacity::Unlimited;
    let context = ForwardContext { capacity, dispatcher, ..ForwardContext::evaluation(&config, &routing) };
    let batch = random_batch(2, 8, 4, 40);
    let mut steps = 0;
    let written = greedy(&model, batch.input_ids, batch.input_mask, limit, &context, |_| {
        steps += 1;
        steps < stop_after
    });
    (written, steps)
}

#[test]
fn a_rank_that_is_done_decoding_keeps_the_others_company() {
    for (stop_after, limit) in [(3, 50), (3, 6), (100, 5)] {
        let beside = Beside::default();
        assert_eq!(decode(&beside, stop_after, limit), decode(&LocalDispatcher, stop_after, limit));
        // Alone it stops after its third step.
        let asked = if stop_after < limit { 7.min(limit - 2) } else { 0 };
        assert_eq!(beside.asked.into_inner(), asked, "stop after {stop_after}, limit {limit}");
    }
}
