//! Says which NCCL is found and what it can do: `cargo run --example version [FILE]`.
#![allow(clippy::print_stdout, reason = "the answer is what the example is for")]

use nccl_rs::{Error, Feature, Library};

fn main() -> Result<(), String> {
    let library = match std::env::args_os().nth(1) {
        Some(file) => Library::open(file),
        None => Library::load(),
    };
    // As a person reads it: an error that `main` returns is printed as a programmer does.
    let library = library.map_err(|error: Error| error.to_string())?;
    println!("NCCL {}: {}", library.version(), library.origin());
    for feature in [
        Feature::BufferRegistration,
        Feature::Float8,
        Feature::TrafficClass,
        Feature::NvlsCtas,
        Feature::ChannelsPerNetPeer,
    ] {
        let has = if library.supports(feature) { "has" } else { "lacks" };
        println!("  {has} {feature} (since {})", feature.since());
    }
    Ok(())
}
