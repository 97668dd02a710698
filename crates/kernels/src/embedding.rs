//! Rows of a table by their number: token embedding and relative position bias.

use std::sync::Arc;

use burn::tensor::{Int, Tensor};
use burn_flex::FlexTensor;

use crate::host;
use crate::operation::{Operand, Operation, apply};

/// Row `ids[i]` of `table`, `[rows, width]`, for every `i`: `[ids, width]`.
///
/// The gradient of a row that occurs several times is the sum over its occurrences.
pub fn embedding(table: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
    let ids = Arc::new(host::integers(&ids));
    let [out] = apply(Embedding { ids }, [Operand::from(table)]);
    out.into_tensor()
}

#[derive(Debug)]
struct Embedding {
    ids: Arc<Vec<i32>>,
}

impl Operation<1, 1> for Embedding {
    /// Rows and width of the table.
    type Saved = [usize; 2];

    fn forward(&self, [table]: &[FlexTensor; 1], _: bool) -> ([FlexTensor; 1], [usize; 2]) {
        let table = host::contiguous(table);
        let [rows, width] = table.layout().shape().dims();
        let values = host::values(&table);
        let mut out = Vec::with_capacity(self.ids.len() * width);
        for &id in self.ids.iter() {
            out.extend_from_slice(&values[id as usize * width..][..width]);
        }
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
        for (&id, row) in self.ids.iter().zip(host::values(gradient).chunks_exact(width)) {
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
}
