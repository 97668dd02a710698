//! Rows of a table by their number: token embedding and relative position bias.

use burn::backend::Flex;
use burn::tensor::{Int, Tensor};
use burn_flex::FlexTensor;
use rayon::prelude::*;

use crate::element::Element;
use crate::host::{self, Held, by_format};
use crate::operation::{Operand, Operation, apply, given};

/// Row `ids[i]` of `table`, `[rows, width]`, for every `i`: `[ids, width]`.
///
/// The gradient of a row that occurs several times is the sum over its occurrences.
pub fn embedding(table: Tensor<2>, ids: Tensor<1, Int>) -> Tensor<2> {
    let [out] = apply(Embedding { ids: Held::integers(&ids) }, [Operand::from(table)]);
    out.into_tensor()
}

/// The [`embedding`] of two lists of ids, and the table itself for a head that shares it; of a `shard`,
/// which begins at that row of a table split over devices, the [`embedding_shard`].
///
/// The gradients of all three meet in one table. The loss must depend on all.
pub fn embedding_and_table(
    table: Tensor<2>,
    ids: [Tensor<1, Int>; 2],
    shard: Option<usize>,
) -> [Tensor<2>; 3] {
    let ids = ids.map(|ids| rows_here(&table, &ids, shard));
    apply(Embeddings { ids }, [Operand::from(table)]).map(Operand::into_tensor)
}

/// The [`embedding`] of two lists of ids, whose gradients meet in one table. The loss must depend on both.
pub fn embedding_two(table: Tensor<2>, ids: [Tensor<1, Int>; 2], shard: Option<usize>) -> [Tensor<2>; 2] {
    let ids = ids.map(|ids| rows_here(&table, &ids, shard));
    apply(Embeddings { ids }, [Operand::from(table)]).map(Operand::into_tensor)
}

/// [`embedding`] where `table` holds the rows from `first_row` on of a table split over devices: the
/// ids that live on another device give 0, so that the sum over devices is the whole embedding.
pub fn embedding_shard(table: Tensor<2>, ids: Tensor<1, Int>, first_row: usize) -> Tensor<2> {
    let ids = rows_here(&table, &ids, Some(first_row));
    let [out] = apply(Embedding { ids }, [Operand::from(table)]);
    out.into_tensor()
}

/// Rows of `table` that hold `ids`; a `shard` begins at that row of the whole.
fn rows_here(table: &Tensor<2>, ids: &Tensor<1, Int>, shard: Option<usize>) -> Held<i32> {
    let Some(first_row) = shard else { return Held::integers(ids) };
    let [rows, _] = table.dims();
    let row = ids.clone() - first_row as i32;
    let outside = row.clone().lower_elem(0).bool_or(row.clone().greater_equal_elem(rows as i32));
    Held::integers(&row.mask_fill(outside, ELSEWHERE))
}

/// Stands for a row that this table does not have.
pub(crate) const ELSEWHERE: i32 = -1;

fn lookup<E: Element>(table: &FlexTensor, ids: &[i32]) -> FlexTensor {
    let [_, width] = table.layout().shape().dims();
    let values = host::values::<E>(table);
    let mut out = host::uninit(ids.len() * width);
    out.par_chunks_mut(width.max(1)).zip(ids).with_min_len(64).for_each(|(out, &id)| match id {
        ELSEWHERE => out.fill(E::default()),
        id => out.copy_from_slice(&values[id as usize * width..][..width]),
    });
    host::tensor(out, [ids.len(), width])
}

/// Values of a table that one thread clears before it looks for more.
const CLEARED_AT_ONCE: usize = 1 << 16;

/// A table of zeros, written by all threads.
fn zeros<E: Element>(len: usize) -> Vec<E> {
    let mut table = host::uninit::<E>(len);
    table.par_chunks_mut(CLEARED_AT_ONCE).for_each(|part| part.fill(E::default()));
    table
}

/// Adds the gradients of looked-up rows to a table, each row's sum rounded once.
fn add_rows<E: Element>(table: &mut [E], width: usize, looked_up: &[(&[i32], &[E])]) {
    let lists = looked_up.iter().enumerate();
    let mut occurrences: Vec<(i32, usize, usize)> = lists
        .flat_map(|(list, (ids, _))| ids.iter().enumerate().map(move |(at, &id)| (id, list, at)))
        .filter(|&(id, ..)| id != ELSEWHERE)
        .collect();
    occurrences.sort_unstable();
    let mut sums = vec![0.0; width];
    for same in occurrences.chunk_by(|a, b| a.0 == b.0) {
        let row = &mut table[same[0].0 as usize * width..][..width];
        sums.iter_mut().zip(&*row).for_each(|(sum, value)| *sum = value.widen());
        for &(_, list, at) in same {
            let gradient = &looked_up[list].1[at * width..][..width];
            sums.iter_mut().zip(gradient).for_each(|(sum, value)| *sum += value.widen());
        }
        row.iter_mut().zip(&sums).for_each(|(value, &sum)| *value = E::round(sum));
    }
}

