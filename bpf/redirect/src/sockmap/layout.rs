//! The user-space side of `bpf/src/sockmap.h`. A change here is a change there.

use std::net::{IpAddr, Ipv6Addr};

use crate::system::pins::MapLayout;

/// The compiled `bpf/src/sockmap.bpf.c`.
pub(crate) static OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sockmap.bpf.o"));
/// The compiled `bpf/src/sockmap_probe.bpf.c`.
pub(crate) static PROBE_OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sockmap_probe.bpf.o"));

/// Size of `struct end_key`.
pub(crate) const KEY_BYTES: usize = 48;
/// Size of `struct end`.
pub(crate) const END_BYTES: usize = 24;
/// Size of `struct shortcut_event`.
pub(crate) const EVENT_BYTES: usize = 16 + 2 * KEY_BYTES;
/// Size of `struct shortcut_config`.
pub(crate) const CONFIG_BYTES: usize = 16;
/// Size of `struct pod_key`.
pub(crate) const POD_BYTES: usize = 16;
/// Size of `struct mark`.
pub(crate) const MARK_BYTES: usize = 8 + KEY_BYTES;

/// A socket: `struct end_key`, only ever copied.
pub(crate) type Key = [u8; KEY_BYTES];

/// What the names of all pins begin with, and of nobody else's.
pub(crate) const PREFIX: &str = "shortcut_";
pub(crate) const CONFIG: &str = "shortcut_config";
pub(crate) const PODS: &str = "shortcut_pods";
pub(crate) const ENDS: &str = "shortcut_ends";
pub(crate) const SENDERS: &str = "shortcut_senders";
pub(crate) const TARGETS: &str = "shortcut_targets";
pub(crate) const MARKS: &str = "shortcut_marks";
pub(crate) const EVENTS: &str = "shortcut_events";
pub(crate) const COUNTERS: &str = "shortcut_counters";

/// Programs, and the pins of their links.
pub(crate) const SOCKETS: &str = "shortcut_sockets";
pub(crate) const SEND: &str = "shortcut_send";
pub(crate) const PROBE_SEND: &str = "probe_send";
pub(crate) const PROBE_SENDER: &str = "probe_sender";
pub(crate) const PROBE_TARGET: &str = "probe_target";

const fn map(name: &'static str, key_bytes: usize, value_bytes: u32, entries: u32) -> MapLayout {
    MapLayout {
        name,
        key_bytes: key_bytes as u32,
        value_bytes,
        entries_max: entries,
    }
}

/// Pinned maps.
pub(crate) const MAPS: [MapLayout; 10] = [
    map(CONFIG, 4, CONFIG_BYTES as u32, 1),
    map(PODS, POD_BYTES, 8, 65_536),
    map(ENDS, KEY_BYTES, END_BYTES as u32, 65_536),
    map(SENDERS, KEY_BYTES, 8, 65_536),
    map(TARGETS, KEY_BYTES, 4, 65_536),
    map(MARKS, 4, MARK_BYTES as u32, 0),
    map(EVENTS, 0, 0, 1 << 18),
    map(COUNTERS, 4, 8, COUNTER_NAMES.len() as u32),
    map("shortcut_blocking", 16, 1, 4096),
    map("shortcut_directions", 4, 136, 0),
];

/// Names of [`super::Status::counters`], in the order of `enum shortcut_counter`.
pub const COUNTER_NAMES: [&str; 12] = [
    "to_ztunnel_messages",
    "to_ztunnel_bytes",
    "to_pod_messages",
    "to_pod_bytes",
    "bypassed_bytes",
    "sockets",
    "refused",
    "demoted_budget",
    "demoted_pressure",
    "demoted_blocking",
    "demoted_no_peer",
    "demoted_closed",
];

const FLAG_ENABLED: u32 = 1;
const FLAG_FORCED: u32 = 2;

/// `struct shortcut_config`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Config {
    pub(crate) ztunnel_netns: u64,
    pub(crate) enabled: bool,
    pub(crate) forced: bool,
    /// 0: only the kernel's own limit.
    pub(crate) memory_pages_max: u32,
}

