//! Sockets: non-blocking, `TCP_NODELAY`, made the same way everywhere.

use std::io;
use std::net::{IpAddr, SocketAddr};

use mio::net::{TcpListener, TcpStream};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use socket2::{Domain, Protocol, Socket, Type};

/// Queue of connections not yet accepted; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Begins to connect. The socket becomes writable when it is decided; then ask [`established`].
pub(crate) fn dial(to: SocketAddr, bind: Option<IpAddr>) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    if let Some(ip) = bind {
        // The port is chosen at connect, by the whole 4-tuple, so that more than 28k fit.
        setsockopt(&socket, IpBindAddressNoPort, &true)?;
        socket.bind(&SocketAddr::new(ip, 0).into())?;
    }
    match socket.connect(&to.into()) {
        Ok(()) => {}
        Err(e) if e.raw_os_error() == Some(nix::libc::EINPROGRESS) => {}
        Err(e) => return Err(e),
    }
    Ok(TcpStream::from_std(socket.into()))
}

/// Whether a connection begun by [`dial`] stands: `Ok(false)` means not decided yet.
pub(crate) fn established(stream: &TcpStream) -> io::Result<bool> {
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    match stream.peer_addr() {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(e) => Err(e),
    }
}

/// One listening socket per thread on one address, the kernel spreading connections over them.
///
/// # Errors
///
/// An address another process listens on is refused, although `SO_REUSEPORT` alone would share it.
pub(crate) fn listen(address: SocketAddr, threads: usize) -> io::Result<Vec<TcpListener>> {
    let probe = listener(address, false)?;
    let address = probe.local_addr()?;
    drop(probe);
    (0..threads).map(|_| listener(address, true)).collect()
}

fn listener(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(TcpListener::from_std(socket.into()))
}

/// What one try to read or write came to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Progress {
    /// This many bytes moved.
    Moved(usize),
    /// Nothing possible now; an event will tell.
    Blocked,
    /// The peer has finished sending (reads only).
    Ended,
}

/// Turns the result of a non-blocking read or write into [`Progress`].
pub(crate) fn progress(result: io::Result<usize>) -> io::Result<Progress> {
    match result {
        Ok(0) => Ok(Progress::Ended),
        Ok(n) => Ok(Progress::Moved(n)),
        Err(e) => match e.kind() {
            // An interrupted call moved nothing and is worth an event's delay at most: it cannot
            // happen on non-blocking sockets in practice.
            io::ErrorKind::WouldBlock => Ok(Progress::Blocked),
            io::ErrorKind::Interrupted => Ok(Progress::Moved(0)),
            _ => Err(e),
        },
    }
}
