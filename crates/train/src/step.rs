//! One update: forward and backward over the micro-batches, clipping, optimizer.

use std::sync::Arc;
use std::time::Duration;

use burn::tensor::{DType, Device, Tensor};
use switchyard_config::RunPlan;
use switchyard_config::plan::RoutingSemantics;
use switchyard_data::HostBatch;
use switchyard_kernels::{
    DeferredGradients, GradientMarks, Place, Values, WorkStream, place_of, with_values,
};
use switchyard_model::moe::{LayerMetrics, RouterOutput};
use switchyard_model::{Capacity, ForwardContext, LossOutput, Seq2SeqBatch, SwitchTransformer};
use switchyard_parallel::{Gradients, Mesh, OwnerExchange, SumFormats};

use crate::diagnose::first_non_finite;
use crate::error::TrainError;
use crate::gpu_step::{AskedStep, GpuStep, LearnerParts, StepReport};
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
pub(crate) struct Denominators {
    /// Targets that count.
    pub(crate) targets: f64,
    /// Routing groups.
    pub(crate) groups: f64,
}

/// What is known of a step before it begins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepInputs {
    pub(crate) step: u64,
    pub(crate) denominators: Denominators,
    pub(crate) learning_rate: f64,
    /// Encoder and decoder tokens that are not padding.
    pub(crate) tokens: u64,
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
    /// Of the last step, if whole steps are done on a GPU. It goes before the mesh: a group of GPUs that ends waits
    /// for recordings of its work.
    gpu_step: Option<GpuStep>,
    /// `None` only while an update moves it.
    model: Option<SwitchTransformer>,
    optimizer: Optimizer,
    exchange: OwnerExchange,
    mesh: Arc<Mesh>,
    device: Device,
    /// Steps under way that a GPU does or has done.
    asked: u64,
    /// Steps under way that a GPU is asked for when they are finished: it refused them, since one before them
    /// was not finite, or they were begun behind such a step. Steps are done in order.
    unasked: u64,
    /// Steps that were not finite.
    left_out: u64,
}

/// A step that has been begun, for [`Learner::finish`].
#[derive(Debug)]
#[must_use = "a learner with a step that was not finished is of no use"]
pub struct BegunStep(Begun);

#[derive(Debug)]
enum Begun {
    Done(Box<StepOutcome>),
    OnGpu(Box<StepUnderWay>),
}

/// A step of a GPU, and what is needed should the GPU have to be asked again.
#[derive(Debug)]
struct StepUnderWay {
    /// `None` if it waits for others to be asked for again.
    asked: Option<AskedStep>,
    micro_batches: Vec<HostBatch>,
    now: StepInputs,
    /// Steps that had not been finite when this one was asked for.
    left_out: u64,
}

const UNDER_WAY: &str = "the model stays on its GPU while a step is under way";

impl Learner {
    /// A fresh model on `device`, which must differentiate, and fresh optimizer state.
    pub fn new(plan: &RunPlan, device: &Device, mesh: Arc<Mesh>) -> Self {
        let exchange = OwnerExchange::new(&plan.model, &mesh, SumFormats::of(plan));
        let (shape, at) = (mesh.shape(), mesh.at());
        let on_gpu = matches!(place_of(device), Place::Gpu(_));
        if plan.trainer.cuda_graph && on_gpu && exchanges_through_host(plan, &mesh) {
            tracing::info!(
                "steps are not recorded as a CUDA graph: gradients go through main memory (comm.deterministic)"
            );
        }
        Self {
            model: Some(SwitchTransformer::part(&plan.model, plan.seed, device, shape, at, plan.precision)),
            optimizer: Optimizer::new(plan, exchange.units()),
            exchange,
            mesh,
            device: device.clone(),
            gpu_step: None,
            asked: 0,
            unasked: 0,
            left_out: 0,
        }
    }

    /// The model, or this rank's part of it.
    pub fn model(&self) -> &SwitchTransformer {
        self.model.as_ref().expect("every method that takes the model puts it back")
    }

    /// The model, for changing single parameters.
    ///
    /// Weights in bfloat16 come back from their masters at the next update, but on a GPU, where they become these.
    pub fn model_mut(&mut self) -> &mut SwitchTransformer {
        self.leave_gpu();
        self.model.as_mut().expect("every method that takes the model puts it back")
    }

    /// Parameters or the optimizer's state are about to be replaced.
    fn leave_gpu(&mut self) {
        self.gpu_step = None;
        self.optimizer.leave_device();
    }

