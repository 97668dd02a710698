//! What this process is doing right now, for those who look for the cause of a wait.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a process does: the mark that the trainer set last, and the collectives that it waits in.
///
/// A lock that nobody contends costs some 20 ns twice a collective; the watchdog looks once a second.
#[derive(Debug)]
pub struct Activity {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    mark: String,
    marked: Instant,
    waits: Vec<(u64, Wait)>,
    /// Waits so far.
    begun: u64,
}

impl Default for Activity {
    fn default() -> Self {
        let state = State { mark: String::new(), marked: Instant::now(), waits: Vec::new(), begun: 0 };
        Self { state: Mutex::new(state) }
    }
}

impl Activity {
    /// Says what the process is at, such as `step 17`.
    pub fn at(&self, mark: &str) {
        let mut state = self.lock();
        state.mark.clear();
        state.mark.push_str(mark);
        state.marked = Instant::now();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A group as the watchdog knows it.
#[derive(Debug, Clone)]
pub(crate) struct GroupName {
    pub(crate) label: Arc<str>,
    /// The same on all its ranks, and no other group's.
    pub(crate) id: u64,
    /// Its ranks' numbers in the job, in its order.
    pub(crate) members: Arc<[usize]>,
}

/// A collective that has begun and not ended.
#[derive(Debug, Clone)]
pub(crate) struct Wait {
    pub(crate) operation: &'static str,
    pub(crate) group: GroupName,
    /// Its number among the group's calls.
    pub(crate) call: u64,
    pub(crate) since: Instant,
}

/// Ends a [`Wait`] when dropped.
#[derive(Debug)]
pub(crate) struct Waiting<'a> {
    activity: &'a Activity,
    number: u64,
}

impl Activity {
    /// Notes that a collective begins.
    pub(crate) fn enter(&self, operation: &'static str, group: &GroupName, call: u64) -> Waiting<'_> {
        let wait = Wait { operation, group: group.clone(), call, since: Instant::now() };
        let mut state = self.lock();
        state.begun += 1;
        let number = state.begun;
        state.waits.push((number, wait));
        Waiting { activity: self, number }
    }

    /// The last mark, its age, and the current waits.
    pub(crate) fn look(&self) -> (String, Duration, Vec<Wait>) {
        let state = self.lock();
        let waits = state.waits.iter().map(|(_, wait)| wait.clone());
        (state.mark.clone(), state.marked.elapsed(), waits.collect())
    }

    /// Does not count `pause` as waiting, since this process did not run.
    pub(crate) fn forgive(&self, pause: Duration) {
        for (_, wait) in &mut self.lock().waits {
            wait.since = (wait.since + pause).min(Instant::now());
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.activity.lock().waits.retain(|(number, _)| *number != self.number);
    }
}
