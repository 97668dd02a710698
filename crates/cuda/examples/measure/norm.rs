//! Norms of all encoder tokens of T5-Base.

use switchyard_cuda::{
    Address, Format, RmsNorm, RmsNormGradients, rms_norm, rms_norm_backward, rms_norm_workspace,
};

use crate::clock::Clock;

pub(crate) fn run(clock: &Clock) {
    let (rows, d_model) = (32_768, 768);
    let len = rows * d_model;
    let bytes = len as f64 * 2.0;
    let rules = RmsNorm { rows, d_model, epsilon: 1e-6, format: Format::Bf16, weight_format: Format::Bf16 };
    let [x, gradient, beside] = [1, 3, 4].map(|seed| clock.normal_bf16(len, 1.0, seed));
    let weight = clock.normal_bf16(d_model, 1.0, 5);
    let out = clock.zeros(len * 2);
    let inverse = clock.zeros(rows * 4);
    let weight_gradient = clock.zeros(d_model * 2);
    let workspace = clock.zeros(rms_norm_workspace(&rules).expect("a width that there is"));

    // SAFETY: all rooms have the values of `rules`.
    clock.time("norm forward [32768, 768] bf16", 0.0, 2.0 * bytes, |queue| unsafe {
        rms_norm(queue, x.at(), weight.at(), out.at(), inverse.at(), rules)
    });
    let mut at = RmsNormGradients {
        x: x.at(),
        weight: weight.at(),
        inverse_rms: inverse.at(),
        gradient: gradient.at(),
        beside: Address::NONE,
        x_gradient: out.at(),
        weight_gradient: weight_gradient.at(),
        workspace: workspace.at(),
    };
    // SAFETY: as above.
    clock.time("norm backward", 0.0, 3.0 * bytes, |queue| unsafe { rms_norm_backward(queue, at, rules) });
    at.beside = beside.at();
    // SAFETY: as above.
    clock.time("norm backward beside", 0.0, 4.0 * bytes, |queue| unsafe {
        rms_norm_backward(queue, at, rules)
    });
}
