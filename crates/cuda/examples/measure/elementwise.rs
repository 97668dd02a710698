//! Sums and conversions of 100 million values.

use switchyard_cuda::{Format, add, narrow, widen};

use crate::clock::Clock;

pub(crate) fn run(clock: &Clock) {
    let len = 32_768 * 3072;
    let bytes = len as f64;
    let [a, b] = [1, 2].map(|seed| clock.normal_bf16(len, 1.0, seed));
    let wide = clock.zeros(len * 4);
    // SAFETY: all rooms have `len` values.
    clock.time("elementwise add bf16", 0.0, 6.0 * bytes, |queue| unsafe {
        add(queue, a.at(), b.at(), b.at(), len, Format::Bf16)
    });
    // SAFETY: as above.
    clock
        .time("elementwise widen", 0.0, 6.0 * bytes, |queue| unsafe { widen(queue, a.at(), wide.at(), len) });
    // SAFETY: as above.
    clock.time("elementwise narrow", 0.0, 6.0 * bytes, |queue| unsafe {
        narrow(queue, wide.at(), a.at(), len)
    });
}
