//! Updates of many tensors in a few launches: Adafactor and AdamW in float32.
//!
//! A parameter that the model has in bfloat16 is kept there and in a rest of 16 bits, which together are its
//! float32 value: what the model has is that value rounded. A value halfway between an even bfloat16 and
//! the next away from zero is kept as the next float32 towards zero, since its rest would have 17 bits.
//!
//! [`UpdatePlan`] cuts the tensors into tiles and lists the work once; the list lies in device memory. A step
//! is then [`gradient_squares`], [`prepare_update`] and [`update`], with a sum over ranks between the first
//! two where there are several; or in place of the last [`update_means`] and [`update_part`] for each part, so that
//! other work may follow the one before it. Nothing comes back to the host: [`UpdateControl`] has what changes from step
//! to step, and where the norm is not finite everything stays as it was, in later steps
//! too until the host has taken note.

mod plan;

use plan::{Items, THREADS};
pub use plan::{UpdatePlan, UpdatedTensor};

use crate::address::{Address, Arg};
use crate::error::CudaError;
use crate::gpu::{Grid, Queue};
use crate::source::OPTIMIZER;

/// Which optimizer, and its constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum UpdateRules {
    /// Second moments as row and column means (arXiv:1804.04235, algorithms 4 and 5, without momentum).
    Adafactor {
        /// Decay of the second moment is `1 - update^-decay_exponent`.
        decay_exponent: f64,
        /// `eps1`: added to squared gradients.
        eps: f64,
        /// Largest root mean square of an update.
        update_clip: f64,
        /// Decoupled weight decay.
        weight_decay: f64,
        /// `eps2`, the floor of the parameter scale; `None` for updates that do not depend on it.
        parameter_scale: Option<f64>,
    },
    /// Adam with decoupled weight decay (arXiv:1711.05101).
    Adamw {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Added to the root of the second moment.
        eps: f64,
        /// Decoupled weight decay.
        weight_decay: f64,
        /// Floor of the parameter scale; `None` for updates that do not depend on it.
        parameter_scale: Option<f64>,
    },
}

/// What changes from step to step, in device memory. The host sets the first two before the first step, the
/// learning rate before every step.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct UpdateControl {
    /// Learning rate of this step, before the parameter scale.
    pub learning_rate: f64,
    /// Updates done; steps that were left out do not count.
    pub updates: u64,
    /// Sum of squares of the gradients: written by [`gradient_squares`], read by [`prepare_update`].
    pub squares: f64,
    /// Norm of the gradients before clipping.
    pub norm: f64,
    /// `1 - beta1^updates`.
    pub correction1: f64,
    /// Factor on the gradients that clips their norm.
    pub gradient_scale: f32,
    /// 1 if this step updates; 0 if the sum of squares in float32 or the loss is not finite, or if any was left
    /// out before.
    pub applied: u32,
    /// Decay of Adafactor's moments.
    pub decay: f32,
    /// `1 / sqrt(1 - beta2^updates)`.
    pub inverse_root_correction2: f32,
    /// Steps that were left out since this was last 0: while it is not, all are.
    pub left_out: u64,
}

impl UpdateControl {
    /// The word in which [`squares`](Self::squares) lies.
    pub const SQUARES: i64 = 2;

    /// The word in which [`left_out`](Self::left_out) lies.
    pub const LEFT_OUT: i64 = 7;

    /// As it lies in device memory.
    pub fn to_words(self) -> [u64; 8] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [
            self.learning_rate.to_bits(),
            self.updates,
            self.squares.to_bits(),
            self.norm.to_bits(),
            self.correction1.to_bits(),
            pair(self.gradient_scale.to_bits(), self.applied),
            pair(self.decay.to_bits(), self.inverse_root_correction2.to_bits()),
            self.left_out,
        ]
    }

    /// From how it lies in device memory.
    pub fn from_words(words: [u64; 8]) -> Self {
        let [learning_rate, updates, squares, norm, correction1, scale, decay, left_out] = words;
        let float = |bits: u64| f32::from_bits(bits as u32);
        Self {
            learning_rate: f64::from_bits(learning_rate),
            updates,
            squares: f64::from_bits(squares),
            norm: f64::from_bits(norm),
            correction1: f64::from_bits(correction1),
            gradient_scale: float(scale),
            applied: (scale >> 32) as u32,
            decay: float(decay),
            inverse_root_correction2: float(decay >> 32),
            left_out,
        }
    }
}

