//! Ctrl-C, SIGTERM and SIGUSR1 ask the run to finish its step and save; a second Ctrl-C or SIGTERM stops
//! at once.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;

/// Exit code of a second signal, as shells report an interrupted program.
const STOPPED_AT_ONCE: i32 = 130;

/// The flag that the first signal raises.
pub(crate) fn stop_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order the first signal finds the flag down and only raises it.
        flag::register_conditional_shutdown(signal, STOPPED_AT_ONCE, Arc::clone(&stop))
            .and_then(|_| flag::register(signal, Arc::clone(&stop)))
            .context("cannot watch for Ctrl-C and SIGTERM")?;
    }
    // mpirun hands this one on to all ranks, and leaves them the time that they need.
    flag::register(SIGUSR1, Arc::clone(&stop)).context("cannot watch for SIGUSR1")?;
    Ok(stop)
}
