//! Steps on GPUs, one a rank: nothing waits for the host between their first kernel and their last, so that
//! they can be recorded once and repeated, and the host can ask for the next before it has read of one.

use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Tensor};
use switchyard_comm::CommError;
use switchyard_config::parameters::ParameterKind;
use switchyard_config::{ExchangeOverlap, RunPlan};
use switchyard_data::HostBatch;
use switchyard_kernels::optimizer::UpdateOutcome;
use switchyard_kernels::{
    DeferredGradients, DeviceIntegers, DeviceOptimizer, DeviceValues, GradientMarks, Readback, Recording,
    WorkStream,
};
use switchyard_model::moe::LayerMetrics;
use switchyard_model::{Seq2SeqBatch, SwitchTransformer};
use switchyard_parallel::{Gradients, Mesh, Overlap, OwnerExchange};

use crate::report::MicroLoss;
use crate::step::{Pass, StepInputs, add_layers, sparse_layers};

/// What steps of one plan with batches of one shape share.
#[derive(Debug)]
pub(crate) struct GpuStep {
    plan: RunPlan,
    shapes: Vec<Shape>,
    /// Input, decoder and target ids of each micro-batch, one behind the other.
    ids: Vec<DeviceIntegers>,
    /// One over the targets of the step. `[1]`
    loss_scale: Tensor<1>,
    mode: Mode,
    /// What the recording leaves each time.
    recorded: Option<LeftOnGpu>,
    /// Ways back that no step is on.
    idle: Vec<Readback>,
    host_time: Duration,
}

/// A step that the GPU has been asked for.
#[derive(Debug)]
pub(crate) struct AskedStep {
    readback: Readback,
    micro_batches: usize,
    /// Sparse layers of a micro-batch, in the order of the report.
    layers: Vec<String>,
}

/// How the next step is done.
#[derive(Debug)]
enum Mode {
    /// As it comes, watched for whether the next could be recorded.
    Watch { first: bool },
    /// Recorded, then repeated.
    Record,
    /// Repeated.
    Replay(Recording),
    /// As it comes: it cannot be recorded, or is not to be.
    Eager,
}

/// What a step did.
#[derive(Debug)]
pub(crate) struct StepReport {
    pub(crate) losses: MicroLoss,
    pub(crate) grad_norm: f64,
    /// Whether losses and gradients were finite, so that parameters changed.
    pub(crate) updated: bool,
    pub(crate) moe: Vec<(String, LayerMetrics)>,
}

/// Where a micro-batch is in the global batch, and its sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    first_row: u32,
    rows: usize,
    inputs: usize,
    targets: usize,
}

/// What a step leaves on the GPU.
#[derive(Debug)]
struct LeftOnGpu {
    /// Of the matrices that this rank owns. Kept where a recording writes and reads them.
    gradients: Gradients,
    /// Of each micro-batch the cross-entropy and everything that was differentiated, then the sums of every
    /// sparse layer.
    report: Tensor<1>,
    /// Everything that was differentiated here, over all micro-batches. `[1]`
    loss: Tensor<1>,
    /// Sparse layers of a micro-batch, in the order of the report.
    layers: Vec<String>,
}

/// The parts of a learner that a step uses.
pub(crate) struct LearnerParts<'a> {
    pub(crate) model: &'a SwitchTransformer,
    pub(crate) mesh: &'a Mesh,
    pub(crate) exchange: &'a OwnerExchange,
    pub(crate) optimizer: &'a mut DeviceOptimizer,
}

impl Shape {
    fn of(batch: &HostBatch) -> Self {
        let (inputs, targets) = (batch.input_ids.len(), batch.target_ids.len());
        Self { first_row: batch.first_row, rows: batch.rows, inputs, targets }
    }
}

/// What may go on while something travels.
fn overlap_of(plan: &RunPlan) -> Overlap<'static> {
    match plan.comm.overlap {
        ExchangeOverlap::Nothing => Overlap::Nothing,
        ExchangeOverlap::Exchanges | ExchangeOverlap::Backward => Overlap::Exchanges,
    }
}