    /// Lets `change` replace the model; after an error there is none and the learner is of no use.
    pub(crate) fn replace_model<E>(
        &mut self,
        change: impl FnOnce(SwitchTransformer) -> Result<SwitchTransformer, E>,
    ) -> Result<(), E> {
        self.leave_gpu();
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

    /// Whether a GPU repeats a recording of the step.
    pub fn is_recorded(&self) -> bool {
        self.gpu_step.as_ref().is_some_and(GpuStep::is_recorded)
    }

    /// How long the host took to ask a GPU for the last step, if whole steps are done there.
    pub fn host_time(&self) -> Option<Duration> {
        self.gpu_step.as_ref().map(GpuStep::host_time)
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
        let begun = self.begin(plan, micro_batches.to_vec(), step)?;
        self.finish(plan, begun)
    }

    /// Whether something is won by beginning the next step before this one is finished: a GPU is at work on it.
    /// Nothing else may look at the model between them.
    pub fn runs_ahead_of(&self, step: &BegunStep) -> bool {
        matches!(&step.0, Begun::OnGpu(step) if self.is_asked(step))
    }

    /// Whether a GPU does a step, or has done it.
    fn is_asked(&self, step: &StepUnderWay) -> bool {
        step.asked.is_some() && step.left_out == self.left_out
    }

    /// Begins what [`step`](Self::step) does. Steps are finished in the order in which they were begun, by the
    /// thread that began them.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn begin(
        &mut self,
        plan: &RunPlan,
        micro_batches: Vec<HostBatch>,
        step: u64,
    ) -> Result<BegunStep, TrainError> {
        let count = |of: fn(&HostBatch) -> usize| micro_batches.iter().map(of).sum::<usize>() as u64;
        let counts = [count(HostBatch::num_targets), count(HostBatch::num_tokens)];
        let [targets, tokens] = self.mesh.sum_over_data(counts)?;
        let denominators = Denominators::of(plan, targets);
        let learning_rate = plan.optimizer.learning_rate * schedule::factor(&plan.schedule, step + 1);
        let now = StepInputs { step, denominators, learning_rate, tokens };
        Ok(BegunStep(match self.gpu(plan) {
            Some(stream) => {
                let asked = if self.unasked == 0 {
                    Some(self.ask_gpu(&stream, plan, &micro_batches, now)?)
                } else {
                    self.unasked += 1;
                    None
                };
                Begun::OnGpu(Box::new(StepUnderWay { asked, micro_batches, now, left_out: self.left_out }))
            }
            None => Begun::Done(Box::new(self.step_on_host(plan, &micro_batches, now)?)),
        }))
    }

    /// What a step did that was begun; waits for it.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    ///
    /// # Panics
    /// When the model has been changed or moved since the step was begun; a later step hides that.
    pub fn finish(&mut self, plan: &RunPlan, begun: BegunStep) -> Result<StepOutcome, TrainError> {
        match (begun.0, self.gpu(plan)) {
            (Begun::Done(outcome), _) => Ok(*outcome),
            (Begun::OnGpu(step), Some(stream)) => self.finish_on_gpu(&stream, plan, *step),
            (Begun::OnGpu(_), None) => panic!("{UNDER_WAY}"),
        }
    }

    fn step_on_host(
        &mut self,
        plan: &RunPlan,
        micro_batches: &[HostBatch],
        now: StepInputs,
    ) -> Result<StepOutcome, TrainError> {
        let StepInputs { step, denominators, learning_rate, tokens } = now;
        let (mut local, mut gradients) = (Gradients::new(), Gradients::new());
        let mut losses = Vec::with_capacity(micro_batches.len());
        let mut moe = Vec::new();
        for micro in micro_batches {
            losses.push(self.accumulate(plan, micro, step, denominators, &mut local, &mut moe)?);
            if plan.comm.deterministic {
                let segments = self.mesh.shape().expert;
                self.exchange.reduce(std::mem::take(&mut local), segments, &mut gradients)?;
            }
        }
        if !plan.comm.deterministic {
            self.exchange.reduce(local, 1, &mut gradients)?;
        }
        let MicroLoss { loss, total_loss } = gathered(&self.mesh, &losses, &mut moe)?;
        let grad_norm = self.exchange.sum_of_squares(&gradients)?.sqrt();
        let mut outcome =
            StepOutcome { loss, total_loss, grad_norm, learning_rate, skipped: None, tokens, moe };
        if outcome.total_loss.is_finite() && outcome.grad_norm.is_finite() {
            self.update(plan, &gradients, &outcome)?;
        } else {
            let place = first_non_finite(self, plan, micro_batches, step, total_loss, &gradients)?;
            outcome.skipped = Some(NonFinite { place });
        }
        Ok(outcome)
    }

