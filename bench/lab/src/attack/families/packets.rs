//! Packets that a captured pod writes itself, as any pod with CAP_NET_RAW can: addresses of others,
//! tags and tunnels around them. The proof is the packet at its aim, with a word in it; the same
//! packet without the trick shows that the way there is open.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket};
use socket2::{Domain, Protocol, Socket, Type};

use super::{Attack, got, small};
use crate::attack::arena::{ATTACKER, Arena, eventually};
use crate::attack::catalog::{Failure, Finding};
use crate::error::Error;
use crate::kinds::Redirect;
use crate::lab::Lab;

const FAMILY: &str = "packets";
/// The pod that writes packets.
const FROM: &str = "client-a";
/// Nobody has this address.
const SPOOFED: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 99);
/// How long a packet is waited for that must not come.
const STAYS_AWAY: Duration = Duration::from_millis(300);

const UDP: u8 = 17;
const TCP: u8 = 6;
/// Protocols that carry IP.
const IP_IN_IP: u8 = 4;
const IPV6_IN_IP: u8 = 41;
const GRE: u8 = 47;

const VLAN: [u8; 2] = [0x81, 0x00];
const SERVICE_VLAN: [u8; 2] = [0x88, 0xa8];

pub(super) fn attacks() -> Vec<Attack> {
    let mut attacks = vec![
        of("spoofed-udp", |arena| raw(arena, SPOOFED, UDP)),
        of("spoofed-tcp", |arena| raw(arena, SPOOFED, TCP)),
        of("spoofed-as-another-pod", |arena| {
            raw(arena, ip("server-a")?, UDP)
        }),
        of("spoofed-as-the-node", |arena| {
            raw(arena, Ipv4Addr::new(10, 244, 1, 1), UDP)
        }),
    ];
    type Tags = &'static [[u8; 2]];
    let tagged: [(&str, Tags); 4] = [
        ("vlan-tag", &[VLAN]),
        ("vlan-tag-twice", &[VLAN, VLAN]),
        ("vlan-tag-of-a-provider", &[SERVICE_VLAN]),
        ("vlan-tag-of-a-provider-twice", &[SERVICE_VLAN, VLAN]),
    ];
    for (name, tags) in tagged {
        attacks.push(small(
            &format!("{name}-spoofed"),
            FAMILY,
            "another's source address behind a tag",
            Box::new(move |arena| frames(arena, SPOOFED, UDP, tags)),
        ));
        attacks.push(small(
            &format!("{name}-tcp"),
            FAMILY,
            "a way past capture behind a tag",
            Box::new(move |arena| frames(arena, ip(FROM)?, TCP, tags)),
        ));
    }
    for (name, protocol) in [
        ("ip-in-ip", IP_IN_IP),
        ("ipv6-in-ip", IPV6_IN_IP),
        ("gre", GRE),
    ] {
        attacks.push(small(
            name,
            FAMILY,
            "the node's tunnel end, with an address of another inside",
            Box::new(move |arena| encapsulated(arena, protocol)),
        ));
    }
    attacks
}

fn of(name: &str, run: fn(&Arena) -> Finding) -> Attack {
    small(
        name,
        FAMILY,
        "another's source address on the wire",
        Box::new(run),
    )
}

fn ip(host: &str) -> Result<Ipv4Addr, Failure> {
    match Lab::address(host)? {
        std::net::IpAddr::V4(address) => Ok(address),
        other => Err(Failure::Driver(format!("{other} is not IPv4"))),
    }
}

fn only_ebpf(arena: &Arena) -> Result<(), Failure> {
    match arena.lab.redirect() {
        Redirect::Ebpf => Ok(()),
        other => Err(Failure::Skipped(format!(
            "redirection {other} does not check what pods send"
        ))),
    }
}

