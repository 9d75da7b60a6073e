//! Giving memory that was freed back to the system.

use std::cell::Cell;

/// Periods of a worker's trimming between two collections of the allocator.
const PERIODS: u32 = 5;
/// Tasks that must have been there for one to be worth it.
const TASKS: usize = 256;

/// When a worker has its allocator collect: once half of its tasks have ended.
#[derive(Debug, Default)]
pub(crate) struct Collector {
    /// Most tasks that were live since the last time.
    peak: Cell<usize>,
    periods: Cell<u32>,
}

impl Collector {
    /// So many tasks are live.
    pub(crate) fn note(&self, live: usize) {
        self.peak.set(self.peak.get().max(live));
    }

    /// Whether so many have ended that what they had is worth giving back.
    pub(crate) fn is_due(&self, live: usize) -> bool {
        self.peak.get() >= TASKS && live <= self.peak.get() / 2
    }

    /// A period has passed.
    pub(crate) fn period(&self, live: usize) {
        self.periods.set(self.periods.get().wrapping_add(1));
        if self.periods.get().is_multiple_of(PERIODS) && self.is_due(live) {
            self.peak.set(live);
            collect();
        }
    }
}

/// Has the allocator give back what this thread has freed: whole pages of it, and what ended
/// threads left behind. It takes some hundred microseconds for each hundred megabytes, so a worker
/// does it seldom. Without the feature `mimalloc` it does nothing.
pub fn collect() {
    #[cfg(all(feature = "mimalloc", not(miri)))]
    // SAFETY: it has no preconditions. It works on the calling thread's heap and on those that no
    // thread owns, and takes only memory in which nothing is allocated.
    unsafe {
        libmimalloc_sys::mi_collect(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_many_tasks_are_worth_a_collection_and_few_are_not() {
        let collector = Collector::default();
        collector.note(TASKS - 1);
        assert!(!collector.is_due(0));
        collector.note(TASKS * 4);
        assert!(!collector.is_due(TASKS * 3));
        for period in 1..=PERIODS {
            assert!(collector.is_due(TASKS * 2), "period {period}");
            collector.period(TASKS * 2);
        }
        assert!(!collector.is_due(TASKS * 2), "it was done");
        assert!(collector.is_due(TASKS), "and the rest counts again");
    }
}
