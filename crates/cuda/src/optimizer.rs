//! Updates of many tensors in a few launches: Adafactor and AdamW with float32 masters.
//!
//! [`UpdatePlan`] cuts the tensors into tiles and lists the work once; the list lies in device memory. A step
//! is then [`gradient_squares`], [`prepare_update`] and [`update`], with a sum over ranks between the first
//! two where there are several. Nothing comes back to the host: [`UpdateControl`] has what changes from step
//! to step, and where the norm is not finite everything stays as it was.

use std::collections::VecDeque;

use crate::address::{Address, Arg, Format};
use crate::error::CudaError;
use crate::gpu::{Grid, Queue};
use crate::size::count;
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

/// A tensor to update and where all of it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdatedTensor {
    /// The last two dims are a matrix with a scale and a clip of its own, the others a stack of those; one
    /// dim is a vector.
    pub shape: Vec<usize>,
    /// The values. float32
    pub master: Address,
    /// Their gradient.
    pub gradient: Address,
    /// Format of the gradient.
    pub gradient_format: Format,
    /// Takes the new values in bfloat16, or [`Address::NONE`].
    pub copy: Address,
    /// AdamW: first and second moment of every value. Adafactor: means over each row and over each column,
    /// `[stack, rows]` and `[stack, cols]`; of a vector the second moment of every value, and
    /// [`Address::NONE`]. float32
    pub moments: [Address; 2],
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
    /// 1 if this step updates, 0 if a gradient or the loss is not finite.
    pub finite: u32,
    /// Decay of Adafactor's moments.
    pub decay: f32,
    /// `1 / sqrt(1 - beta2^updates)`.
    pub inverse_root_correction2: f32,
    /// Steps that were left out.
    pub skipped: u64,
}

impl UpdateControl {
    /// Bytes of it.
    pub const BYTES: usize = size_of::<Self>();
    /// Where the sum of squares lies, for whoever adds up those of several ranks. float64
    pub const SQUARES_AT: usize = 16;

    /// As it lies in device memory.
    pub fn to_words(self) -> [u64; 8] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [
            self.learning_rate.to_bits(),
            self.updates,
            self.squares.to_bits(),
            self.norm.to_bits(),
            self.correction1.to_bits(),
            pair(self.gradient_scale.to_bits(), self.finite),
            pair(self.decay.to_bits(), self.inverse_root_correction2.to_bits()),
            self.skipped,
        ]
    }

    /// From how it lies in device memory.
    pub fn from_words(words: [u64; 8]) -> Self {
        let [learning_rate, updates, squares, norm, correction1, scale, decay, skipped] = words;
        let float = |bits: u64| f32::from_bits(bits as u32);
        Self {
            learning_rate: f64::from_bits(learning_rate),
            updates,
            squares: f64::from_bits(squares),
            norm: f64::from_bits(norm),
            correction1: f64::from_bits(correction1),
            gradient_scale: float(scale),
            finite: (scale >> 32) as u32,
            decay: float(decay),
            inverse_root_correction2: float(decay >> 32),
            skipped,
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

/// Which tiles of which tensors are worked on in which order.
#[derive(Debug, Clone, PartialEq)]
pub struct UpdatePlan {
    rules: UpdateRules,
    sums: Items,
    moments: Items,
    updates: Items,
    room: Room,
}

/// A run of the table's items.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Items {
    /// Bytes from the beginning of the table.
    at: usize,
    count: u32,
}

/// Where the parts of the workspace begin, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Room {
    sized: usize,
    applied: usize,
    ready: usize,
    steps: usize,
    parameter_squares: usize,
    of_sum_tile: usize,
    of_size_tile: usize,
    of_apply_tile: usize,
    segments: usize,
    sums: usize,
    end: usize,
}

/// Words of the kernels' `Tensor`, and where the gradient's address stands in it.
const TENSOR_WORDS: usize = 24;
const GRADIENT_WORD: usize = 2;

const THREADS: u32 = 256;
const COLS: usize = 256;
const SUM_ROWS: usize = 256;
const SIZE_ROWS: usize = 128;
const APPLY_ROWS: usize = 32;
const TO_APPLY: u32 = 1 << 31;

const NARROW: u32 = 1;
const FACTORED: u32 = 2;
const ALIGNED: u32 = 4;

/// Values of later matrices that are sized before a matrix is updated: enough that nobody waits, few enough
/// that gradients still lie in the second-level cache (8 MiB in bfloat16).
const AHEAD: usize = 4 << 20;

