//! Routing of all encoder tokens of Switch-Base.

use switchyard_cuda::{
    Address, Format, Route, RouteAt, RouteGradients, RouterChoice, route, route_backward, route_workspace,
};
use switchyard_random::{Philox, normal_pair};

use crate::clock::Clock;

pub(crate) fn run(clock: &Clock) {
    if !clock.wants("route") {
        return;
    }
    for (experts, groups) in [(8, 1), (32, 1), (32, 64), (128, 1), (256, 1), (2048, 1)] {
        of(clock, RouterChoice::Top1, experts, groups);
    }
    of(clock, RouterChoice::Top2, 32, 1);
}

fn of(clock: &Clock, choice: RouterChoice, experts: usize, groups: usize) {
    let tokens = 32_768;
    let expert_capacity = (tokens / groups / experts * 5 / 4).max(1);
    let rules = Route {
        tokens,
        experts,
        groups,
        expert_capacity,
        choice,
        force_balanced: false,
        format: Format::F32,
    };
    let slots = experts * groups * expert_capacity;
    let mut words = Philox::new(1).stream([0, 0, 0]);
    let logits: Vec<f32> =
        (0..tokens * experts).map(|_| normal_pair(words.next_u32(), words.next_u32()).0 as f32).collect();
    let logits = clock.of(&logits);
    let zeros = |values: usize| clock.zeros(values * 4);
    let (chosen, second, entropy, of_token) =
        (zeros(tokens), zeros(tokens), zeros(tokens), zeros(2 * tokens));
    let (of_slot, gates, used) = (zeros(slots), zeros(slots), zeros(experts));
    let (mean, fraction, z, counted) =
        (zeros(groups * experts), zeros(groups * experts), zeros(groups), zeros(groups));
    let workspace = clock.zeros(route_workspace(rules).expect("sizes that there are"));
    let at = RouteAt {
        logits: logits.at(),
        token_mask: Address::NONE,
        choice: chosen.at(),
        second_choice: second.at(),
        entropy: entropy.at(),
        token_of_slot: of_slot.at(),
        slot_of_token: of_token.at(),
        gates: gates.at(),
        rows_used: used.at(),
        mean_probability: mean.at(),
        fraction: fraction.at(),
        z: z.at(),
        counted: counted.at(),
        workspace: workspace.at(),
    };
    let bytes = (tokens * experts * 4) as f64;
    let name = format!("route {choice:?} {experts} experts {groups} groups");
    // SAFETY: all rooms have the values of `rules`.
    clock.time(&name, 0.0, bytes, |queue| unsafe { route(queue, at, rules) });
    let gradient = zeros(tokens * experts);
    let at = RouteGradients {
        logits: logits.at(),
        choice: chosen.at(),
        second_choice: second.at(),
        slot_of_token: of_token.at(),
        counted: counted.at(),
        gates: gates.at(),
        mean_probability: mean.at(),
        z: z.at(),
        gradient: gradient.at(),
    };
    // SAFETY: as above.
    clock.time(&format!("{name} backward"), 0.0, 2.0 * bytes, |queue| unsafe {
        route_backward(queue, at, rules)
    });
}
