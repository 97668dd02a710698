//! What the ranks tell each other of a pass: losses by micro-batch, sums by layer.

use switchyard_comm::CommError;
use switchyard_model::moe::LayerMetrics;
use switchyard_parallel::Mesh;

/// Losses of one micro-batch, or of all.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct MicroLoss {
    /// Cross-entropy of its targets over the number of targets of the step.
    pub(crate) loss: f64,
    /// Its part of everything that is differentiated.
    pub(crate) total_loss: f64,
}

/// Sums of `losses` over the micro-batches of all data-parallel ranks, in the order of the global
/// batch; sums `moe` as well.
pub(crate) fn gathered(
    mesh: &Mesh,
    losses: &[MicroLoss],
    moe: &mut [(String, LayerMetrics)],
) -> Result<MicroLoss, CommError> {
    let rows: Vec<[f64; 2]> = losses.iter().map(|micro| [micro.loss, micro.total_loss]).collect();
    let mut sum = MicroLoss::default();
    for [loss, total_loss] in in_batch_order(mesh, &rows)? {
        sum.loss += loss;
        sum.total_loss += total_loss;
    }
    sum_moe(mesh, moe)?;
    Ok(sum)
}

/// The rows that all data-parallel ranks have of their micro-batches, equally many each, in the
/// order of the global batch.
pub(crate) fn in_batch_order<const N: usize>(
    mesh: &Mesh,
    rows: &[[f64; N]],
) -> Result<Vec<[f64; N]>, CommError> {
    let (ranks, rounds) = (mesh.data().size(), rows.len());
    let mut gathered = vec![[0.0; N]; ranks * rounds];
    mesh.data().all_gather(rows.as_flattened().into(), gathered.as_flattened_mut().into())?;
    Ok((0..ranks * rounds).map(|at| gathered[at % ranks * rounds + at / ranks]).collect())
}

/// Sums the metrics of every layer over the data-parallel ranks.
pub(crate) fn sum_moe(mesh: &Mesh, moe: &mut [(String, LayerMetrics)]) -> Result<(), CommError> {
    if mesh.data().size() == 1 {
        return Ok(());
    }
    let mut sums: Vec<f64> = moe.iter().flat_map(|(_, layer)| layer.to_sums()).collect();
    mesh.data().all_reduce(sums.as_mut_slice().into(), switchyard_comm::ReduceOp::Sum)?;
    let mut rest = sums.as_slice();
    for (_, layer) in moe {
        let (here, after) = rest.split_at(layer.to_sums().len());
        *layer = LayerMetrics::from_sums(here);
        rest = after;
    }
    Ok(())
}
