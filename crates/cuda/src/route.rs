//! Router logits to choices, slots, gates and the means of the router's losses, and gradients back.

use crate::address::{Address, Arg, Format};
use crate::error::CudaError;
use crate::gpu::{Grid, Queue};
use crate::size::count;
use crate::source::ROUTE;

/// Who chooses whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouterChoice {
    /// Each token its likeliest expert (arXiv:2101.03961, section 2.1).
    Top1,
    /// Each token its two likeliest, gates normalised to sum 1 (arXiv:2006.16668, section 2.2).
    Top2,
}

/// Sizes and rules of a routed layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Tokens of all groups.
    pub tokens: usize,
    /// Experts: 2 to 2048.
    pub experts: usize,
    /// Routing groups, equal runs of tokens.
    pub groups: usize,
    /// Slots of an expert in each group; it has `groups * expert_capacity` in all.
    pub expert_capacity: usize,
    /// Who chooses.
    pub choice: RouterChoice,
    /// Assign tokens round robin, whatever the logits say.
    pub force_balanced: bool,
    /// Of the logits and their gradient; probabilities and gates are rounded to it.
    pub format: Format,
}

/// Where routing finds its logits and leaves what follows from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteAt {
    /// `[tokens, experts]`
    pub logits: Address,
    /// 0 for padding, or [`Address::NONE`]. int32 `[tokens]`
    pub token_mask: Address,
    /// Takes the first choice of each token before the cut, -1 for padding. int32 `[tokens]`
    pub choice: Address,
    /// Takes the second choice; top-2 alone. int32 `[tokens]`
    pub second_choice: Address,
    /// Takes the entropy of each token's probabilities in nats, 0 for padding. float32 `[tokens]`
    pub entropy: Address,
    /// Takes the token of each slot, -1 for none. int32 `[experts, groups * expert_capacity]`
    pub token_of_slot: Address,
    /// Takes the slots of each token, in the order of its choices, -1 for none.
    /// int32 `[tokens]`, top-2 `[tokens, 2]`
    pub slot_of_token: Address,
    /// Takes the weight of each slot, 0 for empty ones. float32, as `token_of_slot`
    pub gates: Address,
    /// Takes the slots in use of each expert. int32 `[experts]`
    pub rows_used: Address,
    /// Takes the mean probability over each group's counted tokens. float32 `[groups, experts]`
    pub mean_probability: Address,
    /// Takes the share of first choices before the cut. float32 `[groups, experts]`
    pub fraction: Address,
    /// Takes the mean of `logsumexp(logits)^2`. float32 `[groups]`
    pub z: Address,
    /// Takes the number of counted tokens. int32 `[groups]`
    pub counted: Address,
    /// Room for [`route_workspace`] bytes.
    pub workspace: Address,
}

/// Where the backward pass of routing finds and leaves its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteGradients {
    /// `[tokens, experts]`
    pub logits: Address,
    /// As [`route`] left it.
    pub choice: Address,
    /// As [`route`] left it; top-2 alone.
    pub second_choice: Address,
    /// As [`route`] left it.
    pub slot_of_token: Address,
    /// As [`route`] left it.
    pub counted: Address,
    /// Gradient of the gates, or [`Address::NONE`]. float32 `[experts, groups * expert_capacity]`
    pub gates: Address,
    /// Gradient of the mean probabilities, or [`Address::NONE`]. float32 `[groups, experts]`
    pub mean_probability: Address,
    /// Gradient of z, or [`Address::NONE`]. float32 `[groups]`
    pub z: Address,
    /// Takes the gradient of the logits; may be `logits`. `[tokens, experts]`
    pub gradient: Address,
}

/// Tokens of one block, which all belong to one group.
const TILE: usize = 128;
const THREADS: usize = 256;
/// Threads of a block that places tokens, and experts of one that makes means.
const PLACERS: u32 = 512;
const CHUNK: u32 = 32;

/// A [`Route`] as the kernels count.
struct Sizes {
    tokens: u32,
    experts: u32,
    groups: u32,
    group_tokens: u32,
    group_tiles: u32,
    choices: u32,
    capacity: u32,
    slots: u32,
}

impl Sizes {
    fn of(rules: &Route) -> Result<Self, CudaError> {
        let wrong = |reason| Err(CudaError::Size { operation: "route", reason });
        let Route { tokens, experts, groups, .. } = *rules;
        let choices = match rules.choice {
            RouterChoice::Top1 => 1,
            RouterChoice::Top2 => 2,
        };
        if !(2..=2048).contains(&experts) {
            return wrong(format!("there are {experts} experts; 2 to 2048 will do"));
        }
        if groups == 0 || !tokens.is_multiple_of(groups) {
            return wrong(format!("{tokens} tokens cannot be cut into {groups} equal groups"));
        }
        let group_tokens = tokens / groups;
        let slots = experts.saturating_mul(groups).saturating_mul(rules.expert_capacity);
        Ok(Self {
            tokens: count("route", "tokens * choices", tokens * choices)? / choices as u32,
            experts: experts as u32,
            groups: count("route", "groups", groups)?,
            group_tokens: group_tokens as u32,
            group_tiles: group_tokens.div_ceil(TILE) as u32,
            choices: choices as u32,
            capacity: count("route", "expert_capacity", rules.expert_capacity)?,
            slots: count("route", "experts * groups * expert_capacity", slots)?,
        })
    }

