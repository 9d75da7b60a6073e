//! The user-space side of `bpf/src/layout.h`. A change here is a change there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::settings::UNDERLAYS_MAX;
use crate::system::pins::MapLayout;
pub(crate) use crate::system::programs::{
    APP_INBOUND, APP_OUTBOUND, CUT_OFF, PROGRAMS, UNDERLAY_INGRESS, ZTUNNEL_GUARD, ZTUNNEL_HOST,
    ZTUNNEL_INGRESS,
};

/// The compiled `bpf/src/redirect.bpf.c`.
pub(crate) static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/redirect.bpf.o"));

/// CPUs the map has room for; `MAX_CPUS` of `bpf/src/layout.h`.
pub const MAX_CPUS: u32 = 1024;

/// What a listener is for; the values are those of `bpf/src/layout.h`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u32)]
pub enum Role {
    /// Connections local pods make (15001).
    Outbound = 0,
    /// Plaintext connections to local pods (15006).
    InboundPlain = 1,
    /// HBONE connections to local pods (15008).
    InboundHbone = 2,
    /// DNS queries of local pods over UDP (15053), if they are captured.
    DnsUdp = 3,
    /// DNS queries of local pods over TCP (15053), if they are captured.
    DnsTcp = 4,
}

/// Number of roles.
const ROLES: u32 = 5;

/// Size of `struct config`.
pub(crate) const CONFIG_BYTES: usize = 8 + 2 * ADDRESS_BYTES + 4 * UNDERLAYS_MAX + 6 + 2;
/// Most addresses the node is known by.
pub(crate) const NODE_ADDRESSES_MAX: usize = 4096;
/// Size of `struct addr`.
pub(crate) const ADDRESS_BYTES: usize = 16;
/// Size of `struct flow`.
pub(crate) const FLOW_BYTES: usize = 2 * ADDRESS_BYTES + 4;
/// Size of `struct event`.
pub(crate) const EVENT_BYTES: usize = 2 * ADDRESS_BYTES + 12;
/// Most connections older than its capture that one pod may keep: 1/32 of the map, so that it takes
/// 32 such pods at once to fill it.
pub(crate) const OLDER_FLOWS_PER_POD: usize = 8_192;
/// Flag of `struct config`.
const CONFIG_DNS: u32 = 1;
/// Flags of `struct pod`.
pub(crate) const POD_OLDER: u32 = 1;
pub(crate) const POD_ENROLLING: u32 = 2;
/// The part of the word of flags that is user space's; the rest is the programs'.
pub(crate) const POD_FLAGS: u32 = 0xffff;

const fn map(name: &'static str, key_bytes: u32, value_bytes: u32, entries_max: u32) -> MapLayout {
    MapLayout {
        name,
        key_bytes,
        value_bytes,
        entries_max,
    }
}

pub(crate) const CONFIG: &str = "config";
pub(crate) const PODS: &str = "pods";
pub(crate) const POD_CIDRS: &str = "pod_cidrs";
/// Pinned under this name for ztunnel.
pub(crate) const LISTENERS: &str = "listeners";
pub(crate) const NODE_ADDRESSES: &str = "node_addrs";
pub(crate) const COUNTERS: &str = "counters";
pub(crate) const OLDER_FLOWS: &str = "older_flows";
pub(crate) const EVENTS: &str = "events";

pub(crate) const MAPS: [MapLayout; 10] = [
    map(CONFIG, 4, CONFIG_BYTES as u32, 1),
    map(PODS, ADDRESS_BYTES as u32, 8, 262_144),
    map(POD_CIDRS, 4 + ADDRESS_BYTES as u32, 4, 64),
    map(
        NODE_ADDRESSES,
        ADDRESS_BYTES as u32,
        1,
        NODE_ADDRESSES_MAX as u32,
    ),
    map("node_flows", FLOW_BYTES as u32, 1, 65_536),
    map("stack_flows", FLOW_BYTES as u32, 1, 65_536),
    map(OLDER_FLOWS, FLOW_BYTES as u32, 1, 262_144),
    map(EVENTS, 0, 0, 65_536),
    map(COUNTERS, 4, 8, (PROGRAMS.len() * REASONS.len()) as u32),
    // Last: whoever waits for it finds the others.
    map(LISTENERS, 4, 4, ROLES * MAX_CPUS),
];

/// In the order of `enum reason`.
pub(crate) const REASONS: [&str; 20] = [
    "passed",
    "redirected",
    "host",
    "spoofed",
    "fragment",
    "options",
    "ipv6",
    "malformed",
    "no_ztunnel",
    "no_listener",
    "capture_port",
    "icmp_error",
    "older",
    "enrolling",
    "dns",
    "cut_off",
    "vlan",
    "ethertype",
    "neighbour",
    "encapsulated",
];

/// What became of the packets that a reason is counted for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Left to the node's stack.
    Passed,
    /// To ztunnel, to a pod, out of the underlay, or to one of ztunnel's listeners.
    Redirected,
    /// Dropped, or refused.
    Dropped,
}

impl Outcome {
    /// Of a reason of [`crate::Status::counters`] of the `ebpf` back end.
    #[must_use]
    pub fn of(reason: &str) -> Self {
        match reason {
            "passed" | "host" | "older" => Self::Passed,
            "redirected" | "icmp_error" | "dns" => Self::Redirected,
            _ => Self::Dropped,
        }
    }

