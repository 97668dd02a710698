//! The groups that a rank belongs to, one for each axis of the mesh.

use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use switchyard_comm::{CommError, Communicator, ReduceOp, Solo};
use switchyard_config::{Coordinates, MeshShape};
use switchyard_kernels::{DeviceMark, DeviceValues};
use switchyard_model::{LocalDispatcher, TensorParallel, TokenDispatcher, WholeTensors};

use crate::dispatcher::{AllToAllDispatcher, TokenTravel};
use crate::failure::Failure;
use crate::on_devices::{slice, stream};
use crate::split_tensors::SplitTensors;

/// A rank's place in the job and its communicators.
pub struct Mesh {
    shape: MeshShape,
    at: Coordinates,
    world: Arc<dyn Communicator>,
    data: Arc<dyn Communicator>,
    expert_holders: Arc<dyn Communicator>,
    dispatcher: Box<dyn TokenDispatcher>,
    is_hierarchical: bool,
    tensor_parallel: Box<dyn TensorParallel>,
    failure: Failure,
}

impl Mesh {
    /// One rank that does everything.
    pub fn solo() -> Self {
        let solo = |label| Arc::new(Solo::new(label));
        Self {
            shape: MeshShape::SOLO,
            at: MeshShape::SOLO.coordinates(0),
            world: solo("world"),
            data: solo("data"),
            expert_holders: solo("expert-data"),
            dispatcher: Box::new(LocalDispatcher),
            is_hierarchical: false,
            tensor_parallel: Box::new(WholeTensors),
            failure: Failure::default(),
        }
    }

    /// Cuts `world` into the groups of `shape`, which has as many ranks.
    ///
    /// # Errors
    /// When the ranks cannot agree.
    pub fn new(
        world: Arc<dyn Communicator>,
        shape: MeshShape,
        travel: TokenTravel,
    ) -> Result<Self, CommError> {
        if world.size() == 1 {
            return Ok(Self::solo());
        }
        let at = shape.coordinates(world.rank());
        let failure = Failure::default();
        let data = world.split(at.tensor, "data")?;
        let expert = world.split(at.data / shape.expert * shape.tensor + at.tensor, "expert")?;
        let tensor = world.split(at.data, "tensor")?;
        let expert_holders = world.split(at.expert, "expert-data")?;
        let (dispatcher, is_hierarchical): (Box<dyn TokenDispatcher>, bool) = match shape.expert {
            1 => (Box::new(LocalDispatcher), false),
            _ => {
                let dispatcher = AllToAllDispatcher::new(expert, failure.clone(), travel)?;
                let is_hierarchical = dispatcher.is_hierarchical();
                (Box::new(dispatcher), is_hierarchical)
            }
        };
        let tensor_parallel: Box<dyn TensorParallel> = match shape.tensor {
            1 => Box::new(WholeTensors),
            _ => Box::new(SplitTensors::new(tensor, failure.clone())),
        };
        Ok(Self {
            shape,
            at,
            world,
            data,
            expert_holders,
            dispatcher,
            is_hierarchical,
            tensor_parallel,
            failure,
        })
    }

    /// Sizes of the axes.
    pub fn shape(&self) -> MeshShape {
        self.shape
    }

    /// Where this rank stands.
    pub fn at(&self) -> Coordinates {
        self.at
    }

    /// All ranks.
    pub fn world(&self) -> &Arc<dyn Communicator> {
        &self.world
    }

    /// The ranks that learn from other rows, with the same part of every split matrix.
    pub fn data(&self) -> &Arc<dyn Communicator> {
        &self.data
    }

    /// The ranks that hold the same experts, or parts of them.
    pub fn expert_holders(&self) -> &Arc<dyn Communicator> {
        &self.expert_holders
    }

    /// Brings tokens to their experts.
    pub fn dispatcher(&self) -> &dyn TokenDispatcher {
        &*self.dispatcher
    }

    /// Whether tokens travel to their experts machine by machine.
    pub fn is_hierarchical(&self) -> bool {
        self.is_hierarchical
    }

    /// Joins split matrices.
    pub fn tensor_parallel(&self) -> &dyn TensorParallel {
        &*self.tensor_parallel
    }

    /// Whether this rank speaks for the job: writes metrics and talks to the user.
    pub fn is_first(&self) -> bool {
        self.world.rank() == 0
    }

    /// Whether the operations inside the model went well.
    ///
    /// # Errors
    /// The first that did not.
    pub fn check(&self) -> Result<(), CommError> {
        self.failure.check()
    }

    /// Sums over the data-parallel ranks.
    ///
    /// # Errors
    /// As every collective.
    pub fn sum_over_data<const N: usize>(&self, mut values: [u64; N]) -> Result<[u64; N], CommError> {
        self.data.all_reduce(values.as_mut_slice().into(), ReduceOp::Sum)?;
        Ok(values)
    }

    /// Sums over the data-parallel ranks, from device to device; not waited for. `[len]`
    ///
    /// # Errors
    /// As every collective.
    ///
    /// # Panics
    /// When there are several ranks and they do not exchange there.
    pub fn summed_over_data(&self, values: Tensor<1>) -> Result<Tensor<1>, CommError> {
        if self.data.size() == 1 {
            return Ok(values);
        }
        let devices = self.data.on_devices().expect("the ranks exchange from device to device");
        let sums = DeviceValues::shared(&values).expect("the values lie there");
        devices.all_reduce(slice(&sums), ReduceOp::Sum, stream(&sums))?;
        Ok(values)
    }

