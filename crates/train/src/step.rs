//! One update: forward and backward over the micro-batches, clipping, optimizer.

use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use switchyard_config::RunPlan;
use switchyard_config::plan::RoutingSemantics;
use switchyard_data::HostBatch;
use switchyard_kernels::with_values;
use switchyard_model::moe::LayerMetrics;
use switchyard_model::{Capacity, ForwardContext, LossOutput, Seq2SeqBatch, SwitchTransformer};
use switchyard_parallel::{Gradients, Mesh, OwnerExchange, SumFormats};

use crate::diagnose::first_non_finite;
use crate::error::TrainError;
use crate::optimizer::Optimizer;
use crate::report::{MicroLoss, gathered};
use crate::schedule;

/// What one step did, over all ranks.
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
    /// For a global batch with `targets` targets.
    fn of(plan: &RunPlan, targets: u64) -> Self {
        let data = &plan.data;
        let groups = match (plan.routing.semantics, plan.routing.group_rows) {
            (RoutingSemantics::Hf, _) => data.batch_rows,
            (RoutingSemantics::Paper, 0) => data.batch_rows.div_ceil(data.micro_batch_rows),
            (RoutingSemantics::Paper, rows) => data.batch_rows / rows,
        };
        Self { targets: targets.max(1) as f64, groups: groups as f64 }
    }
}

/// Model and optimizer of a run: this rank's part of them.
#[derive(Debug)]
pub struct Learner {
    /// `None` only while an update moves it.
    model: Option<SwitchTransformer>,
    optimizer: Optimizer,
    exchange: OwnerExchange,
    mesh: Arc<Mesh>,
    device: Device,
}

impl Learner {
    /// A fresh model on `device`, which must differentiate, and fresh optimizer state.
    pub fn new(plan: &RunPlan, device: &Device, mesh: Arc<Mesh>) -> Self {
        let exchange = OwnerExchange::new(&plan.model, &mesh, SumFormats::of(plan));
        let (shape, at) = (mesh.shape(), mesh.at());
        Self {
            model: Some(SwitchTransformer::part(&plan.model, plan.seed, device, shape, at, plan.precision)),
            optimizer: Optimizer::new(plan, exchange.units()),
            exchange,
            mesh,
            device: device.clone(),
        }
    }

    /// The model, or this rank's part of it.
    pub fn model(&self) -> &SwitchTransformer {
        self.model.as_ref().expect("every method that takes the model puts it back")
    }

    /// The model, for changing single parameters.
    ///
    /// Weights in bfloat16 come back from their masters at the next update.
    pub fn model_mut(&mut self) -> &mut SwitchTransformer {
        self.optimizer.leave_device();
        self.model.as_mut().expect("every method that takes the model puts it back")
    }

    /// Lets `change` replace the model; after an error there is none and the learner is of no use.
    pub(crate) fn replace_model<E>(
        &mut self,
        change: impl FnOnce(SwitchTransformer) -> Result<SwitchTransformer, E>,
    ) -> Result<(), E> {
        self.optimizer.leave_device();
        let model = self.model.take().expect("every method that takes the model puts it back");
        self.model = Some(change(model)?);
        Ok(())
    }

    /// What this rank owns of one moment of the optimizer, such as `lm_head/v`.
    pub fn moment(&mut self, name: &str) -> Option<&[f32]> {
        self.optimizer.settle();
        self.optimizer.moment(name)
    }

    /// The optimizer.
    pub(crate) fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// The optimizer, for loading.
    pub(crate) fn optimizer_mut(&mut self) -> &mut Optimizer {
        &mut self.optimizer
    }

    /// This rank's place in the job.
    pub fn mesh(&self) -> &Arc<Mesh> {
        &self.mesh
    }

