//! Cross-entropy of all decoder tokens of T5-Base.

use switchyard_cuda::{
    CrossEntropy, CrossEntropyAt, Format, ShardSums, cross_entropy, cross_entropy_joined,
    cross_entropy_shard, cross_entropy_sums,
};

use crate::clock::Clock;

pub(crate) fn run(clock: &Clock) {
    let rows = 7296;
    let targets: Vec<i32> = (0..rows as i32).map(|row| row * 7919 % 32_000).collect();
    let targets = clock.of(&targets);
    let (weights, loss_scale) = (clock.of(&vec![1.0_f32; rows]), clock.of(&[1.0_f32]));
    let [loss, correct, log_z] = [(); 3].map(|()| clock.zeros(rows * 4));
    let sums = clock.zeros(16);
    let logits = clock.normal_bf16(rows * 32_128, 2.0, 1);
    let at = CrossEntropyAt {
        logits: logits.at(),
        targets: targets.at(),
        weights: weights.at(),
        loss_scale: loss_scale.at(),
        loss: loss.at(),
        correct: correct.at(),
        log_z: log_z.at(),
    };
    for (name, vocab_size, gradients) in [
        ("cross_entropy [7296, 32128] bf16", 32_128, true),
        ("cross_entropy without gradients", 32_128, false),
        ("cross_entropy [7296, 32127] unaligned", 32_127, true),
    ] {
        let rules = CrossEntropy { rows, vocab_size, format: Format::Bf16, z_coefficient: 1e-4, gradients };
        let passes = if gradients { 2.0 } else { 1.0 };
        // SAFETY: all rooms have the values of `rules`.
        clock.time(name, 0.0, passes * (rows * vocab_size * 2) as f64, |queue| unsafe {
            cross_entropy(queue, at, rules)
        });
    }
    let [largest, total, target_logit] = [(); 3].map(|()| clock.zeros(rows * 4));
    let shard = ShardSums { largest: largest.at(), total: total.at(), target_logit: target_logit.at() };
    let rules =
        CrossEntropy { rows, vocab_size: 16_064, format: Format::Bf16, z_coefficient: 1e-4, gradients: true };
    let bytes = (rows * rules.vocab_size * 2) as f64;
    // SAFETY: as above.
    clock.time("cross_entropy of a shard [7296, 16064] bf16", 0.0, bytes, |queue| unsafe {
        cross_entropy_shard(queue, at, shard, 0, rules)
    });
    // SAFETY: as above.
    clock.time("cross_entropy of joined shards", 0.0, 2.0 * bytes, |queue| unsafe {
        cross_entropy_joined(queue, at, shard, 0, rules)
    });
    // SAFETY: as above.
    clock.time("cross_entropy sums", 0.0, 0.0, |queue| unsafe {
        cross_entropy_sums(queue, at, rows, 1e-4, sums.at())
    });
}
