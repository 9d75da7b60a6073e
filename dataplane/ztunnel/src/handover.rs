//! One ztunnel after another in one network namespace.
//!
//! The younger binds the data path's ports beside the elder (`SO_REUSEPORT`), takes over where
//! packets are steered to, and waits for the ports of the endpoints. The elder goes on until it is
//! told to end. Then it accepts a moment longer, because handshakes of clients are under way with
//! it, and lets the endpoints' ports go, so that the younger answers there while it drains. A
//! ztunnel without a successor keeps them to its end.
//!
//! Neither talks to the other: whether there is another one is seen from who listens on the ports.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::time::Duration;

/// How long a ztunnel that has a successor goes on accepting: time for handshakes of TCP that began
/// when connections were still its own, with one retransmission of a packet.
pub(crate) const ACCEPT_FOR: Duration = Duration::from_millis(1_500);

/// How often ports are looked at.
pub(crate) const INTERVAL: Duration = Duration::from_millis(50);

/// Lets a closing listener's connections move to another one of the port (Linux 5.14).
const MIGRATE: &str = "/proc/sys/net/ipv4/tcp_migrate_req";

/// Sees other processes that listen on a port of ours.
#[derive(Clone, Debug)]
pub(crate) struct Neighbours {
    port: u16,
    own: HashSet<u64>,
}

impl Neighbours {
    /// Of `port`, where nobody listens yet for this process.
    pub(crate) fn of(port: u16) -> Self {
        Self {
            port,
            own: HashSet::new(),
        }
    }

    /// `socket` is this process's own.
    pub(crate) fn add_own(&mut self, socket: &impl AsRawFd) {
        let link = fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd()));
        self.own
            .extend(link.ok().and_then(|link| inode_of(link.to_str()?)));
    }

    /// Whether somebody else listens on the port in this thread's network namespace. What cannot be
    /// read counts as nobody.
    pub(crate) fn are_there(&self) -> bool {
        let foreign = |(port, inode)| port == self.port && !self.own.contains(&inode);
        if let Ok(listening) = redirect::listening() {
            return listening
                .into_iter()
                .any(|(address, inode)| foreign((address.port(), inode)));
        }
        // A kernel without sock_diag. Reading this walks the table of all connections.
        ["tcp", "tcp6"].iter().any(|table| {
            let listed = listeners(table).unwrap_or_default();
            listed.into_iter().any(foreign)
        })
    }
}

/// The number in `socket:[123]`.
fn inode_of(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

/// Port and inode of every listening socket: they come first in the table.
fn listeners(table: &str) -> io::Result<Vec<(u16, u64)>> {
    let table = BufReader::new(File::open(format!("/proc/thread-self/net/{table}"))?);
    let mut found = Vec::new();
    for line in table.lines().skip(1) {
        match listener(&line?) {
            Some(listener) => found.push(listener),
            None => break,
        }
    }
    Ok(found)
}

/// One line of `/proc/net/tcp`, if it is of a listening socket (state 0A).
fn listener(line: &str) -> Option<(u16, u64)> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (_, port) = fields.next()?.rsplit_once(':')?;
    let state = fields.nth(1)?;
    let inode = fields.nth(5)?.parse().ok()?;
    (state == "0A").then_some((u16::from_str_radix(port, 16).ok()?, inode))
}

/// In a namespace that is ztunnel's own: what waits at a listener that is closed goes to the
/// successor's instead of being reset.
pub(crate) fn let_connections_move() {
    let is_on = || fs::read_to_string(MIGRATE).is_ok_and(|value| value.trim() == "1");
    if !is_on() && fs::write(MIGRATE, "1").is_err() {
        tracing::info!(
            "net.ipv4.tcp_migrate_req is 0 and cannot be set: a connection whose handshake takes \
             longer than {} ms when another ztunnel takes over may be reset",
            ACCEPT_FOR.as_millis()
        );
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};

    use super::*;

    #[test]
    fn others_are_told_from_own_listeners() {
        let any: [(std::net::IpAddr, u16); 2] = [
            (Ipv4Addr::LOCALHOST.into(), 0),
            (Ipv6Addr::LOCALHOST.into(), 0),
        ];
        for address in any {
            let Ok(first) = TcpListener::bind(address) else {
                continue; // no IPv6 here
            };
            let to = first.local_addr().unwrap();
            let mut neighbours = Neighbours::of(to.port());
            assert!(neighbours.are_there());
            // A second descriptor is the same socket.
            neighbours.add_own(&first.try_clone().unwrap());
            let client = TcpStream::connect(to).unwrap();
            assert!(!neighbours.are_there(), "connections do not listen");
            drop((client, first));
            assert!(!Neighbours::of(to.port()).are_there());
        }
    }

    #[test]
    fn lines_of_the_table_are_read() {
        let line = "   3: 00000000:3A99 00000000:0000 0A 00000000:00000000 00:00000000 00000000 \
                    0        0 4711 1 ffff 100 0 0 10 0";
        assert_eq!(listener(line), Some((15001, 4711)));
        let established = line.replace(" 0A ", " 01 ");
        assert_eq!(listener(&established), None);
        assert_eq!(listener("   3: 00000000:3A99"), None);
        assert_eq!(inode_of("socket:[4711]"), Some(4711));
        assert_eq!(inode_of("/dev/null"), None);
    }
}
