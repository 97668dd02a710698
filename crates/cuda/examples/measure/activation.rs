//! Hidden activations of T5-Base and of a gated layer as wide.

use switchyard_cuda::{
    Activation, ActivationGradients, Address, Format, Hidden, HiddenDropout, NoiseKey, TokenNoise, activate,
    activate_backward,
};

use crate::clock::Clock;

pub(crate) fn run(clock: &Clock) {
    let (rows, d_ff) = (32_768, 3072);
    let len = rows * d_ff;
    let bytes = len as f64 * 2.0;
    let step = clock.of(&[1_u32]);
    let key = NoiseKey { seed: 1, step: step.at(), site: 2 };
    let noise = TokenNoise { key, first_row: 0, row_tokens: 512, columns: None };
    let dropout = HiddenDropout::Tokens(0.1, noise);
    let both = clock.normal_bf16(2 * len, 1.0, 1);
    let gradient = clock.normal_bf16(len, 1.0, 2);
    let (out, outs) = (clock.zeros(len * 2), clock.zeros(2 * len * 2));
    let hidden = Hidden {
        rows,
        d_ff,
        format: Format::Bf16,
        activation: Activation::Relu,
        stride: d_ff,
        used: None,
        dropout: None,
    };
    // SAFETY: all rooms have the values of `hidden`.
    clock.time("activation relu dropout 0.1 [32768, 3072]", 0.0, 2.0 * bytes, |queue| unsafe {
        let hidden = Hidden { dropout: Some(dropout), ..hidden };
        activate(queue, both.at(), Address::NONE, out.at(), hidden)
    });
    let relu = ActivationGradients {
        gradient: gradient.at(),
        x: both.at(),
        linear: Address::NONE,
        x_gradient: out.at(),
        linear_gradient: Address::NONE,
    };
    for (name, dropout) in [
        ("activation relu backward", None),
        ("activation relu backward dropout 0.1", Some(dropout)),
        ("activation relu backward dropout done", Some(HiddenDropout::Done(0.1))),
    ] {
        // SAFETY: as above.
        clock.time(name, 0.0, 3.0 * bytes, |queue| unsafe {
            activate_backward(queue, relu, Hidden { dropout, ..hidden })
        });
    }
    let gated = Hidden { activation: Activation::GeluTanh, stride: 2 * d_ff, ..hidden };
    let linear = both.at().plus(d_ff * 2);
    for (name, dropout) in
        [("activation gated gelu", None), ("activation gated gelu dropout 0.1", Some(dropout))]
    {
        // SAFETY: as above.
        clock.time(name, 0.0, 3.0 * bytes, |queue| unsafe {
            activate(queue, both.at(), linear, out.at(), Hidden { dropout, ..gated })
        });
    }
    let at = ActivationGradients {
        linear,
        x_gradient: outs.at(),
        linear_gradient: outs.at().plus(d_ff * 2),
        ..relu
    };
    // SAFETY: as above.
    clock.time("activation gated gelu backward", 0.0, 5.0 * bytes, |queue| unsafe {
        activate_backward(queue, at, gated)
    });
}