    fn tiles(&self) -> u32 {
        self.groups * self.group_tiles
    }

    /// Lanes of a token and four-value accesses of each.
    fn lanes(&self) -> (u32, u32) {
        match self.experts {
            ..=8 => (2, 1),
            9..=32 => (8, 1),
            33..=64 => (16, 1),
            65..=128 => (32, 1),
            129..=256 => (32, 2),
            257..=512 => (32, 4),
            _ => (32, 16),
        }
    }

    fn name(&self, kind: &str, format: Format) -> String {
        let (lanes, accesses) = self.lanes();
        format!("route_{kind}_{lanes}x{accesses}_{}", format.suffix())
    }

    /// Bytes of the parts of the workspace: gates by choice, counts, sums of probabilities, of z, of tokens.
    fn parts(&self) -> [usize; 5] {
        let (tiles, experts) = (self.tiles() as usize, self.experts as usize);
        let choices = self.choices as usize;
        [self.tokens as usize * choices, tiles * choices * experts, tiles * experts, tiles, tiles]
            .map(|values| (values * 4).next_multiple_of(16))
    }
}

/// Bytes that [`route`] needs to work in.
///
/// # Errors
/// As [`route`].
pub fn route_workspace(rules: Route) -> Result<usize, CudaError> {
    Ok(Sizes::of(&rules)?.parts().iter().sum())
}

/// Routes tokens: each to its likeliest experts, in token order until those are full; ties go to the
/// lowest index. All first choices of a group take their slots before any second one. Two launches.
///
/// # Errors
/// [`CudaError::Size`] for routers and numbers of experts that the kernels do not have.
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn route(queue: Queue<'_>, at: RouteAt, rules: Route) -> Result<(), CudaError> {
    let sizes = Sizes::of(&rules)?;
    let mut end = at.workspace;
    let [gate_of_choice, tile_counts, tile_sums, tile_z, tile_counted] = sizes.parts().map(|bytes| {
        let begin = end;
        end = end.plus(bytes);
        begin
    });
    let tiles = sizes.tiles();
    let args: [Arg; 19] = [
        at.logits.into(),
        at.token_mask.into(),
        sizes.experts.into(),
        sizes.group_tokens.into(),
        sizes.group_tiles.into(),
        tiles.into(),
        sizes.choices.into(),
        u32::from(rules.force_balanced).into(),
        sizes.slots.into(),
        at.choice.into(),
        at.second_choice.into(),
        at.entropy.into(),
        at.token_of_slot.into(),
        at.gates.into(),
        gate_of_choice.into(),
        tile_counts.into(),
        tile_sums.into(),
        tile_z.into(),
        tile_counted.into(),
    ];
    let (experts, choices) = (rules.experts, sizes.choices as usize);
    let grid = Grid { shared: experts * (1 + choices) * 4, ..Grid::new(tiles.max(1), THREADS as u32) };
    // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
    unsafe { queue.gpu.launch(&ROUTE, &sizes.name("scores", rules.format), grid, queue.stream, &args)? };

    let args: [Arg; 21] = [
        sizes.experts.into(),
        sizes.groups.into(),
        sizes.group_tokens.into(),
        sizes.group_tiles.into(),
        sizes.choices.into(),
        sizes.capacity.into(),
        at.choice.into(),
        at.second_choice.into(),
        gate_of_choice.into(),
        tile_counts.into(),
        tile_sums.into(),
        tile_z.into(),
        tile_counted.into(),
        at.token_of_slot.into(),
        at.slot_of_token.into(),
        at.gates.into(),
        at.rows_used.into(),
        at.mean_probability.into(),
        at.fraction.into(),
        at.z.into(),
        at.counted.into(),
    ];
    let shared = experts * (4 * (1 + 2 * choices) + THREADS / 32);
    let means = sizes.groups * sizes.experts.div_ceil(CHUNK);
    let grid = Grid { shared, ..Grid::new(means + tiles.max(1), PLACERS) };
    // SAFETY: as above.
    unsafe { queue.gpu.launch(&ROUTE, "route_place", grid, queue.stream, &args) }
}

/// Writes the gradient of the logits from those of the gates, the mean probabilities and z. One launch.
///
/// # Errors
/// As [`route`].
///
/// # Safety
/// As the crate's documentation demands.
pub unsafe fn route_backward(queue: Queue<'_>, at: RouteGradients, rules: Route) -> Result<(), CudaError> {
    let sizes = Sizes::of(&rules)?;
    if sizes.tokens == 0 {
        return Ok(());
    }
    let args: [Arg; 13] = [
        at.logits.into(),
        sizes.tokens.into(),
        sizes.experts.into(),
        sizes.group_tokens.into(),
        sizes.choices.into(),
        at.choice.into(),
        at.second_choice.into(),
        at.slot_of_token.into(),
        at.counted.into(),
        at.gates.into(),
        at.mean_probability.into(),
        at.z.into(),
        at.gradient.into(),
    ];
    let block_tokens = THREADS as u32 / sizes.lanes().0;
    let grid = Grid::new(sizes.tokens.div_ceil(block_tokens), THREADS as u32);
    // SAFETY: the arguments are the kernel's; the rest is promised by the caller.
    unsafe { queue.gpu.launch(&ROUTE, &sizes.name("backward", rules.format), grid, queue.stream, &args) }
}
