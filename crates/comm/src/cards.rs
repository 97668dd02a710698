//! What the ranks of a job tell each other of themselves at the start, and the watchdog that they start then.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::activity::Activity;
use crate::buffer::{Buffer, BufferMut};
use crate::communicator::Communicator;
use crate::watchdog::message::Card;
use crate::watchdog::{Post, Watchdog};
use crate::world::{RESTARTABLE, StartError, StartOptions};

/// Set by the first that ends the job, so that nobody else reports what is its consequence.
pub(crate) static ENDING: AtomicBool = AtomicBool::new(false);

/// What each rank says of itself.
pub(crate) struct Cards {
    post: Post,
    all: Vec<Card>,
}

impl Cards {
    /// Shows all ranks this one's, which is on the machine called `host`.
    pub(crate) fn exchange(
        world: &dyn Communicator,
        host: &str,
        address: Option<&str>,
    ) -> Result<Self, StartError> {
        let post = Post::new(world.rank(), world.size()).map_err(StartError::Watchdog)?;
        let card = post.card(host, address).map_err(StartError::Watchdog)?;
        let text = serde_json::to_vec(&card).expect("cards have a JSON form");
        let mut lengths = vec![0; world.size()];
        world.all_gather(Buffer::U64(&[text.len() as u64]), BufferMut::U64(&mut lengths))?;
        let counts: Vec<usize> = lengths.iter().map(|&length| length as usize).collect();
        let mut texts = vec![0; counts.iter().sum()];
        world.all_gather_v(Buffer::U8(&text), BufferMut::U8(&mut texts), &counts)?;
        let mut rest = &texts[..];
        let all = counts.iter().map(|&count| {
            let (text, later) = rest.split_at(count);
            rest = later;
            serde_json::from_slice(text).map_err(|_| StartError::OtherProgram)
        });
        let all = all.collect::<Result<_, _>>()?;
        Ok(Self { post, all })
    }

    /// The machine of every rank, numbered in the order in which the ranks name them.
    pub(crate) fn machines(&self) -> Vec<usize> {
        numbered(self.all.iter().map(|card| card.host.as_str()))
    }

    /// Starts the watchdog, if there is a deadline. `end_all` ends the job with a code.
    pub(crate) fn watch(
        self,
        world: &dyn Communicator,
        activity: &Arc<Activity>,
        options: StartOptions,
        end_all: fn(i32) -> !,
    ) -> Result<Option<Watchdog>, StartError> {
        let Some(timeout) = options.timeout.filter(|_| world.size() > 1) else { return Ok(None) };
        let report = options.report;
        let end = move |reason: String| {
            if !ENDING.swap(true, Ordering::AcqRel) {
                tracing::error!("{reason}");
                report(&reason);
                end_all(RESTARTABLE);
            }
        };
        let activity = Arc::clone(activity);
        let watchdog = self.post.start(&self.all, timeout, activity, end).map_err(StartError::Watchdog)?;
        // Nobody computes before all have connected: a connection is refused once the hub has ended.
        world.barrier()?;
        Ok(Some(watchdog))
    }
}

/// The names as numbers from 0, in the order in which they first occur.
fn numbered<'a>(names: impl Iterator<Item = &'a str>) -> Vec<usize> {
    let mut known = Vec::new();
    let number = |name| {
        known.iter().position(|&other| other == name).unwrap_or_else(|| {
            known.push(name);
            known.len() - 1
        })
    };
    names.map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_one_host_are_on_one_machine() {
        assert_eq!(numbered(["b", "a", "a", "c", "b"].into_iter()), [0, 1, 1, 2, 0]);
    }
}