    /// Whether the operations inside the model went well; where ranks exchange from device to device, once `device`
    /// is done with them. It is waited for in the watchdog's eyes: devices wait without end for a lost rank.
    ///
    /// # Collective
    /// Over all ranks.
    ///
    /// # Errors
    /// The first of the operations that did not go well; else as every collective.
    pub fn wait_for_device(&self, what: &'static str, device: &Device) -> Result<(), CommError> {
        self.check()?;
        if self.world.on_devices().is_none() {
            return Ok(());
        }
        let mark = DeviceMark::after(device);
        self.world.wait_for(what, &mut || mark.is_past())
    }

    /// Whether any rank says yes.
    ///
    /// # Errors
    /// As every collective.
    pub fn any(&self, here: bool) -> Result<bool, CommError> {
        Ok(self.any_of([here])?[0])
    }

    /// For each question, whether any rank says yes.
    ///
    /// # Errors
    /// As every collective.
    pub fn any_of<const N: usize>(&self, here: [bool; N]) -> Result<[bool; N], CommError> {
        let mut values = here.map(u64::from);
        self.world.all_reduce(values.as_mut_slice().into(), ReduceOp::Max)?;
        Ok(values.map(|value| value > 0))
    }

    /// What all ranks have, or the first that failed.
    ///
    /// # Errors
    /// As every collective.
    pub fn agree(&self, here: Result<&str, String>) -> Result<Agreement, CommError> {
        agree(&*self.world, here)
    }

    /// The texts of all ranks, in rank order.
    ///
    /// # Errors
    /// As every collective.
    pub fn gather_text(&self, text: &str) -> Result<Vec<String>, CommError> {
        gather_text(&*self.world, text)
    }
}

/// Whether all ranks could do something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Agreement {
    /// All could; what each has, in rank order.
    All(Vec<String>),
    /// Not all could.
    Failed {
        /// The first that could not.
        rank: usize,
        /// Its error.
        message: String,
    },
}

/// What all ranks of `group` have, or the first that failed.
///
/// # Errors
/// As every collective.
pub fn agree(group: &dyn Communicator, here: Result<&str, String>) -> Result<Agreement, CommError> {
    let failed = u8::from(here.is_err());
    let text = match &here {
        Ok(text) => text,
        Err(message) => message.as_str(),
    };
    let mut flags = vec![0_u8; group.size()];
    group.all_gather([failed].as_slice().into(), flags.as_mut_slice().into())?;
    let mut texts = gather_text(group, text)?;
    Ok(match flags.iter().position(|&failed| failed != 0) {
        Some(rank) => Agreement::Failed { rank, message: texts.swap_remove(rank) },
        None => Agreement::All(texts),
    })
}

/// The texts of all ranks of `group`, in rank order.
///
/// # Errors
/// As every collective.
pub fn gather_text(group: &dyn Communicator, text: &str) -> Result<Vec<String>, CommError> {
    let mut lengths = vec![0_u64; group.size()];
    group.all_gather([text.len() as u64].as_slice().into(), lengths.as_mut_slice().into())?;
    let counts: Vec<usize> = lengths.iter().map(|&length| length as usize).collect();
    let mut bytes = vec![0_u8; counts.iter().sum()];
    group.all_gather_v(text.as_bytes().into(), bytes.as_mut_slice().into(), &counts)?;
    let mut rest = bytes.as_slice();
    let next = |&count: &usize| {
        let (here, after) = rest.split_at(count);
        rest = after;
        String::from_utf8_lossy(here).into_owned()
    };
    Ok(counts.iter().map(next).collect())
}

impl std::fmt::Debug for Mesh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mesh").field("shape", &self.shape).field("at", &self.at).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// What every rank of `shape` gets from `ask`.
    fn on_ranks<T: Send + 'static>(shape: MeshShape, ask: fn(&Mesh) -> T) -> Vec<T> {
        let ranks = switchyard_comm::threads(shape.ranks(), Duration::from_secs(10)).into_iter();
        let ranks = ranks.map(|world| {
            std::thread::spawn(move || {
                ask(&Mesh::new(world, shape, TokenTravel::default()).expect("ranks that talk"))
            })
        });
        ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().expect("no panic")).collect()
    }

    #[test]
    fn groups_are_those_of_the_axes() {
        let shape = MeshShape { data: 4, expert: 2, tensor: 2 };
        let found = on_ranks(shape, |mesh| {
            let here = mesh.world().rank() as u64;
            let members = |group: &Arc<dyn Communicator>| {
                let mut ranks = vec![0_u64; group.size()];
                group.all_gather([here].as_slice().into(), ranks.as_mut_slice().into()).expect("it works");
                ranks
            };
            [members(mesh.data()), members(mesh.expert_holders())]
        });
        assert_eq!(found[5], [vec![1, 3, 5, 7], vec![0, 1, 4, 5]]);
        assert_eq!(found[2], [vec![0, 2, 4, 6], vec![2, 3, 6, 7]]);
    }

    #[test]
    fn ranks_agree_or_know_the_first_that_failed() {
        let shape = MeshShape { data: 3, expert: 1, tensor: 1 };
        let all =
            on_ranks(shape, |mesh| mesh.agree(Ok(["a", "", "ccc"][mesh.world().rank()])).expect("it works"));
        let texts = ["a", "", "ccc"].map(str::to_owned).to_vec();
        assert_eq!(all, vec![Agreement::All(texts); 3]);
        let failed = on_ranks(shape, |mesh| {
            let rank = mesh.world().rank();
            let here = if rank == 0 { Ok("fine") } else { Err(format!("no {rank}")) };
            mesh.agree(here).expect("it works")
        });
        assert_eq!(failed, vec![Agreement::Failed { rank: 1, message: "no 1".to_owned() }; 3]);
        let solo = Mesh::solo();
        assert_eq!(solo.agree(Ok("x")).expect("it works"), Agreement::All(vec!["x".to_owned()]));
        assert_eq!(solo.any_of([true, false]).expect("it works"), [true, false]);
    }
}
