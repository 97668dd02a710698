//! Matrices side by side in one: the columns of the first, then those of the second, and so on.
//!
//! One product then serves them all. Parts are views, so that nothing is copied on the way there and back.

use burn_tch::TchTensor;
use tch::Tensor;

use crate::torch::contiguous;

/// The columns of all `parts` as one matrix: themselves where they lie side by side, else a copy.
pub(crate) fn packed(parts: &[TchTensor]) -> Tensor {
    if let [only] = parts {
        return contiguous(only).tensor;
    }
    let parts: Vec<&Tensor> = parts.iter().map(|part| &part.tensor).collect();
    side_by_side(&parts).unwrap_or_else(|| Tensor::cat(&parts, 1))
}

/// So many columns each of `packed`, as views that nobody else reads or writes.
pub(crate) fn unpacked(packed: &Tensor, widths: &[i64]) -> Vec<TchTensor> {
    packed.split_with_sizes(widths, 1).into_iter().map(TchTensor::new).collect()
}

/// The matrix whose columns `parts` are, in this order, if they are those of one.
pub(crate) fn side_by_side(parts: &[&Tensor]) -> Option<Tensor> {
    let first = *parts.first()?;
    let ([rows, _], [stride, 1]) = (pair(&first.size())?, pair(&first.stride())?) else { return None };
    let mut width = 0;
    for part in parts {
        let ([own_rows, own_width], own_strides) = (pair(&part.size())?, pair(&part.stride())?);
        let next = first.data_ptr() as usize + width as usize * first.kind().elt_size_in_bytes();
        let follows = part.data_ptr() as usize == next && part.kind() == first.kind();
        if !follows || own_rows != rows || own_strides != [stride, 1] {
            return None;
        }
        width += own_width;
    }
    // What lies between two rows of a tensor is that tensor's memory: no other allocation gets in between.
    (rows > 1 && width <= stride).then(|| first.as_strided([rows, width], [stride, 1], None))
}

/// Room for matrices like `parts`, side by side where these are.
pub(crate) fn room_like<const N: usize>(parts: [&Tensor; N]) -> [Tensor; N] {
    let room = |like: &Tensor| Tensor::empty(like.size(), (like.kind(), like.device()));
    let Some(packed) = side_by_side(&parts) else { return parts.map(room) };
    let widths = parts.map(|part| part.size()[1]);
    room(&packed).split_with_sizes(widths, 1).try_into().expect("a part of each width")
}

fn pair(numbers: &[i64]) -> Option<[i64; 2]> {
    numbers.try_into().ok()
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn matrix(rows: i64, columns: i64) -> Tensor {
        Tensor::randn([rows, columns], (Kind::Float, Device::Cpu))
    }

    fn parts(of: &Tensor, columns: &[(i64, i64)]) -> Vec<Tensor> {
        columns.iter().map(|&(start, width)| of.narrow(1, start, width)).collect()
    }

    fn found(parts: &[Tensor]) -> Option<Tensor> {
        side_by_side(&parts.iter().collect::<Vec<_>>())
    }

    #[test]
    fn parts_of_one_matrix_are_that_matrix() {
        let whole = matrix(5, 12);
        for (columns, start, width) in
            [(&[(0, 4), (4, 3), (7, 5)][..], 0, 12), (&[(0, 4), (4, 3)], 0, 7), (&[(4, 3), (7, 2)], 4, 5)]
        {
            let found = found(&parts(&whole, columns)).expect("they lie side by side");
            let expected = whole.narrow(1, start, width);
            assert_eq!(found.data_ptr(), expected.data_ptr());
            assert_eq!((found.size(), found.stride()), (expected.size(), expected.stride()));
        }
    }

    #[test]
    fn other_matrices_are_copied_into_one() {
        let whole = matrix(5, 12);
        let apart = |columns: &[(i64, i64)]| parts(&whole, columns);
        let (a, b) = (matrix(5, 4), matrix(5, 3));
        for several in [
            vec![a.shallow_clone(), b.shallow_clone()],
            apart(&[(4, 3), (0, 4)]),
            apart(&[(0, 4), (5, 3)]),
            apart(&[(0, 6), (0, 6)]),
            vec![whole.narrow(1, 0, 4), a.narrow(1, 0, 1).expand([5, 4], false)],
            vec![a.narrow(0, 0, 1).expand([5, 4], false), b.shallow_clone()],
            vec![matrix(4, 5).tr(), b],
            // Rows of their own may follow one another by chance.
            vec![
                whole.view([-1]).narrow(0, 0, 4).view([1, 4]),
                whole.view([-1]).narrow(0, 4, 4).view([1, 4]),
            ],
        ] {
            assert!(found(&several).is_none(), "{several:?}");
            let held: Vec<TchTensor> = several.iter().map(|t| TchTensor::new(t.shallow_clone())).collect();
            assert!(packed(&held).equal(&Tensor::cat(&several, 1)));
        }
    }

    #[test]
    fn what_is_unpacked_is_not_copied_to_be_packed_again() {
        let whole = matrix(3, 9);
        let held = unpacked(&whole, &[2, 3, 4]);
        assert!(held.iter().all(TchTensor::can_mut));
        assert_eq!(packed(&held).data_ptr(), whole.data_ptr());

        let like = |part: usize| &held[part].tensor;
        let room = room_like([like(0), like(1), like(2)]);
        assert!(found(&room).is_some_and(|room| room.is_contiguous() && room.size() == whole.size()));
        let apart = room_like([like(0), like(2)]);
        assert!(found(&apart).is_none() && apart.iter().all(Tensor::is_contiguous));
    }
}
