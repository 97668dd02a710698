//! Norms of all encoder tokens of T5-Base.

use switchyard_cuda::{
    Address, Dropout, Format, NoiseKey, ResidualNorm, RmsNorm, RmsNormGradients, TokenNoise,
    residual_rms_norm, rms_norm, rms_norm_backward, rms_norm_workspace,
};

use crate::clock::Clock;

pub(crate) fn run(clock: &Clock) {
    let (rows, d_model) = (32_768, 768);
    let len = rows * d_model;
    let bytes = len as f64 * 2.0;
    let rules = RmsNorm { rows, d_model, epsilon: 1e-6, format: Format::Bf16, weight_format: Format::Bf16 };
    let [x, branch, gradient, beside] = [1, 2, 3, 4].map(|seed| clock.normal_bf16(len, 1.0, seed));
    let weight = clock.normal_bf16(d_model, 1.0, 5);
    let [sum, out] = [(); 2].map(|()| clock.zeros(len * 2));
    let inverse = clock.zeros(rows * 4);
    let weight_gradient = clock.zeros(d_model * 2);
    let workspace = clock.zeros(rms_norm_workspace(&rules).expect("a width that there is"));
    let step = clock.of(&[1_u32]);
    let key = NoiseKey { seed: 1, step: step.at(), site: 2 };
    let noise = TokenNoise { key, first_row: 0, row_tokens: 512, columns: None };
    let dropout = Some(Dropout { rate: 0.1, noise });

    // SAFETY: all rooms have the values of `rules`.
    clock.time("norm forward [32768, 768] bf16", 0.0, 2.0 * bytes, |queue| unsafe {
        rms_norm(queue, x.at(), weight.at(), out.at(), inverse.at(), rules)
    });
    let at = ResidualNorm {
        residual: x.at(),
        branch: branch.at(),
        weight: weight.at(),
        x: sum.at(),
        out: out.at(),
        inverse_rms: inverse.at(),
    };
    for (name, dropout) in [("norm residual", None), ("norm residual dropout 0.1", dropout)] {
        // SAFETY: as above.
        clock.time(name, 0.0, 4.0 * bytes, |queue| unsafe { residual_rms_norm(queue, at, rules, dropout) });
    }
    let mut at = RmsNormGradients {
        x: x.at(),
        weight: weight.at(),
        inverse_rms: inverse.at(),
        gradient: gradient.at(),
        beside: Address::NONE,
        x_gradient: out.at(),
        branch_gradient: sum.at(),
        weight_gradient: weight_gradient.at(),
        workspace: workspace.at(),
    };
    // SAFETY: as above.
    clock.time("norm backward", 0.0, 3.0 * bytes, |queue| unsafe {
        rms_norm_backward(queue, at, rules, None, false)
    });
    at.beside = beside.at();
    // SAFETY: as above.
    clock.time("norm backward beside", 0.0, 4.0 * bytes, |queue| unsafe {
        rms_norm_backward(queue, at, rules, None, false)
    });
    // SAFETY: as above.
    clock.time("norm backward beside dropout 0.1", 0.0, 5.0 * bytes, |queue| unsafe {
        rms_norm_backward(queue, at, rules, dropout, false)
    });
}
