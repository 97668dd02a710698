//! Settings of a communicator, and how the library reads them.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::mem::offset_of;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::error::Error;
use crate::library::Library;
use crate::version::{Feature, Version};

/// Settings of a communicator. What is not set, the library chooses, or its environment variables do.
///
/// ```
/// use std::time::Duration;
/// use nccl_rs::Config;
///
/// let config = Config::new().name("experts").non_blocking(Duration::from_secs(600)).max_ctas(16);
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    name: Option<Arc<str>>,
    patience: Option<Duration>,
    net_name: Option<String>,
    cga_cluster_size: Option<u32>,
    min_ctas: Option<u32>,
    max_ctas: Option<u32>,
    traffic_class: Option<u32>,
    nvls_ctas: Option<u32>,
    channels_per_net_peer: Option<u32>,
}

impl Config {
    /// Nothing set: calls block, see [`Config::non_blocking`].
    pub fn new() -> Self {
        Self::default()
    }

    /// What errors call the communicator, and from 2.27 on the library's logs and profilers.
    ///
    /// Each distinct name that a communicator is made with is kept for the life of the process, as the
    /// library points to it for longer than anybody can know: let names be few, without counters.
    #[must_use]
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Lets no call block in the library. Making and finalizing a communicator is then waited for with
    /// [`Communicator::wait`](crate::Communicator::wait); every operation and split waits up to `patience` by
    /// itself, and aborts the communicator after that.
    ///
    /// It is the time for all ranks to come and call the same operation, not for the operation to run:
    /// how much one rank may be ahead of another.
    ///
    /// The library's environment variable `NCCL_COMM_BLOCKING` comes first: with `1` calls block all the
    /// same, and `patience` means nothing; with `0` no call blocks without this setting either, and
    /// operations and splits then wait as long as it takes.
    #[must_use]
    pub fn non_blocking(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
    }

    /// The network module, such as `IB` or `Socket`. Each distinct text is kept for the life of the process,
    /// as that of [`Config::name`].
    #[must_use]
    pub fn net_name(mut self, name: impl Into<String>) -> Self {
        self.net_name = Some(name.into());
        self
    }

    /// Thread blocks of a cluster in the library's kernels, 0 to 8.
    #[must_use]
    pub fn cga_cluster_size(mut self, blocks: u32) -> Self {
        self.cga_cluster_size = Some(blocks);
        self
    }

    /// Thread blocks that a kernel of the library has at least. Goes with [`Config::max_ctas`].
    #[must_use]
    pub fn min_ctas(mut self, blocks: u32) -> Self {
        self.min_ctas = Some(blocks);
        self
    }

    /// Thread blocks that a kernel of the library has at most: what it leaves to other kernels.
    #[must_use]
    pub fn max_ctas(mut self, blocks: u32) -> Self {
        self.max_ctas = Some(blocks);
        self
    }

    /// Class of the traffic on the network, as the network defines it; [`Feature::TrafficClass`].
    #[must_use]
    pub fn traffic_class(mut self, class: u32) -> Self {
        self.traffic_class = Some(class);
        self
    }

    /// Thread blocks of kernels that use NVLink SHARP; [`Feature::NvlsCtas`].
    #[must_use]
    pub fn nvls_ctas(mut self, blocks: u32) -> Self {
        self.nvls_ctas = Some(blocks);
        self
    }

    /// Channels to each rank on another machine, rounded up to a power of two;
    /// [`Feature::ChannelsPerNetPeer`].
    #[must_use]
    pub fn channels_per_net_peer(mut self, channels: u32) -> Self {
        self.channels_per_net_peer = Some(channels);
        self
    }

    /// What errors call the communicator.
    pub(crate) fn label(&self) -> Option<Arc<str>> {
        self.name.clone()
    }

    /// How long operations wait; `None` where the library is asked to block.
    pub(crate) fn patience(&self) -> Option<Duration> {
        self.patience
    }

    /// The settings as `library` reads them.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it is too old for one, [`Error::Setting`] when one cannot be written.
    pub(crate) fn raw(&self, library: &Library) -> Result<RawConfig, Error> {
        let needs = [
            (self.traffic_class, Feature::TrafficClass),
            (self.nvls_ctas, Feature::NvlsCtas),
            (self.channels_per_net_peer, Feature::ChannelsPerNetPeer),
        ];
        for (_, feature) in needs.iter().filter(|(setting, _)| setting.is_some()) {
            library.require(*feature)?;
        }
        // Without a most, the library compares with the mark of what is not set, and refuses.
        if let Some(least) = self.min_ctas.filter(|_| self.min_ctas > self.max_ctas) {
            let reason = "it has to go with a `max_ctas` that is not less";
            return Err(Error::Setting { setting: "min_ctas", value: least.to_string(), reason });
        }
        let mut raw = RawConfig::new(library.version());
        raw.blocking = c_int::from(self.patience.is_none());
        raw.cga_cluster_size = integer("cga_cluster_size", self.cga_cluster_size)?;
        raw.min_ctas = integer("min_ctas", self.min_ctas)?;
        raw.max_ctas = integer("max_ctas", self.max_ctas)?;
        raw.net_name = text("net_name", self.net_name.as_deref())?;
        raw.traffic_class = integer("traffic_class", self.traffic_class)?;
        raw.comm_name = text("name", self.name.as_deref())?;
        raw.nvls_ctas = integer("nvls_ctas", self.nvls_ctas)?;
        raw.channels_per_net_peer = integer("channels_per_net_peer", self.channels_per_net_peer)?;
        Ok(raw)
    }
}

