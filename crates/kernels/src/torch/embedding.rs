//! [`crate::embedding`] and its relatives.

use tch::{Kind, Tensor};

use crate::embedding::{ELSEWHERE, Embedding, Embeddings};
use crate::host::Held;
use crate::torch::composed::composed_operation;

fn lookup(table: &Tensor, ids: &Held<i32>) -> Tensor {
    let ids = ids.in_torch();
    let here = ids.ne(i64::from(ELSEWHERE)).to_kind(table.kind()).unsqueeze(-1);
    table.index_select(0, &ids.clamp_min(0).to_kind(Kind::Int64)) * here
}

composed_operation!(Embedding, 1, 1, false, |embedding, [table]| [lookup(table, &embedding.ids)]);
composed_operation!(Embeddings, 1, 2, true, |embeddings, [table]| {
    embeddings.ids.each_ref().map(|ids| lookup(table, ids))
});
composed_operation!(Embeddings, 1, 3, true, |embeddings, [table]| {
    let [a, b] = embeddings.ids.each_ref().map(|ids| lookup(table, ids));
    [a, b, table.shallow_clone()]
});
