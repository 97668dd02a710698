//! Which part of every parameter a rank computes with, and which whole matrices it owns.
//!
//! A rank *holds* the slice of a parameter that its model multiplies with: its experts, its
//! columns or rows of a split matrix. It *owns* whole logical matrices: their float32 values and
//! optimizer moments, which it updates and saves. Each matrix has one owner among its holders.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::mesh::{Coordinates, MeshShape};
use crate::parameters::{ParameterKind, ParameterSpec};

/// A box within a logical tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// First index along each axis.
    pub start: Vec<usize>,
    /// Length along each axis.
    pub shape: Vec<usize>,
}

/// Matrices of one parameter that one rank owns: an expert each, or the only one there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedMatrices {
    /// The rank.
    pub owner: usize,
    /// The matrices; of a stack of experts their numbers, else `0..1`.
    pub matrices: Range<usize>,
}

impl Part {
    /// All of a tensor of `shape`.
    pub fn whole(shape: &[usize]) -> Self {
        Self { start: vec![0; shape.len()], shape: shape.to_vec() }
    }

    /// Elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it is all of a tensor of `shape`.
    pub fn is_whole(&self, shape: &[usize]) -> bool {
        self.shape == shape
    }

    /// The runs of consecutive elements that make up the part of a tensor of `shape`, row-major.
    pub fn runs(&self, shape: &[usize]) -> impl Iterator<Item = Range<usize>> + use<> {
        // Axes that are whole at the end join the run of the last axis that is cut.
        let cut = (0..shape.len()).rev().find(|&axis| self.shape[axis] != shape[axis]);
        let first = cut.unwrap_or(0);
        let stride = |axis: usize| shape[axis + 1..].iter().product::<usize>();
        let length: usize = self.shape.get(first..).map_or(1, |axes| axes.iter().product());
        let outer: Vec<(usize, usize, usize)> =
            (0..first).map(|axis| (self.start[axis], self.shape[axis], stride(axis))).collect();
        let base = if shape.is_empty() { 0 } else { self.start[first] * stride(first) };
        let count: usize = outer.iter().map(|(_, length, _)| length).product();
        (0..count).map(move |number| {
            let (mut rest, mut offset) = (number, base);
            for &(start, length, stride) in outer.iter().rev() {
                offset += (start + rest % length) * stride;
                rest /= length;
            }
            offset..offset + length
        })
    }

    /// The values of this part of a tensor of `shape` whose values are `whole`.
    pub fn cut<T: Copy>(&self, shape: &[usize], whole: &[T]) -> Vec<T> {
        self.runs(shape).flat_map(|run| whole[run].iter().copied()).collect()
    }

    /// Puts the values of this part into `whole`, a tensor of `shape`.
    pub fn paste<T: Copy>(&self, shape: &[usize], whole: &mut [T], part: &[T]) {
        let mut rest = part;
        for run in self.runs(shape) {
            let (here, after) = rest.split_at(run.len());
            whole[run].copy_from_slice(here);
            rest = after;
        }
    }
}

/// The part of a parameter with which the rank at `at` computes.
pub fn held_part(spec: &ParameterSpec, mesh: MeshShape, at: Coordinates) -> Part {
    let mut part = Part::whole(&spec.shape);
    let mut split = |axis: usize, parts: usize, index: usize| {
        let length = spec.shape[axis] / parts;
        part.start[axis] = index * length;
        part.shape[axis] = length;
    };
    if spec.kind.is_expert() {
        split(0, mesh.expert, at.expert);
    }
    if let Some(axis) = tensor_axis(spec.kind) {
        split(axis, mesh.tensor, at.tensor);
    }
    part
}

/// The axis along which tensor parallelism splits a parameter; `None` where every rank holds all of it.
fn tensor_axis(kind: ParameterKind) -> Option<usize> {
    match kind {
        ParameterKind::Norm | ParameterKind::Router | ParameterKind::RouterBias => None,
        ParameterKind::Embedding | ParameterKind::AttentionOutput | ParameterKind::FeedForwardOut => Some(0),
        ParameterKind::Head
        | ParameterKind::RelativeBias
        | ParameterKind::Query
        | ParameterKind::KeyValue
        | ParameterKind::FeedForwardIn
        | ParameterKind::ExpertOut => Some(1),
        ParameterKind::ExpertIn => Some(2),
    }
}