    /// The stream of the GPU that this rank works on, if whole steps are done there: ranks exchange from device
    /// to device, and need not add up in the order of the global batch.
    fn gpu(&self, plan: &RunPlan) -> Option<WorkStream> {
        if exchanges_through_host(plan, &self.mesh) { None } else { WorkStream::on(&self.device) }
    }

    fn ask_gpu(
        &mut self,
        stream: &WorkStream,
        plan: &RunPlan,
        micro_batches: &[HostBatch],
        now: StepInputs,
    ) -> Result<AskedStep, TrainError> {
        let mut steps = self.gpu_steps(stream, plan, micro_batches);
        let asked = steps.ask(stream, plan, self.parts(), micro_batches, now)?;
        self.gpu_step = Some(steps);
        self.asked += 1;
        Ok(asked)
    }

    /// What steps with batches of these shapes share: that of the last step, if it fits.
    fn gpu_steps(&mut self, stream: &WorkStream, plan: &RunPlan, micro_batches: &[HostBatch]) -> GpuStep {
        let earlier = self.gpu_step.take().filter(|earlier| earlier.fits(stream, plan, micro_batches));
        earlier.unwrap_or_else(|| GpuStep::new(stream, plan, micro_batches, &self.device))
    }

    fn finish_on_gpu(
        &mut self,
        stream: &WorkStream,
        plan: &RunPlan,
        step: StepUnderWay,
    ) -> Result<StepOutcome, TrainError> {
        let is_asked = self.is_asked(&step);
        let StepUnderWay { asked, micro_batches, now, .. } = step;
        let asked = match asked.filter(|_| is_asked) {
            Some(asked) => asked,
            None => {
                self.unasked -= 1;
                self.ask_gpu(stream, plan, &micro_batches, now)?
            }
        };
        let report = self.gpu_step.as_mut().expect(UNDER_WAY).report(asked, &self.mesh)?;
        self.asked -= 1;
        let StepReport { losses: MicroLoss { loss, total_loss }, grad_norm, updated, moe } = report;
        let mut skipped = None;
        if updated {
            self.optimizer.count_update();
        } else {
            let mut steps = self.gpu_steps(stream, plan, &micro_batches);
            let gradients = steps.gradients(stream, plan, &self.parts(), &micro_batches, now)?;
            let place = first_non_finite(self, plan, &micro_batches, now.step, total_loss, &gradients)?;
            skipped = Some(NonFinite { place });
            self.gpu_step = Some(steps);
            self.left_out += 1;
            self.unasked += std::mem::take(&mut self.asked);
            self.parts().optimizer.resume();
        }
        let StepInputs { learning_rate, tokens, .. } = now;
        Ok(StepOutcome { loss, total_loss, grad_norm, learning_rate, skipped, tokens, moe })
    }

    /// What steps on a GPU use.
    fn parts(&mut self) -> LearnerParts<'_> {
        let model = self.model.as_ref().expect("every method that takes the model puts it back");
        let optimizer = self.optimizer.on_device_of(model).expect("the model is on the stream's GPU");
        LearnerParts { model, mesh: &self.mesh, exchange: &self.exchange, optimizer }
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
    ) -> Result<MicroLoss, TrainError> {
        let device = self.device.clone().inner();
        let batch = device_batch(micro, plan.model.pad_token_id as i32, &device);
        let loss_scale = Tensor::full([1], 1.0 / denominators.targets, (&device, DType::F32));
        let (first_row, groups) = (micro.first_row, denominators.groups);
        let mesh = &self.mesh;
        let pass = Pass {
            plan,
            mesh,
            step,
            first_row,
            loss_scale: &loss_scale,
            groups,
            deferred: None,
            marks: None,
        };
        let take = |name: &str, gradient| self.exchange.sums().add(sums, name, gradient);
        let (output, loss) = pass.run(self.model(), &batch, take);
        self.mesh.wait_for_device("a step", &device)?;
        let token_loss = with_values(output.cross_entropy.token_loss.clone(), <[f32]>::to_vec);
        let sum: f64 = with_values(batch.weights, |weights| {
            token_loss.iter().zip(weights).map(|(l, w)| f64::from(l * w)).sum()
        });
        let total = f64::from(with_values(loss, |values| values[0]));
        merge_moe(moe, &output);
        Ok(MicroLoss { loss: sum / denominators.targets, total_loss: total })
    }

    /// Clips and applies the gradients; every rank then holds the new values.
    fn update(
        &mut self,
        plan: &RunPlan,
        gradients: &Gradients,
        outcome: &StepOutcome,
    ) -> Result<(), TrainError> {
        let clip = plan.optimizer.clip_norm;
        let scale = if clip > 0.0 { (clip / outcome.grad_norm.max(f64::MIN_POSITIVE)).min(1.0) } else { 1.0 };
        let model = self.model.take().expect("every method that takes the model puts it back");
        let model = self.optimizer.step(model, gradients, outcome.learning_rate, scale);
        let (model, spread) = self.exchange.spread(model, self.optimizer.masters());
        self.model = Some(model);
        Ok(spread?)
    }
}

