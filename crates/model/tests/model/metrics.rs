//! Router metrics on examples small enough to count by hand.

use burn::tensor::{Distribution, Tensor};
use switchyard_kernels::test_device;
use switchyard_kernels::{
    RouteOptions, int_tensor, route_expert_choice, route_top1, route_top2, with_values,
};
use switchyard_model::moe::{LayerMetrics, RouterOutput};

/// Tokens 0 to 2 prefer expert 0, token 3 expert 2; token 4 is padding. Capacity 2.
fn example() -> LayerMetrics {
    let device = test_device();
    let logits_ne = Tensor::<2>::from_data(
        [[2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 9.0, 0.0]],
        &device,
    );
    let options = RouteOptions {
        groups: 1,
        expert_capacity: Some(2),
        token_mask: Some(int_tensor(vec![1, 1, 1, 1, 0], [5], &device)),
        force_balanced: false,
    };
    LayerMetrics::new(&RouterOutput { layer: 1, routing: route_top1(logits_ne.clone(), options), logits_ne })
}

#[test]
fn sums_on_the_device_are_those_of_the_host() {
    let device = test_device();
    for (route, groups, expert_capacity) in [
        (route_top1 as fn(_, _) -> _, 1, Some(3)),
        (route_top1, 2, Some(3)),
        (route_top1, 2, None),
        (route_top2, 2, Some(3)),
        (route_expert_choice, 2, Some(3)),
    ] {
        let outputs: Vec<RouterOutput> = (0..3)
            .map(|layer| {
                let logits_ne = Tensor::<2>::random([24, 5], Distribution::Normal(0.0, 2.0), &device);
                let mask = (0..24).map(|token| i32::from(token % 7 != layer as i32)).collect();
                let options = RouteOptions {
                    groups,
                    expert_capacity,
                    token_mask: Some(int_tensor(mask, [24], &device)),
                    force_balanced: false,
                };
                RouterOutput { layer, routing: route(logits_ne.clone(), options), logits_ne }
            })
            .collect();
        let sums = with_values(LayerMetrics::sums(&outputs), <[f32]>::to_vec);
        for (output, sums) in outputs.iter().zip(sums.chunks_exact(2 * 5 + 7)) {
            for (found, expected) in sums.iter().zip(LayerMetrics::new(output).to_sums()) {
                close(f64::from(*found), expected);
            }
        }
    }
}

/// Probability of the likeliest of three experts, the other two at logit 0.
fn best(logit: f64) -> f64 {
    logit.exp() / (logit.exp() + 2.0)
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-6 * b.abs().max(1.0), "{a} {b}");
}

#[test]
fn a_hand_counted_layer() {
    let metrics = example();
    assert_eq!(metrics.tokens_per_expert, [3, 0, 1]);
    assert_eq!(metrics.kept_per_expert, [2, 0, 1]);
    assert_eq!((metrics.tokens, metrics.dropped, metrics.groups), (4, 1, 1));
    close(metrics.fraction_tokens_dropped(), 0.25);
    close(metrics.expert_usage(), 2.0 / 3.0);
    // Loads 3, 0, 1: mean 4/3, variance 14/9.
    close(metrics.load_cv(), (14.0_f64 / 9.0).sqrt() / (4.0 / 3.0));
    close(metrics.router_confidence(), (best(2.0) + best(1.0) + best(1.0)) / 3.0);
    let entropy = |logit: f64| {
        let p = best(logit);
        let q = (1.0 - p) / 2.0;
        -p * p.ln() - 2.0 * q * q.ln()
    };
    close(metrics.router_entropy(), (entropy(2.0) + 2.0 * entropy(1.0) + entropy(3.0)) / 4.0);
    let mean_0 = (best(2.0) + best(1.0) + best(3.0) + (1.0 - best(1.0)) / 2.0) / 4.0;
    let others: f64 = [2.0, 1.0, 3.0].iter().map(|&logit| (1.0 - best(logit)) / 2.0).sum();
    let mean_2 = (others + best(1.0)) / 4.0;
    close(metrics.load_balancing_loss, 3.0 * (0.75 * mean_0 + 0.25 * mean_2));
    let z = |logit: f64| (logit.exp() + 2.0).ln().powi(2);
    close(metrics.router_z_loss, (z(2.0) + 2.0 * z(1.0) + z(3.0)) / 4.0);
}

#[test]
fn micro_batches_add_up() {
    let mut sum = example();
    sum.add(&example());
    assert_eq!(sum.tokens_per_expert, [6, 0, 2]);
    assert_eq!((sum.tokens, sum.dropped, sum.groups), (8, 2, 2));
    close(sum.load_balancing_loss, 2.0 * example().load_balancing_loss);
    for same in [
        LayerMetrics::fraction_tokens_dropped,
        LayerMetrics::expert_usage,
        LayerMetrics::load_cv,
        LayerMetrics::router_entropy,
        LayerMetrics::router_confidence,
    ] {
        close(same(&sum), same(&example()));
    }
}
