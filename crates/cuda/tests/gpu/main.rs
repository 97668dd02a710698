//! Every operation against a float64 reference, on a device.
//!
//! They are ignored where no device can be counted on: `cargo test -p switchyard-cuda --test gpu -- --ignored`,
//! or the built test alone, carried to a machine with a device and started with `--ignored --test-threads=1`.

mod activation;
mod attention;
mod cross_entropy;
mod dispatch;
mod embedding;
mod noise;
mod norm;
mod optimizer;
mod product;
mod route;
mod support;
