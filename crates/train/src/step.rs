//! One update: forward and backward over the micro-batches, clipping, optimizer.

use burn::tensor::{Device, Tensor};
use switchyard_checkpoint::{CheckpointError, TensorSource};
use switchyard_config::RunPlan;
use switchyard_config::plan::RoutingSemantics;
use switchyard_data::HostBatch;
use switchyard_kernels::with_values;
use switchyard_model::moe::LayerMetrics;
use switchyard_model::{
    Capacity, ForwardContext, LocalDispatcher, LossOutput, Seq2SeqBatch, SwitchTransformer, WholeTensors,
};

use crate::diagnose::first_non_finite;
use crate::gradients::GradientSums;
use crate::optimizer::Optimizer;
use crate::parameters::filled;
use crate::schedule;

/// What one step did.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutcome {
    /// Mean cross-entropy of the targets in nats.
    pub loss: f64,
    /// Everything that was differentiated: cross-entropy, z-loss and router losses.
    pub total_loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Whether the update was left out because loss or gradient was not finite.
    pub skipped: Option<NonFinite>,
    /// Encoder and decoder tokens that are not padding.
    pub tokens: u64,
    /// Metrics of every sparse layer, named `encoder.1`.
    pub moe: Vec<(String, LayerMetrics)>,
}

/// Where a step stopped being finite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NonFinite {
    /// A parameter, a block such as `encoder.block.3`, or `loss`.
    pub place: String,
}

/// Denominators of a whole step, known before its first micro-batch.
#[derive(Debug, Clone, Copy)]
struct Denominators {
    targets: f64,
    groups: f64,
}

impl Denominators {
    fn of(batch: &HostBatch, plan: &RunPlan) -> Self {
        let groups = match (plan.routing.semantics, plan.routing.group_rows) {
            (RoutingSemantics::Hf, _) => batch.rows,
            (RoutingSemantics::Paper, 0) => batch.rows.div_ceil(plan.data.micro_batch_rows),
            (RoutingSemantics::Paper, rows) => batch.rows / rows,
        };
        Self { targets: batch.num_targets().max(1) as f64, groups: groups as f64 }
    }
}

/// Model and optimizer of a run.
#[derive(Debug)]
pub struct Learner {
    /// `None` only while an update moves it.
    model: Option<SwitchTransformer>,
    optimizer: Optimizer,
    device: Device,
}

impl Learner {
    /// A fresh model on `device`, which must differentiate, and fresh optimizer state.
    pub fn new(plan: &RunPlan, device: &Device) -> Self {
        Self {
            model: Some(SwitchTransformer::new(&plan.model, plan.seed, device)),
            optimizer: Optimizer::new(&plan.optimizer, &plan.model),
            device: device.clone(),
        }
    }

    /// The model.
    pub fn model(&self) -> &SwitchTransformer {
        self.model.as_ref().expect("only `step` moves the model, and puts it back")
    }

    /// Replaces every parameter by that of `source`.
    ///
    /// # Errors
    /// When `source` cannot be read; what is left has no model.
    pub(crate) fn load_parameters(&mut self, source: &dyn TensorSource) -> Result<(), CheckpointError> {
        let model = self.model.take().expect("every method that takes the model puts it back");
        self.model = Some(filled(model, source)?);
        Ok(())
    }