/// Where an optimizer works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UpdateMemory {
    /// The words that came with the plan.
    pub table: Address,
    /// [`UpdatePlan::workspace`] bytes: zeros before the first use, then kept from step to step.
    pub workspace: Address,
    /// An [`UpdateControl`].
    pub control: Address,
}

/// Adds up the squares of all gradients into [`UpdateControl::squares`], and what Adafactor needs of each
/// matrix. Two launches.
///
/// # Errors
/// When the driver refuses.
///
/// # Safety
/// As the crate's documentation demands, for the tensors of the plan too.
pub unsafe fn gradient_squares(
    queue: Queue<'_>,
    plan: &UpdatePlan,
    memory: UpdateMemory,
) -> Result<(), CudaError> {
    let at = |offset| memory.workspace.plus(offset);
    let Items { at: items, count } = plan.sums;
    let of_tile = at(plan.room.of_sum_tile);
    if count > 0 {
        let args: [Arg; 4] =
            [memory.table.into(), memory.table.plus(items).into(), of_tile.into(), at(plan.room.sums).into()];
        let grid = Grid::new(count, THREADS);
        // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
        unsafe { queue.gpu.launch(&OPTIMIZER, "optimizer_sums", grid, queue.stream, &args)? };
    }
    let args: [Arg; 3] = [of_tile.into(), count.into(), memory.control.into()];
    // SAFETY: as above.
    unsafe { queue.gpu.launch(&OPTIMIZER, "optimizer_total", Grid::new(1, 1024), queue.stream, &args) }
}

/// Makes of the sum of squares what [`update`] needs: the factor that clips the norm to `max_norm` (0 for no
/// clipping), and whether to update at all. `loss`, one float32 or [`Address::NONE`], must be finite too.
///
/// # Errors
/// When the driver refuses.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn prepare_update(
    queue: Queue<'_>,
    plan: &UpdatePlan,
    memory: UpdateMemory,
    max_norm: f64,
    loss: Address,
) -> Result<(), CudaError> {
    let [decay_exponent, beta1, beta2] = match plan.rules {
        UpdateRules::Adafactor { decay_exponent, .. } => [decay_exponent, 0.0, 0.0],
        UpdateRules::Adamw { beta1, beta2, .. } => [0.0, beta1, beta2],
    };
    let args: [Arg; 6] = [
        memory.control.into(),
        loss.into(),
        max_norm.to_bits().into(),
        decay_exponent.to_bits().into(),
        beta1.to_bits().into(),
        beta2.to_bits().into(),
    ];
    // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
    unsafe { queue.gpu.launch(&OPTIMIZER, "optimizer_prepare", Grid::new(1, 1), queue.stream, &args) }
}

/// Adds up the squares of the parameters for the first update; every update does so for the next one. Needed
/// whenever values were written by anything else, if there is a parameter scale.
///
/// # Errors
/// When the driver refuses.
///
/// # Safety
/// As the crate's documentation demands, for the tensors of the plan too.
pub unsafe fn parameter_squares(
    queue: Queue<'_>,
    plan: &UpdatePlan,
    memory: UpdateMemory,
) -> Result<(), CudaError> {
    let at = |offset| memory.workspace.plus(offset);
    let Items { at: items, count } = plan.all_updates();
    if count == 0 {
        return Ok(());
    }
    let args: [Arg; 6] = [
        memory.table.into(),
        memory.table.plus(items).into(),
        u32::from(matches!(plan.rules, UpdateRules::Adamw { .. })).into(),
        at(plan.room.applied).into(),
        at(plan.room.parameter_squares).into(),
        at(plan.room.of_apply_tile).into(),
    ];
    let grid = Grid::new(count, THREADS);
    // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
    unsafe { queue.gpu.launch(&OPTIMIZER, "optimizer_parameter_squares", grid, queue.stream, &args) }
}

