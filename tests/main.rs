//! The whole program, from the command line: one test binary.

mod bad_input;
mod cli;
mod comparison;
#[cfg(feature = "mpi")]
mod distributed;
mod resume;
mod support;
mod torchrun;
mod train;
