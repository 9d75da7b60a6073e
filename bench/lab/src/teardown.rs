//! Removing a lab, whatever state it is in.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use crate::agent;
use crate::error::{Error, Result};
use crate::lock::{Lock, ROOT};
use crate::network;
use crate::process::{self, Process};
use crate::state::{State, directory};
use crate::topology::Node;

/// Removes everything the lab `name` has or had: redirection, processes, mounts, namespaces with
/// their links, and files. Returns whether there was anything.
///
/// Order matters: ztunnels first, so that nothing relays while redirection goes; the agents'
/// clean-up before their namespaces; mounts (and with them pinned maps and links) after the last
/// process that could pin again.
pub(crate) fn remove(name: &str, lock: &Lock) -> Result<bool> {
    let directory = directory(name);
    // An unreadable state file only costs the agent's own clean-up; nothing depends on that.
    let state = State::load(name).unwrap_or(None);
    let existed = directory.exists() || network::existing(name).is_some();
    process::stop_all(&known_processes(name, state.as_ref()))?;
    if let Some(binary) = state.as_ref().and_then(|state| state.node_agent.as_deref()) {
        for node in Node::ALL {
            if agent::config_path(name, node).exists() {
                agent::cleanup(name, binary, node);
            }
        }
    }
    process::stop_all(&process::inside(name))?;
    for mount in mounts_below(&directory)? {
        unmount(&mount)?;
    }
    network::remove(name, lock)?;
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("removing", directory)(error))
        }
        _ => Ok(existed),
    }
}

/// Names of all labs that have a directory.
pub(crate) fn names() -> Vec<String> {
    let Ok(entries) = fs::read_dir(ROOT) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Recorded processes, and all others inside the lab's namespaces.
fn known_processes(name: &str, state: Option<&State>) -> Vec<Process> {
    let mut processes = state
        .map(|state| state.processes.clone())
        .unwrap_or_default();
    for found in process::inside(name) {
        if !processes.iter().any(|known| known.pid == found.pid) {
            processes.push(found);
        }
    }
    processes
}

/// Mount points at or below `directory`, innermost first.
fn mounts_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let path = "/proc/self/mountinfo";
    let text = fs::read_to_string(path).map_err(Error::io("reading", path))?;
    let mut mounts: Vec<_> = text
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .filter(|mount| mount.starts_with(directory))
        .collect();
    mounts.reverse();
    Ok(mounts)
}

fn unmount(path: &Path) -> Result<()> {
    // Detaching also works while somebody's shell stands in there.
    umount2(path, MntFlags::MNT_DETACH).map_err(|errno| Error::io("unmounting", path)(errno.into()))
}
