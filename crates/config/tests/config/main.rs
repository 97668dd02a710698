//! Tests of the configuration as its users meet it.
#![allow(clippy::unwrap_used)]

mod errors;
mod experiments;
mod layering;
mod mesh;
mod presets;
mod reference;
mod round_trip;
mod summary;
