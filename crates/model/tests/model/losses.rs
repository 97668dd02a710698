//! Router losses of hand-made layers, under both semantics.

use burn::tensor::Tensor;
use switchyard_config::plan::{RouterKind, RoutingConfig, RoutingSemantics};
use switchyard_kernels::test_device;
use switchyard_kernels::{RouteOptions, int_tensor, route_top1};
use switchyard_model::moe::{RouterOutput, router_losses};

use super::{paper_routing, scalar};

/// Routes two experts by the log-odds of expert 0, one number a token.
fn layer(layer: usize, log_odds: &[f32], groups: usize, mask: Option<Vec<i32>>) -> RouterOutput {
    let device = test_device();
    let n = log_odds.len();
    let logits: Vec<f32> = log_odds.iter().flat_map(|&l| [l, 0.0]).collect();
    let logits_ne = Tensor::<1>::from_data(logits.as_slice(), &device).reshape([n, 2]);
    let token_mask = mask.map(|mask| int_tensor(mask, [n], &device));
    let options = RouteOptions { groups, expert_capacity: Some(n), token_mask, force_balanced: false };
    RouterOutput { layer, routing: route_top1(logits_ne.clone(), options), logits_ne }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `2 (f P_0 + (1 - f) (1 - P_0))` where `f` is expert 0's share of the choices.
fn balance(f: f64, p: f64) -> f64 {
    2.0 * (f * p + (1.0 - f) * (1.0 - p))
}

fn z(log_odds: f64) -> f64 {
    log_odds.exp().ln_1p().powi(2)
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-6 * b.abs().max(1.0), "{a} {b}");
}

#[test]
fn paper_losses_add_up_over_layers_and_groups() {
    let first = layer(1, &[1.0, 2.0, -1.0, -1.0], 2, None);
    let second = layer(3, &[3.0, -3.0, 0.5, 0.5], 2, None);
    let losses = router_losses(&[first, second], &paper_routing(), false).unwrap();
    let expected = balance(1.0, (sigmoid(1.0) + sigmoid(2.0)) / 2.0)
        + balance(0.0, sigmoid(-1.0))
        + balance(0.5, 0.5)
        + balance(1.0, sigmoid(0.5));
    close(scalar(losses.load_balancing), expected);
    let expected = (z(1.0) + z(2.0)) / 2.0 + z(-1.0) + (z(3.0) + z(-3.0)) / 2.0 + z(0.5);
    close(scalar(losses.z), expected);
}

#[test]
fn groups_are_independent() {
    let log_odds = [1.0, 2.0, -1.0, 0.5, 3.0, -0.25];
    let together = router_losses(&[layer(1, &log_odds, 3, None)], &paper_routing(), false).unwrap();
    let alone: Vec<_> = log_odds
        .chunks(2)
        .map(|group| router_losses(&[layer(1, group, 1, None)], &paper_routing(), false).unwrap())
        .collect();
    close(scalar(together.load_balancing), alone.iter().map(|l| scalar(l.load_balancing.clone())).sum());
    close(scalar(together.z), alone.iter().map(|l| scalar(l.z.clone())).sum());
}

#[test]
fn padding_counts_for_nothing() {
    let padded = layer(1, &[1.0, 9.0, -2.0, -9.0], 2, Some(vec![1, 0, 1, 0]));
    let padded = router_losses(&[padded], &paper_routing(), false).unwrap();
    let bare = router_losses(&[layer(1, &[1.0, -2.0], 2, None)], &paper_routing(), false).unwrap();
    close(scalar(padded.load_balancing), scalar(bare.load_balancing));
    close(scalar(padded.z), scalar(bare.z));
}

#[test]
fn hugging_face_pools_layers_before_the_product() {
    let routing = RoutingConfig { semantics: RoutingSemantics::Hf, ..paper_routing() };
    let layers = [layer(1, &[2.0, 2.0], 1, None), layer(3, &[-2.0, -2.0], 1, None)];
    let losses = router_losses(&layers, &routing, false).unwrap();
    // One layer sends all tokens to expert 0, the other all to expert 1: pooled, that is balanced.
    close(scalar(losses.load_balancing), 1.0);
    close(scalar(losses.z), (z(2.0) + z(-2.0)) / 2.0);
    assert!(router_losses(&layers, &routing, true).is_none(), "no losses where every layer is sparse");
    let paper = router_losses(&layers, &paper_routing(), true).unwrap();
    close(scalar(paper.load_balancing), 2.0 * balance(1.0, sigmoid(2.0)));
}

#[test]
fn expert_choice_needs_no_balance_and_dense_stacks_have_no_losses() {
    let routing = RoutingConfig { router: RouterKind::ExpertChoice, ..paper_routing() };
    let losses = router_losses(&[layer(1, &[2.0, 1.0], 1, None)], &routing, false).unwrap();
    assert_eq!(scalar(losses.load_balancing), 0.0);
    assert!(scalar(losses.z) > 0.0);
    assert!(router_losses(&[], &paper_routing(), false).is_none());
}