/// A packet by a raw IP socket.
fn raw(arena: &Arena, source: Ipv4Addr, protocol: u8) -> Finding {
    only_ebpf(arena)?;
    let to = ip(ATTACKER)?;
    let sniffer = Sniffer::on(arena, ATTACKER, protocol)?;
    let send = |source, mark| -> Result<(), Failure> {
        let packet = packet(source, to, protocol, mark);
        arena.lab.on(FROM, || {
            let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255)))?;
            let to = SocketAddr::from(SocketAddrV4::new(to, 0));
            socket.send_to(&packet, &to.into()).map(|_| ())
        })??;
        Ok(())
    };
    let mark = mark();
    // TCP without the trick is captured, so only UDP shows that the way is open.
    if protocol == UDP {
        sniffer.expects(|| send(ip(FROM)?, mark + 1), mark + 1)?;
    }
    // The kernel itself may refuse the pod.
    let _ = send(source, mark);
    sniffer.misses(mark)
}

/// A frame with tags, past the pod's IP stack.
fn frames(arena: &Arena, source: Ipv4Addr, protocol: u8, tags: &'static [[u8; 2]]) -> Finding {
    only_ebpf(arena)?;
    let to = ip(ATTACKER)?;
    let sniffer = Sniffer::on(arena, ATTACKER, protocol)?;
    let gateway = link(arena, "node-a", "va1")?;
    let own = link(arena, FROM, "eth0")?;
    let send = |source, protocol, tags: &[[u8; 2]], mark| -> Result<(), Failure> {
        let mut frame = Vec::new();
        frame.extend(gateway.addr().unwrap_or_default());
        frame.extend(own.addr().unwrap_or_default());
        for tag in tags {
            frame.extend(tag);
            frame.extend([0, 0]);
        }
        frame.extend([0x08, 0x00]);
        frame.extend(packet(source, to, protocol, mark));
        arena.lab.on(FROM, || write_frame(&own, &frame))??;
        Ok(())
    };
    let mark = mark();
    if protocol == UDP {
        sniffer.expects(|| send(ip(FROM)?, UDP, &[], mark + 1), mark + 1)?;
    }
    send(source, protocol, tags, mark)?;
    sniffer.misses(mark)
}

/// An IP packet of another's in a tunnel to the other node, which must not see the outer one.
fn encapsulated(arena: &Arena, protocol: u8) -> Finding {
    only_ebpf(arena)?;
    let node = ip("node-b")?;
    let sniffer = Sniffer::on(arena, "node-b", protocol)?;
    let mark = mark();
    let inner = match protocol {
        IPV6_IN_IP => [
            &[0x60, 0, 0, 0, 0, 8, 59, 64][..],
            &[0; 32],
            &mark.to_be_bytes(),
        ]
        .concat(),
        GRE => [
            &[0, 0, 8, 0][..],
            &packet(SPOOFED, ip(ATTACKER)?, UDP, mark),
        ]
        .concat(),
        _ => packet(SPOOFED, ip(ATTACKER)?, UDP, mark),
    };
    let outer = ip_packet(ip(FROM)?, node, protocol, &inner);
    arena.lab.on(FROM, || {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255)))?;
        let to = SocketAddr::from(SocketAddrV4::new(node, 0));
        socket.send_to(&outer, &to.into()).map(|_| ())
    })??;
    sniffer.misses(mark)
}

/// The address of an interface of a host.
fn link(arena: &Arena, host: &str, name: &str) -> Result<LinkAddr, Failure> {
    let found = arena.lab.on(host, || {
        let mut all = getifaddrs().map_err(io::Error::from)?;
        let found = all.find_map(|interface| {
            let address = interface
                .address
                .filter(|_| interface.interface_name == name)?;
            address.as_link_addr().copied()
        });
        found.ok_or_else(|| io::Error::other(format!("{host} has no link {name}")))
    })?;
    Ok(found?)
}

fn write_frame(link: &LinkAddr, frame: &[u8]) -> io::Result<()> {
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    sendto(socket.as_raw_fd(), frame, link, MsgFlags::empty())?;
    Ok(())
}

/// Sees packets of a protocol as they come to a host.
#[derive(Debug)]
struct Sniffer {
    socket: Socket,
    /// Takes what the packets are for, so that nobody answers.
    _taker: Option<UdpSocket>,
}

/// The UDP port that packets are for.
const PORT: u16 = 7_777;