impl AskedStep {
    /// Losses and metrics summed over micro-batches.
    fn sums(&self, report: &[f32]) -> (MicroLoss, Vec<(String, LayerMetrics)>) {
        let mut losses = MicroLoss::default();
        let mut moe: Vec<(String, LayerMetrics)> = Vec::new();
        for micro in report.chunks_exact(report.len() / self.micro_batches) {
            let (of_losses, of_layers) = micro.split_at(2);
            losses.loss += f64::from(of_losses[0]);
            losses.total_loss += f64::from(of_losses[1]);
            let layers = of_layers.chunks_exact((of_layers.len() / self.layers.len().max(1)).max(1));
            let layers = self.layers.iter().zip(layers).map(|(name, sums)| {
                let sums: Vec<f64> = sums.iter().map(|&sum| f64::from(sum)).collect();
                (name.clone(), LayerMetrics::from_sums(&sums))
            });
            add_layers(&mut moe, layers);
        }
        (losses, moe)
    }
}

impl GpuStep {
    /// For micro-batches of these shapes.
    pub(crate) fn new(
        stream: &WorkStream,
        plan: &RunPlan,
        micro_batches: &[HostBatch],
        device: &Device,
    ) -> Self {
        let shapes: Vec<Shape> = micro_batches.iter().map(Shape::of).collect();
        let ids = shapes.iter().map(|shape| stream.integers(shape.inputs + 2 * shape.targets));
        Self {
            ids: ids.collect(),
            loss_scale: Tensor::ones([1], (&device.clone().inner(), DType::F32)),
            mode: if plan.trainer.cuda_graph { Mode::Watch { first: true } } else { Mode::Eager },
            recorded: None,
            idle: Vec::new(),
            host_time: Duration::ZERO,
            plan: plan.clone(),
            shapes,
        }
    }

    /// Whether it is for these, on this stream.
    pub(crate) fn fits(&self, stream: &WorkStream, plan: &RunPlan, micro_batches: &[HostBatch]) -> bool {
        let may_repeat = match &self.mode {
            Mode::Replay(recording) => recording.is_of(stream),
            _ => true,
        };
        may_repeat
            && self.plan == *plan
            && self.shapes.iter().copied().eq(micro_batches.iter().map(Shape::of))
    }

    /// Asks for one update, and for its report to be sent.
    pub(crate) fn ask(
        &mut self,
        stream: &WorkStream,
        plan: &RunPlan,
        mut learner: LearnerParts<'_>,
        micro_batches: &[HostBatch],
        now: StepInputs,
    ) -> Result<AskedStep, CommError> {
        let started = Instant::now();
        self.feed(stream, micro_batches, now);
        learner.optimizer.set_learning_rate(now.learning_rate);
        if matches!(self.mode, Mode::Record) {
            self.record(stream, plan, &mut learner, now)?;
        }
        let left = match &mut self.mode {
            Mode::Replay(recording) => {
                recording.replay(stream);
                None
            }
            &mut Mode::Watch { first } => {
                let (left, exchanged) = stream.watched(|| self.update(plan, &mut learner, now, false));
                let left = left?;
                // NCCL wants its work recorded by all ranks or by none.
                self.mode = if !learner.mesh.any(exchanged.is_some())? {
                    Mode::Record
                } else if first {
                    // What stays on the GPU was sent there.
                    Mode::Watch { first: false }
                } else {
                    let what = exchanged.unwrap_or("on another rank");
                    tracing::info!("steps are not recorded as a CUDA graph: the host takes part ({what})");
                    Mode::Eager
                };
                Some(left)
            }
            Mode::Record | Mode::Eager => Some(self.update(plan, &mut learner, now, false)?),
        };
        let left = left.as_ref().or(self.recorded.as_ref()).expect("recordings leave what they do");
        let [len] = left.report.dims();
        self.idle.retain(|readback| readback.len() == len);
        let mut readback = self.idle.pop().unwrap_or_else(|| stream.readback(len));
        readback.ask(&left.report, learner.optimizer);
        let layers = left.layers.clone();
        self.host_time = started.elapsed();
        Ok(AskedStep { readback, micro_batches: self.shapes.len(), layers })
    }

