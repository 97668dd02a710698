//! Which token sits in which slot of which expert.

use burn::tensor::{Device, Int, Tensor};

use crate::host;

/// Assignment of tokens to the slots `[num_experts, slots_per_expert]` of a layer.
///
/// An expert's slots hold its tokens first, in routing order, then nothing. The assignment is
/// data, not a differentiable quantity; the gates that go with it are.
#[derive(Debug, Clone)]
pub struct DispatchPlan {
    /// Experts.
    pub num_experts: usize,
    /// Slots of each expert: `groups * expert_capacity`.
    pub slots_per_expert: usize,
    /// Whether that follows from sizes alone, so that ranks with batches of one shape agree on it. If
    /// not, the fullest expert of this device decides.
    pub fixed_capacity: bool,
    /// Token of each slot, -1 for none. `[num_experts * slots_per_expert]`
    pub token_of_slot: Tensor<1, Int>,
    /// Where each token's slots begin in `slots_of_token`. `[tokens + 1]`
    pub slot_offsets: Tensor<1, Int>,
    /// Slots that hold a token, by token. `[assigned slots]`
    pub slots_of_token: Tensor<1, Int>,
    /// Slots in use of each expert. `[num_experts]`
    pub rows_used: Tensor<1, Int>,
}

impl DispatchPlan {
    /// The plan in which slot `s` holds token `token_of_slot[s]`, for `tokens` tokens.
    pub(crate) fn new(
        token_of_slot: Vec<i32>,
        num_experts: usize,
        slots_per_expert: usize,
        fixed_capacity: bool,
        tokens: usize,
        device: &Device,
    ) -> Self {
        let mut offsets = vec![0_i32; tokens + 1];
        for &token in token_of_slot.iter().filter(|&&token| token >= 0) {
            offsets[token as usize + 1] += 1;
        }
        for token in 0..tokens {
            offsets[token + 1] += offsets[token];
        }
        let mut next = offsets.clone();
        let mut slots = vec![0; offsets[tokens] as usize];
        for (slot, &token) in token_of_slot.iter().enumerate().filter(|&(_, &token)| token >= 0) {
            slots[next[token as usize] as usize] = slot as i32;
            next[token as usize] += 1;
        }
        let used = token_of_slot
            .chunks(slots_per_expert.max(1))
            .map(|slots| slots.iter().take_while(|&&token| token >= 0).count() as i32)
            .collect();
        let assigned = slots.len();
        Self {
            num_experts,
            slots_per_expert,
            fixed_capacity,
            token_of_slot: host::int_tensor(token_of_slot, [num_experts * slots_per_expert], device),
            slot_offsets: host::int_tensor(offsets, [tokens + 1], device),
            slots_of_token: host::int_tensor(slots, [assigned], device),
            rows_used: host::int_tensor(used, [num_experts], device),
        }
    }
    /// The same assignment with at least `slots` slots an expert.
    #[must_use]
    pub fn widened(self, slots: usize) -> Self {
        let narrow = self.slots_per_expert;
        if slots <= narrow {
            return self;
        }
        let device = self.token_of_slot.device();
        let mut token_of_slot = vec![-1; self.num_experts * slots];
        let held = host::integers(&self.token_of_slot);
        for (wide, held) in token_of_slot.chunks_mut(slots).zip(held.chunks(narrow.max(1))) {
            wide[..narrow].copy_from_slice(held);
        }
        let moved = |slot: i32| {
            let slot = slot as usize;
            (slot / narrow * slots + slot % narrow) as i32
        };
        let slots_of_token: Vec<i32> = host::integers(&self.slots_of_token).into_iter().map(moved).collect();
        let assigned = slots_of_token.len();
        Self {
            slots_per_expert: slots,
            token_of_slot: host::int_tensor(token_of_slot, [self.num_experts * slots], &device),
            slots_of_token: host::int_tensor(slots_of_token, [assigned], &device),
            ..self
        }
    }
}
