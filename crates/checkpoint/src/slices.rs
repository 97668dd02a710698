//! Boxes within tensors: what two of them share, and whether slices make up a whole tensor.

use std::collections::BTreeSet;
use std::ops::Range;

use switchyard_config::partition::Part;

use crate::manifest::{Slice, TensorEntry};

/// Whether `part` lies within a tensor of `shape`.
pub(crate) fn is_within(part: &Part, shape: &[usize]) -> bool {
    let ends = part.start.iter().zip(&part.shape).map(|(start, len)| start.checked_add(*len));
    part.start.len() == shape.len()
        && part.shape.len() == shape.len()
        && ends.zip(shape).all(|(end, whole)| end.is_some_and(|end| end <= *whole))
}

/// What `a` and `b`, parts of one tensor, have in common; `None` for nothing.
pub(crate) fn intersection(a: &Part, b: &Part) -> Option<Part> {
    let mut common = Part { start: Vec::new(), shape: Vec::new() };
    for axis in 0..a.start.len() {
        let start = a.start[axis].max(b.start[axis]);
        let end = (a.start[axis] + a.shape[axis]).min(b.start[axis] + b.shape[axis]);
        if start >= end {
            return None;
        }
        common.start.push(start);
        common.shape.push(end - start);
    }
    Some(common)
}

/// Where `part` lies within a larger part that begins at `origin`.
pub(crate) fn relative(part: &Part, origin: &[usize]) -> Part {
    let start = part.start.iter().zip(origin).map(|(start, origin)| start - origin).collect();
    Part { start, shape: part.shape.clone() }
}

/// Pairs the elements of two lists of runs in order, as equally long runs.
pub(crate) fn paired_runs(
    from: impl Iterator<Item = Range<usize>>,
    mut to: impl Iterator<Item = Range<usize>>,
    mut each: impl FnMut(Range<usize>, Range<usize>),
) {
    let mut target = 0..0;
    for mut source in from {
        while !source.is_empty() {
            if target.is_empty() {
                let Some(next) = to.next() else { return };
                target = next;
                continue;
            }
            let len = source.len().min(target.len());
            each(source.start..source.start + len, target.start..target.start + len);
            source.start += len;
            target.start += len;
        }
    }
}

/// Why the slices of `entry` do not make up its tensor, each value once; nothing if they do.
pub(crate) fn tiling_faults(entry: &TensorEntry) -> Vec<String> {
    let TensorEntry { name, shape, slices, .. } = entry;
    let Some(values) = num_values(shape) else {
        return vec![format!("`{name}` cannot have shape {shape:?}")];
    };
    let outside = slices.iter().filter(|slice| !is_within(&slice.part(), shape));
    let mut faults: Vec<String> = outside
        .map(|slice| format!("`{name}` has shape {shape:?}, which does not hold {}", describe(slice)))
        .collect();
    if faults.is_empty() {
        faults = overlaps(name, slices);
    }
    if faults.is_empty() {
        let held: usize = slices.iter().map(|slice| slice.part().num_elements()).sum();
        if held != values {
            faults.push(format!("`{name}` is incomplete: {}", gap(shape, slices, held, values)));
        }
    }
    faults
}

/// Elements of a tensor, if they can be counted.
fn num_values(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |product, &len| product.checked_mul(len))
}

fn overlaps(name: &str, slices: &[Slice]) -> Vec<String> {
    let mut faults = Vec::new();
    let mut files = BTreeSet::new();
    for slice in slices {
        if !files.insert(&slice.file) {
            faults.push(format!("`{name}` has more than one slice in {}", slice.file));
        }
    }
    let mut sorted: Vec<(&Slice, Part)> = slices.iter().map(|slice| (slice, slice.part())).collect();
    sorted.sort_by(|(_, a), (_, b)| a.start.cmp(&b.start));
    for (i, (slice, part)) in sorted.iter().enumerate() {
        let end = part.start.first().map(|start| start + part.shape[0]);
        let reached =
            sorted[i + 1..].iter().take_while(|(_, other)| end.is_none_or(|end| other.start[0] < end));
        for (other, _) in reached.filter(|(_, other)| intersection(part, other).is_some()) {
            faults.push(format!("`{name}` is there twice: {} and {}", describe(slice), describe(other)));
        }
    }
    faults
}

