//! What the watchdogs of two ranks tell each other: one line of JSON a message.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::activity::Activity;

/// How a rank's watchdog is reached, told to all at the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Card {
    pub(crate) host: String,
    pub(crate) pid: u32,
    /// Names and addresses to try, in order.
    pub(crate) addresses: Vec<String>,
    /// Where it listens, if it does.
    pub(crate) port: Option<u16>,
    /// What a caller must say, so that strangers on the network are told from ranks.
    pub(crate) token: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Message {
    /// Opens a connection.
    Hello { token: u64, rank: usize },
    /// Comes every tick.
    Status(Status),
    /// The rank leaves the job in good order.
    Bye,
    /// The rank has said why the job must end, and ends it.
    Ending,
}

/// What a rank does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// Its last mark, such as `step 17`, and the mark's age.
    pub(crate) mark: String,
    pub(crate) mark_ms: u64,
    pub(crate) waits: Vec<WaitStatus>,
}

/// A collective that a rank waits in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WaitStatus {
    pub(crate) operation: String,
    pub(crate) label: String,
    pub(crate) group: u64,
    pub(crate) call: u64,
    pub(crate) ms: u64,
    /// The group's ranks; left out while the wait is short.
    pub(crate) members: Vec<usize>,
}

impl Status {
    /// What this process does now; names the members of groups that it waits for longer than `long`.
    pub(crate) fn of(activity: &Activity, long: Duration) -> Self {
        let (mark, marked, waits) = activity.look();
        let waits = waits.into_iter().map(|wait| {
            let waited = wait.since.elapsed();
            WaitStatus {
                operation: wait.operation.to_owned(),
                label: wait.group.label.to_string(),
                group: wait.group.id,
                call: wait.call,
                ms: milliseconds(waited),
                members: if waited > long { wait.group.members.to_vec() } else { Vec::new() },
            }
        });
        Self { mark, mark_ms: milliseconds(marked), waits: waits.collect() }
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
