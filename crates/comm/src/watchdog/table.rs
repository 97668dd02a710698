//! What one rank's watchdog knows of all ranks, and whether that is reason to end the job.

use std::time::{Duration, Instant};

use crate::call::name_ranks;
use crate::watchdog::message::{Status, WaitStatus};

/// How long a rank whose connection broke has to be explained by something else: its own report of
/// why it ends, or the launcher ending the job.
const LOST_GRACE: Duration = Duration::from_secs(2);

/// Time limits of a watchdog.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// How long a collective may take.
    pub(crate) timeout: Duration,
    /// Time between two messages of a rank.
    pub(crate) interval: Duration,
}

impl Limits {
    pub(crate) fn new(timeout: Duration) -> Self {
        let interval = (timeout / 6).clamp(Duration::from_millis(50), Duration::from_secs(1));
        Self { timeout, interval }
    }

    /// From when on a rank that says nothing counts as silent.
    fn silence(&self) -> Duration {
        (self.interval * 5).min(self.timeout / 2)
    }
}

/// What is known of one rank.
#[derive(Debug, Clone)]
struct Known {
    host: String,
    pid: u32,
    /// Whether this rank has a connection to it.
    linked: bool,
    heard: Instant,
    status: Status,
    lost: Option<Instant>,
    finished: bool,
}

/// The ranks of the job.
#[derive(Debug)]
pub(crate) struct Table {
    limits: Limits,
    own: usize,
    ranks: Vec<Known>,
}

impl Table {
    /// The table of rank `own`; `linked` tells which ranks speak to it.
    pub(crate) fn new(
        own: usize,
        processes: impl Iterator<Item = (String, u32)>,
        linked: impl Fn(usize) -> bool,
        limits: Limits,
        now: Instant,
    ) -> Self {
        let ranks = processes.enumerate().map(|(rank, (host, pid))| Known {
            host,
            pid,
            linked: rank == own || linked(rank),
            heard: now,
            status: Status::default(),
            lost: None,
            finished: false,
        });
        Self { limits, own, ranks: ranks.collect() }
    }

    pub(crate) fn heard(&mut self, rank: usize, status: Status, now: Instant) {
        let known = &mut self.ranks[rank];
        (known.status, known.heard) = (status, now);
    }

    pub(crate) fn finished(&mut self, rank: usize) {
        self.ranks[rank].finished = true;
    }

    pub(crate) fn lost(&mut self, rank: usize, now: Instant) {
        let known = &mut self.ranks[rank];
        if !known.finished && known.lost.is_none() {
            known.lost = Some(now);
        }
    }

    /// Does not count `pause` as silence, since this process did not listen.
    pub(crate) fn forgive(&mut self, pause: Duration, now: Instant) {
        for known in &mut self.ranks {
            known.heard = (known.heard + pause).min(now);
        }
    }

    /// Why the job must end, if it must and if it is this rank's turn to say so.
    ///
    /// Rank 0 reports. The others give it time to, unless it is the one that is missing; then the
    /// lowest rank that knows of the matter is the first to lose patience.
    pub(crate) fn trouble(&self, now: Instant) -> Option<String> {
        let patience = self.patience(now)?;
        self.overdue(patience, now).or_else(|| self.deserted(patience, now))
    }

    fn patience(&self, now: Instant) -> Option<Duration> {
        let away = |hub: &Known| hub.linked && (hub.lost.is_some() || self.is_silent(hub, now));
        let hubs = &self.ranks[..self.ranks.len().min(super::HUBS).min(self.own)];
        // Two ticks let the one before end the job; more ranks at once than this are not likely lost.
        let steps = u32::try_from(self.own.min(8)).expect("at most 8") * 2;
        hubs.iter().all(away).then(|| self.limits.interval * steps)
    }

    fn is_silent(&self, known: &Known, now: Instant) -> bool {
        now.saturating_duration_since(known.heard) > self.limits.silence()
    }

    /// A collective that takes too long.
    fn overdue(&self, patience: Duration, now: Instant) -> Option<String> {
        let deadline = self.limits.timeout + patience;
        let waits = self.ranks.iter().flat_map(|known| &known.status.waits);
        let wait = waits
            .filter(|wait| Duration::from_millis(wait.ms) >= deadline && !wait.members.is_empty())
            .max_by_key(|wait| wait.ms)?;
        let (waiting, missing): (Vec<usize>, Vec<usize>) =
            wait.members.iter().partition(|&&rank| self.waits_in(rank, wait));
        let missing: Vec<String> = missing.iter().map(|&rank| self.describe(rank, now)).collect();
        let elsewhere = self.away(now).filter(|rank| !wait.members.contains(rank));
        let elsewhere: Vec<String> = elsewhere.map(|rank| self.describe(rank, now)).collect();
        let missing = match missing.is_empty() {
            true => "all of its ranks are in it: the library or the network hangs".to_owned(),
            false => format!("missing: {}", missing.join("; ")),
        };
        let also =
            if elsewhere.is_empty() { String::new() } else { format!("; also {}", elsewhere.join("; ")) };
        Some(format!(
            "{} has not finished for {}; {} in it; {missing}{also}",
            name(wait),
            seconds(Duration::from_millis(wait.ms)),
            waiters(&waiting),
        ))
    }

    /// A rank that ended without a word.
    fn deserted(&self, patience: Duration, now: Instant) -> Option<String> {
        let gone = |known: &Known| {
            known.lost.is_some_and(|lost| now.saturating_duration_since(lost) >= LOST_GRACE + patience)
        };
        let gone: Vec<usize> = (0..self.ranks.len()).filter(|&rank| gone(&self.ranks[rank])).collect();
        let texts: Vec<String> = gone.iter().map(|&rank| self.describe(rank, now)).collect();
        (!gone.is_empty()).then(|| texts.join("; "))
    }

