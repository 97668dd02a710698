//! What can go wrong between here and the library, and between ranks.

use std::ffi::c_int;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::library::{ENVIRONMENT_VARIABLE, Origin};
use crate::types::DataType;
use crate::version::{Feature, Version};

/// Why a call did not do what it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The library is nowhere.
    #[error(
        "NCCL was not found: {}; install `nvidia-nccl-cu12` or `nvidia-nccl-cu13` (PyPI) or libnccl2 \
         (NVIDIA's packages for Linux) and name its directory in LD_LIBRARY_PATH or the file in {ENVIRONMENT_VARIABLE}",
        list(tried)
    )]
    NotFound {
        /// What was tried, in this order.
        tried: Vec<Attempt>,
    },

    /// The library is older than this crate can use.
    #[error(
        "NCCL {found} of {origin} is too old, {} is needed: install a newer one, or name it in \
         {ENVIRONMENT_VARIABLE} and load it before another library does",
        Version::MINIMUM
    )]
    TooOld {
        /// Its version.
        found: Version,
        /// Where it comes from.
        origin: Origin,
    },

    /// The file is a library, but not a whole NCCL.
    #[error("{origin} is not a complete NCCL: it has no `{symbol}`; install NVIDIA's own build")]
    MissingSymbol {
        /// What it lacks.
        symbol: &'static str,
        /// Where it comes from.
        origin: Origin,
    },

    /// The library is too old for what was asked for.
    #[error("NCCL {found} does not know {feature}, which came with {}", feature.since())]
    Unsupported {
        /// What was asked for.
        feature: Feature,
        /// The library's version.
        found: Version,
    },

    /// A call failed that belongs to no communicator.
    #[error("{0}")]
    Library(Failure),

    /// A call on a communicator failed.
    #[error("{who}: {failure}")]
    Communicator {
        /// Whose call it was.
        who: Who,
        /// What the library says.
        failure: Failure,
    },

    /// The library met a fault after a call had returned: often a peer that ended or a network that broke.
    #[error("{who}: {operation} broke in the background: {}", failure.reason())]
    Asynchronous {
        /// Whose communicator it is.
        who: Who,
        /// What was under way.
        operation: &'static str,
        /// What the library says.
        failure: Failure,
    },

    /// The deadline passed.
    #[error(
        "{who}: {operation} did not come about within {:.3} s: another rank has not called it, or has \
         ended{}",
        after.as_secs_f64(),
        if *aborted { "; this rank gave the communicator up" } else { "" }
    )]
    Timeout {
        /// Who waited.
        who: Who,
        /// What it waited for.
        operation: &'static str,
        /// The time since the deadline was set.
        after: Duration,
        /// Whether the communicator was aborted, so that lent memory is free again.
        aborted: bool,
    },

    /// The communicator is still busy with something that was not waited for.
    #[error("{who}: {operation} has to wait until {pending} is through: call `wait` first")]
    Busy {
        /// Whose communicator it is.
        who: Who,
        /// What was asked for.
        operation: &'static str,
        /// What is under way.
        pending: &'static str,
    },

    /// The communicator was finalized or aborted before.
    #[error("{who}: {operation} came after the communicator was {end}")]
    Ended {
        /// Whose communicator it was.
        who: Who,
        /// What was asked for.
        operation: &'static str,
        /// How it ended: `finalized` or `aborted`.
        end: &'static str,
    },

    /// The call is not possible while a group is open.
    #[error("{operation} is not possible inside a group: call it before or after")]
    InsideGroup {
        /// What was asked for.
        operation: &'static str,
    },

    /// Buffers do not fit the operation or each other.
    #[error("{who}: {operation}: {mismatch}")]
    Buffer {
        /// Whose call it was.
        who: Who,
        /// The operation.
        operation: &'static str,
        /// What does not fit.
        mismatch: Mismatch,
    },

    /// There is no such rank.
    #[error("{operation}: there is no rank {rank} among {count}")]
    NoSuchRank {
        /// What was asked for.
        operation: &'static str,
        /// The rank that was named.
        rank: usize,
        /// Number of ranks.
        count: usize,
    },

    /// A setting has a value that the library cannot take.
    #[error("{setting} cannot be {value}: {reason}")]
    Setting {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// Why not.
        reason: &'static str,
    },

    /// Bytes that are no unique id.
    #[error("a unique id has {} bytes, not {found}", crate::UniqueId::BYTES)]
    IdLength {
        /// Number of bytes.
        found: usize,
    },
}

