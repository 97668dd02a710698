//! Measures collectives through the trait beside the MPI library's own, alternately:
//! `mpirun -n 4 target/release/examples/collectives [MEBIBYTES ...]`.
#![allow(clippy::print_stdout, reason = "the table is what the example is for")]

use std::error::Error;

use switchyard_comm::bench::collectives_beside_bare;
use switchyard_comm::{Choice, Launch, StartOptions, start};

fn main() -> Result<(), Box<dyn Error>> {
    let mebibytes: Vec<f64> = std::env::args().skip(1).map(|size| size.parse()).collect::<Result<_, _>>()?;
    let mebibytes = if mebibytes.is_empty() { vec![0.001, 0.0625, 1.0, 64.0] } else { mebibytes };
    let bytes: Vec<usize> = mebibytes.iter().map(|size| (size * 1024.0 * 1024.0) as usize).collect();
    let launch = Launch::detect(Choice::Mpi, |name| std::env::var(name).ok())?;
    let world = start(&launch, StartOptions { timeout: None, address: None, report: Box::new(|_| {}) })?;
    let found = collectives_beside_bare(&world, &bytes, 15)?;
    if world.communicator().rank() == 0 {
        println!("{}, {} ranks", world.library(), world.communicator().size());
        println!("{:<12}{:>12}{:>14}{:>14}{:>8}", "", "bytes", "trait", "bare", "speed");
        for measurement in found {
            let bare = measurement.bare_seconds.unwrap_or(f64::NAN);
            println!(
                "{:<12}{:>12}{:>11.3} ms{:>11.3} ms{:>7.0}%",
                measurement.operation,
                measurement.bytes,
                measurement.seconds * 1e3,
                bare * 1e3,
                bare / measurement.seconds * 100.0
            );
        }
    }
    world.finish()?;
    Ok(())
}