    /// What a step did, once it has on all ranks.
    pub(crate) fn report(&mut self, asked: AskedStep, mesh: &Mesh) -> Result<StepReport, CommError> {
        if mesh.world().size() > 1 {
            mesh.world().wait_for("a step on GPUs", &mut || asked.readback.is_here())?;
        }
        let (report, UpdateOutcome { grad_norm, applied }) = asked.readback.wait();
        let (losses, moe) = asked.sums(&report);
        self.idle.push(asked.readback);
        Ok(StepReport { losses, grad_norm, updated: applied, moe })
    }

    /// The gradients of a step once more, without its update. Lets go of a recording and the memory of a whole
    /// step that it keeps; the next step is recorded anew.
    pub(crate) fn gradients(
        &mut self,
        stream: &WorkStream,
        plan: &RunPlan,
        learner: &LearnerParts<'_>,
        micro_batches: &[HostBatch],
        now: StepInputs,
    ) -> Result<Gradients, CommError> {
        self.recorded = None;
        if self.is_recorded() {
            self.mode = Mode::Record;
        }
        self.feed(stream, micro_batches, now);
        Ok(self.differentiate(plan, learner, now)?.gradients)
    }

    /// Sends the GPU what changes from step to step.
    fn feed(&mut self, stream: &WorkStream, micro_batches: &[HostBatch], now: StepInputs) {
        for (ids, micro) in self.ids.iter_mut().zip(micro_batches) {
            ids.write(&[&*micro.input_ids, &micro.decoder_input_ids(), &micro.target_ids].concat());
        }
        stream.overwrite(&self.loss_scale, 1.0 / now.denominators.targets);
        stream.set_noise_step(now.step as u32);
    }

    /// How long the host took to ask for the last step.
    pub(crate) fn host_time(&self) -> Duration {
        self.host_time
    }

    /// Whether the next step repeats a recording.
    pub(crate) fn is_recorded(&self) -> bool {
        matches!(self.mode, Mode::Replay(_))
    }

    fn record(
        &mut self,
        stream: &WorkStream,
        plan: &RunPlan,
        learner: &mut LearnerParts<'_>,
        now: StepInputs,
    ) -> Result<(), CommError> {
        let recorded = stream.record(|| self.update(plan, learner, now, true));
        let refused = learner.mesh.any(recorded.is_err())?;
        match recorded {
            Ok(_) if refused => {
                tracing::warn!("steps are not recorded as a CUDA graph: another rank cannot");
                self.mode = Mode::Eager;
            }
            Ok((recording, left)) => {
                learner.optimizer.point();
                self.recorded = Some(left?);
                self.mode = Mode::Replay(recording);
            }
            Err(error) => {
                tracing::warn!("steps are not recorded as a CUDA graph: {error}");
                self.mode = Mode::Eager;
            }
        }
        Ok(())
    }

    /// Forward and backward over all micro-batches, then the update of what this rank owns; every rank then holds
    /// the new values.
    fn update(
        &self,
        plan: &RunPlan,
        learner: &mut LearnerParts<'_>,
        now: StepInputs,
        recording: bool,
    ) -> Result<LeftOnGpu, CommError> {
        let left = self.differentiate(plan, learner, now)?;
        let LearnerParts { model, mesh, exchange, optimizer } = learner;
        let (gradients, loss, clip) = (&left.gradients, &left.loss, plan.optimizer.clip_norm);
        if mesh.world().size() == 1 {
            optimizer.begin_update(gradients, loss, clip, recording, None);
            optimizer.update_part(0);
            return Ok(left);
        }
        let mut summed = Ok(());
        let mut sum = |values: &DeviceValues| summed = exchange.sum_over_ranks(values);
        optimizer.begin_update(gradients, loss, clip, recording, Some(&mut sum));
        summed?;
        let (held, overlap) = (model.device_parameters(), overlap_of(plan));
        let renew = |part| optimizer.update_part(part);
        exchange.spread_on_devices(renew, |name| optimizer.values(name), &held, overlap)?;
        Ok(left)
    }

