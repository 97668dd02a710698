//! What can go wrong between ranks.

use std::time::Duration;

/// A collective that did not come about.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommError {
    /// The deadline passed.
    #[error("{operation} of group `{group}` did not finish within {} s; {blame}", after.as_secs())]
    Timeout {
        /// The operation.
        operation: &'static str,
        /// The group's label.
        group: String,
        /// The deadline.
        after: Duration,
        /// Which ranks are missing and what is known of them.
        blame: String,
    },
    /// A peer ended or gave up.
    #[error("{operation} of group `{group}` cannot finish: {blame}")]
    PeerLost {
        /// The operation.
        operation: &'static str,
        /// The group's label.
        group: String,
        /// Which rank and why.
        blame: String,
    },
    /// Ranks called different operations, or with sizes that do not fit each other.
    #[error("ranks of group `{group}` disagree: {difference}")]
    Disagreement {
        /// The group's label.
        group: String,
        /// Who called what.
        difference: String,
    },
    /// This rank's buffers do not fit the operation.
    #[error("{operation} of group `{group}`: {problem}")]
    WrongBuffer {
        /// The operation.
        operation: &'static str,
        /// The group's label.
        group: String,
        /// What does not fit.
        problem: String,
    },
    /// The communication library reports a fault.
    #[error("{operation} of group `{group}` failed: {message}")]
    Library {
        /// The operation.
        operation: &'static str,
        /// The group's label.
        group: String,
        /// The library's words.
        message: String,
    },
    /// Several ranks were given one device.
    #[error(
        "ranks of group `{group}` share a GPU, which NCCL refuses ({message}); start no more ranks on a machine than \
         it has GPUs, each with `--device cuda`: that is the GPU of the rank's number on its machine"
    )]
    SharedDevice {
        /// The group's label.
        group: String,
        /// The library's words.
        message: String,
    },
}

impl CommError {
    /// Whether the job may fare better when it is started again as it was.
    pub fn may_pass(&self) -> bool {
        !matches!(self, Self::SharedDevice { .. })
    }
}