/// Updates all tensors by their gradients, as [`prepare_update`] left word: [`update_means`], then every part.
///
/// # Errors
/// When the driver refuses.
///
/// # Safety
/// As the crate's documentation demands, for the tensors of the plan too.
pub unsafe fn update(queue: Queue<'_>, plan: &UpdatePlan, memory: UpdateMemory) -> Result<(), CudaError> {
    // SAFETY: passed on.
    unsafe {
        update_means(queue, plan, memory)?;
        (0..plan.parts()).try_for_each(|part| update_part(queue, plan, memory, part))
    }
}

/// Brings Adafactor's means over rows and columns up to date, which [`update_part`] reads. Nothing for AdamW.
///
/// # Errors
/// When the driver refuses.
///
/// # Safety
/// As the crate's documentation demands, for the tensors of the plan too.
pub unsafe fn update_means(
    queue: Queue<'_>,
    plan: &UpdatePlan,
    memory: UpdateMemory,
) -> Result<(), CudaError> {
    let UpdateRules::Adafactor { eps, .. } = plan.rules else { return Ok(()) };
    let Items { at: items, count } = plan.moments;
    if count == 0 {
        return Ok(());
    }
    let at = |offset| memory.workspace.plus(offset);
    let args: [Arg; 6] = [
        memory.control.into(),
        memory.table.into(),
        memory.table.plus(items).into(),
        at(plan.room.sums).into(),
        at(plan.room.segments).into(),
        (eps as f32).into(),
    ];
    let grid = Grid::new(count, THREADS);
    // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
    unsafe { queue.gpu.launch(&OPTIMIZER, "adafactor_moments", grid, queue.stream, &args) }
}

/// Updates the tensors of one part of the plan. One launch, none for a part without tensors.
///
/// Adafactor reads gradients twice, and the second time most of them still lie in the second-level cache: with what
/// comes before an update, 12 bytes a parameter travel in all, if gradients and the model are bfloat16.
///
/// # Errors
/// When the driver refuses.
///
/// # Safety
/// As the crate's documentation demands, for the tensors of the plan too. [`update_means`] comes before.
pub unsafe fn update_part(
    queue: Queue<'_>,
    plan: &UpdatePlan,
    memory: UpdateMemory,
    part: usize,
) -> Result<(), CudaError> {
    let Items { at: items, count } = plan.part(part);
    if count == 0 {
        return Ok(());
    }
    let (at, room) = (|offset| memory.workspace.plus(offset), plan.room);
    let (items, grid) = (memory.table.plus(items), Grid::new(count, THREADS));
    match plan.rules {
        UpdateRules::Adafactor { eps, update_clip, weight_decay, parameter_scale, .. } => {
            let args: [Arg; 17] = [
                memory.control.into(),
                memory.table.into(),
                items.into(),
                memory.workspace.into(),
                at(room.sized).into(),
                at(room.applied).into(),
                at(room.ready).into(),
                at(room.steps).into(),
                at(room.parameter_squares).into(),
                at(room.of_size_tile).into(),
                at(room.of_apply_tile).into(),
                at(room.segments).into(),
                (eps as f32).into(),
                update_clip.to_bits().into(),
                weight_decay.to_bits().into(),
                parameter_scale.unwrap_or(0.0).to_bits().into(),
                u32::from(parameter_scale.is_some()).into(),
            ];
            // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
            unsafe { queue.gpu.launch(&OPTIMIZER, "adafactor_update", grid, queue.stream, &args) }
        }
        UpdateRules::Adamw { beta1, beta2, eps, weight_decay, parameter_scale } => {
            let args: [Arg; 12] = [
                memory.control.into(),
                memory.table.into(),
                items.into(),
                at(room.applied).into(),
                at(room.parameter_squares).into(),
                at(room.of_apply_tile).into(),
                (beta1 as f32).into(),
                (beta2 as f32).into(),
                (eps as f32).into(),
                weight_decay.to_bits().into(),
                parameter_scale.unwrap_or(0.0).to_bits().into(),
                u32::from(parameter_scale.is_some()).into(),
            ];
            // SAFETY: as above.
            unsafe { queue.gpu.launch(&OPTIMIZER, "adamw_update", grid, queue.stream, &args) }
        }
    }
}
