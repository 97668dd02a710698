//! Where a step stopped being finite: one more forward pass, block by block.

use burn::module::Module;
use burn::tensor::Tensor;
use switchyard_comm::CommError;
use switchyard_config::RunPlan;
use switchyard_config::parameters::parameters;
use switchyard_data::HostBatch;
use switchyard_kernels::{Element, Values, with_values};
use switchyard_model::t5::{BlockInputs, Stack};
use switchyard_model::{ForwardContext, SwitchTransformer};
use switchyard_parallel::{Gradients, Mesh};

use crate::step::{Learner, device_batch, training_context};

/// The first thing that is not finite on any rank, in the order in which a step computes: a
/// parameter, the output of a block, the loss, the gradient of a parameter.
pub(crate) fn first_non_finite(
    learner: &Learner,
    plan: &RunPlan,
    micro_batches: &[HostBatch],
    step: u64,
    total_loss: f64,
    gradients: &Gradients,
) -> Result<String, CommError> {
    let (model, mesh) = (learner.model(), learner.mesh());
    let names: Vec<String> = parameters(&plan.model).into_iter().map(|spec| spec.name).collect();
    let broken = |name: &&String| model.parameter(name).is_ok_and(|values| !all_finite(&values));
    if let Some(name) = first_of(mesh, &names, names.iter().find(broken))? {
        return Ok(name);
    }
    if total_loss.is_finite() {
        let broken = |name: &&String| match gradients.get(*name) {
            Some(Values::F32(values)) => !all_finite(values),
            Some(Values::Bf16(values)) => !all_finite(values),
            Some(Values::Device(values)) => !values.all_finite(),
            None => false,
        };
        let found = first_of(mesh, &names, names.iter().find(broken))?;
        return Ok(found.unwrap_or_else(|| "gradient norm".to_owned()));
    }
    let model = model.valid();
    for micro in micro_batches {
        if let Some(block) = block_of(&model, plan, mesh, micro, step)? {
            return Ok(block);
        }
    }
    Ok("loss".to_owned())
}

/// The earliest name that any rank found.
fn first_of(mesh: &Mesh, names: &[String], here: Option<&String>) -> Result<Option<String>, CommError> {
    let found = mesh.gather_text(here.map_or("", String::as_str))?;
    Ok(names.iter().find(|name| found.contains(name)).cloned())
}

/// The first block whose output is not finite on some rank.
fn block_of(
    model: &SwitchTransformer,
    plan: &RunPlan,
    mesh: &Mesh,
    micro: &HostBatch,
    step: u64,
) -> Result<Option<String>, CommError> {
    let context = training_context(plan, mesh, step, micro.first_row);
    let batch = device_batch(micro, plan.model.pad_token_id as i32, &model.device().inner());
    let inputs = model.encoder_inputs(&batch.input_mask, &context);
    let embedded = model.embed(batch.input_ids.clone(), &context);
    if let Some(layer) = layer_of(model.encoder(), embedded, &inputs, mesh, &context)? {
        return Ok(Some(format!("encoder.block.{layer}")));
    }
    let encoder = model.encode(batch.input_ids.clone(), batch.input_mask.clone(), &context);
    let inputs = model.decoder_inputs(&batch, &encoder, &context);
    let embedded = model.embed(batch.decoder_input_ids.clone(), &context);
    let layer = layer_of(model.decoder(), embedded, &inputs, mesh, &context)?;
    Ok(layer.map(|layer| format!("decoder.block.{layer}")))
}

fn layer_of(
    stack: &Stack,
    embedded: Tensor<2>,
    inputs: &BlockInputs,
    mesh: &Mesh,
    context: &ForwardContext<'_>,
) -> Result<Option<usize>, CommError> {
    let mut hidden = stack.begin(embedded, inputs, context);
    for (layer, block) in stack.blocks().iter().enumerate() {
        (hidden, _) = block.forward(layer, hidden, inputs, None, context);
        mesh.wait_for_device("a block", &hidden.device())?;
        // All ranks stop at the same block: each one communicates.
        if mesh.any(!with_values(hidden.clone(), all_finite))? {
            return Ok(Some(layer));
        }
    }
    Ok(None)
}

fn all_finite<E: Element>(values: &[E]) -> bool {
    values.iter().all(|value| value.widen().is_finite())
}
