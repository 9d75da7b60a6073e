//! Outgoing connections, optionally from a foreign source address.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};

use super::stream::TcpStream;
use crate::executor::{Inner, current};
use crate::keepalive::Keepalive;
use crate::op::{OpId, Operation, RawAddr, Readiness, Socket};
use crate::sys::{
    SocketOption, keep_urgent_inline, peer_addr, poll_now, set_option, take_error,
    take_queued_errors,
};

/// Options of an outgoing connection.
#[derive(Debug, Clone, Copy, Default)]
pub struct ConnectOptions {
    /// Source address to connect from; it may belong to another host (`IP_TRANSPARENT`).
    pub source: Option<IpAddr>,
    /// `SO_MARK`.
    pub mark: Option<u32>,
    /// Keepalive probes. They are turned on within a second or two: the time before the first one
    /// counts from the last thing received all the same.
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
    if let Some(keepalive) = options.keepalive {
        inner.driver.borrow_mut().keep_alive(&socket, keepalive);
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
    let fd = socket.as_fd();
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
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    keep_urgent_inline(&socket);
    if let Some(mark) = options.mark {
        set_option(&socket, SocketOption::Mark(mark))?;
    }
    if let Some(source) = options.source {
        bind_foreign(socket.as_fd(), source)?;
    }
    Ok(socket)
}

/// Binds to an address of another host with a port chosen at connect time.
fn bind_foreign(fd: BorrowedFd<'_>, source: IpAddr) -> io::Result<()> {
    match source {
        IpAddr::V4(_) => set_option(fd, SocketOption::TransparentV4)?,
        IpAddr::V6(_) => set_option(fd, SocketOption::TransparentV6)?,
    }
    // The port is picked by connect(2), per 4-tuple, so that 28,000 ports are not the limit.
    set_option(fd, SocketOption::BindAddressNoPort)?;
    Ok(bind(fd, &SocketAddr::new(source, 0))?)
}
