//! The agent's error, one line each.

use std::io;
use std::path::PathBuf;

/// Shorthand for results of the agent.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the agent gives up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The configuration file cannot be read.
    #[error("cannot read configuration {}: {source}", path.display())]
    ReadConfig { path: PathBuf, source: io::Error },
    /// It is not what it should be.
    #[error("configuration {}: {reason}", path.display())]
    Config { path: PathBuf, reason: String },
    /// Another agent works on this node.
    #[error("{} is held by process {pid}: another node-agent runs for this node, stop it first",
            path.display())]
    Locked { path: PathBuf, pid: String },
    /// Another agent works in this network namespace, with another state directory.
    #[error("another node-agent runs in this network namespace, process {pid}: stop it first")]
    NetnsLocked { pid: i32 },
    /// The lock file or the state directory cannot be used.
    #[error("cannot lock {}: {source}", path.display())]
    Lock { path: PathBuf, source: io::Error },
    /// Signals cannot be waited for.
    #[error("cannot wait for signals: {0}")]
    Signals(nix::errno::Errno),
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// Standard output is gone.
    #[error("cannot write to standard output: {0}")]
    Output(io::Error),
    /// The endpoint for metrics cannot be had.
    #[error("stats_address {address}: {source}: is the port taken?")]
    Stats {
        address: std::net::SocketAddr,
        source: io::Error,
    },
    /// Redirection failed.
    #[error(transparent)]
    Redirect(#[from] redirect::Error),
}
