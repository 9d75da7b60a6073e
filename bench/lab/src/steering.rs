//! The eBPF redirection for programs that know nothing of it: their listeners are put into its map
//! for them.
//!
//! The redirection gives a connection to the socket that ztunnel registered for the CPU it comes in
//! on. Registering needs a descriptor of the socket, and those of another process can be duplicated
//! (pidfd_getfd(2), Linux 5.6). So a program only has to listen where ztunnels do, transparently;
//! its sockets are found in its descriptors once it says that it is ready. One that opens listeners
//! later, or anew, does not get what comes for them.

use std::collections::HashMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use mesh::ports;
use nix::unistd::{SysconfVar, sysconf};
use redirect::{ListenerMap, Role};
use rustix::process::{ForeignRawFd, Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::error::{Error, Result};

/// Where ztunnels listen, and for what.
const PORTS: [(u16, Role); 3] = [
    (ports::OUTBOUND, Role::Outbound),
    (ports::INBOUND_PLAIN, Role::InboundPlain),
    (ports::INBOUND_HBONE, Role::InboundHbone),
];

/// Registers the listeners of the process `pid` in the map pinned at `map`.
///
/// # Errors
/// [`Error::Command`]: what could not be read or duplicated, or that it does not listen on 15001.
pub(crate) fn register(map: &Path, pid: u32) -> Result<()> {
    let failed = |detail: String| Error::Command {
        what: format!("registering the listeners of process {pid}"),
        detail,
    };
    let own = listeners(pid).map_err(|error| failed(error.to_string()))?;
    let id = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let id = id.ok_or_else(|| failed("no such process".to_owned()))?;
    let process = pidfd_open(id, PidfdFlags::empty());
    let process = process.map_err(|error| failed(format!("pidfd_open: {error}")))?;
    let mut map = ListenerMap::open(map).map_err(|error| failed(error.to_string()))?;
    for (port, role) in PORTS {
        let mine = own.iter().filter(|(of, _)| *of == port);
        let mine: Vec<ForeignRawFd> = mine.map(|(_, descriptor)| *descriptor).collect();
        if mine.is_empty() && role == Role::Outbound {
            return Err(failed(format!("it does not listen on port {port}")));
        }
        for (cpu, descriptor) in (0..configured_cpus()).zip(mine.iter().cycle()) {
            let socket = pidfd_getfd(&process, *descriptor, PidfdGetfdFlags::empty());
            let socket = socket.map_err(|error| failed(format!("pidfd_getfd: {error}")))?;
            map.set(role, cpu, socket.as_fd())
                .map_err(|error| failed(format!("port {port}: {error}")))?;
        }
    }
    Ok(())
}

/// Port and descriptor of each TCP socket on which `pid` listens.
fn listeners(pid: u32) -> std::io::Result<Vec<(u16, ForeignRawFd)>> {
    let mut ports = HashMap::new();
    for table in ["tcp", "tcp6"] {
        // IPv6 may be missing.
        let text = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        ports.extend(text.lines().skip(1).filter_map(listening));
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        // A descriptor that was closed meanwhile is none of a listener that stays.
        let link = fs::read_link(&path).unwrap_or_default();
        let inode = link.to_str().and_then(|link| {
            let inode = link.strip_prefix("socket:[")?.strip_suffix(']')?;
            inode.parse::<u64>().ok()
        });
        let descriptor = path
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok());
        if let (Some(port), Some(descriptor)) = (inode.and_then(|i| ports.get(&i)), descriptor) {
            found.push((*port, descriptor));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Inode and port of a line of /proc/net/tcp, if it is of a listener: its state is 0A.
fn listening(line: &str) -> Option<(u64, u16)> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [_, local, _, "0A", ..] = fields[..] else {
        return None;
    };
    let port = u16::from_str_radix(local.rsplit(':').next()?, 16).ok()?;
    Some((fields.get(9)?.parse().ok()?, port))
}

/// CPUs the machine has, whether or not we may use them: packets arrive on all.
pub(crate) fn configured_cpus() -> u32 {
    let count = sysconf(SysconfVar::_NPROCESSORS_CONF).ok().flatten();
    count.and_then(|count| count.try_into().ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn listeners_are_found_with_their_descriptors_and_connections_are_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let _connection = std::net::TcpStream::connect(address).unwrap();
        let found = listeners(std::process::id()).unwrap();
        let mine: Vec<_> = found.iter().filter(|(p, _)| *p == address.port()).collect();
        assert_eq!(mine, [&(address.port(), listener.as_raw_fd())]);
    }

    #[test]
    fn a_process_that_has_gone_is_an_error() {
        let error = register(Path::new("/none"), 4_194_305).unwrap_err();
        assert!(error.to_string().contains("process 4194305"), "{error}");
    }
}