/// Owners of the matrices of every parameter, by name, in the order of the matrices.
///
/// Dense matrices go, largest first, to the rank that owns least so far; the experts of a stack are
/// cut evenly among the ranks that hold them.
pub fn owners(specs: &[ParameterSpec], mesh: MeshShape) -> BTreeMap<String, Vec<OwnedMatrices>> {
    let mut owned = vec![0; mesh.ranks()];
    let mut dense: Vec<&ParameterSpec> = specs.iter().filter(|spec| !spec.kind.is_expert()).collect();
    dense.sort_by_key(|spec| (std::cmp::Reverse(spec.num_elements()), &spec.name));
    let mut found = BTreeMap::new();
    for spec in dense {
        let owner = (0..owned.len()).min_by_key(|&rank| (owned[rank], rank)).unwrap_or(0);
        owned[owner] += spec.num_elements();
        found.insert(spec.name.clone(), vec![OwnedMatrices { owner, matrices: 0..1 }]);
    }
    for (number, spec) in specs.iter().filter(|spec| spec.kind.is_expert()).enumerate() {
        let local = spec.shape[0] / mesh.expert;
        let of_group = |expert: usize| {
            let holders = mesh.expert_holders(expert);
            let n = holders.len();
            (0..n).map(move |share| OwnedMatrices {
                // With fewer experts than holders each stack begins at another holder.
                owner: holders[(share + number) % n],
                matrices: expert * local + local * share / n..expert * local + local * (share + 1) / n,
            })
        };
        let ranges = (0..mesh.expert).flat_map(of_group).filter(|range| !range.matrices.is_empty());
        found.insert(spec.name.clone(), ranges.collect());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parameters::parameters;
    use crate::preset;

    fn at(mesh: MeshShape) -> impl Iterator<Item = Coordinates> {
        (0..mesh.ranks()).map(move |rank| mesh.coordinates(rank))
    }

    #[test]
    fn a_part_is_cut_and_pasted_back() {
        let shape = [2, 3, 4];
        let whole: Vec<usize> = (0..24).collect();
        let part = Part { start: vec![1, 0, 1], shape: vec![1, 3, 2] };
        assert_eq!(part.cut(&shape, &whole), [13, 14, 17, 18, 21, 22]);
        let rows = Part { start: vec![0, 1, 0], shape: vec![2, 2, 4] };
        assert_eq!(rows.runs(&shape).collect::<Vec<_>>(), [4..12, 16..24]);
        assert!(Part::whole(&shape).runs(&shape).eq(std::iter::once(0..24)));
        let mut empty = vec![0; 24];
        rows.paste(&shape, &mut empty, &rows.cut(&shape, &whole));
        assert_eq!(rows.cut(&shape, &empty), rows.cut(&shape, &whole));
        assert_eq!(empty[..4], [0; 4]);
        let vector = Part { start: vec![2], shape: vec![3] };
        assert!(vector.runs(&[6]).eq(std::iter::once(2..5)));
    }

    #[test]
    fn holders_cover_every_parameter_and_owners_own_each_matrix_once() {
        let model = preset("switch-base-8").unwrap();
        let specs = parameters(&model);
        for (data, expert, tensor) in
            [(1, 1, 1), (4, 1, 1), (4, 2, 1), (4, 4, 1), (2, 2, 2), (1, 1, 4), (8, 2, 2)]
        {
            let mesh = MeshShape { data, expert, tensor };
            let owners = owners(&specs, mesh);
            for spec in &specs {
                let elements: usize = at(mesh).map(|at| held_part(spec, mesh, at).num_elements()).sum();
                let copies = match (spec.kind.is_expert(), tensor_axis(spec.kind)) {
                    (true, _) => data / expert,
                    (false, Some(_)) => data,
                    (false, None) => data * tensor,
                };
                assert_eq!(elements, spec.num_elements() as usize * copies, "{} on {mesh}", spec.name);
                let matrices = if spec.kind.is_expert() { spec.shape[0] } else { 1 };
                let mut owned: Vec<usize> =
                    owners[&spec.name].iter().flat_map(|range| range.matrices.clone()).collect();
                owned.sort_unstable();
                assert_eq!(owned, (0..matrices).collect::<Vec<_>>(), "{} on {mesh}", spec.name);
                for OwnedMatrices { owner, matrices } in &owners[&spec.name] {
                    let held = held_part(spec, mesh, mesh.coordinates(*owner));
                    let among = held.start[0]..held.start[0] + held.shape[0];
                    let holds = !spec.kind.is_expert()
                        || (among.contains(&matrices.start) && matrices.end <= among.end);
                    assert!(holds, "{} on {mesh}", spec.name);
                }
            }
        }
    }

    #[test]
    fn ownership_is_balanced() {
        let specs = parameters(&preset("switch-base-8").unwrap());
        let mesh = MeshShape { data: 4, expert: 2, tensor: 1 };
        let mut owned = [0; 4];
        for (name, ranges) in owners(&specs, mesh) {
            let spec = specs.iter().find(|spec| spec.name == name).unwrap();
            for OwnedMatrices { owner, matrices } in ranges {
                let of = if spec.kind.is_expert() { spec.shape[0] } else { 1 };
                owned[owner] += spec.num_elements() as usize / of * matrices.len();
            }
        }
        let (least, most) = (owned.iter().min().unwrap(), owned.iter().max().unwrap());
        assert!((*most as f64) < 1.1 * *least as f64, "{owned:?}");
    }
}
