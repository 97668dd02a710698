//! All encoder tokens of Switch-Base into slots at capacity factor 1.25 and back.

use switchyard_cuda::{
    CombineGradients, Format, Slots, combine, combine_backward, dispatch, dispatch_backward,
};
use switchyard_random::Philox;

use crate::clock::Clock;

pub(crate) fn run(clock: &Clock) {
    if !clock.wants("dispatch") && !clock.wants("combine") {
        return;
    }
    let (tokens, d_model, experts) = (32_768, 768, 32);
    let of_expert = tokens / experts * 5 / 4;
    for choices in [1, 2] {
        let slots = experts * of_expert * choices;
        let mut words = Philox::new(1).stream([0, 0, 0]);
        let (mut token_of_slot, mut slot_of_token) = (vec![-1_i32; slots], vec![-1_i32; tokens * choices]);
        let mut used = vec![0; experts];
        for (i, held) in slot_of_token.iter_mut().enumerate() {
            let expert = words.next_u32() as usize % experts;
            let slot = expert * of_expert * choices + used[expert];
            if used[expert] < of_expert * choices {
                used[expert] += 1;
                (*held, token_of_slot[slot]) = (slot as i32, (i / choices) as i32);
            }
        }
        let [of_slot, of_token] = [clock.of(&token_of_slot), clock.of(&slot_of_token)];
        let format = Format::Bf16;
        let plan = Slots {
            tokens,
            choices,
            slots,
            d_model,
            format,
            token_of_slot: of_slot.at(),
            slot_of_token: of_token.at(),
        };
        let [x, residual] = [1, 2].map(|seed| clock.normal_bf16(tokens * d_model, 1.0, seed));
        let rows = clock.normal_bf16(slots * d_model, 1.0, 3);
        let [out, to_slots] = [tokens, slots].map(|rows| clock.zeros(rows * d_model * 2));
        let (gates, of_gates) = (clock.of(&vec![0.5_f32; slots]), clock.zeros(slots * 4));
        let row = (d_model * 2) as f64;
        let kept = used.iter().sum::<usize>() as f64;
        let name = |what: &str| format!("{what} top-{choices} [32768, 768] bf16");
        // SAFETY: all rooms have the values of `plan`.
        clock.time(&name("dispatch"), 0.0, row * (kept + slots as f64), |queue| unsafe {
            dispatch(queue, x.at(), to_slots.at(), plan)
        });
        // SAFETY: as above.
        clock.time(&name("dispatch backward"), 0.0, row * (kept + tokens as f64), |queue| unsafe {
            dispatch_backward(queue, rows.at(), out.at(), plan)
        });
        // SAFETY: as above.
        clock.time(&name("combine"), 0.0, row * (kept + 2.0 * tokens as f64), |queue| unsafe {
            combine(queue, rows.at(), gates.at(), residual.at(), out.at(), plan)
        });
        let at = CombineGradients {
            gradient: x.at(),
            expert_outputs: rows.at(),
            gates: gates.at(),
            expert_outputs_gradient: to_slots.at(),
            gates_gradient: of_gates.at(),
        };
        // SAFETY: as above.
        clock.time(&name("combine backward"), 0.0, row * (2.0 * kept + slots as f64), |queue| unsafe {
            combine_backward(queue, at, plan)
        });
    }
}
