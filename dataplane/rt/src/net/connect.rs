//! Outgoing connections, optionally from a foreign source address.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use super::sockaddr::{RawAddr, set_option};
use super::socket::{Keepalive, Socket, TcpStream};
use crate::exec::{Inner, current};
use crate::op::{Keep, OpId};

/// Options of an outgoing connection.
#[derive(Debug, Clone, Copy, Default)]
pub struct ConnectOptions {
    /// Source address to connect from; it may belong to another host (`IP_TRANSPARENT`).
    pub source: Option<IpAddr>,
    /// `SO_MARK`.
    pub mark: Option<u32>,
    /// Keepalive probes.
    pub keepalive: Option<Keepalive>,
}

/// Connects a TCP socket with `TCP_NODELAY`. Cancel safe: a dropped connect is cancelled.
///
/// # Errors
/// Those of `socket(2)`, `setsockopt(2)`, `bind(2)` and `connect(2)`; `EPERM` from a foreign source
/// means that `CAP_NET_ADMIN` is missing.
pub async fn connect(to: SocketAddr, options: &ConnectOptions) -> io::Result<TcpStream> {
    connect_prepared(to, options, |_| {}).await
}

/// As [`connect`], after `prepare` has seen the socket.
///
/// # Errors
/// As [`connect`].
pub async fn connect_prepared(
    to: SocketAddr,
    options: &ConnectOptions,
    prepare: impl FnOnce(BorrowedFd<'_>),
) -> io::Result<TcpStream> {
    let socket = make(to, options)?;
    prepare(socket.as_fd());
    let socket = Rc::new(Socket::new(socket));
    let inner = current();
    let keep = Keep::Connect(Rc::clone(&socket), Box::new(RawAddr::new(to)));
    let op = inner.driver.borrow_mut().start(keep);
    let mut guard = Guard {
        inner: &inner,
        op: Some(op),
    };
    let (result, keep) = poll_fn(|cx| inner.driver.borrow_mut().poll_once(op, cx)).await;
    guard.op = None;
    drop(keep);
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    Ok(TcpStream::from_socket(socket))
}

struct Guard<'a> {
    inner: &'a Rc<Inner>,
    op: Option<OpId>,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if let Some(op) = self.op.take() {
            self.inner.driver.borrow_mut().abandon(op);
        }
    }
}

fn make(to: SocketAddr, options: &ConnectOptions) -> io::Result<OwnedFd> {
    let family = if to.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    // SAFETY: socket(2) has no memory-safety preconditions.
    let fd = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just created and nobody else owns it.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
    if let Some(mark) = options.mark {
        set_option(fd, libc::SOL_SOCKET, libc::SO_MARK, mark.cast_signed())?;
    }
    if let Some(keepalive) = &options.keepalive {
        keepalive.apply(fd)?;
    }
    if let Some(source) = options.source {
        bind_foreign(fd, source)?;
    }
    Ok(owned)
}

/// Binds to an address of another host with a port chosen at connect time.
fn bind_foreign(fd: RawFd, source: IpAddr) -> io::Result<()> {
    match source {
        IpAddr::V4(_) => set_option(fd, libc::SOL_IP, libc::IP_TRANSPARENT, 1)?,
        IpAddr::V6(_) => set_option(fd, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1)?,
    }
    // The port is picked by connect(2), per 4-tuple, so that 28,000 ports are not the limit.
    set_option(fd, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
    let addr = RawAddr::new(SocketAddr::new(source, 0));
    // SAFETY: address and length describe live, initialised storage.
    let rc = unsafe { libc::bind(fd, addr.as_ptr(), addr.len()) };
    if rc != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
