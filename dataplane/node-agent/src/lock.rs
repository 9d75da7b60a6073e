//! One agent per state directory and per network namespace.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

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
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state_dir)
            .map_err(failed)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
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

/// An abstract socket, whose names each network namespace has for itself; held until dropped.
#[derive(Debug)]
pub(crate) struct NetnsLock {
    _socket: UnixDatagram,
}

impl NetnsLock {
    const NAME: &str = "ztunnel-node-agent";

    pub(crate) fn take() -> Result<Self> {
        let bound = SocketAddr::from_abstract_name(Self::NAME)
            .and_then(|name| UnixDatagram::bind_addr(&name));
        match bound {
            Ok(socket) => Ok(Self { _socket: socket }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(Error::NetnsLocked),
            Err(source) => Err(Error::Lock {
                path: PathBuf::from(format!("@{}", Self::NAME)),
                source,
            }),
        }
    }
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
}
