//! The groups of a rank's device: where one breaks, all are given up.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::DeviceCommunicator;
use crate::communicator::Communicator;
use crate::error::CommError;

/// Time between two looks for faults while something is waited for.
const BETWEEN_CHECKS: Duration = Duration::from_millis(100);

/// A group that can be given up.
pub(super) trait DeviceGroup: DeviceCommunicator {
    /// Ends what the group's operations still do on the device, on this rank alone; every later call returns
    /// `error`.
    fn give_up(&self, error: &CommError);
}

/// A group and all that were split from it, as long as somebody has them.
#[derive(Debug, Default)]
pub(super) struct Siblings(Mutex<Vec<Weak<dyn DeviceGroup>>>);

impl Siblings {
    pub(super) fn add(&self, group: &Arc<dyn DeviceGroup>) {
        let mut groups = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|group| group.strong_count() > 0);
        groups.push(Arc::downgrade(group));
    }

    fn all(&self) -> Vec<Arc<dyn DeviceGroup>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect()
    }

    /// Waits with `group` until `done`, and looks for faults of any group meanwhile; gives all up after an error.
    pub(super) fn watch(
        &self,
        group: &dyn Communicator,
        what: &'static str,
        done: &mut dyn FnMut() -> bool,
    ) -> Result<(), CommError> {
        let mut checked = Instant::now();
        let mut met = Ok(());
        let waited = group.wait_for(what, &mut || {
            if done() {
                return true;
            }
            if checked.elapsed() >= BETWEEN_CHECKS {
                met = self.all().iter().try_for_each(|group| group.check());
                checked = Instant::now();
            }
            met.is_err()
        });
        let outcome = waited.and(met);
        if let Err(error) = &outcome {
            self.all().iter().for_each(|group| group.give_up(error));
        }
        outcome
    }
}
