//! Ethernet frames made by hand, as whoever has CAP_NET_RAW in a pod can send them.

use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket};

use super::{Topology, inside};

pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const IPV6: u16 = 0x86dd;
pub(crate) const ARP: u16 = 0x0806;

impl Topology {
    /// MAC address of an interface.
    pub(crate) fn mac(&self, host: &str, interface: &str) -> [u8; 6] {
        let shown = self.ip(host, &format!("-br link show dev {interface}"));
        let text = shown.split_whitespace().nth(2).unwrap();
        let bytes = text
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).unwrap());
        bytes.collect::<Vec<_>>().try_into().unwrap()
    }

    /// Sends a frame out of an interface; `tags` are VLAN tags, the outer one first.
    pub(crate) fn send_frame(
        &self,
        (host, interface): (&str, &str),
        to: [u8; 6],
        tags: &[(u16, u16)],
        ethertype: u16,
        payload: &[u8],
    ) {
        let mut frame = to.to_vec();
        frame.extend(self.mac(host, interface));
        for (kind, tag) in tags {
            frame.extend(kind.to_be_bytes());
            frame.extend(tag.to_be_bytes());
        }
        frame.extend(ethertype.to_be_bytes());
        frame.extend(payload);
        inside(&self.netns(host), || {
            let none = SockFlag::empty();
            let sender = socket(AddressFamily::Packet, SockType::Raw, none, None).unwrap();
            let mut entries = nix::ifaddrs::getifaddrs().unwrap();
            let link: LinkAddr = entries
                .find_map(|entry| {
                    let address = entry.address?;
                    let own = entry.interface_name == interface;
                    own.then(|| address.as_link_addr().copied()).flatten()
                })
                .unwrap();
            match sendto(sender.as_raw_fd(), &frame, &link, MsgFlags::empty()) {
                // What is dropped on its way out.
                Ok(_) | Err(Errno::ENOBUFS) => {}
                Err(error) => panic!("{host} {interface}: {error}"),
            }
        });
    }

    /// Packets that an interface has received.
    pub(crate) fn received(&self, host: &str, interface: &str) -> u64 {
        let path = "/proc/thread-self/net/dev";
        let text = inside(&self.netns(host), || std::fs::read_to_string(path).unwrap());
        let line = text
            .lines()
            .find_map(|line| line.trim().strip_prefix(&format!("{interface}:")))
            .unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

fn checksum(header: &[u8]) -> [u8; 2] {
    let words = header
        .chunks(2)
        .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// An IPv4 packet; `fragment` is the field with flags and offset, `options` a multiple of 4 bytes.
pub(crate) fn ipv4_with(
    protocol: u8,
    (from, to): (Ipv4Addr, Ipv4Addr),
    fragment: u16,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let header_bytes = 20 + options.len();
    let length = (header_bytes + payload.len()) as u16;
    let mut packet = vec![0x40 | (header_bytes / 4) as u8, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0x12, 0x34]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(options);
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum);
    packet.extend(payload);
    packet
}

pub(crate) fn ipv4(protocol: u8, ends: (Ipv4Addr, Ipv4Addr), payload: &[u8]) -> Vec<u8> {
    ipv4_with(protocol, ends, 0, &[], payload)
}

/// A datagram to a port, without a checksum.
pub(crate) fn udp(port: u16, payload: &[u8]) -> Vec<u8> {
    let mut datagram = 40000_u16.to_be_bytes().to_vec();
    datagram.extend(port.to_be_bytes());
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    datagram
}

/// A SYN to a port, with a wrong checksum.
pub(crate) fn syn(port: u16) -> Vec<u8> {
    let mut segment = 40000_u16.to_be_bytes().to_vec();
    segment.extend(port.to_be_bytes());
    segment.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]);
    segment
}

/// A VXLAN datagram's payload: a frame to `to` with an IPv4 packet.
pub(crate) fn vxlan(id: u32, to: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let mut payload = vec![8, 0, 0, 0];
    payload.extend((id << 8).to_be_bytes());
    payload.extend(to);
    payload.extend([2, 0, 0, 0, 0, 9]);
    payload.extend(IPV4.to_be_bytes());
    payload.extend(packet);
    payload
}
