//! Routes eight tokens to three experts and prints who got a slot.
//!
//! `cargo run --release --example route_tokens`
#![allow(clippy::print_stdout)]

use burn::tensor::{Device, Distribution, Tensor};
use switchyard_kernels::{RouteOptions, combine, dispatch, route_top1, with_values};

fn main() {
    let device = Device::flex();
    let tokens = Tensor::<2>::random([8, 4], Distribution::Normal(0.0, 1.0), &device);
    let router = Tensor::<2>::random([4, 3], Distribution::Normal(0.0, 1.0), &device);
    let logits = tokens.clone().matmul(router);
    let options =
        RouteOptions { groups: 1, expert_capacity: Some(3), token_mask: None, force_balanced: false };
    let routing = route_top1(logits, options);

    let gates = with_values(routing.gates.clone(), <[f32]>::to_vec);
    let token_of_slot = routing.plan.token_of_slot.clone().into_data();
    for (slot, token) in token_of_slot.iter::<i64>().enumerate() {
        let expert = slot / routing.plan.slots_per_expert;
        match usize::try_from(token) {
            Ok(token) => println!("expert {expert}: token {token}, gate {:.2}", gates[slot]),
            Err(_) => println!("expert {expert}: free slot"),
        }
    }
    // Experts that return their input: what comes back is each token times its gate.
    let output = combine(dispatch(tokens, &routing.plan), routing.gates, &routing.plan, None);
    let dropped = with_values(output, |rows| rows.chunks(4).filter(|row| **row == [0.0; 4]).count());
    println!("{dropped} of 8 tokens dropped");
}
