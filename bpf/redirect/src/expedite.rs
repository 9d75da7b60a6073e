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
/// possible. [`Journal::end_expedited`] ends it.
pub(crate) fn begin(journal: &mut Journal, pods: usize) -> Result<()> {
    let before = fs::read_to_string(FILE).unwrap_or_default();
    // Somebody else's wish, or a kernel without: nothing to do.
    if pods < PODS_MIN || before.trim() != "0" || journal.installed_redirect().is_none() {
        return Ok(());
    }
    // Nothing is noted that could not be taken back: /sys may be read-only here.
    if let Err(error) = OpenOptions::new().write(true).open(FILE) {
        tracing::info!(%error, "{FILE} cannot be written: adding many pods takes longer");
        return Ok(());
    }
    journal.begin_expedited("0")?;
    write("1")
}
