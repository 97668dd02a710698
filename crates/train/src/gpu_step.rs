//! Steps of one rank on a GPU: nothing waits for the host between their first kernel and their last, so that
//! they can be recorded once and repeated.

use std::time::{Duration, Instant};

use burn::tensor::{DType, Device, Tensor};
use switchyard_config::RunPlan;
use switchyard_data::HostBatch;
use switchyard_kernels::optimizer::UpdateOutcome;
use switchyard_kernels::{DeviceIntegers, DeviceOptimizer, Recording, WorkStream, with_values};
use switchyard_model::moe::LayerMetrics;
use switchyard_model::{Seq2SeqBatch, SwitchTransformer};
use switchyard_parallel::{Gradients, Mesh, SumFormats};

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
    /// What the last step left, or the recording leaves each time.
    done: Option<LeftOnGpu>,
    host_time: Duration,
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
    gradients: Gradients,
    /// Of each micro-batch the cross-entropy and everything that was differentiated, then the sums of every
    /// sparse layer.
    report: Tensor<1>,
    micro_batches: usize,
    /// Sparse layers of a micro-batch, in the order of the report.
    layers: Vec<String>,
}

/// The parts of a learner that a step uses.
pub(crate) struct LearnerParts<'a> {
    pub(crate) model: &'a SwitchTransformer,
    pub(crate) mesh: &'a Mesh,
    pub(crate) sums: &'a SumFormats,
    pub(crate) optimizer: &'a mut DeviceOptimizer,
}

impl Shape {
    fn of(batch: &HostBatch) -> Self {
        let (inputs, targets) = (batch.input_ids.len(), batch.target_ids.len());
        Self { first_row: batch.first_row, rows: batch.rows, inputs, targets }
    }
}

impl LeftOnGpu {
    /// Losses and metrics summed over micro-batches; waits for the GPU.
    fn read(&self) -> (MicroLoss, Vec<(String, LayerMetrics)>) {
        let report = with_values(self.report.clone(), <[f32]>::to_vec);
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
            done: None,
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

    /// One update.
    pub(crate) fn step(
        &mut self,
        stream: &WorkStream,
        plan: &RunPlan,
        mut learner: LearnerParts<'_>,
        micro_batches: &[HostBatch],
        now: StepInputs,
    ) -> StepReport {
        let started = Instant::now();
        for (ids, micro) in self.ids.iter_mut().zip(micro_batches) {
            ids.write(&[&*micro.input_ids, &micro.decoder_input_ids(), &micro.target_ids].concat());
        }
        stream.overwrite(&self.loss_scale, 1.0 / now.denominators.targets);
        stream.set_noise_step(now.step as u32);
        learner.optimizer.set_learning_rate(now.learning_rate);
        if matches!(self.mode, Mode::Record) {
            self.record(stream, plan, &mut learner, now);
        }
        match &mut self.mode {
            Mode::Replay(recording) => recording.replay(stream),
            &mut Mode::Watch { first } => {
                let (done, exchanged) = stream.watched(|| self.run(plan, &mut learner, now, false));
                self.done = Some(done);
                self.mode = match exchanged {
                    None => Mode::Record,
                    // What stays on the GPU was sent there.
                    Some(_) if first => Mode::Watch { first: false },
                    Some(what) => {
                        tracing::info!(
                            "steps are not recorded as a CUDA graph: the host takes part ({what})"
                        );
                        Mode::Eager
                    }
                };
            }
            Mode::Record | Mode::Eager => self.done = Some(self.run(plan, &mut learner, now, false)),
        }
        self.host_time = started.elapsed();
        let done = self.done.as_ref().expect("a step was done");
        let (losses, moe) = done.read();
        let UpdateOutcome { grad_norm, applied } = learner.optimizer.outcome();
        StepReport { losses, grad_norm, updated: applied, moe }
    }

    /// Lets go of a recording and the memory of a whole step that it keeps; the next step is recorded anew.
    pub(crate) fn unrecord(&mut self) {
        if self.is_recorded() {
            self.mode = Mode::Record;
        }
    }

    /// How long the host took to ask for the last step.
    pub(crate) fn host_time(&self) -> Duration {
        self.host_time
    }

    /// Whether the next step repeats a recording.
    pub(crate) fn is_recorded(&self) -> bool {
        matches!(self.mode, Mode::Replay(_))
    }

    /// The gradients of the last step, before clipping.
    pub(crate) fn gradients(&self) -> Option<&Gradients> {
        self.done.as_ref().map(|done| &done.gradients)
    }

    /// Lets go of what the last step left, unless the next leaves it in the same place.
    pub(crate) fn forget(&mut self) {
        if !self.is_recorded() {
            self.done = None;
        }
    }

    fn record(
        &mut self,
        stream: &WorkStream,
        plan: &RunPlan,
        learner: &mut LearnerParts<'_>,
        now: StepInputs,
    ) {
        match stream.record(|| self.run(plan, learner, now, true)) {
            Ok((recording, done)) => {
                learner.optimizer.point();
                self.done = Some(done);
                self.mode = Mode::Replay(recording);
            }
            Err(error) => {
                tracing::warn!("steps are not recorded as a CUDA graph: {error}");
                self.mode = Mode::Eager;
            }
        }
    }

    /// Forward and backward over all micro-batches, then the update.
    fn run(
        &self,
        plan: &RunPlan,
        learner: &mut LearnerParts<'_>,
        now: StepInputs,
        recording: bool,
    ) -> LeftOnGpu {
        let LearnerParts { model, mesh, sums, optimizer } = learner;
        let (mut gradients, mut layers) = (Gradients::new(), Vec::new());
        let (mut losses, mut reports) = (Vec::new(), Vec::new());
        for index in 0..self.shapes.len() {
            let batch = self.batch(index, plan.model.pad_token_id as i32);
            let (first_row, groups) = (self.shapes[index].first_row, now.denominators.groups);
            let pass = Pass { plan, mesh, step: now.step, first_row, loss_scale: &self.loss_scale, groups };
            let (output, loss) =
                pass.run(model, &batch, |name, gradient| sums.add(&mut gradients, name, gradient));
            let weighted = output.cross_entropy.token_loss.clone() * batch.weights;
            reports.extend([weighted.sum() * self.loss_scale.clone(), loss.clone().inner()]);
            losses.push(loss.inner());
            layers = sparse_layers(&output).map(|(name, _)| name).collect();
            let stacks = [&output.encoder_routers, &output.decoder_routers];
            let sparse = stacks.into_iter().filter(|routers| !routers.is_empty());
            reports.extend(sparse.map(|routers| LayerMetrics::sums(routers).flatten(0, 1)));
        }
        let loss = Tensor::cat(losses, 0).sum();
        optimizer.update(&gradients, &loss, plan.optimizer.clip_norm, recording);
        LeftOnGpu { gradients, report: Tensor::cat(reports, 0), micro_batches: self.shapes.len(), layers }
    }

    fn batch(&self, index: usize, pad_token_id: i32) -> Seq2SeqBatch {
        let Shape { rows, inputs, targets, .. } = self.shapes[index];
        let ids = self.ids[index].tensor();
        let part = |start: usize, length: usize| ids.clone().narrow(0, start, length);
        let parts = [part(0, inputs), part(inputs, targets), part(inputs + targets, targets)];
        Seq2SeqBatch::of_tensors(rows, parts, pad_token_id)
    }
}
