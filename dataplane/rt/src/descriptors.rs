//! How many descriptors the process's sockets and pipes have.

use std::sync::atomic::{AtomicUsize, Ordering};

static OPEN: AtomicUsize = AtomicUsize::new(0);

/// Descriptors that sockets and pipes of all runtimes of this process have open. What else a
/// process opens is not counted.
#[must_use]
pub fn open() -> usize {
    OPEN.load(Ordering::Relaxed)
}

/// Counts some of them as long as it lives.
#[derive(Debug)]
pub(crate) struct Counted(usize);

impl Counted {
    pub(crate) fn new(count: usize) -> Self {
        OPEN.fetch_add(count, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        OPEN.fetch_sub(self.0, Ordering::Relaxed);
    }
}
