//! Work in another network namespace: on a helper thread, so that no other thread ever leaves its
//! own. Commands started by that thread, and `/proc/sys/net` as it sees it, follow.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The calling thread's own namespace.
const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace, by path and by identity.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub(crate) struct Netns {
    /// None: the node's, in which the caller runs.
    path: Option<PathBuf>,
    /// A new namespace under the same path has another one.
    inode: u64,
}

impl Netns {
    /// The node's, that is the calling thread's.
    pub(crate) fn node() -> Result<Self> {
        Ok(Self {
            path: None,
            inode: inode(Path::new(OWN))?,
        })
    }

    pub(crate) fn at(path: &Path) -> Result<Self> {
        Ok(Self {
            path: Some(path.to_owned()),
            inode: inode(path)?,
        })
    }

    /// The calling thread's, which must be the one at `expected`.
    pub(crate) fn node_at(expected: Option<&Path>) -> Result<Self> {
        let own = Self::node()?;
        match expected {
            Some(path) if inode(path)? != own.inode => Err(Error::WrongNetns {
                path: path.to_owned(),
            }),
            _ => Ok(own),
        }
    }

    /// Whether it is still the namespace it was when this value was made.
    pub(crate) fn is_alive(&self) -> bool {
        let path = self.path.as_deref().unwrap_or_else(|| Path::new(OWN));
        inode(path).is_ok_and(|inode| inode == self.inode)
    }

    pub(crate) fn inode(&self) -> u64 {
        self.inode
    }

    pub(crate) fn describe(&self) -> String {
        self.path
            .as_ref()
            .map_or_else(|| "the node".to_owned(), |p| p.display().to_string())
    }

    /// Runs `work` inside.
    pub(crate) fn run<T, F>(&self, work: F) -> Result<T>
    where
        T: Send,
        F: FnOnce() -> Result<T> + Send,
    {
        let Some(path) = &self.path else {
            return work();
        };
        let netns_error = |source| Error::Netns {
            path: path.clone(),
            source,
        };
        let file = File::open(path).map_err(netns_error)?;
        let joined = thread::scope(|scope| {
            let helper = scope.spawn(|| {
                setns(&file, CloneFlags::CLONE_NEWNET)
                    .map_err(|errno| netns_error(io::Error::from(errno)))?;
                work()
            });
            helper.join()
        });
        match joined {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Number of the namespace at `path`; one that is made anew there has another.
pub(crate) fn inode(path: &Path) -> Result<u64> {
    let metadata = std::fs::metadata(path).map_err(|source| Error::Netns {
        path: path.to_owned(),
        source,
    })?;
    Ok(metadata.ino())
}

/// For each of these, whether it is the path of a network namespace that can be entered.
///
/// # Errors
/// Each alone: [`Error::Netns`] says what is wrong with it.
#[must_use]
pub fn check_namespaces(paths: &[&Path]) -> Vec<Result<()>> {
    if paths.is_empty() {
        return Vec::new();
    }
    // One thread enters them all and ends; nobody else leaves its own.
    let joined = thread::scope(|scope| {
        let helper = scope.spawn(|| paths.iter().map(|path| check_namespace(path)).collect());
        helper.join()
    });
    match joined {
        Ok(all) => all,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn check_namespace(path: &Path) -> Result<()> {
    let failed = |source| Error::Netns {
        path: path.to_owned(),
        source,
    };
    // Opening something else could wait (a FIFO) or have effects (a device).
    let info = nix::sys::statfs::statfs(path).map_err(|errno| failed(errno.into()))?;
    if info.filesystem_type() != nix::sys::statfs::NSFS_MAGIC {
        return Err(failed(io::Error::other("is not a network namespace")));
    }
    let file = File::open(path).map_err(failed)?;
    setns(&file, CloneFlags::CLONE_NEWNET).map_err(|errno| failed(errno.into()))
}

/// Number of an interface of the node, in whose network namespace the caller is.
///
/// # Errors
/// [`Error::Interface`] if there is none.
pub fn interface_index(name: &str) -> Result<u32> {
    index("the node", name)
}

/// An interface as the kernel numbers it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Interface {
    pub(crate) index: u32,
    pub(crate) mac: [u8; 6],
}

/// Number of an interface in the calling thread's namespace, which is called `place`.
pub(crate) fn index(place: &str, name: &str) -> Result<u32> {
    nix::net::if_::if_nametoindex(name).map_err(|errno| Error::Interface {
        name: name.to_owned(),
        place: place.to_owned(),
        source: errno.into(),
    })
}

/// Finds an interface of the namespace.
pub(crate) fn interface(netns: &Netns, name: &str) -> Result<Interface> {
    netns.run(|| {
        let not_found = |source| Error::Interface {
            name: name.to_owned(),
            place: netns.describe(),
            source,
        };
        let index = index(&netns.describe(), name)?;
        let addresses = nix::ifaddrs::getifaddrs().map_err(|e| not_found(e.into()))?;
        let mac = addresses
            .filter(|entry| entry.interface_name == name)
            .find_map(|entry| entry.address?.as_link_addr()?.addr());
        Ok(Interface {
            index,
            mac: mac.unwrap_or_default(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_namespace_is_alive_and_has_loopback() {
        let node = Netns::node().unwrap();
        assert!(node.is_alive());
        assert_eq!(interface(&node, "lo").unwrap().index, 1);
        let error = interface(&node, "no-such-if").unwrap_err().to_string();
        assert!(
            error.starts_with("interface no-such-if not found in the node"),
            "{error}"
        );
    }

    #[test]
    fn what_is_no_network_namespace_is_told_apart() {
        let here = Path::new(OWN);
        let wrong = [
            "/dev/null",
            "/etc",
            "/proc/self/ns/uts",
            "/run/netns/no-such",
        ]
        .map(Path::new);
        let paths: Vec<_> = [here].into_iter().chain(wrong).collect();
        let checked = check_namespaces(&paths);
        // Entering one's own takes a privilege, too.
        assert!(checked[0].is_ok() || !nix::unistd::geteuid().is_root());
        for (path, result) in wrong.iter().zip(&checked[1..]) {
            let text = result.as_ref().unwrap_err().to_string();
            assert!(text.contains(&path.display().to_string()), "{text}");
        }
    }

    #[test]
    fn missing_namespace_is_named() {
        let error = Netns::at(Path::new("/run/netns/no-such"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/run/netns/no-such"), "{error}");
    }
}
