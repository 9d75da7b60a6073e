//! One connected TCP descriptor, its options and addresses.

use std::cell::{Cell, OnceCell};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::task::Waker;
use std::time::Duration;

use super::error::take_error;
use super::read::ReadHalf;
use super::sockaddr::{RawAddr, set_option};
use super::write::WriteHalf;
use crate::descriptors::Counted;
use crate::driver::Watch;
use crate::exec::current;

/// An owned descriptor; closed when the last half and the last operation let go of it.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    /// The first error that the kernel has told; 0: none. The kernel tells an error once, to
    /// whatever asks first, and from then on it looks like an end.
    failed: Cell<i32>,
    /// Its registration with epoll, where that is the back end.
    watch: OnceCell<Watch>,
    /// Woken by the first error.
    waiter: Waiter,
    _counted: Counted,
}

/// At most one waker.
#[derive(Default)]
struct Waiter(Cell<Option<Waker>>);

impl std::fmt::Debug for Waiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Waiter")
    }
}

impl Socket {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            failed: Cell::new(0),
            watch: OnceCell::new(),
            waiter: Waiter::default(),
            _counted: Counted::new(1),
        }
    }

    /// The error that has ended this connection, if one has.
    pub(crate) fn failure(&self) -> Option<i32> {
        Some(self.failed.get()).filter(|code| *code != 0)
    }

    /// Notes an error that the kernel has told of this connection.
    pub(crate) fn fail(&self, code: i32) {
        if self.failed.get() == 0 {
            self.failed.set(code);
        }
        if let Some(waker) = self.waiter.0.take() {
            waker.wake();
        }
    }

    /// Notes the error in an operation's result, if it is one of the connection.
    pub(crate) fn note(&self, result: i32) {
        match -result {
            ..=0 | libc::ECANCELED | libc::EAGAIN | libc::EINTR | libc::ENOBUFS => {}
            code => self.fail(code),
        }
    }

    /// Asks the kernel for an error that nothing has been told yet.
    pub(crate) fn look_for_failure(&self) {
        if let Ok(code) = take_error(self.raw()) {
            self.note(-code);
        }
    }

    /// Wakes `waker` when the connection fails.
    pub(crate) fn wake_on_failure(&self, waker: &Waker) {
        self.waiter.0.set(Some(waker.clone()));
    }

    pub(crate) fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    pub(crate) fn watch(&self) -> Option<&Watch> {
        self.watch.get()
    }

    /// Remembers the registration; there is only one.
    pub(crate) fn set_watch(&self, watch: Watch) {
        let fresh = self.watch.set(watch).is_ok();
        debug_assert!(fresh, "a socket is registered once");
    }
}

impl AsFd for ReadHalf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().fd.as_fd()
    }
}

impl AsFd for WriteHalf {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket().fd.as_fd()
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
        reset_on_close(&self.0)
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

/// What a socket is ready for now, of `events` and of what `poll(2)` always tells (`POLLERR`,
/// `POLLHUP`).
pub(crate) fn poll_now(fd: RawFd, events: i16) -> io::Result<i16> {
    let mut poll = libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    // SAFETY: one structure is passed, which lives across the call.
    if unsafe { libc::poll(&raw mut poll, 1, 0) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(poll.revents)
    }
}

/// Makes the close of `socket` send RST.
pub(crate) fn reset_on_close(socket: &Socket) -> io::Result<()> {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    let len = size_of::<libc::linger>() as libc::socklen_t;
    let value = (&raw const linger).cast();
    // SAFETY: `linger` lives across the call and its own size is passed.
    let rc =
        unsafe { libc::setsockopt(socket.raw(), libc::SOL_SOCKET, libc::SO_LINGER, value, len) };
    if rc != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Makes calls that would block fail with `EAGAIN`.
pub(crate) fn set_nonblocking(fd: RawFd) {
    // SAFETY: F_GETFL and F_SETFL have no memory-safety preconditions.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags & libc::O_NONBLOCK == 0 {
            libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK);
        }
    }
}
