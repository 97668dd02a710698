//! [`crate::embedding`] and its relatives.

use burn_tch::TchTensor;
use switchyard_cuda::{LookedUp, Queue, Table, embedding_backward, embedding_workspace};
use tch::{Kind, Tensor};

use crate::embedding::{ELSEWHERE, Embedding, Embeddings};
use crate::host::Held;
use crate::torch::contiguous;
use crate::torch::gpu::{at, format, in_pieces, narrow, queue, room, started, workspace};
use crate::torch::with_kernels::WithKernels;

/// What the kernels of the backward pass of so many lists of ids need.
#[derive(Debug)]
pub(crate) struct Kept<const LISTS: usize> {
    /// Of the table.
    sizes: Table,
    /// As kernels take them.
    ids: [TchTensor; LISTS],
}

/// Rows of the largest table whose gradient has kernels.
const MOST_ROWS: usize = 1 << 18;

fn lookup(table: &Tensor, ids: &Held<i32>) -> Tensor {
    let ids = ids.in_torch();
    let here = ids.ne(i64::from(ELSEWHERE)).to_kind(table.kind()).unsqueeze(-1);
    table.index_select(0, &ids.clamp_min(0).to_kind(Kind::Int64)) * here
}

/// Where kernels run on this table, and how they see it; `None` where there are none.
fn kernels(table: &Tensor) -> Option<(Queue<'static>, Table)> {
    let queue = queue(table)?;
    let (rows, width) = table.size2().expect("tables are matrices");
    // An id that lives elsewhere is no number of a row, which kernels take for just that.
    let sizes = Table { rows: rows as usize, width: width as usize, format: format(table) };
    (in_pieces(sizes.width, sizes.format) && sizes.rows <= MOST_ROWS).then_some((queue, sizes))
}

/// The rows of each list, and the lists for the backward pass.
fn looked_up<const LISTS: usize>(
    table: &TchTensor,
    lists: [&Held<i32>; LISTS],
) -> Option<([TchTensor; LISTS], Kept<LISTS>)> {
    let (queue, sizes) = kernels(&table.tensor)?;
    let table = contiguous(table).tensor;
    let ids = lists.map(|ids| TchTensor::new(narrow(ids.in_torch())));
    let rows = ids.each_ref().map(|TchTensor { tensor: ids, .. }| {
        let tokens = ids.numel();
        let out = room(&[tokens, sizes.width], table.kind(), &table);
        // SAFETY: all tensors have the sizes given.
        started(unsafe { switchyard_cuda::embedding(queue, [at(&table), at(ids), at(&out)], tokens, sizes) });
        TchTensor::new(out)
    });
    Some((rows, Kept { sizes, ids }))
}

fn assert_sizes(gradient: &Tensor, rows: usize, sizes: Table) {
    let same = gradient.size() == [rows as i64, sizes.width as i64] && format(gradient) == sizes.format;
    assert!(same, "gradients have the sizes and the format of what they belong to");
}

/// The gradient of the table from those of the rows that were looked up, added `onto` another if there is one.
fn gradient<const LISTS: usize>(
    &Kept { sizes, ref ids }: &Kept<LISTS>,
    gradients: [&Tensor; LISTS],
    onto: Option<TchTensor>,
) -> TchTensor {
    let like = gradients[0];
    let mut lists = [LookedUp::NONE; 2];
    for (list, (ids, gradient)) in lists.iter_mut().zip(ids.iter().zip(gradients)) {
        let tokens = ids.tensor.numel();
        assert_sizes(gradient, tokens, sizes);
        *list = LookedUp { ids: at(&ids.tensor), gradient: at(gradient), tokens };
    }
    let scratch = workspace(embedding_workspace(&sizes, lists.iter().map(|list| list.tokens).sum()), like);
    let adds = onto.is_some();
    let table = match onto {
        Some(gradient) if gradient.can_mut() => gradient,
        Some(shared) => TchTensor::new(shared.tensor.copy()),
        None => TchTensor::new(room(&[sizes.rows, sizes.width], like.kind(), like)),
    };
    assert_sizes(&table.tensor, sizes.rows, sizes);
    let queue = queue(like).expect("kernels were chosen on a GPU");
    // SAFETY: all tensors have the sizes given; the table is this function's alone; scratch memory is reused in
    // the order of the stream.
    started(unsafe { embedding_backward(queue, lists, at(&table.tensor), at(&scratch), sizes, adds) });
    table
}

impl WithKernels<1, 1> for Embedding {
    type Kept = Kept<1>;

    fn compose(&self, [table]: [&Tensor; 1]) -> [Tensor; 1] {
        [lookup(table, &self.ids)]
    }

    fn launch(&self, [table]: &[TchTensor; 1]) -> Option<([TchTensor; 1], Kept<1>)> {
        looked_up(table, [&self.ids])
    }

    fn launch_backward(
        &self,
        kept: &Kept<1>,
        [rows]: [TchTensor; 1],
        _: [bool; 1],
    ) -> [Option<TchTensor>; 1] {
        [Some(gradient(kept, [&rows.tensor], None))]
    }
}

impl WithKernels<1, 2> for Embeddings {
    type Kept = Kept<2>;

    fn compose(&self, [table]: [&Tensor; 1]) -> [Tensor; 2] {
        self.ids.each_ref().map(|ids| lookup(table, ids))
    }

    fn launch(&self, [table]: &[TchTensor; 1]) -> Option<([TchTensor; 2], Kept<2>)> {
        looked_up(table, self.ids.each_ref())
    }

    fn launch_backward(
        &self,
        kept: &Kept<2>,
        [a, b]: [TchTensor; 2],
        _: [bool; 1],
    ) -> [Option<TchTensor>; 1] {
        [Some(gradient(kept, [&a.tensor, &b.tensor], None))]
    }
}

impl WithKernels<1, 3> for Embeddings {
    type Kept = Kept<2>;

    fn compose(&self, [table]: [&Tensor; 1]) -> [Tensor; 3] {
        let [a, b] = self.ids.each_ref().map(|ids| lookup(table, ids));
        [a, b, table.shallow_clone()]
    }

    fn launch(&self, [table]: &[TchTensor; 1]) -> Option<([TchTensor; 3], Kept<2>)> {
        let ([a, b], kept) = looked_up(table, self.ids.each_ref())?;
        Some(([a, b, table.clone()], kept))
    }

    fn launch_backward(
        &self,
        kept: &Kept<2>,
        [a, b, table]: [TchTensor; 3],
        _: [bool; 1],
    ) -> [Option<TchTensor>; 1] {
        [Some(gradient(kept, [&a.tensor, &b.tensor], Some(table)))]
    }
}
