//! Waiting for what nobody announces: the end of a device's work.

use std::thread;
use std::time::{Duration, Instant};

use crate::error::CommError;

/// How long the question is repeated without a pause.
const EAGER: Duration = Duration::from_micros(20);

/// A pause between two questions. Linux lets a sleep last some 50 us more.
const PAUSE: Duration = Duration::from_micros(5);

/// Waits until `done`; `go_on` is asked before each question and ends the wait with its error.
pub(crate) fn poll(
    done: &mut dyn FnMut() -> bool,
    mut go_on: impl FnMut() -> Result<(), CommError>,
) -> Result<(), CommError> {
    let began = Instant::now();
    loop {
        go_on()?;
        if done() {
            return Ok(());
        }
        if began.elapsed() < EAGER {
            std::hint::spin_loop();
        } else {
            thread::sleep(PAUSE);
        }
    }
}
