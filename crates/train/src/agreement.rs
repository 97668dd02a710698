//! Steps that all ranks take together or not at all.

use switchyard_comm::Communicator;
use switchyard_config::{RunPlan, entries};
use switchyard_parallel::{Agreement, Mesh, gather_text};

use crate::error::TrainError;

/// Refuses to train when ranks would train different things.
///
/// `version` is the program's; `plan` the run as this rank understands it.
///
/// # Errors
/// [`TrainError::RanksDiffer`] with every key that differs, on the first rank.
pub fn refuse_different_runs(
    world: &dyn Communicator,
    plan: &RunPlan,
    version: &str,
) -> Result<(), TrainError> {
    if world.size() == 1 {
        return Ok(());
    }
    let lines =
        std::iter::once(("the program's version".to_owned(), version.to_owned())).chain(entries(plan));
    let text: String = lines.map(|(key, value)| format!("{key} = {}\n", value.replace('\n', " "))).collect();
    let texts = gather_text(world, &text)?;
    let mut differences = String::new();
    for (rank, other) in texts.iter().enumerate().skip(1) {
        for (here, there) in texts[0].lines().zip(other.lines()).filter(|(here, there)| here != there) {
            let value = there.split_once(" = ").map_or(there, |(_, value)| value);
            differences.push_str(&format!("\n  {here} on rank 0, {value} on rank {rank}"));
        }
    }
    match world.rank() {
        _ if differences.is_empty() => Ok(()),
        0 => Err(TrainError::OnAllRanks(Box::new(TrainError::RanksDiffer { differences }))),
        _ => Err(TrainError::OnRank { rank: 0, message: "the ranks differ".to_owned() }),
    }
}

/// What every rank has made, if all of them could.
///
/// # Errors
/// The error of this rank, if it is the first that failed, as one of all ranks; else [`TrainError::OnRank`] with the
/// first rank that did.
pub(crate) fn agreed<T>(mesh: &Mesh, here: Result<T, TrainError>) -> Result<T, TrainError> {
    let told = here.as_ref().map(|_| "").map_err(ToString::to_string);
    match mesh.agree(told)? {
        Agreement::All(_) => here,
        Agreement::Failed { rank, message } => Err(own_or_peer(mesh, here.err(), rank, message)),
    }
}

/// The texts of all ranks, in rank order.
///
/// # Errors
/// As [`agreed`].
pub(crate) fn agreed_texts(mesh: &Mesh, here: Result<String, TrainError>) -> Result<Vec<String>, TrainError> {
    let told = here.as_ref().map(String::as_str).map_err(ToString::to_string);
    match mesh.agree(told)? {
        Agreement::All(texts) => Ok(texts),
        Agreement::Failed { rank, message } => Err(own_or_peer(mesh, here.err(), rank, message)),
    }
}

/// What the first rank finds, given to all; the others do not look.
///
/// # Errors
/// As [`agreed`].
pub(crate) fn decided_by_first(
    mesh: &Mesh,
    decide: impl FnOnce() -> Result<String, TrainError>,
) -> Result<String, TrainError> {
    let here = if mesh.is_first() { decide() } else { Ok(String::new()) };
    Ok(agreed_texts(mesh, here)?.swap_remove(0))
}

fn own_or_peer(mesh: &Mesh, own: Option<TrainError>, rank: usize, message: String) -> TrainError {
    match own {
        Some(error) if mesh.world().size() == 1 => error,
        Some(error) if rank == mesh.world().rank() => TrainError::OnAllRanks(Box::new(error)),
        _ => TrainError::OnRank { rank, message },
    }
}
