//! Until when to wait, and how.

use std::thread;
use std::time::{Duration, Instant};

/// A time up to which a caller waits.
///
/// It is a point in time, not a length: several waits one after the other can share one.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    made: Instant,
    at: Option<Instant>,
}

impl Deadline {
    /// The time `patience` from now.
    pub fn after(patience: Duration) -> Self {
        let made = Instant::now();
        // Later than the clock can count is never.
        Self { made, at: made.checked_add(patience) }
    }

    /// The time `instant`.
    pub fn at(instant: Instant) -> Self {
        Self { made: Instant::now(), at: Some(instant) }
    }

    /// No time: waits as long as it takes.
    pub fn never() -> Self {
        Self { made: Instant::now(), at: None }
    }

    /// Whether it is past.
    pub fn is_past(self) -> bool {
        self.at.is_some_and(|at| Instant::now() >= at)
    }

    /// Time that is left; `None` without an end.
    pub fn remaining(self) -> Option<Duration> {
        self.at.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Time since it was made.
    pub(crate) fn elapsed(self) -> Duration {
        self.made.elapsed()
    }
}

/// Tries before the first sleep: most operations are queued within microseconds.
const EAGER_TRIES: u32 = 32;

const FIRST_SLEEP: Duration = Duration::from_micros(20);

const LONGEST_SLEEP: Duration = Duration::from_millis(1);

/// Pauses between questions, short at first.
#[derive(Debug)]
pub(crate) struct Pauses {
    tries: u32,
    sleep: Duration,
}

impl Pauses {
    pub(crate) fn new() -> Self {
        Self { tries: 0, sleep: FIRST_SLEEP }
    }

    /// Pauses, but not beyond the deadline.
    pub(crate) fn pause(&mut self, deadline: Deadline) {
        self.tries += 1;
        if self.tries <= EAGER_TRIES {
            return thread::yield_now();
        }
        thread::sleep(deadline.remaining().map_or(self.sleep, |left| left.min(self.sleep)));
        self.sleep = (self.sleep * 2).min(LONGEST_SLEEP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_time_are_told_apart() {
        assert!(Deadline::after(Duration::ZERO).is_past());
        assert!(Deadline::at(Instant::now()).is_past());
        assert!(!Deadline::after(Duration::from_secs(3600)).is_past());
        assert!(!Deadline::never().is_past());
        assert_eq!(Deadline::never().remaining(), None);
        assert_eq!(Deadline::after(Duration::MAX).remaining(), None);
        assert!(Deadline::after(Duration::ZERO).remaining().is_some_and(|left| left.is_zero()));
    }

    #[test]
    fn pauses_grow_up_to_the_longest() {
        let mut pauses = Pauses::new();
        for _ in 0..EAGER_TRIES {
            pauses.pause(Deadline::never());
        }
        assert_eq!(pauses.sleep, FIRST_SLEEP, "it has not slept");
        for _ in 0..8 {
            pauses.pause(Deadline::never());
        }
        assert_eq!(pauses.sleep, LONGEST_SLEEP);
    }

    #[test]
    fn pauses_do_not_outlast_the_deadline() {
        let day = Duration::from_secs(86_400);
        let mut pauses = Pauses { tries: EAGER_TRIES, sleep: day };
        pauses.pause(Deadline::after(Duration::ZERO));
        assert_eq!(pauses.tries, EAGER_TRIES + 1);
    }
}
