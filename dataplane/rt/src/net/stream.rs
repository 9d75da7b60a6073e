//! A connected TCP socket before it is split, its options and addresses.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use super::read::ReadHalf;
use super::write::WriteHalf;
use crate::executor::current;
use crate::op::{RawAddr, Socket};
use crate::sys::{reset_on_close, set_option};

impl AsFd for ReadHalf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}

impl AsFd for WriteHalf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().as_fd()
    }
}

/// TCP keepalive settings (`tcp(7)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Idle time before the first probe (`TCP_KEEPIDLE`), whole seconds.
    pub time: Duration,
    /// Time between probes (`TCP_KEEPINTVL`), whole seconds.
    pub interval: Duration,
    /// Unanswered probes before the connection is dropped (`TCP_KEEPCNT`).
    pub retries: u32,
}

impl Keepalive {
    pub(crate) fn apply(&self, fd: RawFd) -> io::Result<()> {
        let seconds = |duration: Duration| duration.as_secs().clamp(1, 32_767) as i32;
        set_option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
        set_option(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_KEEPIDLE,
            seconds(self.time),
        )?;
        set_option(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_KEEPINTVL,
            seconds(self.interval),
        )?;
        set_option(
            fd,
            libc::IPPROTO_TCP,
            libc::TCP_KEEPCNT,
            self.retries.clamp(1, 127) as i32,
        )
    }
}

/// A connected TCP socket, not yet split into its halves.
#[derive(Debug)]
pub struct TcpStream(Rc<Socket>);

impl TcpStream {
    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self(Rc::new(Socket::new(fd)))
    }

    pub(crate) fn from_socket(socket: Rc<Socket>) -> Self {
        Self(socket)
    }

    /// Takes over a connected, *blocking-mode* standard socket, as [`super::Listener::from_std`]
    /// does.
    #[must_use]
    pub fn from_std(stream: std::net::TcpStream) -> Self {
        keep_urgent_inline(stream.as_raw_fd());
        Self::from_fd(stream.into())
    }

    pub(crate) fn socket(&self) -> &Rc<Socket> {
        &self.0
    }

    /// Splits into halves that live in different tasks or futures of this worker.
    ///
    /// # Panics
    /// Outside [`crate::Runtime::run`].
    #[must_use]
    pub fn split(self) -> (ReadHalf, WriteHalf) {
        let inner = current();
        let read = ReadHalf::new(Rc::clone(&self.0), Rc::clone(&inner));
        (read, WriteHalf::new(self.0, inner))
    }

    /// Address of the other end.
    ///
    /// # Errors
    /// `ENOTCONN` once the connection is reset.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        peer_addr(self.0.raw())
    }

    /// Address of this end. On a transparent listener's connection: the original destination.
    ///
    /// # Errors
    /// That of `getsockname(2)`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        let fd = self.0.raw();
        // SAFETY: `fill` passes storage and length that are valid for writes.
        RawAddr::fill(|addr, len| unsafe { libc::getsockname(fd, addr, len) })
    }

    /// Destination before a netfilter `REDIRECT` (`SO_ORIGINAL_DST`, then its IPv6 twin).
    ///
    /// # Errors
    /// `ENOENT` or `ENOPROTOOPT` when conntrack knows no other destination.
    pub fn original_dst(&self) -> io::Result<SocketAddr> {
        const SO_ORIGINAL_DST: i32 = 80; // linux/netfilter_ipv4.h, netfilter_ipv6/ip6_tables.h
        let fd = self.0.raw();
        let ask = |level: i32| {
            // SAFETY: `fill` passes storage and length that are valid for writes.
            RawAddr::fill(|addr, len| unsafe {
                libc::getsockopt(fd, level, SO_ORIGINAL_DST, addr.cast(), len)
            })
        };
        ask(libc::SOL_IP).or_else(|_| ask(libc::SOL_IPV6))
    }

    /// Disables Nagle's algorithm.
    ///
    /// # Errors
    /// That of `setsockopt(2)`.
    pub fn set_nodelay(&self) -> io::Result<()> {
        set_option(self.0.raw(), libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)
    }

    /// Makes the final close send RST instead of FIN (`SO_LINGER` with zero time).
    ///
    /// # Errors
    /// That of `setsockopt(2)`.
    pub fn reset_on_close(&self) -> io::Result<()> {
        reset_on_close(self.0.raw())
    }
}

/// A byte that its sender calls urgent is received in its place. Without this it is taken out of
/// the stream (`tcp(7)`), and a relay that does not ask for it loses it.
pub(crate) fn keep_urgent_inline(fd: RawFd) {
    // Every TCP socket has the option.
    let set = set_option(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, 1);
    debug_assert!(set.is_ok(), "{set:?}");
}

/// Address of the other end; `ENOTCONN` where there is none (yet, or any more).
pub(crate) fn peer_addr(fd: RawFd) -> io::Result<SocketAddr> {
    // SAFETY: `fill` passes storage and length that are valid for writes.
    RawAddr::fill(|addr, len| unsafe { libc::getpeername(fd, addr, len) })
}
