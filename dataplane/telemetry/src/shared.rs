//! What workers and the scraper share: counters of each worker, and the label sets of all.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::connection::{ConnectionInfo, ResponseFlags};
use crate::faults::{Event, Fault};
use crate::series::{LabelSet, LabelSets, Series, WorkerCounter};

/// What one worker shares with the scraper.
#[derive(Debug, Default)]
pub(crate) struct WorkerShared {
    /// Series that no scrape has seen yet. Held by a scrape for one swap.
    fresh: Mutex<Vec<Arc<Series>>>,
    /// Connections open now, by reporter.
    pub(crate) open: [WorkerCounter; 2],
    /// Connections refused before there was anything to count them under, by reporter.
    pub(crate) failed_early: [WorkerCounter; 2],
    /// Of those, how many the log does not tell one by one.
    pub(crate) refusals_left_out: WorkerCounter,
    /// Label sets counted as overflow.
    pub(crate) overflows: WorkerCounter,
    /// What peers of tunnels did wrong, in the order of [`Fault::ALL`].
    pub(crate) faults: [WorkerCounter; Fault::COUNT],
    /// By number of the [`Event`].
    pub(crate) events: [WorkerCounter; Event::COUNT],
}

impl WorkerShared {
    /// Shows a new series to the next scrape.
    pub(crate) fn publish(&self, series: Arc<Series>) {
        lock(&self.fresh).push(series);
    }
    /// The series that no scrape has taken yet.
    pub(crate) fn take_fresh(&self) -> Vec<Arc<Series>> {
        std::mem::take(&mut *lock(&self.fresh))
    }
}

/// All label sets of the process. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct SharedLabels(Arc<Mutex<LabelSets>>);

impl SharedLabels {
    pub(crate) fn new(regular_max: usize) -> Self {
        Self(Arc::new(Mutex::new(LabelSets::new(regular_max))))
    }

    /// The label set of `info` with `flags`, and whether it is that of the overflow. Takes a lock:
    /// for what a worker has not seen before.
    pub(crate) fn intern(
        &self,
        info: &ConnectionInfo,
        flags: ResponseFlags,
    ) -> (Arc<LabelSet>, bool) {
        lock(&self.0).intern(info, flags)
    }

    /// Label sets in use.
    pub(crate) fn len(&self) -> usize {
        lock(&self.0).len()
    }
}

/// A panic elsewhere must not take the metrics with it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
