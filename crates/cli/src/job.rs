//! This process among the ranks of its job: how it joins, who speaks, and how all end together.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use burn::tensor::Device;
use switchyard_comm::{
    Choice, CommError, Communicator, Launch, RESTARTABLE, StartOptions, World, abort, start,
};
use switchyard_config::{MeshShape, ModelConfig};
use switchyard_kernels::DeviceName;
use switchyard_parallel::{Agreement, Mesh, agree, devices_of, world_on};
use switchyard_train::TrainError;

use crate::args::{MeshArguments, Verbosity};
use crate::device::OnMachine;
use crate::{Outcome, report};

/// The environment variable that names this machine for the others.
const ADDRESS: &str = "SWITCHYARD_ADDRESS";

/// A job that this process has joined.
#[derive(Debug)]
pub(crate) struct Job {
    world: World,
    on_machine: OnMachine,
}

/// An error that ends all ranks alike; the first rank that met it tells.
#[derive(Debug)]
enum EndsAll {
    Told,
    ToTell(anyhow::Error),
}

impl fmt::Display for EndsAll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Told => f.write_str("another rank failed"),
            Self::ToTell(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for EndsAll {}

/// Longest wait for other ranks where no experiment file says it.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(600);

impl Job {
    /// Joins the job that the launcher announces, by the user's `choice` of who that is; alone without one.
    ///
    /// `timeout` is the longest wait in a collective before the job is ended as restartable.
    pub(crate) fn join(choice: Choice, timeout: Duration) -> anyhow::Result<Self> {
        let launch = Launch::detect(choice, |name| std::env::var(name).ok())?;
        let options = StartOptions {
            timeout: Some(timeout),
            address: std::env::var(ADDRESS).ok(),
            report: Box::new(report::line),
        };
        let world = start(&launch, options).context("cannot join the job")?;
        let on_machine = match (launch.local_rank, launch.local_size) {
            (Some(rank), Some(ranks)) if rank < ranks && ranks <= world.communicator().size() => {
                OnMachine { rank, ranks }
            }
            _ => OnMachine { rank: world.local_rank(), ranks: world.local_size() },
        };
        let job = Self { world, on_machine };
        share_cores(job.world.local_size());
        if job.ranks() > 1 {
            abort_on_panic(job.rank());
        }
        Ok(job)
    }

    /// The mesh on which the ranks use a model of `model` together.
    pub(crate) fn mesh(
        &self,
        model: &ModelConfig,
        sizes: MeshArguments,
        device: &Device,
    ) -> anyhow::Result<Arc<Mesh>> {
        let shape = MeshShape::of_model(model, &sizes.plan(), self.ranks()).map_err(report::in_options);
        let (world, shape) = (self.communicator_on(device)?, self.agree(shape)?);
        Ok(Arc::new(Mesh::new(world, shape, sizes.hierarchical_all_to_all.into())?))
    }

    /// How much the terminal is told by this rank.
    pub(crate) fn verbosity(&self, asked: Verbosity) -> Verbosity {
        if self.is_first() { asked } else { Verbosity { quiet: true, verbose: 0 } }
    }

    /// All ranks.
    pub(crate) fn communicator(&self) -> &Arc<dyn Communicator> {
        self.world.communicator()
    }

    /// The device that `name` means for this rank, once all ranks have theirs.
    pub(crate) fn device(&self, name: DeviceName) -> anyhow::Result<Device> {
        self.agree(self.on_machine.device(name))
    }

    /// All ranks, for work on `device`.
    pub(crate) fn communicator_on(&self, device: &Device) -> anyhow::Result<Arc<dyn Communicator>> {
        if self.ranks() > 1 {
            // Those that could would wait for those that cannot.
            self.agree(devices_of(device).map(drop).map_err(Into::into))?;
        }
        Ok(world_on(Arc::clone(self.communicator()), device)?)
    }

    /// This rank.
    pub(crate) fn rank(&self) -> usize {
        self.communicator().rank()
    }

    /// Ranks of the job.
    pub(crate) fn ranks(&self) -> usize {
        self.communicator().size()
    }

    /// Whether this rank speaks for the job.
    pub(crate) fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// The world itself.
    pub(crate) fn world(&self) -> &World {
        &self.world
    }

    /// What every rank has made, if all could; else the first that could not tells why.
    pub(crate) fn agree<T>(&self, here: anyhow::Result<T>) -> anyhow::Result<T> {
        if self.ranks() == 1 {
            return here;
        }
        let told = here.as_ref().map(|_| "").map_err(ToString::to_string);
        match (agree(&**self.communicator(), told)?, here) {
            (Agreement::All(_), here) => here,
            (Agreement::Failed { rank, .. }, Err(error)) if rank == self.rank() => {
                Err(EndsAll::ToTell(error).into())
            }
            (Agreement::Failed { .. }, _) => Err(EndsAll::Told.into()),
        }
    }

    /// Ends this process's part in the job: in good order when `outcome` is one of all ranks, else by
    /// ending all others, which may wait for this one.
    pub(crate) fn end(self, outcome: anyhow::Result<Outcome>) -> anyhow::Result<Outcome> {
        let rank = self.rank();
        let error = match outcome {
            Ok(outcome) => {
                self.world.finish()?;
                return Ok(outcome);
            }
            Err(error) if self.ranks() == 1 => return Err(error),
            Err(error) => error,
        };
        match error.downcast::<EndsAll>() {
            Ok(ends_all) => {
                // Before any rank can leave: launchers end all ranks as soon as one has failed.
                if let EndsAll::ToTell(error) = ends_all {
                    report::print(&error);
                }
                self.world.finish()?;
                Ok(Outcome::Failed)
            }
            Err(error) => {
                let lost = error.chain().any(|cause| {
                    let of_training = match cause.downcast_ref() {
                        Some(TrainError::Comm(error)) => Some(error),
                        _ => None,
                    };
                    cause.downcast_ref().or(of_training).is_some_and(CommError::may_pass)
                });
                report::print(&error.context(format!("rank {rank}")));
                abort(if lost { RESTARTABLE } else { 1 })
            }
        }
    }
}

/// An error of training as one of all ranks, where it is.
pub(crate) fn of_all_ranks(error: TrainError) -> anyhow::Error {
    match error {
        TrainError::OnRank { .. } => EndsAll::Told.into(),
        TrainError::OnAllRanks(error) => EndsAll::ToTell((*error).into()).into(),
        error => error.into(),
    }
}

/// Starts as many threads as this process's share of the machine's cores, or as the user has said; the
/// calling thread is among them.
///
/// So it works on its own operations instead of going to sleep at each one. Alone it could not: what
/// another thread hands to the threads would wait until it waits too.
pub(crate) fn share_cores(local_ranks: usize) {
    let asked = std::env::var("RAYON_NUM_THREADS").ok().and_then(|threads| threads.parse().ok());
    let threads = asked.filter(|&threads| threads > 0).unwrap_or_else(|| share_of_cores(local_ranks));
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
    let builder = if threads > 1 { builder.use_current_thread() } else { builder };
    // Fails only when the threads are there already, which then serve as well.
    let _ = builder.build_global();
}

fn share_of_cores(local_ranks: usize) -> usize {
    let within_reach = std::thread::available_parallelism().map_or(1, usize::from);
    let bound = bound_cores().unwrap_or(within_reach);
    // Fewer than it is bound to are a quota, which all ranks of the machine share; otherwise they share
    // all of the machine's.
    let shared = if within_reach < bound { within_reach } else { online_cores().unwrap_or(within_reach) };
    (shared / local_ranks).clamp(1, bound)
}

/// Cores that the launcher has bound this process to.
fn bound_cores() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    cores_of(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim())
}

/// Cores of the whole machine.
fn online_cores() -> Option<usize> {
    cores_of(std::fs::read_to_string("/sys/devices/system/cpu/online").ok()?.trim())
}

/// How many numbers a list such as `0-3,8` has.
fn cores_of(list: &str) -> Option<usize> {
    let count = |range: &str| -> Option<usize> {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        Some(last.checked_sub(first)? + 1)
    };
    list.split(',').map(count).sum()
}

/// A panic in one rank would leave the others waiting.
fn abort_on_panic(rank: usize) {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        match report::gpu_failure_of(panic) {
            Some(failure) => report::line(&format!("rank {rank}: {failure}")),
            None => {
                report::line(&format!("rank {rank} panicked; this is a fault of the program"));
                print(panic);
            }
        }
        abort(1);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cores_are_counted() {
        assert_eq!(cores_of("0"), Some(1));
        assert_eq!(cores_of("0-3,8,10-11"), Some(7));
        for nonsense in ["", "a", "3-1", "0-"] {
            assert_eq!(cores_of(nonsense), None, "{nonsense}");
        }
    }
}
