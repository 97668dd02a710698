//! Which device is a rank's own.

use anyhow::ensure;
use burn::tensor::Device;
use switchyard_kernels::{DeviceName, gpus};

/// With this variable of the environment NCCL takes ranks that share a GPU, and so do we: for tests.
const MAY_SHARE: &str = "NCCL_HOSTID";

/// The variable that hides GPUs from a process, by which launchers show a rank its own alone.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// A rank among those that share its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OnMachine {
    /// From 0.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
}

impl OnMachine {
    /// The device that `name` means for the rank.
    pub(crate) fn device(self, name: DeviceName) -> anyhow::Result<Device> {
        let name = match name {
            DeviceName::Cuda if self.ranks > 1 => {
                let is_set = |variable: &str| std::env::var_os(variable).is_some();
                DeviceName::CudaNumber(self.gpu(gpus()?, is_set)?)
            }
            name => name,
        };
        Ok(name.open()?)
    }

    /// The rank's own of `gpus` GPUs that its process sees.
    fn gpu(self, gpus: usize, is_set: impl Fn(&str) -> bool) -> anyhow::Result<usize> {
        let Self { rank, ranks } = self;
        let is_only = gpus == 1 && is_set(VISIBLE);
        ensure!(
            gpus >= ranks || is_only || (gpus > 0 && is_set(MAY_SHARE)),
            "`--device cuda` gives each of the {ranks} ranks of a machine a GPU of its own, but there are {gpus}; start \
             no more ranks on a machine than it has GPUs, and check nvidia-smi and {VISIBLE}"
        );
        Ok(if is_only { 0 } else { rank % gpus })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpus_of(ranks: usize, gpus: usize, set: &[&str]) -> anyhow::Result<Vec<usize>> {
        (0..ranks)
            .map(|rank| OnMachine { rank, ranks }.gpu(gpus, |variable| set.contains(&variable)))
            .collect()
    }

    #[test]
    fn each_rank_of_a_machine_has_the_gpu_of_its_number() {
        assert_eq!(gpus_of(4, 4, &[]).unwrap(), [0, 1, 2, 3]);
        assert_eq!(gpus_of(2, 8, &[VISIBLE]).unwrap(), [0, 1]);
        assert_eq!(gpus_of(1, 1, &[]).unwrap(), [0]);
    }

    #[test]
    fn a_rank_that_is_shown_one_gpu_takes_it() {
        assert_eq!(gpus_of(3, 1, &[VISIBLE]).unwrap(), [0, 0, 0]);
        assert_eq!(gpus_of(3, 1, &[VISIBLE, MAY_SHARE]).unwrap(), [0, 0, 0]);
    }

    #[test]
    fn too_few_gpus_are_an_error_unless_ranks_may_share_them() {
        for (gpus, set) in [(2, &[][..]), (2, &[VISIBLE][..]), (1, &[]), (0, &[VISIBLE, MAY_SHARE])] {
            let error = gpus_of(3, gpus, set).unwrap_err().to_string();
            assert!(
                error.contains(&format!(
                    "each of the 3 ranks of a machine a GPU of its own, but there are {gpus}"
                )),
                "{error}"
            );
        }
        assert_eq!(gpus_of(5, 2, &[MAY_SHARE]).unwrap(), [0, 1, 0, 1, 0]);
    }
}