    /// Learns from this rank's micro-batches of the global batch of `step`, counted from 0.
    ///
    /// Beyond the order of floating-point sums the result does not depend on how the batch splits into
    /// micro-batches, if `routing.group_rows` is set or the model is dense: by default a micro-batch is
    /// a routing group, and experts have room by the group. It never depends on the mesh; with
    /// `comm.deterministic` the data and expert axes do not change a bit of it.
    ///
    /// # Errors
    /// [`TrainError::Comm`] when the ranks cannot finish it together; the run is over then.
    pub fn step(
        &mut self,
        plan: &RunPlan,
        micro_batches: &[HostBatch],
        step: u64,
    ) -> Result<StepOutcome, TrainError> {
        let count = |of: fn(&HostBatch) -> usize| micro_batches.iter().map(of).sum::<usize>() as u64;
        let counts = [count(HostBatch::num_targets), count(HostBatch::num_tokens)];
        let [targets, tokens] = self.mesh.sum_over_data(counts)?;
        let denominators = Denominators::of(plan, targets);
        let (mut local, mut gradients) = (Gradients::new(), Gradients::new());
        let mut losses = Vec::with_capacity(micro_batches.len());
        let mut moe = Vec::new();
        for micro in micro_batches {
            losses.push(self.accumulate(plan, micro, step, denominators, &mut local, &mut moe));
            if plan.comm.deterministic {
                let segments = self.mesh.shape().expert;
                self.exchange.reduce(std::mem::take(&mut local), segments, &mut gradients)?;
            }
            self.mesh.check()?;
        }
        if !plan.comm.deterministic {
            self.exchange.reduce(local, 1, &mut gradients)?;
        }
        let MicroLoss { loss, total_loss } = gathered(&self.mesh, &losses, &mut moe)?;
        let model = self.model.as_ref().expect("every method that takes the model puts it back");
        let grad_norm = match self.optimizer.norm_on_device(model, &gradients) {
            Some(norm) => norm,
            None => self.exchange.sum_of_squares(&gradients)?.sqrt(),
        };
        let mut outcome = StepOutcome {
            loss,
            total_loss,
            grad_norm,
            learning_rate: plan.optimizer.learning_rate * schedule::factor(&plan.schedule, step + 1),
            skipped: None,
            tokens,
            moe,
        };
        if outcome.total_loss.is_finite() && outcome.grad_norm.is_finite() {
            self.update(plan, &gradients, &outcome)?;
        } else {
            let place = first_non_finite(self, plan, micro_batches, step, total_loss, &gradients)?;
            outcome.skipped = Some(NonFinite { place });
        }
        Ok(outcome)
    }

    /// Forward and backward of one micro-batch.
    fn accumulate(
        &self,
        plan: &RunPlan,
        micro: &HostBatch,
        step: u64,
        denominators: Denominators,
        sums: &mut Gradients,
        moe: &mut Vec<(String, LayerMetrics)>,
    ) -> MicroLoss {
        let loss_scale = 1.0 / denominators.targets;
        let context =
            ForwardContext { loss_scale, ..training_context(plan, &self.mesh, step, micro.first_row) };
        let batch = device_batch(micro, plan.model.pad_token_id as i32, &self.device.clone().inner());
        let (z_loss, mut take) =
            (plan.trainer.z_loss, |name: &str, gradient| self.exchange.sums().add(sums, name, gradient));
        let (output, loss) = if plan.trainer.recompute_activations {
            let total = |output: &LossOutput| total_loss(plan, output, denominators);
            self.model().gradients_by_block(&batch, z_loss, &context, total, take)
        } else {
            let output = self.model().loss(&batch, z_loss, &context);
            let loss = total_loss(plan, &output, denominators);
            self.model().take_gradients(&mut loss.clone().backward(), &mut take);
            (output, loss)
        };
        let token_loss = with_values(output.cross_entropy.token_loss.clone(), <[f32]>::to_vec);
        let sum: f64 = token_loss.iter().zip(&batch.weights).map(|(l, w)| f64::from(l * w)).sum();
        let total = f64::from(with_values(loss.clone(), |values| values[0]));
        merge_moe(moe, &output);
        MicroLoss { loss: sum / denominators.targets, total_loss: total }
    }

    /// Clips and applies the gradients; every rank then holds the new values.
    fn update(
        &mut self,
        plan: &RunPlan,
        gradients: &Gradients,
        outcome: &StepOutcome,
    ) -> Result<(), TrainError> {
        let clip = plan.optimizer.clip_norm;
        if self.optimizer.step_on_device(gradients, outcome.learning_rate, clip) {
            return Ok(());
        }
        let scale = if clip > 0.0 { (clip / outcome.grad_norm.max(f64::MIN_POSITIVE)).min(1.0) } else { 1.0 };
        let model = self.model.take().expect("every method that takes the model puts it back");
        let model = self.optimizer.step(model, gradients, outcome.learning_rate, scale);
        let (model, spread) = self.exchange.spread(model, self.optimizer.masters());
        self.model = Some(model);
        Ok(spread?)
    }
}

/// Noise, capacity, routing and seams of one micro-batch in training.
pub(crate) fn training_context<'a>(
    plan: &'a RunPlan,
    mesh: &'a Mesh,
    step: u64,
    first_row: u32,
) -> ForwardContext<'a> {
    ForwardContext {
        model: &plan.model,
        routing: &plan.routing,
        capacity: Capacity::Training,
        dropout_rate: plan.trainer.dropout_rate,
        expert_dropout: plan.trainer.expert_dropout,
        router_jitter_noise: plan.routing.router_jitter_noise,
        loss_scale: 1.0,
        seed: plan.seed,
        step: step as u32,
        first_row,
        dispatcher: mesh.dispatcher(),
        tensor_parallel: mesh.tensor_parallel(),
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
