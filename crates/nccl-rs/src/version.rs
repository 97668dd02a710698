//! Versions of the library and what came with which.

use std::fmt;

/// Version of the library, such as 2.28.9.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub patch: u32,
}

impl Version {
    /// The oldest that this crate works with: the first with `ncclCommSplit`.
    pub const MINIMUM: Self = Self::new(2, 18, 1);

    /// Version `major.minor.patch`.
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// Reads `NCCL_VERSION_CODE`, whose digits moved with 2.9.
    ///
    /// # Source
    /// `NCCL_VERSION` of `nccl.h`.
    pub(crate) const fn from_code(code: u32) -> Self {
        let minor_at = if code < 10_000 { 1_000 } else { 10_000 };
        Self::new(code / minor_at, code % minor_at / 100, code % 100)
    }

    /// As `NCCL_VERSION_CODE` of 2.9 and later.
    pub(crate) const fn code(self) -> u32 {
        self.major * 10_000 + self.minor * 100 + self.patch
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// What newer versions of the library have and [`Version::MINIMUM`] has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Feature {
    /// [`Communicator::register`](crate::Communicator::register).
    BufferRegistration,
    /// [`DataType::F8E4M3`](crate::DataType::F8E4M3) and [`DataType::F8E5M2`](crate::DataType::F8E5M2).
    Float8,
    /// [`Config::traffic_class`](crate::Config::traffic_class).
    TrafficClass,
    /// [`Config::nvls_ctas`](crate::Config::nvls_ctas).
    NvlsCtas,
    /// [`Config::channels_per_net_peer`](crate::Config::channels_per_net_peer).
    ChannelsPerNetPeer,
}

impl Feature {
    /// The version that it came with.
    ///
    /// # Source
    /// `nccl.h` of the releases.
    pub const fn since(self) -> Version {
        match self {
            Self::BufferRegistration => Version::new(2, 19, 1),
            Self::Float8 => Version::new(2, 24, 3),
            Self::TrafficClass => Version::new(2, 26, 2),
            Self::NvlsCtas => Version::new(2, 27, 3),
            Self::ChannelsPerNetPeer => Version::new(2, 28, 3),
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BufferRegistration => "registration of buffers",
            Self::Float8 => "8-bit floats",
            Self::TrafficClass => "a traffic class",
            Self::NvlsCtas => "a number of CTAs for NVLink SHARP",
            Self::ChannelsPerNetPeer => "a number of channels for a peer on the network",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_all_times_are_read() {
        assert_eq!(Version::from_code(2_708), Version::new(2, 7, 8));
        assert_eq!(Version::from_code(20_906), Version::new(2, 9, 6));
        assert_eq!(Version::from_code(22_809), Version::new(2, 28, 9));
        assert_eq!(Version::new(2, 28, 9).code(), 22_809);
    }

    #[test]
    fn newer_is_greater() {
        assert!(Version::new(2, 9, 9) < Version::new(2, 18, 0));
        assert!(Version::new(2, 18, 5) < Version::new(2, 18, 6));
    }
}
