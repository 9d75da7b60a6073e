//! The limit of open files: a proxy needs two or three for each connection.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the limit to what the hard one allows.
pub(crate) fn raise_open_files() {
    let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        eprintln!("ztunnel: cannot raise the limit of open files to {hard}: {error}");
    }
}

/// Open files the process may have.
pub(crate) fn open_files() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    usize::try_from(limit).unwrap_or(usize::MAX)
}