impl Sniffer {
    fn on(arena: &Arena, host: &str, protocol: u8) -> Result<Self, Failure> {
        let socket = arena.lab.on(host, || {
            let socket = Socket::new(
                Domain::IPV4,
                Type::RAW,
                Some(Protocol::from(i32::from(protocol))),
            )?;
            socket.set_nonblocking(true)?;
            Ok::<_, io::Error>(socket)
        })??;
        // Another attack may have the port at this moment, which does as well.
        let taker = arena
            .lab
            .on(host, || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT)))?;
        Ok(Self {
            socket,
            _taker: taker.ok(),
        })
    }

    /// Whether a packet with `mark` has come.
    fn saw(&self, mark: u64) -> bool {
        use std::io::Read as _;
        let mut buffer = [0; 4096];
        while let Ok(n) = (&self.socket).read(&mut buffer) {
            let word = mark.to_be_bytes();
            if buffer[..n].windows(word.len()).any(|window| window == word) {
                return true;
            }
        }
        false
    }

    /// What is sent must come.
    fn expects(&self, send: impl Fn() -> Result<(), Failure>, mark: u64) -> Result<(), Failure> {
        send()?;
        eventually("an honest packet comes through", || {
            // It may be lost where neighbours are not known yet.
            self.saw(mark) || send().is_err()
        })?;
        Ok(())
    }

    /// What was sent must not come.
    fn misses(&self, mark: u64) -> Finding {
        let deadline = Instant::now() + STAYS_AWAY;
        while Instant::now() < deadline {
            if self.saw(mark) {
                return got("the packet through to its aim");
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok("dropped".to_owned())
    }
}

/// A number that tells one attack's packets from another's.
fn mark() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let next = NEXT.fetch_add(2, std::sync::atomic::Ordering::Relaxed);
    0xa77a_c4ed_0000_0000 + next
}

/// A packet with `mark` in it: UDP, or a SYN of TCP whose payload it is.
fn packet(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, mark: u64) -> Vec<u8> {
    let port = PORT.to_be_bytes();
    let payload = mark.to_be_bytes();
    let body = match protocol {
        // Checksum 0: none.
        UDP => [&port[..], &port, &[0, 16, 0, 0], &payload].concat(),
        _ => {
            let head = [
                &port[..],
                &port,
                &[0; 8],
                &[0x50, 2, 0xff, 0xff, 0, 0, 0, 0],
            ]
            .concat();
            let mut segment = [&head[..], &payload].concat();
            let sum = tcp_checksum(from, to, &segment).to_be_bytes();
            segment[16..18].copy_from_slice(&sum);
            segment
        }
    };
    ip_packet(from, to, protocol, &body)
}

fn ip_packet(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, body: &[u8]) -> Vec<u8> {
    let length = (20 + body.len() as u16).to_be_bytes();
    let mut header = vec![
        0x45, 0, length[0], length[1], 0, 1, 0, 0, 64, protocol, 0, 0,
    ];
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&header, 0).to_be_bytes();
    header[10..12].copy_from_slice(&sum);
    [&header[..], body].concat()
}

fn tcp_checksum(from: Ipv4Addr, to: Ipv4Addr, segment: &[u8]) -> u16 {
    let pseudo = [&from.octets()[..], &to.octets(), &[0, TCP]].concat();
    let sum = pseudo
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum::<u32>();
    checksum(segment, sum + segment.len() as u32)
}

/// The Internet checksum (RFC 1071) of `bytes`, on top of `sum`.
fn checksum(bytes: &[u8], sum: u32) -> u16 {
    let mut sum = bytes.chunks(2).fold(sum, |sum, pair| {
        sum + (u32::from(pair[0]) << 8) + pair.get(1).map_or(0, |byte| u32::from(*byte))
    });
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

impl From<nix::Error> for Failure {
    fn from(error: nix::Error) -> Self {
        Error::io("sending a frame from", FROM)(error.into()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_rfc() {
        let packet = packet(SPOOFED, Ipv4Addr::LOCALHOST, TCP, 7);
        assert_eq!(
            checksum(&packet[..20], 0),
            0,
            "a right header sums to nothing"
        );
        assert_eq!(packet.len(), 48);
        assert_eq!(tcp_checksum(SPOOFED, Ipv4Addr::LOCALHOST, &packet[20..]), 0);
    }
}
