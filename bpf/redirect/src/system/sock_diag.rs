//! Open TCP connections and listeners of the calling thread's network namespace, by sock_diag(7).
//!
//! The kernel keeps the connections of all namespaces in one table and looks at all of it for each
//! question, milliseconds on a large machine. So it is asked only for a family that has any, which
//! its own count of sockets tells.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

/// Local and remote end.
pub(crate) type Ends = (SocketAddr, SocketAddr);

/// A socket in the kernel's tables.
#[derive(Clone, Copy, Debug)]
struct Found {
    ends: Ends,
    inode: u32,
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER_BYTES: usize = 16;
/// `struct inet_diag_req_v2` and the part of `struct inet_diag_msg` that is read.
const REQUEST_BYTES: usize = 56;
const MESSAGE_BYTES: usize = 72;
/// Most the kernel puts into one datagram.
const BUFFER_BYTES: usize = 64 * 1024;

const TCP: u8 = 6;
const LISTEN: u32 = 1 << 10;
/// Without SYN_SENT, SYN_RECV, TIME_WAIT, CLOSE, LISTEN and what is not TCP's own.
const OPEN: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Family {
    number: u8,
    file: &'static str,
    /// Start of the line of `file` that counts its TCP sockets.
    line: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        number: 2,
        file: "/proc/thread-self/net/sockstat",
        line: "TCP: inuse ",
    },
    Family {
        number: 10,
        file: "/proc/thread-self/net/sockstat6",
        line: "TCP6: inuse ",
    },
];

/// Open connections, without those that are being set up and those in TIME_WAIT.
pub(crate) fn connections() -> io::Result<Vec<Ends>> {
    let mut all = Vec::new();
    for family in FAMILIES {
        let sockets = count(family);
        if sockets == Some(0) {
            continue;
        }
        let netlink = netlink()?;
        // A server that nobody is connected to. Listeners have a small table of their own.
        let listeners = ask(&netlink, family, LISTEN)?.len();
        if sockets.is_none_or(|sockets| sockets > listeners) {
            let open = ask(&netlink, family, OPEN)?;
            all.extend(open.into_iter().map(|socket| socket.ends));
        }
    }
    Ok(all)
}

/// Address and inode of every listening TCP socket in the calling thread's network namespace. They
/// have a table of their own: what this costs does not depend on how many connections there are.
///
/// # Errors
/// The kernel's, when it cannot be asked (`CONFIG_INET_DIAG`).
pub fn listening() -> io::Result<Vec<(SocketAddr, u64)>> {
    let netlink = netlink()?;
    let mut all = Vec::new();
    for family in FAMILIES {
        let found = ask(&netlink, family, LISTEN)?;
        all.extend(
            found
                .into_iter()
                .map(|socket| (socket.ends.0, socket.inode.into())),
        );
    }
    Ok(all)
}

fn netlink() -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?)
}

/// Sockets in the kernel's tables, listening ones included; None if it does not say.
fn count(family: Family) -> Option<usize> {
    match fs::read_to_string(family.file) {
        Ok(text) => parse_count(family, &text),
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Some(0),
        Err(_) => None,
    }
}

fn parse_count(family: Family, text: &str) -> Option<usize> {
    let rest = text
        .lines()
        .find_map(|line| line.strip_prefix(family.line))?;
    rest.split_whitespace().next()?.parse().ok()
}

fn request(family: Family, states: u32) -> [u8; HEADER_BYTES + REQUEST_BYTES] {
    let mut bytes = [0; HEADER_BYTES + REQUEST_BYTES];
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes[16] = family.number;
    bytes[17] = TCP;
    bytes[20..24].copy_from_slice(&states.to_ne_bytes());
    bytes
}

/// Sockets of a family in any of these states.
fn ask(netlink: &OwnedFd, family: Family, states: u32) -> io::Result<Vec<Found>> {
    let kernel = NetlinkAddr::new(0, 0);
    let message = request(family, states);
    sendto(netlink.as_raw_fd(), &message, &kernel, MsgFlags::empty())?;
    let mut all = Vec::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let received = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if parse(&buffer[..received], &mut all)? {
            return Ok(all);
        }
    }
}