impl Config {
    pub(crate) fn encode(self) -> [u8; CONFIG_BYTES] {
        let enabled = if self.enabled { FLAG_ENABLED } else { 0 };
        let forced = if self.forced { FLAG_FORCED } else { 0 };
        let mut bytes = [0; CONFIG_BYTES];
        bytes[..8].copy_from_slice(&self.ztunnel_netns.to_ne_bytes());
        bytes[8..12].copy_from_slice(&(enabled | forced).to_ne_bytes());
        bytes[12..].copy_from_slice(&self.memory_pages_max.to_ne_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; CONFIG_BYTES]) -> Self {
        let word = |at: usize| {
            let mut part = [0; 4];
            part.copy_from_slice(&bytes[at..at + 4]);
            u32::from_ne_bytes(part)
        };
        Self {
            ztunnel_netns: u64::from(word(0)) | u64::from(word(4)) << 32,
            enabled: word(8) & FLAG_ENABLED != 0,
            forced: word(8) & FLAG_FORCED != 0,
            memory_pages_max: word(12),
        }
    }
}

/// `struct pod_key`: IPv4 addresses are mapped into IPv6.
pub(crate) fn pod_key(address: IpAddr) -> [u8; POD_BYTES] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => Ipv6Addr::octets(&address),
    }
}

/// `struct mark`: the map (identifier) the socket was entered into and its key there, if it was.
pub(crate) fn entered(mark: &[u8; MARK_BYTES]) -> Option<(u32, Key)> {
    let (head, key) = mark.split_at(8);
    let id = u32::from_ne_bytes(head[..4].try_into().ok()?);
    (id != 0).then_some((id, key.try_into().ok()?))
}

/// Cookie of `struct end`: tells whether it still is the same socket.
pub(crate) fn end_cookie(end: &[u8; END_BYTES]) -> u64 {
    let mut cookie = [0; 8];
    cookie.copy_from_slice(&end[8..16]);
    u64::from_ne_bytes(cookie)
}

/// Flags of `struct end`.
fn end_flags(end: &[u8; END_BYTES]) -> u32 {
    u32::from_ne_bytes([end[16], end[17], end[18], end[19]])
}

/// Whether something may have been redirected to this end.
pub(crate) fn end_is_started(end: &[u8; END_BYTES]) -> bool {
    end_flags(end) & 1 != 0
}

/// Whether nothing new is redirected to this end.
pub(crate) fn end_is_closed(end: &[u8; END_BYTES]) -> bool {
    end_flags(end) & 2 != 0
}

/// What a program told.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Event {
    /// Neither end redirects to the other any more, once both are no targets. The flags: whether
    /// it may hold redirected data.
    Demoted { own: (Key, bool), peer: (Key, bool) },
    /// The socket uses TCP and had read everything that was redirected to it at `when_ns`.
    Drained { own: Key, when_ns: u64 },
}

impl Event {
    /// None: not an event of these programs.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; EVENT_BYTES] = bytes.try_into().ok()?;
        let (head, keys) = bytes.split_at(16);
        let (own, peer) = keys.split_at(KEY_BYTES);
        let (own, peer): (Key, Key) = (own.try_into().ok()?, peer.try_into().ok()?);
        let when_ns = u64::from_ne_bytes(head[..8].try_into().ok()?);
        let kind = u32::from_ne_bytes(head[8..12].try_into().ok()?);
        let started = u32::from_ne_bytes(head[12..].try_into().ok()?);
        match kind {
            0 => Some(Self::Demoted {
                own: (own, started & 1 != 0),
                peer: (peer, started & 2 != 0),
            }),
            1 => Some(Self::Drained { own, when_ns }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_survives_the_map() {
        let config = Config {
            ztunnel_netns: 0x1_0000_0007,
            enabled: true,
            forced: false,
            memory_pages_max: 77,
        };
        let decoded = Config::decode(&config.encode());
        assert_eq!(decoded.ztunnel_netns, config.ztunnel_netns);
        assert!(decoded.enabled && !decoded.forced);
        assert_eq!(decoded.memory_pages_max, 77);
    }

    #[test]
    fn marks_say_where_a_socket_is() {
        let mut mark = [0; MARK_BYTES];
        assert_eq!(entered(&mark), None);
        mark[..4].copy_from_slice(&7_u32.to_ne_bytes());
        mark[8..].fill(9);
        assert_eq!(entered(&mark), Some((7, [9; KEY_BYTES])));
    }

    #[test]
    fn events_are_decoded_or_refused() {
        let mut bytes = [7_u8; EVENT_BYTES];
        bytes[8..16].copy_from_slice(&[0, 0, 0, 0, 2, 0, 0, 0]);
        let demoted = Event::decode(&bytes);
        let keys = ([7; KEY_BYTES], [7; KEY_BYTES]);
        let expected = Event::Demoted {
            own: (keys.0, false),
            peer: (keys.1, true),
        };
        assert_eq!(demoted, Some(expected));
        bytes[8] = 9;
        assert_eq!(Event::decode(&bytes), None);
        assert_eq!(Event::decode(&bytes[1..]), None);
    }
}
