//! Making the kernel wait less when many programs are attached.
//!
//! Attaching a program by tcx ends with a wait until all CPUs have stopped using the list of
//! programs that was replaced (`synchronize_rcu`), 5 to 20 ms each, one after the other because of
//! the lock all changes of interfaces take. With `rcu_expedited` the kernel interrupts the CPUs
//! instead, which takes a fraction of a millisecond. It is set for as long as many pods are added
//! and then put back; the journal knows of it, for the case that this process is killed meanwhile.

use std::fs::{self, OpenOptions};
use std::path::Path;

use crate::error::{Error, Result};
use crate::journal::Journal;

const FILE: &str = "/sys/kernel/rcu_expedited";

/// Fewer pods are not worth it.
const PODS_MIN: usize = 8;

pub(crate) fn write(value: &str) -> Result<()> {
    fs::write(FILE, value).map_err(|e| Error::file("write", Path::new(FILE), e))
}

/// Shortens the waits of what follows, which is about `pods` pods, if that is worth it and
/// possible: it is about time alone, so that no pod is kept waiting for it. [`end`] ends it.
pub(crate) fn begin(journal: &mut Journal, pods: usize) {
    let before = fs::read_to_string(FILE).unwrap_or_default();
    // Somebody else's wish, or a kernel without: nothing to do.
    if pods < PODS_MIN || before.trim() != "0" || journal.installed_redirect().is_none() {
        return;
    }
    // Nothing is noted that could not be taken back: /sys may be read-only here.
    let writable = OpenOptions::new().write(true).open(FILE);
    let writable = writable.map_err(|e| Error::file("write", Path::new(FILE), e));
    let begun = writable
        .and_then(|_| journal.begin_expedited("0"))
        .and_then(|()| write("1"));
    if let Err(error) = begun {
        tracing::info!(%error, "adding or removing many pods takes longer");
    }
}

/// Ends [`begin`].
pub(crate) fn end(journal: &mut Journal) {
    if let Err(error) = journal.end_expedited() {
        tracing::warn!(%error, "the kernel's waits stay short");
    }
}
