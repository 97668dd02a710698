//! Rows of a table by their number: token embedding and relative position bias.

use burn::tensor::{Int, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::host;
use crate::operation::{Operand, Operation, apply};

/// Row `ids[i]` of `table`, `[rows, width]`, for every `i`: `[ids, width]`.
///
/// The gradient of a row that occurs several times is the sum over its occurrences.
pub fn embedding(table: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
    lookup(table, host::integers(&ids))
}

/// [`embedding`] where `table` holds the rows from `first_row` on of a table split over devices: the
/// ids that live on another device give 0, so that the sum over devices is the whole embedding.
pub fn embedding_shard(table: Tensor<2>, ids: Tensor<1, Int>, first_row: usize) -> Tensor<2> {
    let [rows, _] = table.dims();
    let here = |id: i32| {
        let row = id - first_row as i32;
        if (0..rows as i32).contains(&row) { row } else { ELSEWHERE }
    };
    lookup(table, host::integers(&ids).into_iter().map(here).collect())
}

fn lookup(table: Tensor<2>, ids: Vec<i32>) -> Tensor<2> {
    let [out] = apply(Embedding { ids }, [Operand::from(table)]);
    out.into_tensor()
}

/// Stands for a row that this table does not have.
const ELSEWHERE: i32 = -1;

#[derive(Debug)]
struct Embedding {
    ids: Vec<i32>,
}

impl Operation<1, 1> for Embedding {
    /// Rows and width of the table.
    type Saved = [usize; 2];

    fn forward(&self, [table]: &[FlexTensor; 1], _: bool) -> ([FlexTensor; 1], [usize; 2]) {
        let table = host::contiguous(table);
        let [rows, width] = table.layout().shape().dims();
        let values = host::values(&table);
        let mut out = host::uninit(self.ids.len() * width);
        out.par_chunks_mut(width.max(1)).zip(&self.ids).with_min_len(64).for_each(|(out, &id)| match id {
            ELSEWHERE => out.fill(0.0),
            id => out.copy_from_slice(&values[id as usize * width..][..width]),
        });
        ([host::tensor(out, [self.ids.len(), width])], [rows, width])
    }

    fn backward(
        &self,
        &[rows, width]: &[usize; 2],
        _: usize,
        gradient: &FlexTensor,
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let mut table = vec![0.0; rows * width];
        let rows_of_ids = self.ids.iter().zip(host::values(gradient).chunks_exact(width.max(1)));
        for (&id, row) in rows_of_ids.filter(|&(&id, _)| id != ELSEWHERE) {
            for (sum, value) in table[id as usize * width..][..width].iter_mut().zip(row) {
                *sum += value;
            }
        }
        [Some(host::tensor(table, [rows, width]))]
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn repeated_rows_add_their_gradients() {
        let device = Device::flex().autodiff();
        let table = Tensor::<2>::from_data([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], &device).require_grad();
        let out = embedding(table.clone(), host::int_tensor(vec![2, 0, 2], [3], &device));
        assert_eq!(out.to_data().try_to_vec::<f32>().unwrap(), [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
        let gradients = (out.clone() * out).sum().backward();
        let gradient = table.grad(&gradients).expect("table is a leaf").into_data();
        assert_eq!(gradient.try_to_vec::<f32>().unwrap(), [2.0, 4.0, 0.0, 0.0, 20.0, 24.0]);
    }

    #[test]
    fn the_parts_of_a_split_table_add_up() {
        let device = Device::flex().autodiff();
        let table = Tensor::<2>::from_data([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], &device).require_grad();
        let ids = host::int_tensor(vec![2, 0, 2, 1], [4], &device);
        let part = |rows: std::ops::Range<usize>| {
            embedding_shard(table.clone().slice([rows.clone(), 0..2]), ids.clone(), rows.start)
        };
        let (split, whole) = (part(0..1) + part(1..3), embedding(table.clone(), ids.clone()));
        assert_eq!(split.to_data(), whole.to_data());
        let gradient = |out: Tensor<2>| {
            let gradients = out.square().sum().backward();
            table.grad(&gradients).expect("table is a leaf").into_data()
        };
        assert_eq!(gradient(split), gradient(whole));
    }
}
