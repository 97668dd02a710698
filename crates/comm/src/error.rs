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
}