    /// The model, for changing single parameters.
    pub fn model_mut(&mut self) -> &mut SwitchTransformer {
        self.model.as_mut().expect("only `step` moves the model, and puts it back")
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// The optimizer, for loading.
    pub fn optimizer_mut(&mut self) -> &mut Optimizer {
        &mut self.optimizer
    }

    /// Learns from `batch`, the data of `step`, counted from 0.
    ///
    /// Beyond the order of floating-point sums the result does not depend on how the batch splits into
    /// micro-batches, if `routing.group_rows` is set or the model is dense: by default a micro-batch is
    /// a routing group, and experts have room by the group.
    pub fn step(&mut self, plan: &RunPlan, batch: &HostBatch, step: u64) -> StepOutcome {
        let denominators = Denominators::of(batch, plan);
        let mut sums = GradientSums::default();
        let mut report = StepOutcome {
            loss: 0.0,
            total_loss: 0.0,
            grad_norm: 0.0,
            learning_rate: plan.optimizer.learning_rate * schedule::factor(&plan.schedule, step + 1),
            skipped: None,
            tokens: count_tokens(batch),
            moe: Vec::new(),
        };
        for micro in micro_batches(plan, batch) {
            self.accumulate(plan, &micro, step, denominators, &mut sums, &mut report);
        }
        report.grad_norm = sums.global_norm();
        if !report.total_loss.is_finite() || !report.grad_norm.is_finite() {
            let place = first_non_finite(self.model(), plan, batch, step, report.total_loss, &sums);
            report.skipped = Some(NonFinite { place });
            return report;
        }
        let clip = plan.optimizer.clip_norm;
        let scale = if clip > 0.0 { (clip / report.grad_norm.max(f64::MIN_POSITIVE)).min(1.0) } else { 1.0 };
        let model = self.model.take().expect("only `step` moves the model, and puts it back");
        self.model = Some(self.optimizer.step(model, &sums, report.learning_rate, scale));
        report
    }

    /// Forward and backward of one micro-batch.
    fn accumulate(
        &self,
        plan: &RunPlan,
        micro: &HostBatch,
        step: u64,
        denominators: Denominators,
        sums: &mut GradientSums,
        report: &mut StepOutcome,
    ) {
        let context = training_context(plan, step, micro.first_row);
        let batch = device_batch(micro, plan.model.pad_token_id as i32, &self.device.clone().inner());
        let output = self.model().loss(&batch, plan.trainer.z_loss, &context);
        let loss = total_loss(plan, &output, denominators);
        let token_loss = with_values(output.cross_entropy.token_loss.clone(), <[f32]>::to_vec);
        let sum: f64 = token_loss.iter().zip(&batch.weights).map(|(l, w)| f64::from(l * w)).sum();
        report.loss += sum / denominators.targets;
        report.total_loss += f64::from(with_values(loss.clone(), |values| values[0]));
        merge_moe(&mut report.moe, &output);
        let mut gradients = loss.backward();
        drop(output);
        self.model().take_gradients(&mut gradients, |name, gradient| sums.add(name, gradient));
    }
}

/// The parts of a batch that are computed at once.
pub(crate) fn micro_batches(plan: &RunPlan, batch: &HostBatch) -> impl Iterator<Item = HostBatch> {
    let at_once = plan.data.micro_batch_rows;
    let starts = (0..batch.rows).step_by(at_once);
    starts.map(move |start| batch.slice(start, at_once.min(batch.rows - start)))
}

/// Noise, capacity and routing of one micro-batch in training.
pub(crate) fn training_context(plan: &RunPlan, step: u64, first_row: u32) -> ForwardContext<'_> {
    ForwardContext {
        model: &plan.model,
        routing: &plan.routing,
        capacity: Capacity::Training,
        dropout_rate: plan.trainer.dropout_rate,
        expert_dropout: plan.trainer.expert_dropout,
        router_jitter_noise: plan.routing.router_jitter_noise,
        seed: plan.seed,
        step: step as u32,
        first_row,
        dispatcher: &LocalDispatcher,
        tensor_parallel: &WholeTensors,
    }
}

/// `sum CE / N_targets + sum over groups and layers of the router losses / N_groups`.
fn total_loss(plan: &RunPlan, output: &LossOutput, denominators: Denominators) -> Tensor<1> {
    let mut loss = output.cross_entropy.loss_sum.clone() / denominators.targets;
    for router in &output.router_losses {
        let terms = [
            (&router.load_balancing, plan.routing.load_balancing_loss_coef),
            (&router.z, plan.routing.router_z_loss_coef),
        ];
        // A term that does not count would still cost a backward pass through every router.
        for (term, coefficient) in terms.into_iter().filter(|&(_, coefficient)| coefficient != 0.0) {
            loss = loss + term.clone() * (coefficient / denominators.groups);
        }
    }
    loss
}

/// The batch as tensors on `device`.
pub(crate) fn device_batch(batch: &HostBatch, pad_token_id: i32, device: &Device) -> Seq2SeqBatch {
    Seq2SeqBatch::from_ids(
        batch.rows,
        batch.input_ids.clone(),
        batch.decoder_input_ids(),
        batch.target_ids.clone(),
        pad_token_id,
        device,
    )
}

/// Adds the metrics of one micro-batch to those of its step.
pub(crate) fn merge_moe(moe: &mut Vec<(String, LayerMetrics)>, output: &LossOutput) {
    let stacks = [("encoder", &output.encoder_routers), ("decoder", &output.decoder_routers)];
    let layers = stacks.into_iter().flat_map(|(stack, routers)| {
        routers.iter().map(move |router| (format!("{stack}.{}", router.layer), LayerMetrics::new(router)))
    });
    if moe.is_empty() {
        moe.extend(layers);
    } else {
        for ((_, sum), (_, metrics)) in moe.iter_mut().zip(layers) {
            sum.add(&metrics);
        }
    }
}

fn count_tokens(batch: &HostBatch) -> u64 {
    batch.input_ids.iter().chain(&batch.target_ids).filter(|&&id| id != 0).count() as u64
}