    /// Forward and backward over all micro-batches; gradients go to their owners.
    fn differentiate(
        &self,
        plan: &RunPlan,
        learner: &LearnerParts<'_>,
        now: StepInputs,
    ) -> Result<LeftOnGpu, CommError> {
        let LearnerParts { model, mesh, exchange, .. } = learner;
        let (mut gradients, mut layers) = (Gradients::new(), Vec::new());
        let (mut losses, mut reports) = (Vec::new(), Vec::new());
        let several = self.shapes.len() > 1;
        let sum_bytes = plan.precision.sum_bytes(ParameterKind::ExpertIn, plan.accumulation);
        let deferred =
            (several && !plan.comm.deterministic).then(|| DeferredGradients::instead_of_sums(sum_bytes));
        // Sums over micro-batches, and gradients of blocks that run again, are complete at the end.
        let at_once = !several && !plan.trainer.recompute_activations;
        let marks = (plan.comm.overlap == ExchangeOverlap::Backward && at_once).then(GradientMarks::default);
        for index in 0..self.shapes.len() {
            let batch = self.batch(index, plan.model.pad_token_id as i32);
            let (first_row, groups) = (self.shapes[index].first_row, now.denominators.groups);
            let (step, loss_scale, deferred) = (now.step, &self.loss_scale, deferred.as_ref());
            let marks = marks.as_ref();
            let pass = Pass { plan, mesh, step, first_row, loss_scale, groups, deferred, marks };
            let mut take = |name: &str, gradient| exchange.sums().add(&mut gradients, name, gradient);
            let (output, loss) = pass.run(model, &batch, &mut take);
            let is_last = index + 1 == self.shapes.len();
            if let Some(deferred) = deferred.filter(|deferred| is_last || deferred.is_full()) {
                model.take_deferred_gradients(deferred, &mut take);
            }
            let weighted = output.cross_entropy.token_loss.clone() * batch.weights;
            reports.extend([weighted.sum() * self.loss_scale.clone(), loss.clone().inner()]);
            losses.push(loss.inner());
            layers = sparse_layers(&output).map(|(name, _)| name).collect();
            let stacks = [&output.encoder_routers, &output.decoder_routers];
            let sparse = stacks.into_iter().filter(|routers| !routers.is_empty());
            reports.extend(sparse.map(|routers| LayerMetrics::sums(routers).flatten(0, 1)));
        }
        mesh.check()?;
        // What a group of ranks exchanges is done in the order in which it was asked for: gradients that need not
        // wait for the end of the backward pass come first.
        let overlap = marks.as_ref().map_or_else(|| overlap_of(plan), Overlap::BackwardPass);
        let gradients = exchange.reduce_on_devices(gradients, overlap)?;
        let (report, loss) = (Tensor::cat(reports, 0), Tensor::cat(losses, 0).sum());
        let report = mesh.summed_over_data(report)?;
        Ok(LeftOnGpu { gradients, report, loss, layers })
    }

    fn batch(&self, index: usize, pad_token_id: i32) -> Seq2SeqBatch {
        let Shape { rows, inputs, targets, .. } = self.shapes[index];
        let ids = self.ids[index].tensor();
        let part = |start: usize, length: usize| ids.clone().narrow(0, start, length);
        let parts = [part(0, inputs), part(inputs, targets), part(inputs + targets, targets)];
        Seq2SeqBatch::of_tensors(rows, parts, pad_token_id)
    }
}
