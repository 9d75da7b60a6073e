//! Running code and programs inside a named network namespace.
//!
//! `setns` moves only the calling thread, so everything here happens on a short-lived thread: the
//! caller's namespace never changes, sockets made inside stay inside after the thread has ended,
//! and a child inherits the namespace of the thread that forked it.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::SigSet;

use crate::error::{Error, Result};

/// Where iproute2 keeps named network namespaces.
const DIRECTORY: &str = "/run/netns";

/// File that stands for the namespace `netns`.
#[must_use]
pub fn path(netns: &str) -> PathBuf {
    Path::new(DIRECTORY).join(netns)
}

/// Inode that identifies a namespace for as long as it exists; `None` if there is no such
/// namespace (a plain file left behind by a half-done `ip netns add` counts as none).
#[must_use]
pub fn inode(path: &Path) -> Option<u64> {
    use nix::sys::statfs::{NSFS_MAGIC, statfs};
    let magic = statfs(path).ok()?.filesystem_type();
    let metadata = std::fs::metadata(path).ok()?;
    (magic == NSFS_MAGIC).then(|| metadata.ino())
}

/// Moves the calling thread into the namespace at `path`, for good.
///
/// # Errors
/// [`Error::Enter`] if the namespace does not exist or may not be entered.
pub fn enter(path: &Path) -> Result<()> {
    let enter = |source| Error::Enter {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(enter)?;
    setns(file, CloneFlags::CLONE_NEWNET).map_err(|errno| enter(errno.into()))
}

/// Runs `f` on a thread inside the namespace at `path` and returns what it returns. Sockets that
/// `f` makes belong to that namespace and may be used from anywhere afterwards.
///
/// # Errors
/// [`Error::Enter`] if the namespace does not exist or may not be entered.
pub fn in_namespace<T: Send>(path: &Path, f: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| enter(path).map(|()| f()));
        match inside.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// A [`Command`] that runs in a host's network namespace.
#[derive(Debug)]
pub struct HostCommand {
    netns: PathBuf,
    command: Command,
}

impl HostCommand {
    /// A command for `program` in the namespace at `netns`.
    #[must_use]
    pub fn new(netns: PathBuf, program: impl AsRef<OsStr>) -> Self {
        Self {
            netns,
            command: Command::new(program),
        }
    }

    /// Adds an argument.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(&mut self, args: impl IntoIterator<Item = S>) -> &mut Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(&mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        self.command.env(key, value);
        self
    }

    /// Standard input.
    pub fn stdin(&mut self, stdin: impl Into<Stdio>) -> &mut Self {
        self.command.stdin(stdin);
        self
    }

    /// Standard output.
    pub fn stdout(&mut self, stdout: impl Into<Stdio>) -> &mut Self {
        self.command.stdout(stdout);
        self
    }

    /// Standard error.
    pub fn stderr(&mut self, stderr: impl Into<Stdio>) -> &mut Self {
        self.command.stderr(stderr);
        self
    }

    /// The command itself, for everything else (working directory, process group).
    pub fn inner(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Starts the command, with no signal blocked whatever this process has blocked.
    ///
    /// # Errors
    /// The namespace cannot be entered or the program cannot be started.
    pub fn spawn(&mut self) -> io::Result<Child> {
        let Self { netns, command } = self;
        let spawn = || {
            // A child inherits the mask of the thread that starts it, and one that has SIGTERM
            // blocked cannot be stopped in order. This thread ends right after.
            SigSet::all().thread_unblock()?;
            command.spawn()
        };
        in_namespace(netns, spawn).map_err(io::Error::other)?
    }

    /// Runs the command to its end, with nothing to read, and collects its output.
    ///
    /// # Errors
    /// As [`Self::spawn`].
    pub fn output(&mut self) -> io::Result<Output> {
        self.stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.spawn()?.wait_with_output()
    }

    /// Runs the command to its end.
    ///
    /// # Errors
    /// As [`Self::spawn`].
    pub fn status(&mut self) -> io::Result<ExitStatus> {
        self.spawn()?.wait()
    }
}
