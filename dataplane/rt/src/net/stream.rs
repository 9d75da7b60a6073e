//! A connected TCP socket before it is split, its options and addresses.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::net::sockopt;

use super::read::ReadHalf;
use super::write::WriteHalf;
use crate::executor::current;
use crate::op::Socket;
use crate::sys::{canonical, keep_urgent_inline, local_addr, peer_addr, reset_on_close};

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
        keep_urgent_inline(&stream);
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
        peer_addr(&*self.0)
    }

    /// Address of this end. On a transparent listener's connection: the original destination.
    ///
    /// # Errors
    /// That of `getsockname(2)`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        local_addr(&*self.0)
    }

    /// Destination before a netfilter `REDIRECT` (`SO_ORIGINAL_DST`, then its IPv6 twin).
    ///
    /// # Errors
    /// `ENOENT` or `ENOPROTOOPT` when conntrack knows no other destination.
    pub fn original_dst(&self) -> io::Result<SocketAddr> {
        let fd = &*self.0;
        match sockopt::ip_original_dst(fd) {
            Ok(v4) => Ok(v4.into()),
            Err(_) => Ok(canonical(sockopt::ipv6_original_dst(fd)?.into())),
        }
    }

    /// Disables Nagle's algorithm.
    ///
    /// # Errors
    /// That of `setsockopt(2)`.
    pub fn set_nodelay(&self) -> io::Result<()> {
        Ok(sockopt::set_tcp_nodelay(&*self.0, true)?)
    }

    /// Makes the final close send RST instead of FIN (`SO_LINGER` with zero time).
    ///
    /// # Errors
    /// That of `setsockopt(2)`.
    pub fn reset_on_close(&self) -> io::Result<()> {
        reset_on_close(&*self.0)
    }
}