/// A tensor as it is cut into tiles.
#[derive(Debug, Clone, Copy)]
struct Cut {
    matrices: usize,
    rows: usize,
    cols: usize,
    /// Values of a matrix.
    len: usize,
    flags: u32,
}

impl Cut {
    fn of(tensor: &UpdatedTensor, rules: &UpdateRules) -> Self {
        let (stack, matrix) = tensor.shape.split_at(tensor.shape.len().saturating_sub(2));
        let (matrices, len) = (stack.iter().product(), matrix.iter().product::<usize>());
        let narrow = if tensor.gradient_format == Format::Bf16 { NARROW } else { 0 };
        let aligned = |yes| if yes { ALIGNED } else { 0 };
        match (rules, matrix) {
            (UpdateRules::Adafactor { .. }, &[rows, cols]) => {
                let flags = narrow | FACTORED | aligned(cols.is_multiple_of(8));
                Self { matrices, rows, cols, len, flags }
            }
            _ => {
                let flags = narrow | aligned(matrices == 1 || len.is_multiple_of(8));
                Self { matrices, rows: len.div_ceil(COLS), cols: COLS, len, flags }
            }
        }
    }

    fn is_factored(&self) -> bool {
        self.flags & FACTORED != 0
    }

    /// Tiles of `rows` rows, row after row.
    fn tiles(&self, rows: usize) -> impl Iterator<Item = (usize, usize)> + Clone + use<> {
        let cols = self.cols.div_ceil(COLS);
        (0..self.rows.div_ceil(rows)).flat_map(move |row| (0..cols).map(move |col| (row, col)))
    }

    fn num_tiles(&self, rows: usize) -> usize {
        self.rows.div_ceil(rows) * self.cols.div_ceil(COLS)
    }
}

/// Counts what lies before a tensor while the tensors are listed.
#[derive(Debug, Clone, Copy, Default)]
struct Before {
    matrices: usize,
    size_tiles: usize,
    apply_tiles: usize,
    segments: usize,
    sums: usize,
}

impl UpdatePlan {
    /// Plans updates of `tensors`; also returns words that must lie in device memory at
    /// [`UpdateMemory::table`]. Tensors with other addresses need another plan.
    ///
    /// # Errors
    /// [`CudaError::Size`] for more than the kernels can count.
    pub fn new(rules: UpdateRules, tensors: &[UpdatedTensor]) -> Result<(Self, Vec<u32>), CudaError> {
        let is_adafactor = matches!(rules, UpdateRules::Adafactor { .. });
        let cuts: Vec<(&UpdatedTensor, Cut)> = tensors
            .iter()
            .map(|tensor| (tensor, Cut::of(tensor, &rules)))
            .filter(|(_, cut)| cut.matrices * cut.len > 0)
            .collect();
        let mut before = Before::default();
        let mut table = Vec::new();
        for (tensor, cut) in &cuts {
            describe(&mut table, tensor, cut, &mut before, is_adafactor)?;
        }
        let cuts: Vec<Cut> = cuts.into_iter().map(|(_, cut)| cut).collect();
        let sums = add_items(&mut table, |table| {
            for (tensor, cut) in cuts.iter().enumerate() {
                for matrix in 0..cut.matrices {
                    for (row, col) in cut.tiles(SUM_ROWS) {
                        table.extend([tensor as u32, matrix as u32, row as u32, col as u32]);
                    }
                }
            }
        })?;
        let moments = add_items(&mut table, |table| {
            for (tensor, cut) in cuts.iter().enumerate().filter(|(_, cut)| cut.is_factored()) {
                for matrix in 0..cut.matrices {
                    for (kind, len) in [cut.rows, cut.cols].into_iter().enumerate() {
                        for segment in 0..len.div_ceil(THREADS as usize) {
                            table.extend([tensor as u32, matrix as u32, segment as u32, kind as u32]);
                        }
                    }
                }
            }
        })?;
        let updates = add_items(&mut table, |table| {
            if is_adafactor { adafactor_order(table, &cuts) } else { adamw_order(table, &cuts) }
        })?;
        let room = Room::new(&before, sums.count as usize);
        Ok((Self { rules, sums, moments, updates, room }, table))
    }

    /// Words at the beginning of the table that say where the tensors are.
    pub fn described_words(&self) -> usize {
        self.sums.at / size_of::<u32>()
    }

