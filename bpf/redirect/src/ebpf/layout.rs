//! The user-space side of `bpf/src/layout.h`. A change here is a change there.

use std::net::Ipv4Addr;

use crate::listener_map::{MAX_CPUS, ROLES};
use crate::settings::UNDERLAYS_MAX;

/// The compiled `bpf/src/redirect.bpf.c`.
pub(crate) static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/redirect.bpf.o"));

/// Size of `struct config`.
pub(crate) const CONFIG_BYTES: usize = 8 + 4 * NODE_ADDRESSES_MAX + 4 * UNDERLAYS_MAX + 6 + 2;
/// Most addresses the node is known by.
pub(crate) const NODE_ADDRESSES_MAX: usize = 16;

/// A map, by its name in the object and as a pin: key size, value size, entries.
pub(crate) struct MapLayout {
    pub(crate) name: &'static str,
    pub(crate) key_bytes: u32,
    pub(crate) value_bytes: u32,
    pub(crate) entries_max: u32,
}

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
pub(crate) const COUNTERS: &str = "counters";

pub(crate) const MAPS: [MapLayout; 6] = [
    map(CONFIG, 4, CONFIG_BYTES as u32, 1),
    map(PODS, 4, 4, 4096),
    map(POD_CIDRS, 8, 4, 64),
    map("node_flows", 12, 1, 65_536),
    map(COUNTERS, 4, 8, (PROGRAMS.len() * REASONS.len()) as u32),
    // Last: whoever waits for it finds the others.
    map(LISTENERS, 4, 4, ROLES * MAX_CPUS),
];

pub(crate) const APP_OUTBOUND: &str = "app_outbound";
pub(crate) const APP_INBOUND: &str = "app_inbound";
pub(crate) const ZTUNNEL_HOST: &str = "ztunnel_host";
pub(crate) const UNDERLAY_INGRESS: &str = "underlay_ingress";
pub(crate) const ZTUNNEL_INGRESS: &str = "ztunnel_ingress";

/// In the order of `enum program`.
pub(crate) const PROGRAMS: [&str; 5] = [
    APP_OUTBOUND,
    APP_INBOUND,
    ZTUNNEL_HOST,
    UNDERLAY_INGRESS,
    ZTUNNEL_INGRESS,
];

/// In the order of `enum reason`.
pub(crate) const REASONS: [&str; 12] = [
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
];

/// `struct config`.
pub(crate) struct Config {
    pub(crate) ztunnel_ifindex: u32,
    pub(crate) ztunnel_address: Ipv4Addr,
    /// Those beyond [`NODE_ADDRESSES_MAX`] are left out.
    pub(crate) node_addresses: Vec<Ipv4Addr>,
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
        bytes[4..8].copy_from_slice(&self.ztunnel_address.octets());
        let (addresses, rest) = bytes[8..].split_at_mut(4 * NODE_ADDRESSES_MAX);
        for (slot, address) in addresses.chunks_exact_mut(4).zip(&self.node_addresses) {
            slot.copy_from_slice(&address.octets());
        }
        let (underlays, rest) = rest.split_at_mut(4 * UNDERLAYS_MAX);
        for (slot, index) in underlays.chunks_exact_mut(4).zip(&self.underlays) {
            slot.copy_from_slice(&index.to_ne_bytes());
        }
        rest[..6].copy_from_slice(&self.ztunnel_mac);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_has_the_programs_layout() {
        let config = Config {
            ztunnel_ifindex: 7,
            ztunnel_address: [10, 0, 0, 2].into(),
            node_addresses: vec![[10, 0, 0, 1].into(); NODE_ADDRESSES_MAX + 1],
            underlays: vec![3; UNDERLAYS_MAX],
            ztunnel_mac: [1, 2, 3, 4, 5, 6],
        };
        let bytes = config.encode();
        assert_eq!(bytes[0..4], 7u32.to_ne_bytes());
        assert_eq!(bytes[4..8], [10, 0, 0, 2]);
        assert_eq!(bytes[8..12], [10, 0, 0, 1]);
        assert_eq!(bytes[68..72], [10, 0, 0, 1]);
        assert_eq!(bytes[72..76], 3u32.to_ne_bytes());
        assert_eq!(bytes[100..104], 3u32.to_ne_bytes());
        assert_eq!(bytes[104..], [1, 2, 3, 4, 5, 6, 0, 0]);
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
