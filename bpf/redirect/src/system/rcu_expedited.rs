//! Making the kernel wait less when many programs are attached.
//!
//! Attaching a program by tcx ends with a wait until all CPUs have stopped using the list of
//! programs that was replaced (`synchronize_rcu`), 5 to 20 ms each, one after the other because of
//! the lock all changes of interfaces take. With `rcu_expedited` the kernel interrupts the CPUs
//! instead, which takes a fraction of a millisecond. The journal sets it for as long as many pods
//! are added and then puts it back.

use std::fs::{self, OpenOptions};
use std::path::Path;

use crate::error::{Error, Result};

const FILE: &str = "/sys/kernel/rcu_expedited";

/// What it is; empty on a kernel without it.
pub(crate) fn read() -> String {
    let text = fs::read_to_string(FILE).unwrap_or_default();
    text.trim().to_owned()
}

/// Sets it.
pub(crate) fn write(value: &str) -> Result<()> {
    fs::write(FILE, value).map_err(failed)
}

/// Whether it could be set: `/sys` may be read-only here.
pub(crate) fn check_writable() -> Result<()> {
    let opened = OpenOptions::new().write(true).open(FILE);
    opened.map(drop).map_err(failed)
}

fn failed(source: std::io::Error) -> Error {
    Error::file("write", Path::new(FILE), source)
}