    /// Writes into the table's [`described_words`](Self::described_words) that the gradient of a tensor, by its
    /// number among those that are not empty, lies elsewhere now; its format must be the same.
    pub fn point_gradient(&self, described: &mut [u32], tensor: usize, gradient: Address) {
        let word = tensor * TENSOR_WORDS + GRADIENT_WORD;
        described[word] = gradient.0 as u32;
        described[word + 1] = (gradient.0 >> 32) as u32;
    }

    /// Bytes of the workspace.
    pub fn workspace(&self) -> usize {
        self.room.end
    }
}

/// Appends the kernels' `Tensor` to the table.
fn describe(
    table: &mut Vec<u32>,
    tensor: &UpdatedTensor,
    cut: &Cut,
    before: &mut Before,
    is_adafactor: bool,
) -> Result<(), CudaError> {
    let counted = |what, size| count("optimizer", what, size);
    // The second moment of every value stands where column means do.
    let [row, col] = match tensor.moments {
        [v, _] if is_adafactor && !cut.is_factored() => [Address::NONE, v],
        moments => moments,
    };
    let row_sums = before.sums;
    let col_sums = row_sums + cut.matrices * cut.cols.div_ceil(COLS) * cut.rows;
    let longs = [
        tensor.master.0,
        tensor.gradient.0,
        tensor.copy.0,
        row.0,
        col.0,
        cut.len as u64,
        row_sums as u64,
        col_sums as u64,
    ];
    table.extend(longs.iter().flat_map(|&long| [long as u32, (long >> 32) as u32]));
    counted("matrices", cut.matrices)?;
    table.extend([
        counted("rows", cut.rows)?,
        counted("cols", cut.cols)?,
        cut.flags,
        counted("matrices", before.matrices)?,
        counted("tiles", before.size_tiles)?,
        counted("tiles", before.apply_tiles)?,
        counted("rows", before.segments)?,
        0,
    ]);
    before.matrices += cut.matrices;
    before.apply_tiles += cut.matrices * cut.num_tiles(APPLY_ROWS);
    if is_adafactor {
        before.size_tiles += cut.matrices * cut.num_tiles(SIZE_ROWS);
    }
    if cut.is_factored() {
        before.segments += cut.matrices * cut.rows.div_ceil(THREADS as usize);
        before.sums = col_sums + cut.matrices * cut.rows.div_ceil(SUM_ROWS) * cut.cols;
    }
    Ok(())
}

/// Appends items of four words each.
fn add_items(table: &mut Vec<u32>, add: impl FnOnce(&mut Vec<u32>)) -> Result<Items, CudaError> {
    let at = table.len();
    add(table);
    Ok(Items { at: at * 4, count: count("optimizer", "tiles", (table.len() - at) / 4)? })
}

/// Tiles of every matrix to size, and behind those of some later matrices its tiles to apply: the last ones
/// first, which were read last.
fn adafactor_order(table: &mut Vec<u32>, cuts: &[Cut]) {
    let apply = |table: &mut Vec<u32>, (tensor, matrix): (usize, usize)| {
        let tiles: Vec<_> = cuts[tensor].tiles(APPLY_ROWS).collect();
        for &(row, col) in tiles.iter().rev() {
            table.extend([tensor as u32, matrix as u32, row as u32, col as u32 | TO_APPLY]);
        }
    };
    let mut sized: VecDeque<(usize, usize)> = VecDeque::new();
    let mut ahead = 0;
    for (tensor, cut) in cuts.iter().enumerate() {
        for matrix in 0..cut.matrices {
            for (row, col) in cut.tiles(SIZE_ROWS) {
                table.extend([tensor as u32, matrix as u32, row as u32, col as u32]);
            }
            if !sized.is_empty() {
                ahead += cut.len;
            }
            sized.push_back((tensor, matrix));
            while ahead >= AHEAD
                && let Some(first) = sized.pop_front()
            {
                apply(table, first);
                ahead -= sized.front().map_or(0, |&(tensor, _)| cuts[tensor].len);
            }
        }
    }
    sized.into_iter().for_each(|matrix| apply(table, matrix));
}

fn adamw_order(table: &mut Vec<u32>, cuts: &[Cut]) {
    for (tensor, cut) in cuts.iter().enumerate() {
        for matrix in 0..cut.matrices {
            for (row, col) in cut.tiles(APPLY_ROWS) {
                table.extend([tensor as u32, matrix as u32, row as u32, col as u32]);
            }
        }
    }
}

