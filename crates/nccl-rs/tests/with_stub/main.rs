//! The crate on a stand-in for NCCL: ranks are threads, devices' memory is the host's.

mod collectives;
mod environment;
mod failures;
mod lifecycle;
mod loading;
mod non_blocking;
mod stub;