    /// In one word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Redirected => "redirected",
            Self::Dropped => "dropped",
        }
    }
}

/// An address as `struct addr`.
pub(crate) fn address(address: IpAddr) -> [u8; ADDRESS_BYTES] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The inverse of [`address`].
pub(crate) fn parse_address(bytes: [u8; ADDRESS_BYTES]) -> IpAddr {
    Ipv6Addr::from(bytes).to_canonical()
}

/// `struct config`.
pub(crate) struct Config {
    pub(crate) ztunnel_ifindex: u32,
    pub(crate) dns: bool,
    /// At most one of each family.
    pub(crate) ztunnel_addresses: Vec<IpAddr>,
    pub(crate) underlays: Vec<u32>,
    pub(crate) ztunnel_mac: [u8; 6],
}

impl Config {
    /// At most [`UNDERLAYS_MAX`] underlays, which the settings' check guarantees.
    pub(crate) fn encode(&self) -> [u8; CONFIG_BYTES] {
        assert!(
            self.underlays.len() <= UNDERLAYS_MAX,
            "settings are checked first"
        );
        let mut bytes = [0; CONFIG_BYTES];
        bytes[0..4].copy_from_slice(&self.ztunnel_ifindex.to_ne_bytes());
        let flags = if self.dns { CONFIG_DNS } else { 0 };
        bytes[4..8].copy_from_slice(&flags.to_ne_bytes());
        let (ztunnel, rest) = bytes[8..].split_at_mut(2 * ADDRESS_BYTES);
        put_addresses(ztunnel, &self.ztunnel_addresses);
        let (underlays, rest) = rest.split_at_mut(4 * UNDERLAYS_MAX);
        for (slot, index) in underlays.chunks_exact_mut(4).zip(&self.underlays) {
            slot.copy_from_slice(&index.to_ne_bytes());
        }
        rest[..6].copy_from_slice(&self.ztunnel_mac);
        bytes
    }
}

/// ztunnel's IPv4 address in an encoded [`Config`]; unspecified in one that was never set.
pub(crate) fn ztunnel_address(config: &[u8; CONFIG_BYTES]) -> Ipv4Addr {
    let [.., a, b, c, d] = config[8..8 + ADDRESS_BYTES] else {
        return Ipv4Addr::UNSPECIFIED;
    };
    Ipv4Addr::new(a, b, c, d)
}

/// Into an array of `struct addr`; what does not fit is left out.
fn put_addresses(array: &mut [u8], addresses: &[IpAddr]) {
    for (slot, ip) in array.chunks_exact_mut(ADDRESS_BYTES).zip(addresses) {
        slot.copy_from_slice(&address(*ip));
    }
}

#[cfg(test)]
mod tests {
    use mesh::ports;

    use super::*;

    #[test]
    fn the_programs_have_the_same_ports() {
        let header = include_str!("../../../src/layout.h");
        for (name, port) in [
            ("OUTBOUND", ports::OUTBOUND),
            ("INBOUND_PLAIN", ports::INBOUND_PLAIN),
            ("INBOUND_HBONE", ports::INBOUND_HBONE),
        ] {
            let line = format!("#define PORT_{name} {port}\n");
            assert!(header.contains(&line), "{line}");
        }
    }

    #[test]
    fn config_has_the_programs_layout() {
        let config = Config {
            ztunnel_ifindex: 7,
            dns: true,
            ztunnel_addresses: vec![[10, 0, 0, 2].into(), "fd00::2".parse().unwrap()],
            underlays: vec![3; UNDERLAYS_MAX],
            ztunnel_mac: [1, 2, 3, 4, 5, 6],
        };
        let bytes = config.encode();
        assert_eq!(bytes[0..4], 7u32.to_ne_bytes());
        assert_eq!(bytes[4..8], 1u32.to_ne_bytes());
        assert_eq!(bytes[18..24], [0xff, 0xff, 10, 0, 0, 2]);
        assert_eq!(ztunnel_address(&bytes), Ipv4Addr::new(10, 0, 0, 2));
        assert_eq!((bytes[24], bytes[39]), (0xfd, 2));
        assert_eq!(bytes[40..44], 3u32.to_ne_bytes());
        assert_eq!(bytes[68..72], 3u32.to_ne_bytes());
        assert_eq!(bytes[72..], [1, 2, 3, 4, 5, 6, 0, 0]);
        for text in ["10.1.2.3", "fd00::1"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(parse_address(address(ip)), ip);
        }
    }

    /// The header's enums, sizes and reasons are what this module says they are.
    #[test]
    fn header_and_module_agree() {
        let header = include_str!("../../../src/layout.h");
        let names = |prefix: &str| -> Vec<String> {
            header
                .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
                .filter(|word| word.starts_with(prefix) && !word.ends_with("_COUNT"))
                .map(|word| word[prefix.len()..].to_lowercase())
                .collect()
        };
        assert_eq!(names("REASON_"), REASONS);
        assert_eq!(names("PROG_").len(), PROGRAMS.len());
        assert!(header.contains(&format!("#define MAX_CPUS {MAX_CPUS}\n")));
        assert!(header.contains(&format!("#define MAX_UNDERLAYS {UNDERLAYS_MAX}\n")));
        assert!(header.contains(&format!("#define MAX_NODE_ADDRS {NODE_ADDRESSES_MAX}\n")));
        assert_eq!(names("ROLE_").len(), ROLES as usize);
    }
}
