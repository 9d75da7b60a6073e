//! The newest configuration, and who wants to know of it.
//!
//! For the control thread and the endpoints: a lock holds the pointer. Workers do not come here,
//! they are told by a callback that puts the newest snapshot where each of them looks. Callbacks
//! run on the publishing thread, one
//! publication at a time and in order, so a callback sees generations rise.

use std::fmt;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh::Snapshot;

/// Called with every new snapshot. Must return quickly (put it into a cell) and must not call
/// back into the [`SnapshotPublisher`].
pub type OnChange = Box<dyn Fn(Arc<Snapshot>) + Send>;

/// How the configuration is doing, for the admin endpoint.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Status {
    /// Number of snapshots published so far, the first included.
    pub generation: u64,
    /// Why the newest configuration was refused, one line; none while the newest is in use.
    pub last_error: Option<String>,
    /// Configurations refused so far.
    pub errors: u64,
}

/// Publishes snapshots. Clones share everything.
#[derive(Clone)]
pub struct SnapshotPublisher {
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    current: Arc<Snapshot>,
    status: Status,
    callbacks: Vec<OnChange>,
    /// Replaced snapshots that a worker may still hold.
    replaced: Vec<Arc<Snapshot>>,
}

impl SnapshotPublisher {
    /// Publishes `first` as generation 1.
    pub fn new(first: Snapshot) -> Self {
        let status = Status {
            generation: 1,
            ..Status::default()
        };
        Self {
            shared: Arc::new(Mutex::new(Shared {
                current: Arc::new(first),
                status,
                callbacks: Vec::new(),
                replaced: Vec::new(),
            })),
        }
    }

    /// Replaces the snapshot, clears the last error and calls the callbacks. Returns the new
    /// generation.
    pub fn publish(&self, snapshot: Snapshot) -> u64 {
        let snapshot = Arc::new(snapshot);
        let mut shared = self.lock();
        shared.status.generation += 1;
        shared.status.last_error = None;
        let replaced = mem::replace(&mut shared.current, snapshot.clone());
        shared.replaced.push(replaced);
        for callback in &shared.callbacks {
            callback(snapshot.clone());
        }
        shared.status.generation
    }

    /// Records that a newer configuration was refused; the snapshot stays.
    pub fn refuse(&self, error: &dyn fmt::Display) {
        let mut shared = self.lock();
        shared.status.errors += 1;
        shared.status.last_error = Some(error.to_string());
    }

    /// The newest snapshot.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.lock().current.clone()
    }

    /// Registers a callback for every later publication and returns the snapshot that was the
    /// newest at that moment: between the two, none is missed.
    pub fn on_change(&self, callback: OnChange) -> Arc<Snapshot> {
        let mut shared = self.lock();
        shared.callbacks.push(callback);
        shared.current.clone()
    }

    /// Frees replaced snapshots that no worker holds any longer. A large mesh takes long to
    /// free; here it holds up no connection. Called by [`crate::Watcher`] at every look.
    pub fn reclaim(&self) {
        self.lock()
            .replaced
            .retain(|snapshot| Arc::strong_count(snapshot) > 1);
    }

    /// Generation and last error.
    pub fn status(&self) -> Status {
        self.lock().status.clone()
    }

    /// A callback that panicked leaves nothing half-changed, so a poisoned lock is usable.
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for SnapshotPublisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotPublisher")
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publications_arrive_in_order() {
        let publisher = SnapshotPublisher::new(Snapshot::empty());
        let seen: Arc<Mutex<Vec<Arc<Snapshot>>>> = Arc::default();
        let sink = seen.clone();
        let at_start = publisher.on_change(Box::new(move |s| sink.lock().unwrap().push(s)));
        assert!(Arc::ptr_eq(&at_start, &publisher.snapshot()));
        assert_eq!(publisher.publish(Snapshot::empty()), 2);
        assert_eq!(publisher.publish(Snapshot::empty()), 3);
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 2);
        assert!(!Arc::ptr_eq(&seen[0], &seen[1]));
        assert!(Arc::ptr_eq(&seen[1], &publisher.snapshot()));
    }

    #[test]
    fn a_refusal_keeps_the_snapshot_and_is_forgotten_by_the_next_one() {
        let publisher = SnapshotPublisher::new(Snapshot::empty());
        let before = publisher.snapshot();
        publisher.refuse(&"line 3 is wrong");
        assert!(Arc::ptr_eq(&before, &publisher.snapshot()));
        let last_error = Some("line 3 is wrong".to_owned());
        assert_eq!(
            publisher.status(),
            Status {
                generation: 1,
                last_error,
                errors: 1
            }
        );
        publisher.publish(Snapshot::empty());
        assert_eq!(
            publisher.status(),
            Status {
                generation: 2,
                last_error: None,
                errors: 1
            }
        );
    }

    #[test]
    fn replaced_snapshots_are_freed_here_and_not_where_they_were_used() {
        let publisher = SnapshotPublisher::new(Snapshot::empty());
        let in_use = publisher.snapshot();
        let freed = Arc::downgrade(&in_use);
        publisher.publish(Snapshot::empty());
        publisher.reclaim();
        assert_eq!(freed.strong_count(), 2);
        drop(in_use);
        assert_eq!(freed.strong_count(), 1);
        publisher.reclaim();
        assert_eq!(freed.strong_count(), 0);
        assert_eq!(Arc::strong_count(&publisher.snapshot()), 2);
    }

    #[test]
    fn threads_never_see_generations_fall() {
        let publisher = SnapshotPublisher::new(Snapshot::empty());
        let last = Arc::new(Mutex::new(Vec::new()));
        let sink = last.clone();
        publisher.on_change(Box::new(move |s| {
            sink.lock().unwrap().push(Arc::as_ptr(&s) as usize);
        }));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        publisher.publish(Snapshot::empty());
                    }
                });
            }
        });
        assert_eq!(publisher.status().generation, 401);
        let last = last.lock().unwrap();
        assert_eq!(last.len(), 400);
        assert_eq!(last[399], Arc::as_ptr(&publisher.snapshot()) as usize);
    }
}
