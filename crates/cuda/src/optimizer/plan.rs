//! Tensors cut into tiles, and the order in which tiles are worked on.

use std::collections::VecDeque;

use super::UpdateRules;
use crate::address::{Address, Format};
use crate::error::CudaError;
use crate::size::count;

/// A tensor to update and where all of it lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdatedTensor {
    /// The last two dims are a matrix with a scale and a clip of its own, the others a stack of those; one
    /// dim is a vector.
    pub shape: Vec<usize>,
    /// The values. float32, or bfloat16 if there is a rest
    pub values: Address,
    /// What makes float32 values of the bfloat16 ones, whose bits lie in the upper half of 32: added to these.
    /// int16, or [`Address::NONE`]
    pub rest: Address,
    /// Their gradient.
    pub gradient: Address,
    /// Format of the gradient.
    pub gradient_format: Format,
    /// AdamW: first and second moment of every value. Adafactor: means over each row and over each column,
    /// `[stack, rows]` and `[stack, cols]`; of a vector the second moment of every value, and
    /// [`Address::NONE`]. float32
    pub moments: [Address; 2],
    /// Which part of an update has it.
    pub part: usize,
}

/// Which tiles of which tensors are worked on in which order.
#[derive(Debug, Clone, PartialEq)]
pub struct UpdatePlan {
    pub(super) rules: UpdateRules,
    /// Where each tensor stands in the table; empty ones do not.
    entries: Vec<Option<usize>>,
    pub(super) sums: Items,
    pub(super) moments: Items,
    /// Of each part of an update, one behind the other.
    updates: Vec<Items>,
    pub(super) room: Room,
}

/// A run of the table's items.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Items {
    /// Bytes from the beginning of the table.
    pub(super) at: usize,
    pub(super) count: u32,
}

/// Where the parts of the workspace begin, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Room {
    pub(super) sized: usize,
    pub(super) applied: usize,
    pub(super) ready: usize,
    pub(super) steps: usize,
    pub(super) parameter_squares: usize,
    pub(super) of_sum_tile: usize,
    pub(super) of_size_tile: usize,
    pub(super) of_apply_tile: usize,
    pub(super) segments: usize,
    pub(super) sums: usize,
    pub(super) end: usize,
}

/// Words of the kernels' `Tensor`, and where the gradient's address stands in it.
const TENSOR_WORDS: usize = 24;
const GRADIENT_WORD: usize = 2;

