//! How fast a checkpoint is written beside training, which needs the same cores.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Work below which a rest is not worth the change of threads.
const SHORTEST_WORK: Duration = Duration::from_millis(1);

/// A limit on the part of a core that writing takes, until it is lifted.
#[derive(Debug)]
pub struct Pace {
    /// Rest after a second of work, in seconds.
    rest_per_work: f64,
    hurried: Mutex<bool>,
    changed: Condvar,
}

impl Pace {
    /// Takes `cores` of a core, such as 0.1, on average; 1 or more is no limit.
    pub fn of_cores(cores: f64) -> Self {
        let rest_per_work = (1.0 / cores.clamp(1e-6, 1.0)) - 1.0;
        Self { rest_per_work, hurried: Mutex::new(false), changed: Condvar::new() }
    }

    /// No limit.
    pub fn unlimited() -> Self {
        Self::of_cores(1.0)
    }

    /// Lifts the limit, because somebody waits; ends a rest at once.
    pub fn hurry(&self) {
        *self.hurried.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Rests after what this thread has computed since `before`, its [`cpu_time`], and moves that on.
    pub(crate) fn rest(&self, before: &mut Duration) {
        let work = cpu_time().saturating_sub(*before);
        if work < SHORTEST_WORK {
            return;
        }
        let hurried = self.hurried.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = work.mul_f64(self.rest_per_work);
        drop(self.changed.wait_timeout_while(hurried, rest, |hurried| !*hurried));
        *before = cpu_time();
    }
}

/// Time that this thread has computed, in the system as well: what waits for the disk does not count.
pub(crate) fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;
    use std::time::Instant;

    use super::*;

    fn work() -> Duration {
        let begin = cpu_time();
        while cpu_time() - begin < 2 * SHORTEST_WORK {
            std::hint::spin_loop();
        }
        begin
    }

    #[test]
    fn rests_are_as_long_as_the_limit_says() {
        let started = Instant::now();
        Pace::of_cores(0.05).rest(&mut work());
        assert!(started.elapsed() >= 2 * SHORTEST_WORK * 20);
    }

    #[test]
    fn who_waits_ends_every_rest() {
        let pace = Arc::new(Pace::of_cores(0.0));
        let resting = thread::spawn({
            let pace = Arc::clone(&pace);
            move || {
                for _ in 0..3 {
                    pace.rest(&mut work());
                }
            }
        });
        pace.hurry();
        // Were it not hurried, this would take an hour and more.
        resting.join().expect("no panic");
        assert!(*pace.hurried.lock().unwrap());
    }

    #[test]
    fn without_a_limit_nothing_rests() {
        assert_eq!(Pace::unlimited().rest_per_work, 0.0);
    }
}
