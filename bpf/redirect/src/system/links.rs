//! The node's interfaces, read once for many pods.

use std::collections::HashMap;
use std::io;

use super::command;
use super::netns::Netns;
use crate::error::{Error, Result};

/// What matters of an interface's kind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    /// veth or netkit: packets can be redirected to its peer.
    Pair,
    /// TUN or TAP: one process has its other end.
    Tun,
    /// Whatever else: bridges, bonds, the machine's own.
    Other,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    index: u32,
    kind: Kind,
    /// Whether its packets come in Ethernet frames.
    has_ethernet: bool,
}

/// Interfaces by name.
#[derive(Debug, Default)]
pub(crate) struct Links(HashMap<String, Link>);

impl Links {
    pub(crate) fn read(node: &Netns) -> Result<Self> {
        node.run(|| command::ip("-d -o link show"))
            .map(|shown| Self::parse(&shown))
    }

    fn parse(shown: &str) -> Self {
        let entry = |line: &str| {
            let mut words = line.split_whitespace();
            let index = words.next()?.strip_suffix(':')?.parse().ok()?;
            let name = words.next()?.strip_suffix(':')?;
            let name = name.split('@').next()?.to_owned();
            let kind = if line.contains(" veth ") || line.contains(" netkit ") {
                Kind::Pair
            } else if line.contains(" tun type ") {
                Kind::Tun
            } else {
                Kind::Other
            };
            let link = Link {
                index,
                kind,
                has_ethernet: line.contains(" link/ether "),
            };
            Some((name, link))
        };
        Self(shown.lines().filter_map(entry).collect())
    }

    pub(crate) fn index(&self, name: &str) -> Result<u32> {
        let found = self.0.get(name).map(|link| link.index);
        found.ok_or_else(|| Error::Interface {
            name: name.to_owned(),
            place: "the node".to_owned(),
            source: io::Error::from_raw_os_error(19),
        })
    }

    /// Index of an interface that must have a peer: packets redirected to the peer of any other
    /// kind would vanish.
    pub(crate) fn veth(&self, field: &'static str, name: &str) -> Result<u32> {
        let index = self.index(name)?;
        match self.0.get(name).map(|link| link.kind) {
            Some(Kind::Pair) => Ok(index),
            _ => Err(Error::Setting {
                field,
                value: name.to_owned(),
                reason: "must be a veth or netkit interface for redirection ebpf".to_owned(),
            }),
        }
    }

    /// Index of an interface whose packets come in Ethernet frames: where they do not, the programs
    /// would look for their headers in what a sender chose to put there.
    pub(crate) fn with_ethernet(&self, field: &'static str, name: &str) -> Result<u32> {
        let index = self.index(name)?;
        match self.0.get(name) {
            Some(link) if link.has_ethernet => Ok(index),
            _ => Err(Error::Setting {
                field,
                value: name.to_owned(),
                reason: "has no Ethernet header (TUN, WireGuard, IP in IP): name the interfaces \
                         that carry the tunnel"
                    .to_owned(),
            }),
        }
    }

    /// Index of an interface that is one pod's alone, by its kind.
    pub(crate) fn of_one_pod(&self, name: &str) -> Result<u32> {
        let index = self.index(name)?;
        match self.0.get(name).map(|link| link.kind) {
            Some(Kind::Pair | Kind::Tun) => Ok(index),
            _ => Err(Error::Setting {
                field: "pods.host_interface",
                value: name.to_owned(),
                reason: "is not cut off: neither veth nor netkit nor tun, so that others may \
                         need it"
                    .to_owned(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_and_kind_are_read() {
        let links = Links::parse(
            "1: lo: <LOOPBACK> mtu 65536\\    link/loopback 00:00 promiscuity 0\n\
             4: t0: <NOARP> mtu 1500 qdisc noop\\    link/none promiscuity 0 \\    tun type tun pi off \n\
             12: va1@if2: <UP> mtu 1500\\    link/ether 0a:0b link-netns x promiscuity 0\\    veth \n",
        );
        assert_eq!(links.veth("x", "va1").unwrap(), 12);
        assert_eq!(links.index("lo").unwrap(), 1);
        assert_eq!(links.of_one_pod("va1").unwrap(), 12);
        assert_eq!(links.of_one_pod("t0").unwrap(), 4);
        assert_eq!(links.with_ethernet("x", "va1").unwrap(), 12);
        links.with_ethernet("x", "t0").unwrap_err();
        links.of_one_pod("lo").unwrap_err();
        links.veth("x", "t0").unwrap_err();
        let text = links.veth("x", "lo").unwrap_err().to_string();
        assert!(text.contains("veth or netkit"), "{text}");
        let text = links.index("va2").unwrap_err().to_string();
        assert!(text.starts_with("interface va2 not found"), "{text}");
    }
}
