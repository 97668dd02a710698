//! What the ranks of a communicator find each other by.

use std::fmt;

use crate::error::Error;
use crate::library::Library;

/// Names a communicator that is to be made.
///
/// One rank makes it and hands its bytes to all others, by files, sockets or MPI; then every rank calls
/// [`Communicator::init`](crate::Communicator::init) with it, once. It holds an address of the rank that
/// made it, so whoever knows it can join: keep it among the ranks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct UniqueId([u8; UniqueId::BYTES]);

impl UniqueId {
    /// Its length: `NCCL_UNIQUE_ID_BYTES` of `nccl.h`.
    pub const BYTES: usize = 128;

    /// A new one. The library opens a socket for the ranks to call: on the network interface that
    /// `NCCL_SOCKET_IFNAME` names, else on the first that fits.
    ///
    /// # Errors
    /// [`Error::Library`] where the library finds no network interface.
    pub fn new(library: &Library) -> Result<Self, Error> {
        library.api().unique_id().map(Self).map_err(Error::Library)
    }

    /// The one with these bytes, which another rank made.
    pub const fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes, for the other ranks.
    pub const fn as_bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }
}

impl TryFrom<&[u8]> for UniqueId {
    type Error = Error;

    fn try_from(bytes: &[u8]) -> Result<Self, Error> {
        bytes.try_into().map(Self).map_err(|_| Error::IdLength { found: bytes.len() })
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(")?;
        // As much as tells two apart in a log.
        self.0.iter().take(8).try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str("..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_make_the_same_id() {
        let id = UniqueId::from_bytes(std::array::from_fn(|at| at as u8));
        assert_eq!(UniqueId::try_from(&id.as_bytes()[..]).expect("as long"), id);
        assert_eq!(format!("{id:?}"), "UniqueId(0001020304050607..)");
    }

    #[test]
    fn another_length_is_refused() {
        let error = UniqueId::try_from(&[0_u8; 127][..]).expect_err("too short");
        assert_eq!(error.to_string(), "a unique id has 128 bytes, not 127");
    }
}
