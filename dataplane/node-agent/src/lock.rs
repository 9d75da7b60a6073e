//! One agent per state directory and per network namespace.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, UnixCredentials, connect, getsockopt, socket,
};
use nix::unistd::geteuid;

use crate::error::{Error, Result};

const FILE: &str = "lock";
const RETRY_EVERY: Duration = Duration::from_millis(50);

/// Held until dropped, also by the death of the process.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    _file: Flock<File>,
}

impl Lock {
    /// Takes the lock, waiting at most `patience` for a process that is just ending.
    pub(crate) fn take(state_dir: &Path, patience: Duration) -> Result<Self> {
        let path = state_dir.join(FILE);
        let failed = |source| Error::Lock {
            path: path.clone(),
            source,
        };
        redirect::check_trusted(&path)?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state_dir)
            .map_err(failed)?;
        redirect::check_trusted(&path)?;
        // Whoever can open it can hold it; an earlier version let everybody read it.
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        file.set_permissions(Permissions::from_mode(0o600))
            .map_err(failed)?;
        let deadline = Instant::now() + patience;
        loop {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(mut locked) => {
                    write_pid(&mut locked).map_err(failed)?;
                    return Ok(Self {
                        path,
                        _file: locked,
                    });
                }
                Err((_, Errno::EWOULDBLOCK)) if Instant::now() >= deadline => {
                    return Err(Error::Locked {
                        pid: holder(state_dir),
                        path,
                    });
                }
                Err((unlocked, Errno::EWOULDBLOCK)) => {
                    file = unlocked;
                    thread::sleep(RETRY_EVERY);
                }
                Err((_, errno)) => return Err(failed(errno.into())),
            }
        }
    }

    /// Removes the file, too; for when there is nothing left to protect.
    pub(crate) fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(|source| Error::Lock {
            path: self.path.clone(),
            source,
        })
    }
}

/// An abstract socket, whose names each network namespace has for itself, whatever is mounted
/// where: against a second agent with another state directory, in another container say. Held until
/// dropped.
///
/// Anybody in the namespace can take the name. So it counts only if root holds it, by what the
/// kernel says of the process that listens there: others keep no agent from its work, and two
/// agents with one state directory are kept apart by [`Lock`] all the same.
#[derive(Debug)]
pub(crate) struct NetnsLock {
    _socket: Option<UnixListener>,
}

impl NetnsLock {
    const NAME: &str = "ztunnel-node-agent";

    pub(crate) fn take() -> Result<Self> {
        let failed = |source| Error::Lock {
            path: PathBuf::from(format!("@{}", Self::NAME)),
            source,
        };
        let name = SocketAddr::from_abstract_name(Self::NAME).map_err(failed)?;
        match UnixListener::bind_addr(&name) {
            Ok(socket) => Ok(Self {
                _socket: Some(socket),
            }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => match name_holder() {
                Ok(holder) if holder.uid() == geteuid().as_raw() => {
                    Err(Error::NetnsLocked { pid: holder.pid() })
                }
                Ok(holder) => {
                    let (uid, pid) = (holder.uid(), holder.pid());
                    tracing::warn!(uid, pid, "@{} is held by no agent, ignored", Self::NAME);
                    Ok(Self { _socket: None })
                }
                Err(error) => {
                    tracing::warn!(%error, "@{} is held by nobody who tells, ignored", Self::NAME);
                    Ok(Self { _socket: None })
                }
            },
            Err(source) => Err(failed(source)),
        }
    }
}

/// The process that listens under the name. Does not wait: a queue may be full.
fn name_holder() -> nix::Result<UnixCredentials> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let name = UnixAddr::new_abstract(NetnsLock::NAME.as_bytes())?;
    connect(socket.as_raw_fd(), &name)?;
    getsockopt(&socket, PeerCredentials)
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

/// What the file says, for messages.
fn holder(state_dir: &Path) -> String {
    let mut text = String::new();
    let read = File::open(state_dir.join(FILE)).and_then(|mut f| f.read_to_string(&mut text));
    match read {
        Ok(_) if !text.trim().is_empty() => text.trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}

/// Process id of the agent that runs now, if one does.
pub(crate) fn running(state_dir: &Path) -> Option<u32> {
    let file = File::open(state_dir.join(FILE)).ok()?;
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Err((_, Errno::EWOULDBLOCK)) => holder(state_dir).parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_agent_is_refused_and_told_by_whom() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::take(dir.path(), Duration::ZERO).unwrap();
        assert_eq!(running(dir.path()), Some(std::process::id()));
        let error = Lock::take(dir.path(), Duration::ZERO)
            .unwrap_err()
            .to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(first);
        assert_eq!(running(dir.path()), None);
        Lock::take(dir.path(), Duration::ZERO)
            .unwrap()
            .remove()
            .unwrap();
        assert!(!dir.path().join(FILE).exists());
    }

    #[test]
    fn nobody_else_can_open_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let _lock = Lock::take(dir.path(), Duration::ZERO).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_directory_that_others_can_write_is_no_place_for_a_lock() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        std::fs::create_dir(&state).unwrap();
        std::fs::set_permissions(&state, Permissions::from_mode(0o777)).unwrap();
        let error = Lock::take(&state, Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("0777"), "{error}");
        assert!(!state.join(FILE).exists());
    }
}
