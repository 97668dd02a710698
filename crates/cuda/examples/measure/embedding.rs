//! The shared table of T5-Base, looked up for encoder and decoder.

use switchyard_cuda::{Format, LookedUp, Table, embedding, embedding_backward, embedding_workspace};
use switchyard_random::Philox;

use crate::clock::Clock;

pub(crate) fn run(clock: &Clock) {
    let sizes = Table { rows: 32_128, width: 768, format: Format::Bf16 };
    let Table { rows, width, .. } = sizes;
    let tokens = [32_768, 7296];
    let row_bytes = width as f64 * 2.0;
    let mut words = Philox::new(1).stream([0, 0, 0]);
    // About as natural language has them: a tenth of all tokens one id, the others the more the smaller.
    let mut id = || match words.below(10) {
        0 => 5.0,
        _ => (f64::from(words.next_u32()) / 4_294_967_296.0).powi(3) * 32_000.0,
    } as i32;
    let ids = tokens.map(|n| clock.of(&(0..n).map(|_| id()).collect::<Vec<i32>>()));
    let gradients = tokens.map(|n| clock.normal_bf16(n * width, 1.0, 2));
    let table = clock.normal_bf16(rows * width, 1.0, 3);
    let out = clock.zeros(tokens[0] * width * 2);
    let workspace = clock.zeros(embedding_workspace(&sizes, tokens[0] + tokens[1]));
    // SAFETY: all rooms have the values of `sizes`.
    clock.time("embedding 32768 tokens", 0.0, 2.0 * tokens[0] as f64 * row_bytes, |queue| unsafe {
        embedding(queue, [table.at(), ids[0].at(), out.at()], tokens[0], sizes)
    });
    let list = |i: usize| LookedUp { ids: ids[i].at(), gradient: gradients[i].at(), tokens: tokens[i] };
    for (name, onto) in [("embedding backward", false), ("embedding backward onto", true)] {
        let bytes = (tokens[0] + tokens[1] + rows) as f64 * row_bytes;
        // SAFETY: as above.
        clock.time(name, 0.0, bytes, |queue| unsafe {
            embedding_backward(queue, [list(0), list(1)], table.at(), workspace.at(), sizes, onto)
        });
    }
}