    /// Ranks that are lost or silent.
    fn away(&self, now: Instant) -> impl Iterator<Item = usize> {
        self.ranks.iter().enumerate().filter_map(move |(rank, known)| {
            let away =
                known.linked && !known.finished && (known.lost.is_some() || self.is_silent(known, now));
            away.then_some(rank)
        })
    }

    fn waits_in(&self, rank: usize, wait: &WaitStatus) -> bool {
        let same = |other: &WaitStatus| {
            (other.group, other.call, &other.operation) == (wait.group, wait.call, &wait.operation)
        };
        self.ranks[rank].status.waits.iter().any(same)
    }

    fn describe(&self, rank: usize, now: Instant) -> String {
        let known = &self.ranks[rank];
        let process = format!("rank {rank} (host {}, pid {})", known.host, known.pid);
        let silence = now.saturating_duration_since(known.heard);
        if known.lost.is_some() {
            return format!("{process} has ended without a word");
        }
        if known.finished {
            return format!("{process} has left the job in good order");
        }
        if !known.linked {
            return format!("{process} does not speak to rank {}", self.own);
        }
        if self.is_silent(known, now) {
            let silence = seconds(silence);
            return format!("{process} has been silent for {silence}: stopped, or its machine is gone");
        }
        if let Some(wait) = known.status.waits.first() {
            return format!(
                "rank {rank} waits in {} for {}",
                name(wait),
                seconds(Duration::from_millis(wait.ms))
            );
        }
        let age = seconds(Duration::from_millis(known.status.mark_ms));
        match known.status.mark.as_str() {
            "" => format!("rank {rank} is busy outside of collectives"),
            mark => format!("rank {rank} is busy: {mark}, for {age}"),
        }
    }
}

fn name(wait: &WaitStatus) -> String {
    format!("{} of group `{}` (its call {})", wait.operation, wait.label, wait.call)
}

fn waiters(ranks: &[usize]) -> String {
    match ranks {
        [] => "no rank that answers is".to_owned(),
        [_] => format!("{} waits", name_ranks(ranks)),
        _ => format!("{} wait", name_ranks(ranks)),
    }
}

fn seconds(duration: Duration) -> String {
    match duration.as_secs_f64() {
        short if short < 10.0 => format!("{short:.1} s"),
        long => format!("{long:.0} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(12);

    fn table(own: usize, now: Instant) -> Table {
        let processes = (0..4).map(|rank| (format!("h{rank}"), 100 + rank));
        let hub = |rank: usize| rank < crate::watchdog::HUBS;
        Table::new(own, processes, |rank| hub(own) || hub(rank), Limits::new(TIMEOUT), now)
    }

    fn waiting(seconds: u64) -> Status {
        let wait = WaitStatus {
            operation: "all_reduce".to_owned(),
            label: "world".to_owned(),
            group: 1,
            call: 17,
            ms: seconds * 1000,
            members: vec![0, 1, 2, 3],
        };
        Status { waits: vec![wait], ..Status::default() }
    }

    fn busy() -> Status {
        Status { mark: "step 17".to_owned(), mark_ms: 13_000, ..Status::default() }
    }

    #[test]
    fn rank_0_names_who_waits_and_who_is_missing() {
        let start = Instant::now();
        let now = start + Duration::from_secs(13);
        let mut table = table(0, start);
        table.heard(0, waiting(12), now);
        table.heard(1, busy(), now);
        table.heard(3, waiting(11), now);
        assert_eq!(
            table.trouble(now).expect("overdue"),
            "all_reduce of group `world` (its call 17) has not finished for 12 s; ranks 0 and 3 wait in it; \
             missing: rank 1 is busy: step 17, for 13 s; \
             rank 2 (host h2, pid 102) has been silent for 13 s: stopped, or its machine is gone"
        );
        table.heard(0, waiting(11), now);
        assert_eq!(table.trouble(now), None);
    }

    #[test]
    fn nobody_waits_no_alarm() {
        let start = Instant::now();
        let later = start + Duration::from_secs(3600);
        assert_eq!(table(0, start).trouble(later), None);
        assert_eq!(table(3, start).trouble(later), None);
    }

    #[test]
    fn others_speak_only_when_those_before_them_cannot() {
        let start = Instant::now();
        let now = start + Duration::from_secs(14);
        let mut table = table(1, start);
        table.heard(1, waiting(14), now);
        table.heard(0, busy(), now);
        assert_eq!(table.trouble(now), None, "rank 0 is there");
        table.heard(0, busy(), start);
        let text = table.trouble(now).expect("rank 0 is silent");
        assert!(text.contains("rank 0 (host h0, pid 100) has been silent for 14 s"), "{text}");
        table.heard(1, waiting(13), now);
        assert_eq!(table.trouble(now), None, "rank 0 gets its time");
    }

    #[test]
    fn the_lost_are_reported_after_a_grace_unless_they_took_leave() {
        let start = Instant::now();
        let mut table = table(0, start);
        table.finished(2);
        table.lost(2, start);
        table.lost(3, start);
        assert_eq!(table.trouble(start + Duration::from_secs(1)), None);
        let text = table.trouble(start + Duration::from_secs(3)).expect("rank 3 is gone");
        assert_eq!(text, "rank 3 (host h3, pid 103) has ended without a word");
    }
}
