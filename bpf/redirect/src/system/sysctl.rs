//! `/proc/sys/net` entries of the calling thread's network namespace.

use std::fs;
use std::path::PathBuf;

use crate::error::{Error, Result};

fn path(name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/sys/{name}"))
}

/// Reads `net/...`.
pub(crate) fn read(name: &str) -> Result<String> {
    fs::read_to_string(path(name))
        .map(|value| value.trim().to_owned())
        .map_err(|source| Error::file("read", path(name), source))
}

/// Writes `net/...`.
pub(crate) fn write(name: &str, value: &str) -> Result<()> {
    fs::write(path(name), value).map_err(|source| Error::file("write", path(name), source))
}
