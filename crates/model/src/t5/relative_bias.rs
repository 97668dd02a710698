//! Relative position buckets and the bias vector that attention reads.

use std::cell::RefCell;
use std::collections::HashMap;

use burn::tensor::{Device, Int, Tensor};
use switchyard_kernels::{embedding, int_tensor};

/// Bucket of relative position `key - query`.
///
/// Half of the buckets are exact distances, the rest grow logarithmically up to `max_distance`.
/// The logarithm is taken in float32, as in the reference implementations.
///
/// # Source
/// Raffel et al. 2020 (arXiv:1910.10683), section 2.1, and Mesh TensorFlow's relative attention.
pub fn bucket(relative: i64, bidirectional: bool, num_buckets: usize, max_distance: usize) -> usize {
    let (buckets, base, distance) = if bidirectional {
        let half = num_buckets / 2;
        (half, if relative > 0 { half } else { 0 }, relative.unsigned_abs() as usize)
    } else {
        (num_buckets, 0, (-relative).max(0) as usize)
    };
    let exact = buckets / 2;
    if distance < exact {
        return base + distance;
    }
    let scale = (max_distance as f64 / exact as f64).ln() as f32;
    let logarithmic = (distance as f32 / exact as f32).ln() / scale * (buckets - exact) as f32;
    base + (exact + logarithmic as usize).min(buckets - 1)
}

/// The bias of every relative position that `queries` and `keys` can have.
///
/// # Shapes
/// `table`: `[num_buckets, num_heads]`. Returns `[num_heads, queries + keys - 1]`; column `i` is for
/// `key - query = i - (queries - 1) - query_offset`.
pub fn relative_bias(
    table: Tensor<2>,
    queries: usize,
    keys: usize,
    query_offset: usize,
    bidirectional: bool,
    max_distance: usize,
) -> Tensor<2> {
    let [num_buckets, _] = table.dims();
    let device = table.device().inner();
    let buckets = Buckets { queries, keys, query_offset, bidirectional, num_buckets, max_distance };
    embedding(table, buckets.ids(&device)).transpose()
}

/// What the buckets of a bias are functions of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Buckets {
    queries: usize,
    keys: usize,
    query_offset: usize,
    bidirectional: bool,
    num_buckets: usize,
    max_distance: usize,
}

impl Buckets {
    /// The bucket of every relative position, on `device`. `[queries + keys - 1]`
    ///
    /// Those of whole sequences stay there: a step that a GPU records may not send it anything.
    fn ids(self, device: &Device) -> Tensor<1, Int> {
        type Kept = HashMap<Buckets, Vec<(Device, Tensor<1, Int>)>>;
        thread_local! {
            static KEPT: RefCell<Kept> = RefCell::default();
        }
        if self.query_offset > 0 {
            return self.sent(device);
        }
        KEPT.with_borrow_mut(|all| {
            let kept = all.entry(self).or_default();
            if let Some((_, ids)) = kept.iter().find(|(on, _)| on == device) {
                return ids.clone();
            }
            let ids = self.sent(device);
            kept.push((device.clone(), ids.clone()));
            ids
        })
    }

    fn sent(self, device: &Device) -> Tensor<1, Int> {
        let Self { queries, keys, query_offset, bidirectional, num_buckets, max_distance } = self;
        let (first, count) = (-(queries as i64 - 1) - query_offset as i64, queries + keys - 1);
        let ids = (0..count as i64)
            .map(|i| bucket(first + i, bidirectional, num_buckets, max_distance) as i32)
            .collect();
        int_tensor(ids, [count], device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_begin_where_the_reference_has_them() {
        let first = |bidirectional: bool, b: usize| {
            (0..300).find(|&d| bucket(-d, bidirectional, 32, 128) == b).expect("bucket occurs")
        };
        let encoder: Vec<i64> = (0..16).map(|b| first(true, b)).collect();
        assert_eq!(encoder, [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]);
        let decoder: Vec<i64> = (16..32).map(|b| first(false, b)).collect();
        assert_eq!(decoder, [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]);
        assert_eq!(bucket(5, false, 32, 128), 0);
        assert_eq!(bucket(5, true, 32, 128), 21);
    }
}
