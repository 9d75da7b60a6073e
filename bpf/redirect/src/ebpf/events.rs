//! Dropped packets, as the programs tell them in a ring buffer.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use aya::maps::{MapData, RingBuf};

use super::layout::{self, ADDRESS_BYTES, EVENT_BYTES};
use crate::error::Result;
use crate::system::pins;

/// A packet that a program dropped. The buffer is lossy: counters say how many there were.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Dropped {
    /// The program, as in [`crate::Status::counters`].
    pub program: &'static str,
    /// Why, as in [`crate::Status::counters`].
    pub reason: &'static str,
    /// IP protocol number.
    pub protocol: u8,
    /// Its source; port 0 if it is not known.
    pub source: SocketAddr,
    /// Its destination; port 0 if it is not known.
    pub destination: SocketAddr,
    /// Name of the node's interface, or its index if it has none any more; empty for a connection
    /// refused in ztunnel's network namespace.
    pub interface: String,
}

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            program,
            reason,
            protocol,
            source,
            destination,
            interface,
        } = self;
        write!(
            f,
            "{program} {reason}: protocol {protocol} {source} -> {destination}"
        )?;
        if interface.is_empty() {
            Ok(())
        } else {
            write!(f, " on {interface}")
        }
    }
}

fn parse(bytes: &[u8]) -> Option<Dropped> {
    let bytes: &[u8; EVENT_BYTES] = bytes.get(..EVENT_BYTES)?.try_into().ok()?;
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; ADDRESS_BYTES] = bytes[at..at + ADDRESS_BYTES].try_into().ok()?;
        Some(layout::parse_address(octets))
    };
    let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let index = u32::from_ne_bytes([bytes[36], bytes[37], bytes[38], bytes[39]]);
    Some(Dropped {
        program: layout::PROGRAMS.get(usize::from(bytes[40]))?,
        reason: layout::REASONS.get(usize::from(bytes[41]))?,
        protocol: bytes[42],
        source: SocketAddr::new(address(0)?, port(32)),
        destination: SocketAddr::new(address(ADDRESS_BYTES)?, port(34)),
        interface: interface_name(index),
    })
}

fn interface_name(index: u32) -> String {
    if index == 0 {
        return String::new();
    }
    nix::net::if_::if_indextoname(index).map_or_else(
        |_| index.to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// Takes what the ring holds, at most `most`.
pub(crate) fn take(directory: &Path, most: usize) -> Result<Vec<Dropped>> {
    let mut ring: RingBuf<MapData> = pins::open(directory, layout::EVENTS)?;
    let mut all = Vec::new();
    while all.len() < most
        && let Some(item) = ring.next()
    {
        all.extend(parse(&item));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_read_and_garbage_is_not() {
        let mut bytes = [0; EVENT_BYTES];
        bytes[..16].copy_from_slice(&layout::address([10, 0, 0, 1].into()));
        bytes[16..32].copy_from_slice(&layout::address("fd00::1".parse().unwrap()));
        bytes[32..36].copy_from_slice(&[0x1f, 0x90, 0, 80]);
        bytes[41..43].copy_from_slice(&[3, 6]);
        let text = parse(&bytes).unwrap().to_string();
        assert_eq!(
            text,
            "app_outbound spoofed: protocol 6 10.0.0.1:8080 -> [fd00::1]:80"
        );
        bytes[41] = 200;
        assert_eq!(parse(&bytes), None);
        assert_eq!(parse(&bytes[1..]), None);
    }
}
