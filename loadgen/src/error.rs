//! Errors that end a command. What happens to single requests is in [`crate::outcome`].

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Why a command could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server's address could not be taken.
    #[error("cannot listen on {address}: {source}{}", listen_hint(source))]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// A worker's event loop could not be set up or failed while running.
    #[error("cannot {what}: {source}")]
    Worker {
        /// What the worker was doing.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A thread could not be bound to its CPU.
    #[error(
        "cannot run on CPU {cpu} (--cpus): {source}; it may not exist or this process may not use \
         it"
    )]
    Pin {
        /// CPU number as the kernel counts, from 0.
        cpu: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// A result file could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Output {
        /// The file asked for.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A setting is out of its range.
    #[error("{name} is {value}, must be {allowed}")]
    Setting {
        /// The option's name on the command line.
        name: &'static str,
        /// What was given.
        value: String,
        /// The allowed range in words.
        allowed: &'static str,
    },
    /// A worker thread panicked: a bug in this program.
    #[error("worker {0} stopped by a panic (see above); please report it")]
    Panicked(usize),
}

impl Error {
    /// For `map_err` on the set-up and running of event loops.
    pub(crate) fn worker(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Worker { what, source }
    }
}

fn listen_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => "; another process listens there",
        io::ErrorKind::AddrNotAvailable => "; no interface has this address",
        io::ErrorKind::PermissionDenied => "; ports below 1024 need privileges",
        _ => "",
    }
}
