//! What can go wrong with a lab, one line each: what failed, on what, and what to do.

use std::io;
use std::path::PathBuf;

/// Result of a lab operation.
pub type Result<T> = std::result::Result<T, Error>;

/// Failure of a lab operation. The message is one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not started by root.
    #[error(
        "the lab creates network namespaces and needs root: run it as root (or with sudo); \
         effective uid is {uid}"
    )]
    NotRoot {
        /// Effective user id of this process.
        uid: u32,
    },
    /// A program of the system is not installed.
    #[error("program `{program}` is not in PATH: install Debian package {package}")]
    MissingProgram {
        /// Name of the program.
        program: &'static str,
        /// Debian package that holds it.
        package: &'static str,
    },
    /// A binary of this workspace (or the one named by the caller) does not exist.
    #[error("binary `{name}` not found, looked for {looked}: {hint}")]
    MissingBinary {
        /// Name of the binary.
        name: String,
        /// Paths tried.
        looked: String,
        /// What to do.
        hint: &'static str,
    },
    /// The kernel refuses something the lab needs.
    #[error("{what} needs {feature}, which this kernel or container refuses: {source}")]
    Kernel {
        /// Step that failed.
        what: String,
        /// What it needs.
        feature: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A lab of this name is up.
    #[error(
        "lab `{name}` is already up (redirect {redirect}): run `lab down --name {name}` first, \
         or choose another --name"
    )]
    AlreadyUp {
        /// Name of the lab.
        name: String,
        /// Its redirection.
        redirect: String,
    },
    /// No lab of this name is up.
    #[error("lab `{name}` is not up: run `lab up --name {name}` first")]
    NotUp {
        /// Name of the lab.
        name: String,
    },
    /// Namespaces with this lab's names exist, but the lab did not record them.
    #[error(
        "network namespace `{netns}` exists, but lab `{name}` has no record of it: \
         `lab down --name {name}` removes it, or choose another --name"
    )]
    Foreign {
        /// Name of the lab.
        name: String,
        /// The namespace in the way.
        netns: String,
    },
    /// A lab name that cannot be used in file and namespace names.
    #[error("lab name `{name}` is not usable: 1 to 32 of a-z, 0-9 and `-`, starting with a letter")]
    BadName {
        /// The name given.
        name: String,
    },
    /// A host the topology does not have.
    #[error("no host `{host}`; hosts are {known}")]
    UnknownHost {
        /// The name given.
        host: String,
        /// Names of all hosts.
        known: String,
    },
    /// Options that contradict each other.
    #[error("{0}")]
    Options(String),
    /// An external command failed.
    #[error("{what}: {detail}")]
    Command {
        /// Step and object.
        what: String,
        /// Last line the command wrote, or how it ended.
        detail: String,
    },
    /// A daemon did not come up.
    #[error("{program} on {host} {how}; its last words: {log}")]
    NotReady {
        /// The daemon.
        program: String,
        /// The host it runs on.
        host: String,
        /// Exited or timed out.
        how: String,
        /// Last log lines, joined.
        log: String,
    },
    /// A file operation or system call failed.
    #[error("{what} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Entering a network namespace failed.
    #[error("entering network namespace {path}: {source}", path = path.display())]
    Enter {
        /// The namespace's file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The state file cannot be understood.
    #[error("{path}: {reason}; `lab down` removes it", path = path.display())]
    State {
        /// The state file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate could not be made.
    #[error("making {what}: {source}")]
    Certificate {
        /// Which certificate.
        what: String,
        /// Why.
        source: rcgen::Error,
    },
    /// A process does not die.
    #[error("process {pid} on {host} survived SIGKILL for {seconds} s: look at /proc/{pid}/stack")]
    Immortal {
        /// The process.
        pid: u32,
        /// Where it runs.
        host: String,
        /// How long was waited.
        seconds: u64,
    },
}

impl Error {
    /// Attaches what was tried, and on which path, to an I/O error.
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
