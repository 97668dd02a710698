//! Where a step stopped being finite: one more forward pass, block by block.

use burn::module::Module;
use burn::tensor::Tensor;
use switchyard_config::RunPlan;
use switchyard_config::parameters::parameters;
use switchyard_data::HostBatch;
use switchyard_kernels::with_values;
use switchyard_model::t5::{BlockInputs, Stack};
use switchyard_model::{ForwardContext, SwitchTransformer};

use crate::gradients::GradientSums;
use crate::step::{device_batch, micro_batches, training_context};

/// The first thing that is not finite, in the order in which a step computes: a parameter, the output
/// of a block, the loss, the gradient of a parameter.
pub(crate) fn first_non_finite(
    model: &SwitchTransformer,
    plan: &RunPlan,
    batch: &HostBatch,
    step: u64,
    total_loss: f64,
    gradients: &GradientSums,
) -> String {
    let broken = |name: &String| model.parameter(name).is_ok_and(|values| !all_finite(&values));
    if let Some(name) = parameters(&plan.model).into_iter().map(|spec| spec.name).find(broken) {
        return name;
    }
    if total_loss.is_finite() {
        return gradients.first_non_finite().unwrap_or("gradient norm").to_owned();
    }
    let model = model.valid();
    let block = micro_batches(plan, batch).find_map(|micro| block_of(&model, plan, &micro, step));
    block.unwrap_or_else(|| "loss".to_owned())
}

/// The first block whose output is not finite.
fn block_of(model: &SwitchTransformer, plan: &RunPlan, micro: &HostBatch, step: u64) -> Option<String> {
    let context = training_context(plan, step, micro.first_row);
    let batch = device_batch(micro, plan.model.pad_token_id as i32, &model.device().inner());
    let inputs = model.encoder_inputs(&batch.input_mask, &context);
    let embedded = model.embed(batch.input_ids.clone(), &context);
    if let Some(layer) = layer_of(model.encoder(), embedded, &inputs, &context) {
        return Some(format!("encoder.block.{layer}"));
    }
    let encoder = model.encode(batch.input_ids.clone(), batch.input_mask.clone(), &context);
    let inputs = model.decoder_inputs(&batch, &encoder, &context);
    let embedded = model.embed(batch.decoder_input_ids.clone(), &context);
    let layer = layer_of(model.decoder(), embedded, &inputs, &context)?;
    Some(format!("decoder.block.{layer}"))
}

fn layer_of(
    stack: &Stack,
    embedded: Tensor<2>,
    inputs: &BlockInputs,
    context: &ForwardContext<'_>,
) -> Option<usize> {
    let mut hidden = stack.begin(embedded, inputs, context);
    for (layer, block) in stack.blocks().iter().enumerate() {
        (hidden, _) = block.forward(layer, hidden, inputs, None, context);
        if !with_values(hidden.clone(), all_finite) {
            return Some(layer);
        }
    }
    None
}

fn all_finite(values: &[f32]) -> bool {
    values.iter().all(|value| value.is_finite())
}