/// `NCCL_CONFIG_UNDEF_INT` of `nccl.h`.
const UNDEFINED: c_int = c_int::MIN;

fn integer(setting: &'static str, value: Option<u32>) -> Result<c_int, Error> {
    let Some(value) = value else { return Ok(UNDEFINED) };
    let reason = "it has to fit 31 bits";
    c_int::try_from(value).map_err(|_| Error::Setting { setting, value: value.to_string(), reason })
}

/// Texts that the library was given. It keeps a pointer to a communicator's name, beyond the communicator
/// where other ranks of it live in the process, so they are never freed; there are few.
static TEXTS: Mutex<BTreeSet<&'static CStr>> = Mutex::new(BTreeSet::new());

fn text(setting: &'static str, value: Option<&str>) -> Result<*const c_char, Error> {
    let Some(value) = value else { return Ok(ptr::null()) };
    let owned = CString::new(value).map_err(|_| Error::Setting {
        setting,
        value: format!("{value:?}"),
        reason: "the library's texts end with the first zero byte",
    })?;
    let mut texts = TEXTS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(text) = texts.get(owned.as_c_str()) {
        return Ok(text.as_ptr());
    }
    let text: &'static CStr = Box::leak(owned.into_boxed_c_str());
    texts.insert(text);
    Ok(text.as_ptr())
}

/// `ncclConfig_t`: what newer versions have comes after what older ones have.
///
/// # Source
/// `nccl.h` of the releases 2.18 to 2.28. Later versions take this layout too.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawConfig {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
    channels_per_net_peer: c_int,
    nvlink_centric_sched: c_int,
}

const MAGIC: c_uint = 0xcafe_beef;

/// The version that each layout came with, and its length in bytes. The library takes a layout that is older
/// than itself and sets the rest; it cannot know one that is newer.
const LAYOUTS: [(Version, usize); 4] = [
    (Version::new(2, 28, 0), size_of::<RawConfig>()),
    (Version::new(2, 27, 0), offset_of!(RawConfig, channels_per_net_peer)),
    (Version::new(2, 26, 0), offset_of!(RawConfig, comm_name)),
    // Ends with `split_share` and four bytes that only align it.
    (Version::new(2, 17, 0), offset_of!(RawConfig, comm_name)),
];

impl RawConfig {
    /// Nothing set, in the layout of library `version`.
    fn new(version: Version) -> Self {
        let fits = |(since, _): &&(Version, usize)| *since <= version;
        let [.., oldest] = LAYOUTS;
        let (layout, size) = *LAYOUTS.iter().find(fits).unwrap_or(&oldest);
        Self {
            size,
            magic: MAGIC,
            version: layout.code(),
            blocking: UNDEFINED,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: ptr::null(),
            split_share: UNDEFINED,
            traffic_class: UNDEFINED,
            comm_name: ptr::null(),
            collnet_enable: UNDEFINED,
            cta_policy: UNDEFINED,
            shrink_share: UNDEFINED,
            nvls_ctas: UNDEFINED,
            channels_per_net_peer: UNDEFINED,
            nvlink_centric_sched: UNDEFINED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_those_of_the_header() {
        for (library, version, size) in [
            (Version::new(2, 18, 1), 21_700, 48),
            (Version::new(2, 25, 1), 21_700, 48),
            (Version::new(2, 26, 2), 22_600, 48),
            (Version::new(2, 27, 7), 22_700, 72),
            (Version::new(2, 28, 9), 22_800, 80),
            (Version::new(2, 30, 7), 22_800, 80),
        ] {
            let raw = RawConfig::new(library);
            assert_eq!((raw.version, raw.size), (version, size), "{library}");
        }
    }

    #[test]
    fn equal_texts_are_kept_once() {
        let first = text("name", Some("kept once")).expect("no zero byte");
        let second = text("name", Some("kept once")).expect("no zero byte");
        assert_eq!(first, second);
        let other = text("name", Some("another")).expect("no zero byte");
        assert_ne!(first, other);
    }

    #[test]
    fn what_c_cannot_hold_is_refused() {
        let error = text("name", Some("a\0b")).expect_err("a zero byte");
        assert!(error.to_string().starts_with(r#"name cannot be "a\0b""#), "{error}");
        let error = integer("max_ctas", Some(u32::MAX)).expect_err("32 bits");
        assert!(error.to_string().starts_with("max_ctas cannot be 4294967295"), "{error}");
    }
}