/// Whether gradients travel between ranks through main memory.
fn exchanges_through_host(plan: &RunPlan, mesh: &Mesh) -> bool {
    let world = mesh.world();
    world.size() > 1 && (plan.comm.deterministic || world.on_devices().is_none())
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
        loss_scale: None,
        deferred: None,
        marks: None,
        seed: plan.seed,
        step: step as u32,
        first_row,
        dispatcher: mesh.dispatcher(),
        tensor_parallel: mesh.tensor_parallel(),
    }
}

/// Forward and backward over one micro-batch, all of it on the device.
pub(crate) struct Pass<'a> {
    pub(crate) plan: &'a RunPlan,
    pub(crate) mesh: &'a Mesh,
    pub(crate) step: u64,
    /// Number of the micro-batch's first row within the global batch.
    pub(crate) first_row: u32,
    /// One over the targets of the global batch. `[1]`
    pub(crate) loss_scale: &'a Tensor<1>,
    /// Routing groups of the global batch.
    pub(crate) groups: f64,
    /// Where gradients of experts may wait.
    pub(crate) deferred: Option<&'a DeferredGradients>,
    /// Gets marks of how far the backward pass is.
    pub(crate) marks: Option<&'a GradientMarks>,
}

impl Pass<'_> {
    /// What was computed and what was differentiated; `take` gets the gradients.
    pub(crate) fn run(
        &self,
        model: &SwitchTransformer,
        batch: &Seq2SeqBatch,
        mut take: impl FnMut(&str, Values),
    ) -> (LossOutput, Tensor<1>) {
        let plan = self.plan;
        let context = ForwardContext {
            loss_scale: Some(self.loss_scale),
            deferred: self.deferred,
            marks: self.marks,
            ..training_context(plan, self.mesh, self.step, self.first_row)
        };
        if plan.trainer.recompute_activations {
            let total = |output: &LossOutput| self.total_loss(output);
            return model.gradients_by_block(batch, plan.trainer.z_loss, &context, total, take);
        }
        let output = model.loss(batch, plan.trainer.z_loss, &context);
        let loss = self.total_loss(&output);
        model.take_marked_gradients(&mut loss.clone().backward(), self.marks, &mut take);
        (output, loss)
    }

    /// `sum CE / N_targets + sum over groups and layers of the router losses / N_groups`.
    fn total_loss(&self, output: &LossOutput) -> Tensor<1> {
        let routing = &self.plan.routing;
        let mut loss = output.cross_entropy.loss_sum.clone() * self.loss_scale.clone().autodiff();
        for router in &output.router_losses {
            let terms = [
                (&router.load_balancing, routing.load_balancing_loss_coef),
                (&router.z, routing.router_z_loss_coef),
            ];
            // A term that does not count would still cost a backward pass through every router.
            for (term, coefficient) in terms.into_iter().filter(|&(_, coefficient)| coefficient != 0.0) {
                loss = loss + term.clone() * (coefficient / self.groups);
            }
        }
        loss
    }
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
    add_layers(moe, sparse_layers(output).map(|(name, router)| (name, LayerMetrics::new(router))));
}

/// The sparse layers of both stacks by their names, such as `encoder.1`.
pub(crate) fn sparse_layers(output: &LossOutput) -> impl Iterator<Item = (String, &RouterOutput)> {
    let stacks = [("encoder", &output.encoder_routers), ("decoder", &output.decoder_routers)];
    stacks.into_iter().flat_map(|(stack, routers)| {
        routers.iter().map(move |router| (format!("{stack}.{}", router.layer), router))
    })
}

/// Adds up layer by layer.
pub(crate) fn add_layers(
    sums: &mut Vec<(String, LayerMetrics)>,
    layers: impl Iterator<Item = (String, LayerMetrics)>,
) {
    if sums.is_empty() {
        sums.extend(layers);
    } else {
        sums.iter_mut().zip(layers).for_each(|((_, sum), (_, layer))| sum.add(&layer));
    }
}
