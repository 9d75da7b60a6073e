//! Asks one question and says in a word or two what came of it.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::cells::{Cell, Way};
use socket2::{Domain, Protocol, Socket, Type};

/// More than any path's packet, less than what a connection's buffers take unread.
const BULK: usize = 48 << 10;
/// Fits the pods' links and not the underlay.
const LARGE: usize = 1_450;
/// How often a datagram is sent.
const AGAIN: Duration = Duration::from_millis(250);

pub(crate) const NO_ANSWER: &str = "no answer";

/// What came of `cell` within `limit`. The calling thread is in the asking host's namespace.
pub(crate) fn ask(cell: &Cell, limit: Duration) -> String {
    let result = match cell.way {
        Way::Tcp => tcp(cell, limit, b"?"),
        Way::Bulk => tcp(cell, limit, &vec![7; BULK]),
        Way::Udp => udp(cell, limit, b"?"),
        Way::Large => udp(cell, limit, &[7; LARGE]),
        Way::Echo => echo(cell, limit),
    };
    result.unwrap_or_else(|error| word(&error))
}

fn word(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::TimedOut | ErrorKind::WouldBlock => NO_ANSWER.to_owned(),
        ErrorKind::ConnectionRefused => "refused".to_owned(),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "reset".to_owned(),
        ErrorKind::UnexpectedEof => "an end without an answer".to_owned(),
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => "unreachable".to_owned(),
        _ => error.to_string(),
    }
}

fn socket(cell: &Cell, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let to = cell.to();
    let socket = Socket::new(Domain::for_address(to), kind, Some(protocol))?;
    if let Some(address) = cell.bind() {
        socket.bind(&SocketAddr::new(address, 0).into())?;
    }
    Ok(socket)
}

fn tcp(cell: &Cell, limit: Duration, question: &[u8]) -> io::Result<String> {
    let deadline = Instant::now() + limit;
    let socket = socket(cell, Type::STREAM, Protocol::TCP)?;
    socket.connect_timeout(&cell.to().into(), limit)?;
    let mut stream = TcpStream::from(socket);
    stream.set_write_timeout(Some(limit))?;
    stream.write_all(question)?;
    let mut answer = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    let who = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let length = match stream.read(&mut buffer) {
            // Of a socket in a sockmap Linux says so when a reset wakes its reader, and says the
            // reset when it is asked again.
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                continue;
            }
            other => other?,
        };
        if length == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        answer.extend_from_slice(&buffer[..length]);
        if let Some(end) = answer.iter().position(|byte| *byte == b'\n')
            && answer.len() > end + question.len()
        {
            break String::from_utf8_lossy(&answer[..end]).into_owned();
        }
    };
    Ok(who)
}

fn udp(cell: &Cell, limit: Duration, question: &[u8]) -> io::Result<String> {
    let socket = socket(cell, Type::DGRAM, Protocol::UDP)?;
    let answer = exchange(cell, socket, limit, question)?;
    let end = answer.iter().position(|byte| *byte == b'\n').unwrap_or(0);
    Ok(String::from_utf8_lossy(&answer[..end]).into_owned())
}

/// By a socket that needs no privilege but the namespace's leave: the kernel does the checksum and
/// finds the answer that belongs to it.
fn echo(cell: &Cell, limit: Duration) -> io::Result<String> {
    let (protocol, request, reply) = if cell.v6 {
        (Protocol::ICMPV6, 128, 129)
    } else {
        (Protocol::ICMPV4, 8, 0)
    };
    let socket = socket(cell, Type::DGRAM, protocol)?;
    let question = [request, 0, 0, 0, 0, 0, 0, 1, 42, 42];
    let answer = exchange(cell, socket, limit, &question)?;
    Ok(if answer.first() == Some(&reply) {
        "an echo".to_owned()
    } else {
        format!("ICMP {:?}", answer.first())
    })
}

/// Sends until an answer or an error comes.
fn exchange(cell: &Cell, socket: Socket, limit: Duration, question: &[u8]) -> io::Result<Vec<u8>> {
    socket.connect(&cell.to().into())?;
    // std's calls for datagrams, whatever the protocol.
    let socket = UdpSocket::from(OwnedFd::from(socket));
    socket.set_read_timeout(Some(AGAIN))?;
    let deadline = Instant::now() + limit;
    let mut buffer = vec![0; 64 << 10];
    loop {
        match socket.send(question) {
            // An ICMP error said that it is too large: from now on it is cut into fragments.
            Err(error) if error.raw_os_error() == Some(nix::libc::EMSGSIZE) => {}
            other => drop(other?),
        }
        match socket.recv(&mut buffer) {
            Ok(length) => return Ok(buffer[..length].to_vec()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) if error.raw_os_error() == Some(nix::libc::EMSGSIZE) => {}
            Err(error) => return Err(error),
        }
        if Instant::now() >= deadline {
            return Err(ErrorKind::TimedOut.into());
        }
    }
}
