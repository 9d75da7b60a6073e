//! Connections that a pod has when its capture begins.
//!
//! Redirected to ztunnel they would meet no socket there and be reset, so the programs leave them
//! alone. Which they are is read from the pod's network namespace when it is added, less those
//! that ztunnel has (it may have been reaching the pod before), and looked at again until all have
//! ended. Connections in TIME_WAIT and those whose SYN is under way are not among them: the latter
//! send it again and are captured then.

use std::collections::HashSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use super::layout::{self, FLOW_BYTES};
use super::maps::FlowKey;
use crate::error::Result;
use crate::settings::Pod;
use crate::system::netns::Netns;
use crate::system::sock_diag::{self, Ends};

const FILES: [&str; 2] = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];

/// States of <net/tcp_states.h> that do not count: SYN_SENT, TIME_WAIT, CLOSE, LISTEN.
const NOT_OPEN: [&str; 4] = ["02", "06", "07", "0A"];

/// Open connections in a network namespace.
pub(crate) fn connections(netns: &Path) -> Result<HashSet<Ends>> {
    Netns::at(netns)?.run(|| match sock_diag::connections() {
        Ok(all) => Ok(all.into_iter().collect()),
        Err(_) => {
            // A kernel without sock_diag; one without IPv6 has no second file.
            let texts = FILES.iter().flat_map(fs::read_to_string);
            Ok(texts.flat_map(|text| parse(&text)).collect())
        }
    })
}

/// The pod's among them, as keys of the map.
pub(crate) fn keys(all: &HashSet<Ends>, pod: &Pod) -> HashSet<FlowKey> {
    all.iter()
        .filter(|(local, _)| pod.addresses.contains(&local.ip()))
        .map(key)
        .collect()
}

/// The other end's view of these connections.
pub(crate) fn mirrored(all: HashSet<Ends>) -> HashSet<Ends> {
    all.into_iter()
        .map(|(local, remote)| (remote, local))
        .collect()
}

fn key((local, remote): &Ends) -> FlowKey {
    let mut key = [0; FLOW_BYTES];
    key[..16].copy_from_slice(&layout::address(local.ip()));
    key[16..32].copy_from_slice(&layout::address(remote.ip()));
    key[32..34].copy_from_slice(&local.port().to_be_bytes());
    key[34..36].copy_from_slice(&remote.port().to_be_bytes());
    key
}

/// The pod's address in a key.
pub(crate) fn pod_address(key: &FlowKey) -> IpAddr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&key[..16]);
    layout::parse_address(octets)
}

fn parse(text: &str) -> Vec<Ends> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let (local, remote, state) = (words.next()?, words.next()?, words.next()?);
            if NOT_OPEN.contains(&state) {
                return None;
            }
            Some((end(local)?, end(remote)?))
        })
        .collect()
}

/// `0100007F:0050`: words of four bytes as the kernel has them in memory, and a port.
fn end(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut octets = Vec::with_capacity(16);
    for at in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        octets.extend(word.to_ne_bytes());
    }
    let ip = match *octets.as_slice() {
        [a, b, c, d] => IpAddr::from([a, b, c, d]),
        _ => IpAddr::from(<[u8; 16]>::try_from(octets).ok()?),
    };
    Some(SocketAddr::new(ip.to_canonical(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_endian = "little")]
    #[test]
    fn open_connections_are_read() {
        let text = "  sl  local_address rem_address   st\n\
            0: 0B01F40A:1F90 0B02F40A:0050 01 00000000:00000000\n\
            1: 0100007F:0016 00000000:0000 0A 00000000:00000000\n\
            2: 0000000000000000FFFF00000B01F40A:1F91 0000000000000000FFFF00000B02F40A:0050 08 0\n\
            3: 000000FD000000000000000011000000:0050 000000FD000000000000000012000000:C000 01 0\n\
            4: 0B01F40A:1F92 0B02F40A:0050 06 00000000:00000000\n\
            5: nonsense\n";
        let ends: Vec<_> = parse(text)
            .into_iter()
            .map(|(local, remote)| format!("{local} {remote}"))
            .collect();
        assert_eq!(
            ends,
            [
                "10.244.1.11:8080 10.244.2.11:80",
                "10.244.1.11:8081 10.244.2.11:80",
                "[fd00::11]:80 [fd00::12]:49152",
            ]
        );
    }

    #[test]
    fn a_key_is_seen_from_the_pod() {
        let ends = (
            "10.0.0.1:1".parse().unwrap(),
            "[fd00::1]:2".parse().unwrap(),
        );
        let key = key(&ends);
        assert_eq!(pod_address(&key), ends.0.ip());
        assert_eq!(key[32..], [0, 1, 0, 2]);
        let pod = Pod {
            uid: "a".into(),
            namespace: "default".into(),
            name: "pod".into(),
            service_account: "default".into(),
            addresses: vec![ends.0.ip()],
            netns: "/x".into(),
            host_interface: "x".into(),
        };
        let all = HashSet::from([ends]);
        assert_eq!(keys(&all, &pod).len(), 1);
        assert_eq!(keys(&mirrored(all), &pod).len(), 0);
    }
}
