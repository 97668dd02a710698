//! Which token sits in which slot of which expert.

use std::sync::Arc;

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
    /// Tokens, with a slot or without.
    pub num_tokens: usize,
    /// Token of each slot, -1 for none. `[num_experts * slots_per_expert]`
    pub token_of_slot: Tensor<1, Int>,
    /// Slots in use of each expert. `[num_experts]`
    pub rows_used: Tensor<1, Int>,
    pub(crate) by_token: ByToken,
}

/// The same assignment seen from the tokens, where it was made.
#[derive(Debug, Clone)]
pub(crate) enum ByToken {
    Listed(Arc<TokenSlots>),
    /// On a GPU: the slots of each token in the order of its choices, -1 for none. int32 `[tokens, choices]`
    #[cfg(feature = "libtorch")]
    Table(burn_tch::TchTensor),
}

/// Slots that hold a token, by token, in main memory.
#[derive(Debug, PartialEq, Eq)]
pub struct TokenSlots {
    /// Where each token's slots begin in `slots`. `[tokens + 1]`
    offsets: Vec<usize>,
    slots: Vec<i32>,
}

impl TokenSlots {
    fn new(token_of_slot: &[i32], tokens: usize) -> Self {
        let assigned = || {
            token_of_slot.iter().enumerate().filter_map(|(slot, &t)| Some((slot, usize::try_from(t).ok()?)))
        };
        let mut offsets = vec![0; tokens + 1];
        for (_, token) in assigned() {
            offsets[token + 1] += 1;
        }
        for token in 0..tokens {
            offsets[token + 1] += offsets[token];
        }
        let mut next = offsets.clone();
        let mut slots = vec![0; offsets[tokens]];
        for (slot, token) in assigned() {
            slots[next[token]] = slot as i32;
            next[token] += 1;
        }
        Self { offsets, slots }
    }

    /// The slots of one token, the lowest first.
    pub fn of(&self, token: usize) -> &[i32] {
        &self.slots[self.offsets[token]..self.offsets[token + 1]]
    }

    /// The slots of every token.
    pub fn iter(&self) -> impl Iterator<Item = &[i32]> {
        self.offsets.windows(2).map(|pair| &self.slots[pair[0]..pair[1]])
    }
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
        let by_token = ByToken::Listed(Arc::new(TokenSlots::new(&token_of_slot, tokens)));
        let used = token_of_slot
            .chunks(slots_per_expert.max(1))
            .map(|slots| slots.iter().take_while(|&&token| token >= 0).count() as i32)
            .collect();
        Self {
            num_experts,
            slots_per_expert,
            fixed_capacity,
            num_tokens: tokens,
            token_of_slot: host::int_tensor(token_of_slot, [num_experts * slots_per_expert], device),
            rows_used: host::int_tensor(used, [num_experts], device),
            by_token,
        }
    }

    /// Whether LibTorch has the assignment.
    pub fn is_on_devices(&self) -> bool {
        #[cfg(feature = "libtorch")]
        return crate::torch::is_here(&self.rows_used.device());
        #[cfg(not(feature = "libtorch"))]
        false
    }

    /// The slots of every token; of a plan made on a GPU this waits for the GPU.
    pub fn token_slots(&self) -> Arc<TokenSlots> {
        match &self.by_token {
            ByToken::Listed(slots) => Arc::clone(slots),
            #[cfg(feature = "libtorch")]
            ByToken::Table(_) => {
                Arc::new(TokenSlots::new(&host::integers(&self.token_of_slot), self.num_tokens))
            }
        }
    }

    /// Tokens with a slot, counted where the plan is. float32 `[1]`
    pub fn tokens_with_slot(&self) -> Tensor<1> {
        match &self.by_token {
            ByToken::Listed(slots) => {
                let count = slots.iter().filter(|own| !own.is_empty()).count();
                Tensor::full([1], count as f32, &self.rows_used.device())
            }
            #[cfg(feature = "libtorch")]
            ByToken::Table(slots) => crate::torch::rows_with_any(slots),
        }
    }

    /// The same assignment with at least `slots` slots an expert.
    #[must_use]
    pub fn widened(self, slots: usize) -> Self {
        let narrow = self.slots_per_expert;
        if slots <= narrow {
            return self;
        }
        let mut token_of_slot = vec![-1; self.num_experts * slots];
        let held = host::integers(&self.token_of_slot);
        for (wide, held) in token_of_slot.chunks_mut(slots).zip(held.chunks(narrow.max(1))) {
            wide[..narrow].copy_from_slice(held);
        }
        let device = self.token_of_slot.device();
        Self::new(token_of_slot, self.num_experts, slots, self.fixed_capacity, self.num_tokens, &device)
    }
}
