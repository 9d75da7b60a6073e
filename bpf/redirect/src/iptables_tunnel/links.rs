//! The two tunnels: each a layer-2 link over UDP between the node and ztunnel's namespace.
//!
//! They carry the first packet of each connection. GENEVE where the kernel has it, else VXLAN with
//! the same identifiers, port and routes.

use std::net::Ipv4Addr;

use super::rules::{IN, OUT, PEER_IN, PEER_OUT};
use crate::back_end::{Driver, Tunnels};
use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::journal::undo::Undo;
use crate::system::command::{self, ip};
use crate::system::netns::Netns;

const PORT_FIRST: u16 = 6081;
const PORT_LAST: u16 = 6096;

/// One end of a tunnel.
struct End {
    name: &'static str,
    id: u32,
    address: &'static str,
}

const NODE_ENDS: [End; 2] = [
    End {
        name: IN,
        id: 1000,
        address: "192.168.126.1/30",
    },
    End {
        name: OUT,
        id: 1001,
        address: "192.168.127.1/30",
    },
];
const ZTUNNEL_ENDS: [End; 2] = [
    End {
        name: PEER_IN,
        id: 1000,
        address: "192.168.126.2/30",
    },
    End {
        name: PEER_OUT,
        id: 1001,
        address: "192.168.127.2/30",
    },
];

/// Makes both ends of both tunnels, or adopts those that are there, and says how.
pub(crate) fn ensure(
    journal: &mut Journal,
    node: &Netns,
    ztunnel: &Netns,
    addresses: (Ipv4Addr, Ipv4Addr),
) -> Result<Tunnels> {
    let (node_address, ztunnel_address) = addresses;
    let tunnels = match journal.tunnels() {
        Some(known) => known,
        None => choose(journal, node, ztunnel_address)?,
    };
    for end in &NODE_ENDS {
        ensure_end(journal, node, end, tunnels, ztunnel_address)?;
    }
    for end in &ZTUNNEL_ENDS {
        ensure_end(journal, ztunnel, end, tunnels, node_address)?;
    }
    Ok(tunnels)
}

/// Finds a driver the kernel has and a port no other tunnel uses, by making the node's first end.
fn choose(journal: &mut Journal, node: &Netns, remote: Ipv4Addr) -> Result<Tunnels> {
    let end = &NODE_ENDS[0];
    if exists(node, end.name) {
        return Err(taken(node, end.name));
    }
    journal.record(
        None,
        Undo::command(node, format!("ip link del {}", end.name)),
    )?;
    let mut failure = None;
    // A port of our own: what comes to it and is not ztunnel's is dropped.
    let taken = tunnel_ports(node)?;
    for driver in Driver::ALL {
        for port in (PORT_FIRST..=PORT_LAST).filter(|port| !taken.contains(port)) {
            let tunnels = Tunnels { driver, port };
            match node.run(|| ip(&add_line(end, tunnels, remote))) {
                Ok(_) => {
                    journal.set_tunnels(tunnels)?;
                    return Ok(tunnels);
                }
                // The identifier is taken on this port, or the name is.
                Err(error) if command::is_present(&error) && !exists(node, end.name) => {
                    failure = Some(error);
                }
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
    }
    Err(failure.unwrap_or_else(|| Error::Setting {
        field: "tunnel",
        value: end.name.to_owned(),
        reason: format!("other tunnels have all ports of {PORT_FIRST} to {PORT_LAST}"),
    }))
}

/// UDP ports of the tunnels that there are.
fn tunnel_ports(node: &Netns) -> Result<Vec<u16>> {
    let shown = node.run(|| ip("-d -o link show"))?;
    let port = |line: &str| {
        let mut words = line
            .split_whitespace()
            .skip_while(|word| *word != "dstport");
        words.nth(1)?.parse().ok()
    };
    Ok(shown.lines().filter_map(port).collect())
}

fn add_line(end: &End, tunnels: Tunnels, remote: Ipv4Addr) -> String {
    let Tunnels { driver, port } = tunnels;
    format!(
        "link add {} type {driver} id {} remote {remote} dstport {port}",
        end.name, end.id
    )
}

/// An interface that the journal does not know is someone else's, whatever its name.
fn taken(netns: &Netns, name: &str) -> Error {
    Error::Setting {
        field: "tunnel interface",
        value: name.to_owned(),
        reason: format!(
            "exists in {} and is not ours: remove it first",
            netns.describe()
        ),
    }
}

fn exists(netns: &Netns, name: &str) -> bool {
    netns.run(|| ip(&format!("link show dev {name}"))).is_ok()
}

fn ensure_end(
    journal: &mut Journal,
    netns: &Netns,
    end: &End,
    tunnels: Tunnels,
    remote: Ipv4Addr,
) -> Result<()> {
    let name = end.name;
    let undo = Undo::command(netns, format!("ip link del {name}"));
    if !journal.has(&undo) && exists(netns, name) {
        return Err(taken(netns, name));
    }
    journal.record(None, undo)?;
    netns.run(|| {
        if let Ok(shown) = ip(&format!("-d link show dev {name}")) {
            let wanted = format!("{} id {} remote {remote} ", tunnels.driver, end.id);
            let port = format!("dstport {} ", tunnels.port);
            if !shown.contains(&wanted) || !shown.contains(&port) {
                ip(&format!("link del {name}"))?;
                ip(&add_line(end, tunnels, remote))?;
            }
        } else {
            ip(&add_line(end, tunnels, remote))?;
        }
        ip(&format!("addr replace {} dev {name}", end.address))?;
        ip(&format!("link set {name} up"))?;
        // The other end may be a new one with another MAC address.
        ip(&format!("neigh flush dev {name}")).map(drop)
    })
}
