//! Outgoing connections, optionally from a foreign source address.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use super::stream::{Keepalive, TcpStream, keep_urgent_inline, peer_addr};
use crate::executor::{Inner, current};
use crate::op::{OpId, Operation, RawAddr, Readiness, Socket};
use crate::sys::{poll_now, set_option, take_error, take_queued_errors};

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

/// Connects a TCP socket with `TCP_NODELAY` and `SO_OOBINLINE`. Cancel safe: a dropped connect is
/// cancelled.
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
    let addr = Box::new(RawAddr::new(to));
    perform(&inner, Operation::Connect(Rc::clone(&socket), addr)).await?;
    // io_uring says that it is done when an ICMP error has answered the SYN while connect(2) ran;
    // the kernel goes on sending SYNs, and the next answer decides.
    let mut told = None;
    while !is_connected(&socket, &mut told)? {
        let wait = Operation::Ready(Rc::clone(&socket), Readiness::Write);
        perform(&inner, wait).await?;
    }
    Ok(TcpStream::from_socket(socket))
}

/// Does one operation. Cancelled when dropped.
async fn perform(inner: &Rc<Inner>, operation: Operation) -> io::Result<()> {
    let op = inner.driver.borrow_mut().start(operation);
    let mut guard = Guard {
        inner,
        op: Some(op),
    };
    let (result, _) = poll_fn(|cx| inner.driver.borrow_mut().poll_once(op, cx)).await;
    guard.op = None;
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    Ok(())
}

/// Whether a socket that was told to connect is connected; false while it still tries. One system
/// call where all is well. Leaves no error in the socket's queue, which would end every wait at
/// once; `told` is the last of them.
fn is_connected(socket: &Socket, told: &mut Option<i32>) -> io::Result<bool> {
    let fd = socket.raw();
    let state = poll_now(fd, libc::POLLOUT)?;
    if state == libc::POLLOUT {
        return Ok(true);
    }
    let closed = state & libc::POLLHUP != 0;
    // Before the queue is emptied, which takes it away as well. While the socket still tries it is
    // one that the kernel has passed over, and so do we.
    let error = if closed { take_error(fd)? } else { 0 };
    *told = take_queued_errors(fd).or(*told);
    if closed {
        let code = Some(error).filter(|code| *code != 0);
        let code = code.or(*told).unwrap_or(libc::ECONNABORTED);
        return Err(io::Error::from_raw_os_error(code));
    }
    match peer_addr(fd) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Ok(false),
        Err(error) => Err(error),
    }
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
    keep_urgent_inline(fd);
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