impl Error {
    /// Whether the communicator is of no further use: it should be aborted, on every rank, and made anew.
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::Communicator { failure, .. } => failure.code.is_fatal(),
            Self::Asynchronous { .. } => true,
            Self::Timeout { aborted, .. } => *aborted,
            _ => false,
        }
    }
}

/// A place where the library was looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The place.
    pub place: Origin,
    /// What the system says.
    pub problem: String,
}

fn list(tried: &[Attempt]) -> String {
    let tried: Vec<_> =
        tried.iter().map(|Attempt { place, problem }| format!("{place}: {problem}")).collect();
    tried.join("; ")
}

/// One rank of a communicator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Who {
    /// The communicator's name.
    pub name: Option<Arc<str>>,
    /// The rank.
    pub rank: usize,
    /// Number of ranks.
    pub count: usize,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NCCL, rank {} of {}", self.rank, self.count)?;
        self.name.as_ref().map_or(Ok(()), |name| write!(f, " in `{name}`"))
    }
}

/// A call that the library answered with an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The library's function.
    pub call: &'static str,
    /// Its answer.
    pub code: Code,
    /// What the library says of the answer.
    pub meaning: String,
    /// The library's last warning, of this call or an earlier one.
    pub last_error: Option<String>,
}

impl Failure {
    fn reason(&self) -> String {
        let last = self.last_error.as_ref().map(|last| format!("; the library's last warning: {last}"));
        format!("{}{}", self.meaning, last.unwrap_or_default())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed: {}", self.call, self.reason())
    }
}

/// Kinds of errors of the library.
///
/// # Source
/// `ncclResult_t` of `nccl.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Code {
    /// A call of CUDA failed.
    UnhandledCudaError,
    /// A call of the system failed.
    SystemError,
    /// The library contradicts itself, or memory is damaged.
    InternalError,
    /// An argument was refused; the call had no effect.
    InvalidArgument,
    /// The call does not fit the state of things.
    InvalidUsage,
    /// The network failed or a peer ended.
    RemoteError,
    /// Something took longer than the library waits.
    Timeout,
    /// A number that this crate does not know.
    Other(i32),
}

impl Code {
    pub(crate) const fn from_raw(code: c_int) -> Self {
        match code {
            1 => Self::UnhandledCudaError,
            2 => Self::SystemError,
            3 => Self::InternalError,
            4 => Self::InvalidArgument,
            5 => Self::InvalidUsage,
            6 => Self::RemoteError,
            // 7 is `ncclInProgress`, which is no error.
            8 => Self::Timeout,
            other => Self::Other(other),
        }
    }

    /// Whether the communicator is of no further use after it.
    ///
    /// # Source
    /// The table of errors in NCCL's user guide, "Error handling and communicator abort".
    pub const fn is_fatal(self) -> bool {
        !matches!(self, Self::InvalidArgument)
    }
}

/// How buffers do not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mismatch {
    /// The buffers have different types.
    Types {
        /// What is sent.
        sent: DataType,
        /// What is received.
        received: DataType,
    },
    /// A buffer has the wrong number of values.
    Length {
        /// Which buffer: `input` or `output`.
        buffer: &'static str,
        /// Values that it has.
        found: usize,
        /// Values that it should have.
        expected: usize,
    },
    /// A buffer cannot be cut into equal parts for the ranks.
    Uneven {
        /// Values that it has.
        found: usize,
        /// Number of ranks.
        count: usize,
    },
    /// There are not as many parts as ranks.
    Parts {
        /// Which buffer: `input` or `output`.
        buffer: &'static str,
        /// Parts that were named.
        found: usize,
        /// Number of ranks.
        count: usize,
    },
    /// The rank that is to have the result gave no room for it.
    NoOutput,
    /// A buffer lies on another device than the communicator.
    Device {
        /// The buffer's device.
        found: i32,
        /// The communicator's device.
        expected: i32,
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Types { sent, received } => write!(f, "the input is {sent}, the output {received}"),
            Self::Length { buffer, found, expected } => {
                write!(f, "the {buffer} has {found} values, not {expected}")
            }
            Self::Uneven { found, count } => {
                write!(f, "{found} values cannot be cut into equal parts for {count} ranks")
            }
            Self::Parts { buffer, found, count } => {
                write!(f, "the {buffer} has {found} parts for {count} ranks")
            }
            Self::NoOutput => f.write_str("the root gave no room for the result"),
            Self::Device { found, expected } => {
                write!(f, "a buffer is on device {found}, the communicator on device {expected}")
            }
        }
    }
}