/// One datagram of messages; true if it was the last.
fn parse(mut bytes: &[u8], all: &mut Vec<Found>) -> io::Result<bool> {
    while let Some((length, kind)) = header(bytes) {
        let message = &bytes[HEADER_BYTES..length];
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => return Err(error(message)),
            _ => all.extend(found(message)),
        }
        // The next begins at a multiple of four.
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    if bytes.is_empty() {
        Ok(false)
    } else {
        Err(io::Error::other("sock_diag answered with a cut message"))
    }
}

/// Length and type of the message at the start.
fn header(bytes: &[u8]) -> Option<(usize, u16)> {
    let head = bytes.get(..HEADER_BYTES)?;
    let length = u32::from_ne_bytes(head[..4].try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes([head[4], head[5]]);
    (HEADER_BYTES..=bytes.len())
        .contains(&length)
        .then_some((length, kind))
}

fn error(message: &[u8]) -> io::Error {
    match message.first_chunk() {
        Some(code) => io::Error::from_raw_os_error(-i32::from_ne_bytes(*code)),
        None => io::Error::other("sock_diag answered with an error that it did not tell"),
    }
}

/// `struct inet_diag_msg`: family, state, timer, retrans, then ports and addresses; the inode comes
/// last.
fn found(message: &[u8]) -> Option<Found> {
    let message = message.get(..MESSAGE_BYTES)?;
    let port = |at: usize| u16::from_be_bytes([message[at], message[at + 1]]);
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 16] = message[at..at + 16].try_into().ok()?;
        match message[0] {
            2 => Some([octets[0], octets[1], octets[2], octets[3]].into()),
            10 => Some(IpAddr::from(octets).to_canonical()),
            _ => None,
        }
    };
    let local = SocketAddr::new(address(8)?, port(4));
    Some(Found {
        ends: (local, SocketAddr::new(address(24)?, port(6))),
        inode: u32::from_ne_bytes(message[68..].try_into().ok()?),
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn counts_are_read() {
        let text = "sockets: used 1\nTCP: inuse 5 orphan 0 tw 0 alloc 29 mem 347\n";
        assert_eq!(parse_count(FAMILIES[0], text), Some(5));
        assert_eq!(parse_count(FAMILIES[1], text), None);
        assert_eq!(parse_count(FAMILIES[1], "TCP6: inuse 12\n"), Some(12));
    }

    /// Of the namespace the tests run in: no privileges are needed to ask.
    #[test]
    fn open_connections_are_listed_and_listeners_are_not() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                continue; // a machine without IPv6
            };
            let to = listener.local_addr().unwrap();
            let client = TcpStream::connect(to).unwrap();
            let (_server, from) = listener.accept().unwrap();
            assert_eq!(client.local_addr().unwrap(), from);
            let all = connections().unwrap();
            assert!(all.contains(&(from, to)), "{all:?}");
            assert!(all.contains(&(to, from)), "{all:?}");
            assert!(all.iter().all(|(_, remote)| remote.port() != 0), "{all:?}");
        }
    }

    #[test]
    fn listeners_have_the_inode_of_their_descriptor() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let link = fs::read_link(format!("/proc/self/fd/{}", listener.as_raw_fd())).unwrap();
        let all = listening().unwrap();
        let address = listener.local_addr().unwrap();
        let found = all.iter().find(|(at, _)| *at == address);
        let inode = found.map(|(_, inode)| format!("socket:[{inode}]"));
        assert_eq!(inode.as_deref(), link.to_str());
        drop(listener);
        assert!(listening().unwrap().iter().all(|(at, _)| *at != address));
    }

    #[test]
    fn garbage_is_refused() {
        let mut all = Vec::new();
        assert!(parse(&[1; 40], &mut all).is_err());
        assert!(parse(&[0; 7], &mut all).is_err());
        let mut refusal = [0; 36];
        refusal[0] = 36;
        refusal[4] = 2;
        refusal[16..20].copy_from_slice(&(-2_i32).to_ne_bytes());
        let error = parse(&refusal, &mut all).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(all.is_empty());
        assert!(!parse(&[], &mut all).unwrap());
    }
}