#[derive(Debug)]
pub(crate) struct Embedding {
    pub(crate) ids: Held<i32>,
}

impl Operation<Flex, 1, 1> for Embedding {
    /// Rows and width of the table.
    type Saved = [usize; 2];

    fn forward(&self, [table]: &[FlexTensor; 1], _: bool) -> ([FlexTensor; 1], [usize; 2]) {
        let table = host::contiguous(table);
        ([by_format!(table, E => lookup::<E>(&table, self.ids.on_host()))], table.layout().shape().dims())
    }

    fn backward(
        &self,
        &[rows, width]: &[usize; 2],
        gradients: [Option<FlexTensor>; 1],
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let [gradient] = given(gradients);
        [Some(by_format!(gradient, E => {
            let mut table = zeros::<E>(rows * width);
            add_rows(&mut table, width, &[(self.ids.on_host(), host::values::<E>(&gradient))]);
            host::tensor(table, [rows, width])
        }))]
    }
}

#[derive(Debug)]
pub(crate) struct Embeddings {
    pub(crate) ids: [Held<i32>; 2],
}

impl Embeddings {
    fn lookup(&self, table: &FlexTensor) -> [FlexTensor; 2] {
        self.ids.each_ref().map(|ids| by_format!(table, E => lookup::<E>(table, ids.on_host())))
    }

    /// Adds the gradients of both lists to that of the table.
    fn add_to<E: Element>(&self, table: &mut [E], width: usize, gradients: [&FlexTensor; 2]) {
        let [a, b] = gradients.map(host::values::<E>);
        let [first, second] = self.ids.each_ref().map(|ids| ids.on_host().as_slice());
        add_rows(table, width, &[(first, a), (second, b)]);
    }
}

impl Operation<Flex, 1, 2> for Embeddings {
    /// Rows and width of the table.
    type Saved = [usize; 2];

    const TOGETHER: bool = true;

    fn forward(&self, [table]: &[FlexTensor; 1], _: bool) -> ([FlexTensor; 2], [usize; 2]) {
        let table = host::contiguous(table);
        (self.lookup(&table), table.layout().shape().dims())
    }

    fn backward(
        &self,
        &[rows, width]: &[usize; 2],
        gradients: [Option<FlexTensor>; 2],
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let [a, b] = given(gradients);
        [Some(by_format!(a, E => {
            let mut table = zeros::<E>(rows * width);
            self.add_to(&mut table, width, [&a, &b]);
            host::tensor(table, [rows, width])
        }))]
    }
}

impl Operation<Flex, 1, 3> for Embeddings {
    /// Width of the table.
    type Saved = usize;

    const TOGETHER: bool = true;

    fn forward(&self, [table]: &[FlexTensor; 1], _: bool) -> ([FlexTensor; 3], usize) {
        let table = host::contiguous(table);
        let [_, width] = table.layout().shape().dims();
        let [a, b] = self.lookup(&table);
        ([a, b, table], width)
    }

    fn backward(
        &self,
        &width: &usize,
        gradients: [Option<FlexTensor>; 3],
        _: [bool; 1],
    ) -> [Option<FlexTensor>; 1] {
        let [a, b, mut table] = given(gradients);
        by_format!(table, E => self.add_to(host::writable::<E>(&mut table), width, [&a, &b]));
        [Some(table)]
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::test_device;

    #[test]
    fn repeated_rows_add_their_gradients() {
        let device = test_device().autodiff();
        let table = Tensor::<2>::from_data([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], &device).require_grad();
        let out = embedding(table.clone(), host::int_tensor(vec![2, 0, 2], [3], &device));
        assert_eq!(out.to_data().try_to_vec::<f32>().unwrap(), [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
        let gradients = (out.clone() * out).sum().backward();
        let gradient = table.grad(&gradients).expect("table is a leaf").into_data();
        assert_eq!(gradient.try_to_vec::<f32>().unwrap(), [2.0, 4.0, 0.0, 0.0, 20.0, 24.0]);
    }

    #[test]
    fn two_lists_and_a_head_share_one_gradient() {
        let device = test_device().autodiff();
        let table = Tensor::<2>::from_data([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], &device).require_grad();
        let ids = |ids: Vec<i32>| {
            let count = ids.len();
            host::int_tensor(ids, [count], &device)
        };
        let (first, second) = (ids(vec![2, 0, 2]), ids(vec![1]));
        let loss = |a: Tensor<2>, b: Tensor<2>, head: Tensor<2>| {
            a.square().sum() + b.sum() * 3.0 + head.powi_scalar(3).sum()
        };
        let [a, b, head] = embedding_and_table(table.clone(), [first.clone(), second.clone()], None);
        let together = loss(a, b, head).backward();
        let plain = loss(embedding(table.clone(), first), embedding(table.clone(), second), table.clone());
        let apart = plain.backward();
        let of = |gradients| table.grad(gradients).expect("table is a leaf").into_data();
        assert_eq!(of(&together), of(&apart));
    }

    #[test]
    fn the_parts_of_a_split_table_add_up() {
        let device = test_device().autodiff();
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
