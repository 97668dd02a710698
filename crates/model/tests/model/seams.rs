//! What the seams promise to devices that hold a part, and what routing asks of its callers.

use std::ops::Range;

use burn::tensor::{Device, Tensor};
use switchyard_config::ModelConfig;
use switchyard_config::plan::RoutingConfig;
use switchyard_kernels::{Columns, int_tensor};
use switchyard_model::{Capacity, ForwardContext, SwitchTransformer, TensorParallel, WholeTensors};

use super::{paper_routing, random_batch, random_ids, small_model, values};

/// A device that holds some rows of the vocabulary and whose gates meet outputs of three devices.
struct Part(Range<usize>);

impl TensorParallel for Part {
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

    fn columns(&self, local: usize) -> Columns {
        WholeTensors.columns(local)
    }
}

#[test]
fn embeddings_of_a_split_vocabulary_add_up() {
    let device = Device::flex();
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
    let device = Device::flex();
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
    let model = SwitchTransformer::new(&config, 3, &Device::flex());
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