/// What no slice holds; the slices do not overlap.
fn gap(shape: &[usize], slices: &[Slice], held: usize, values: usize) -> String {
    if slices.is_empty() {
        return "no file holds any of it".to_owned();
    }
    if slices.iter().any(|slice| slice.shape[1..] != shape[1..]) {
        return format!("its slices hold {held} of {values} values");
    }
    let mut taken: Vec<(usize, usize)> =
        slices.iter().map(|slice| (slice.start[0], slice.shape[0])).collect();
    taken.sort_unstable();
    taken.push((shape[0], 0));
    let (mut missing, mut next) = (Vec::new(), 0);
    for (start, len) in taken {
        if start > next {
            missing.push(format!("{next}..={}", start - 1));
        }
        next = next.max(start + len);
    }
    format!("no file holds {} of the {} along its first axis", missing.join(", "), shape[0])
}

fn describe(slice: &Slice) -> String {
    let axes = slice.start.iter().zip(&slice.shape);
    let axes: Vec<String> =
        axes.map(|(start, len)| format!("{start}..{}", start.saturating_add(*len))).collect();
    format!("[{}] in {}", axes.join(", "), slice.file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(file: &str, start: &[usize], shape: &[usize]) -> Slice {
        Slice { file: file.to_owned(), start: start.to_vec(), shape: shape.to_vec() }
    }

    fn faults(shape: &[usize], slices: &[Slice]) -> Vec<String> {
        tiling_faults(&TensorEntry {
            name: "w".to_owned(),
            shape: shape.to_vec(),
            dtype: "F32".to_owned(),
            slices: slices.to_vec(),
        })
    }

    #[test]
    fn slices_that_tile_a_tensor_along_any_axes() {
        assert!(faults(&[4], &[slice("b", &[1], &[3]), slice("a", &[0], &[1])]).is_empty());
        assert!(faults(&[], &[slice("a", &[], &[])]).is_empty());
        let windmill = [
            slice("a", &[0, 0], &[1, 2]),
            slice("b", &[0, 2], &[2, 1]),
            slice("c", &[2, 1], &[1, 2]),
            slice("d", &[1, 0], &[2, 1]),
            slice("e", &[1, 1], &[1, 1]),
        ];
        assert!(faults(&[3, 3], &windmill).is_empty());
        assert_eq!(faults(&[3, 3], &windmill[..4]), ["`w` is incomplete: its slices hold 8 of 9 values"]);
    }

    #[test]
    fn slices_that_do_not_are_named() {
        let (low, high) = (slice("a", &[0, 0], &[2, 5]), slice("b", &[3, 0], &[2, 5]));
        assert_eq!(
            faults(&[8, 5], &[high.clone(), low.clone()]),
            ["`w` is incomplete: no file holds 2..=2, 5..=7 of the 8 along its first axis"]
        );
        assert_eq!(faults(&[8], &[]), ["`w` is incomplete: no file holds any of it"]);
        assert_eq!(
            faults(&[4, 5], &[low.clone(), high]),
            ["`w` has shape [4, 5], which does not hold [3..5, 0..5] in b"]
        );
        assert_eq!(
            faults(&[3, 5], &[slice("b", &[1, 4], &[2, 1]), low.clone()]),
            ["`w` is there twice: [0..2, 0..5] in a and [1..3, 4..5] in b"]
        );
        assert_eq!(
            faults(&[4, 5], &[low.clone(), slice("a", &[2, 0], &[2, 5])]),
            ["`w` has more than one slice in a"]
        );
        for absurd in [slice("a", &[0], &[2]), slice("a", &[usize::MAX, 0], &[2, 5])] {
            assert_eq!(faults(&[2, 5], &[absurd]).len(), 1);
        }
        assert_eq!(
            faults(&[usize::MAX, 2], &[low]),
            [format!("`w` cannot have shape {:?}", [usize::MAX, 2])]
        );
    }

    #[test]
    fn runs_of_unequal_length_are_paired() {
        let mut pairs = Vec::new();
        paired_runs([0..4, 10..12].into_iter(), [5..6, 7..7, 20..25].into_iter(), |a, b| pairs.push((a, b)));
        assert_eq!(pairs, [(0..1, 5..6), (1..4, 20..23), (10..12, 23..25)]);
    }
}