/// Threads of a block.
pub(super) const THREADS: u32 = 256;
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
        let places = [tensor.values, tensor.gradient, tensor.rest].into_iter().chain(tensor.moments);
        let begins_aligned = places.fold(0, |all, at| all | at.0).is_multiple_of(16);
        let aligned = |yes| if yes && begins_aligned { ALIGNED } else { 0 };
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

    fn is_empty(&self) -> bool {
        self.matrices * self.len == 0
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
    /// [`UpdateMemory::table`](crate::UpdateMemory::table). Tensors with other addresses need another plan.
    ///
    /// # Errors
    /// [`CudaError::Size`] for more than the kernels can count.
    pub fn new(rules: UpdateRules, tensors: &[UpdatedTensor]) -> Result<(Self, Vec<u32>), CudaError> {
        let is_adafactor = matches!(rules, UpdateRules::Adafactor { .. });
        let all: Vec<(&UpdatedTensor, Cut)> =
            tensors.iter().map(|tensor| (tensor, Cut::of(tensor, &rules))).collect();
        let mut described = 0..;
        let entries =
            all.iter().map(|(_, cut)| if cut.is_empty() { None } else { described.next() }).collect();
        let cuts: Vec<(&UpdatedTensor, Cut)> = all.into_iter().filter(|(_, cut)| !cut.is_empty()).collect();
        let mut before = Before::default();
        let mut table = Vec::new();
        for (tensor, cut) in &cuts {
            describe(&mut table, tensor, cut, &mut before, is_adafactor)?;
        }
        let parts = cuts.iter().map(|(tensor, _)| tensor.part + 1).max().unwrap_or(1);
        let mut members: Vec<Vec<usize>> = vec![Vec::new(); parts];
        cuts.iter().enumerate().for_each(|(index, (tensor, _))| members[tensor.part].push(index));
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
        let order = if is_adafactor { adafactor_order } else { adamw_order };
        let part = |members: &Vec<usize>| add_items(&mut table, |table| order(table, &cuts, members));
        let updates = members.iter().map(part).collect::<Result<_, _>>()?;
        let room = Room::new(&before, sums.count as usize);
        Ok((Self { rules, entries, sums, moments, updates, room }, table))
    }

    /// Words at the beginning of the table that say where the tensors are.
    pub fn described_words(&self) -> usize {
        self.sums.at / size_of::<u32>()
    }

    /// Writes into the table's [`described_words`](Self::described_words) that the gradient of tensor number
    /// `tensor` lies elsewhere now; its format must be the same.
    pub fn point_gradient(&self, described: &mut [u32], tensor: usize, gradient: Address) {
        let Some(entry) = self.entries[tensor] else { return };
        let word = entry * TENSOR_WORDS + GRADIENT_WORD;
        described[word] = gradient.0 as u32;
        described[word + 1] = (gradient.0 >> 32) as u32;
    }

    /// Parts of an update: one more than the last that has a tensor.
    pub fn parts(&self) -> usize {
        self.updates.len()
    }

    /// The tiles of a part; none of one that has no tensors.
    pub(super) fn part(&self, part: usize) -> Items {
        self.updates.get(part).copied().unwrap_or(Items { at: 0, count: 0 })
    }

    /// The tiles of all parts.
    pub(super) fn all_updates(&self) -> Items {
        let count = self.updates.iter().map(|items| items.count).sum();
        Items { at: self.updates[0].at, count }
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
        tensor.values.0,
        tensor.gradient.0,
        tensor.rest.0,
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
fn adafactor_order(table: &mut Vec<u32>, cuts: &[Cut], tensors: &[usize]) {
    let apply = |table: &mut Vec<u32>, (tensor, matrix): (usize, usize)| {
        let tiles: Vec<_> = cuts[tensor].tiles(APPLY_ROWS).collect();
        for &(row, col) in tiles.iter().rev() {
            table.extend([tensor as u32, matrix as u32, row as u32, col as u32 | TO_APPLY]);
        }
    };
    let mut sized: VecDeque<(usize, usize)> = VecDeque::new();
    let mut ahead = 0;
    for (tensor, cut) in tensors.iter().map(|&tensor| (tensor, &cuts[tensor])) {
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

fn adamw_order(table: &mut Vec<u32>, cuts: &[Cut], tensors: &[usize]) {
    for (tensor, cut) in tensors.iter().map(|&tensor| (tensor, &cuts[tensor])) {
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

#[cfg(test)]
mod tests {
    use super::*;

    const ADAFACTOR: UpdateRules = UpdateRules::Adafactor {
        decay_exponent: 0.8,
        eps: 1e-30,
        update_clip: 1.0,
        weight_decay: 0.0,
        parameter_scale: None,
    };

    const ADAMW: UpdateRules =
        UpdateRules::Adamw { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, parameter_scale: None };

    fn tensors(gradient: u64) -> Vec<UpdatedTensor> {
        let shapes: [&[usize]; 5] = [&[3000, 700], &[], &[4, 600, 300], &[0, 5], &[70]];
        let tensor = |(i, shape): (usize, &&[usize])| UpdatedTensor {
            shape: shape.to_vec(),
            values: Address(1 << 20 | i as u64),
            rest: Address::NONE,
            gradient: Address(gradient | (i as u64) << 4),
            gradient_format: Format::Bf16,
            moments: [Address::NONE; 2],
            part: i % 2,
        };
        shapes.iter().enumerate().map(tensor).collect()
    }

    #[test]
    fn gradients_that_moved_give_the_table_of_a_new_plan() {
        let (plan, mut table) = UpdatePlan::new(ADAFACTOR, &tensors(1 << 32)).unwrap();
        let moved = tensors(5 << 32);
        let (_, expected) = UpdatePlan::new(ADAFACTOR, &moved).unwrap();
        assert!(table != expected);
        let words = plan.described_words();
        for (i, tensor) in moved.iter().enumerate() {
            plan.point_gradient(&mut table[..words], i, tensor.gradient);
        }
        assert!(table == expected);
    }

    #[test]
    fn parts_have_the_tiles_of_their_tensors() {
        for rules in [ADAFACTOR, ADAMW] {
            let (plan, table) = UpdatePlan::new(rules, &tensors(0)).unwrap();
            assert_eq!(plan.parts(), 2);
            let of_part = |part: usize| {
                let Items { at, count } = plan.part(part);
                table[at / 4..].chunks_exact(4).take(count as usize).map(|item| item[0]).collect::<Vec<_>>()
            };
            // The fourth tensor is empty, so that the last is number 3.
            for (part, expected) in [(0, [0, 2, 3].as_slice()), (1, &[1]), (2, &[])] {
                let mut found = of_part(part);
                found.sort_unstable();
                found.dedup();
                assert_eq!(found, expected);
            }
            assert_eq!(plan.all_updates().count as usize, of_part(0).len() + of_part(1).len());
        }
    }

    /// Blocks that apply a matrix wait for those that size it; were one behind, all could wait for ever.
    #[test]
    fn every_tile_that_is_waited_for_comes_before() {
        let (plan, table) = UpdatePlan::new(ADAFACTOR, &tensors(0)).unwrap();
        let Items { at, count } = plan.all_updates();
        let items: Vec<&[u32]> = table[at / 4..].chunks_exact(4).take(count as usize).collect();
        let mut applied = std::collections::HashSet::new();
        let mut sized = 0;
        for item in &items {
            let matrix = (item[0], item[1]);
            if item[3] & TO_APPLY != 0 {
                applied.insert(matrix);
            } else {
                sized += 1;
                assert!(!applied.contains(&matrix), "{matrix:?} is sized after it is applied");
            }
        }
        assert!(sized > 0 && applied.len() == 1 + 1 + 4 + 1, "{sized} {applied:?}");
    }
}
