//! Readiness: the process is ready once every named task has reported so.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::StatusCode;

use crate::server::{Answer, Query};

/// The tasks that readiness waits for. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Ready {
    /// How many of each name are pending.
    pending: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Ready {
    /// Nothing to wait for yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a task; it is pending until what is returned is dropped or marked.
    #[must_use = "dropping it at once makes the task ready"]
    pub fn task(&self, name: &str) -> PendingTask {
        self.with(|pending| *pending.entry(name.to_owned()).or_default() += 1);
        PendingTask {
            ready: self.clone(),
            name: name.to_owned(),
        }
    }

    /// The names of the tasks still pending, sorted.
    pub fn pending(&self) -> Vec<String> {
        self.with(|pending| pending.keys().cloned().collect())
    }

    /// Whether nothing is pending.
    pub fn is_ready(&self) -> bool {
        self.with(|pending| pending.is_empty())
    }

    /// The answer to a probe: 200 `ready`, or 500 and the tasks that are not.
    pub fn answer(&self, query: &Query<'_>) -> Answer {
        let pending = self.pending();
        if !query.is_read() {
            Answer::method_not_allowed("GET")
        } else if pending.is_empty() {
            Answer::text(StatusCode::OK, "ready\n")
        } else {
            let body = format!("not ready, pending: {}\n", pending.join(", "));
            Answer::text(StatusCode::INTERNAL_SERVER_ERROR, body)
        }
    }

    fn with<T>(&self, f: impl FnOnce(&mut BTreeMap<String, usize>) -> T) -> T {
        f(&mut self.pending.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A task that readiness waits for, until this is dropped.
#[derive(Debug)]
pub struct PendingTask {
    ready: Ready,
    name: String,
}

impl PendingTask {
    /// The task is ready; the same as dropping this.
    pub fn ready(self) {}
}

impl Drop for PendingTask {
    fn drop(&mut self) {
        self.ready.with(|pending| {
            if let Some(count) = pending.get_mut(&self.name) {
                *count -= 1;
                if *count == 0 {
                    pending.remove(&self.name);
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_when_every_task_is() {
        let ready = Ready::new();
        assert!(ready.is_ready());
        let listeners = ready.task("listeners");
        let (first, second) = (ready.task("worker"), ready.task("worker"));
        assert_eq!(ready.pending(), ["listeners", "worker"]);
        first.ready();
        assert_eq!(ready.pending(), ["listeners", "worker"]);
        drop(second);
        assert_eq!(ready.pending(), ["listeners"]);
        assert!(!ready.is_ready());
        listeners.ready();
        assert!(ready.is_ready() && ready.pending().is_empty());
    }
}