impl Room {
    fn new(count: &Before, sum_tiles: usize) -> Self {
        // The ticket comes first.
        let mut end = 16;
        let mut part = |values: usize, bytes: usize| {
            let begin = end;
            end += (values * bytes).next_multiple_of(16);
            begin
        };
        let mut room = Self {
            sized: part(count.matrices, 4),
            applied: part(count.matrices, 4),
            ready: part(count.matrices, 4),
            steps: part(count.matrices, 8),
            parameter_squares: part(count.matrices, 8),
            of_sum_tile: part(sum_tiles, 4),
            of_size_tile: part(count.size_tiles, 4),
            of_apply_tile: part(count.apply_tiles, 4),
            segments: part(count.segments, 4),
            sums: part(count.sums, 4),
            end: 0,
        };
        room.end = end;
        room
    }
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
/// whenever masters were written by anything else, if there is a parameter scale.
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
    let Items { at: items, count } = plan.updates;
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

/// Updates all tensors by their gradients, as [`prepare_update`] left word. Two launches for Adafactor, one
/// for AdamW.
///
/// Adafactor reads gradients twice more, and the second time most of them still lie in the second-level
/// cache: 14 bytes a parameter travel in all, with bfloat16 gradients and copies.
///
/// # Errors
/// When the driver refuses.
///
/// # Safety
/// As the crate's documentation demands, for the tensors of the plan too.
pub unsafe fn update(queue: Queue<'_>, plan: &UpdatePlan, memory: UpdateMemory) -> Result<(), CudaError> {
    if plan.updates.count == 0 {
        return Ok(());
    }
    match plan.rules {
        UpdateRules::Adafactor { eps, update_clip, weight_decay, parameter_scale, .. } => {
            let numbers = [update_clip, weight_decay, parameter_scale.unwrap_or(0.0)];
            // SAFETY: passed on.
            unsafe { adafactor(queue, plan, memory, eps as f32, numbers, parameter_scale.is_some()) }
        }
        UpdateRules::Adamw { beta1, beta2, eps, weight_decay, parameter_scale } => {
            let at = |offset| memory.workspace.plus(offset);
            let Items { at: items, count } = plan.updates;
            let args: [Arg; 12] = [
                memory.control.into(),
                memory.table.into(),
                memory.table.plus(items).into(),
                at(plan.room.applied).into(),
                at(plan.room.parameter_squares).into(),
                at(plan.room.of_apply_tile).into(),
                (beta1 as f32).into(),
                (beta2 as f32).into(),
                (eps as f32).into(),
                weight_decay.to_bits().into(),
                parameter_scale.unwrap_or(0.0).to_bits().into(),
                u32::from(parameter_scale.is_some()).into(),
            ];
            let grid = Grid::new(count, THREADS);
            // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
            unsafe { queue.gpu.launch(&OPTIMIZER, "adamw_update", grid, queue.stream, &args) }
        }
    }
}

unsafe fn adafactor(
    queue: Queue<'_>,
    plan: &UpdatePlan,
    memory: UpdateMemory,
    eps: f32,
    numbers: [f64; 3],
    scaled: bool,
) -> Result<(), CudaError> {
    let at = |offset| memory.workspace.plus(offset);
    let (room, moments, updates) = (plan.room, plan.moments, plan.updates);
    if moments.count > 0 {
        let args: [Arg; 6] = [
            memory.control.into(),
            memory.table.into(),
            memory.table.plus(moments.at).into(),
            at(room.sums).into(),
            at(room.segments).into(),
            eps.into(),
        ];
        let grid = Grid::new(moments.count, THREADS);
        // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
        unsafe { queue.gpu.launch(&OPTIMIZER, "adafactor_moments", grid, queue.stream, &args)? };
    }
    let [update_clip, weight_decay, floor] = numbers.map(f64::to_bits);
    let args: [Arg; 17] = [
        memory.control.into(),
        memory.table.into(),
        memory.table.plus(updates.at).into(),
        memory.workspace.into(),
        at(room.sized).into(),
        at(room.applied).into(),
        at(room.ready).into(),
        at(room.steps).into(),
        at(room.parameter_squares).into(),
        at(room.of_size_tile).into(),
        at(room.of_apply_tile).into(),
        at(room.segments).into(),
        eps.into(),
        update_clip.into(),
        weight_decay.into(),
        floor.into(),
        u32::from(scaled).into(),
    ];
    let grid = Grid::new(updates.count, THREADS);
    // SAFETY: as above.
    unsafe { queue.gpu.launch(&OPTIMIZER, "adafactor_update", grid, queue.stream, &args) }
}
