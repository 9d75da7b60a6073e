//! Plain system calls: those that `rustix` has not, and those whose answer is given another form.
//!
//! What a call here touches is its arguments, which live across it; descriptors are borrowed, so
//! they are open. Calls that work on memory which somebody else keeps alive are made where that is
//! argued: in [`crate::driver`] and [`crate::buf`].

use std::io;
use std::net::{SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::net::{SocketAddrAny, sockopt};

/// Errors taken from a queue at once: it is bounded by the socket's buffer, and each is asked for.
const QUEUED_MAX: usize = 64;

/// Integer socket options that `rustix` does not set.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SocketOption {
    /// `SO_MARK`.
    Mark(u32),
    /// `IP_TRANSPARENT`: bind to addresses of other hosts.
    TransparentV4,
    /// `IPV6_TRANSPARENT`.
    TransparentV6,
    /// `IP_BIND_ADDRESS_NO_PORT`: connect(2) picks the port, not bind(2).
    BindAddressNoPort,
}

/// Sets an option of a socket.
pub(crate) fn set_option(fd: impl AsFd, option: SocketOption) -> io::Result<()> {
    let (level, name, value) = match option {
        SocketOption::Mark(mark) => (libc::SOL_SOCKET, libc::SO_MARK, mark.cast_signed()),
        SocketOption::TransparentV4 => (libc::SOL_IP, libc::IP_TRANSPARENT, 1),
        SocketOption::TransparentV6 => (libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1),
        SocketOption::BindAddressNoPort => (libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1),
    };
    let fd = fd.as_fd().as_raw_fd();
    let len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: `value` lives across the call and its own size is passed.
    let rc = unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), len) };
    if rc != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// A byte that its sender calls urgent is received in its place (`SO_OOBINLINE`). Without this it
/// is taken out of the stream (`tcp(7)`), and a relay that does not ask for it loses it.
pub(crate) fn keep_urgent_inline(fd: impl AsFd) {
    // Every TCP socket has the option.
    let set = sockopt::set_socket_oobinline(fd, true);
    debug_assert!(set.is_ok(), "{set:?}");
}

/// Makes the close of a socket send RST (`SO_LINGER` with zero time).
pub(crate) fn reset_on_close(fd: impl AsFd) -> io::Result<()> {
    Ok(sockopt::set_socket_linger(fd, Some(Duration::ZERO))?)
}

/// Makes calls that would block fail with `EAGAIN`.
pub(crate) fn set_nonblocking(fd: impl AsFd) {
    // A descriptor that is open has flags to get and set.
    if let Ok(flags) = rustix::fs::fcntl_getfl(&fd)
        && !flags.contains(OFlags::NONBLOCK)
    {
        let _ = rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK);
    }
}

/// What a socket is ready for now, of `events` and of what `poll(2)` always reports (`POLLERR`,
/// `POLLHUP`).
pub(crate) fn poll_now(fd: impl AsFd, events: i16) -> io::Result<i16> {
    let events = PollFlags::from_bits_retain(events.cast_unsigned());
    let mut poll = [PollFd::new(&fd, events)];
    rustix::event::poll(&mut poll, Some(&Timespec::default()))?;
    Ok(poll[0].revents().bits().cast_signed())
}

/// Address of the other end; `ENOTCONN` where there is none (yet, or any more).
pub(crate) fn peer_addr(fd: impl AsFd) -> io::Result<SocketAddr> {
    internet(rustix::net::getpeername(fd)?)
}

/// Address of this end.
pub(crate) fn local_addr(fd: impl AsFd) -> io::Result<SocketAddr> {
    internet(Some(rustix::net::getsockname(fd)?))
}

fn internet(addr: Option<SocketAddrAny>) -> io::Result<SocketAddr> {
    let addr = addr.and_then(|addr| SocketAddr::try_from(addr).ok());
    addr.map(canonical)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EAFNOSUPPORT))
}

/// IPv4 addresses mapped into IPv6 as IPv4; without flow information.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    let SocketAddr::V6(v6) = addr else {
        return addr;
    };
    match v6.ip().to_ipv4_mapped() {
        Some(v4) => SocketAddr::new(v4.into(), v6.port()),
        None => SocketAddrV6::new(*v6.ip(), v6.port(), 0, v6.scope_id()).into(),
    }
}

/// Takes the error of a socket (`SO_ERROR`); 0: there is none. The kernel reports it once only.
pub(crate) fn take_error(fd: impl AsFd) -> io::Result<i32> {
    let error = sockopt::socket_error(fd)?;
    Ok(error.err().map_or(0, rustix::io::Errno::raw_os_error))
}

/// Empties the error queue of a socket (`MSG_ERRQUEUE`, `ip(7)`): since Linux 5.9 ICMP errors for a
/// SYN lie there, asked for or not. Returns what the last one says.
pub(crate) fn take_queued_errors(fd: impl AsFd) -> Option<i32> {
    let mut last = None;
    for _ in 0..QUEUED_MAX {
        match take_queued_error(fd.as_fd()) {
            Some(code) => last = code.or(last),
            None => break,
        }
    }
    last
}

/// One error of the queue, if there is one, and its code, if it has one.
fn take_queued_error(fd: BorrowedFd<'_>) -> Option<Option<i32>> {
    let mut control = [0_u64; 32];
    // SAFETY: msghdr is plain old data; all zeroes means no name, vectors and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: the header describes live storage, aligned for control messages.
    let n = unsafe {
        let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
        libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags)
    };
    if n < 0 {
        return None;
    }
    // SAFETY: the kernel has filled the control buffer as the header says now.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: a header that the macros yield lies inside the control buffer, and its data are
        // of the type that level and kind name.
        unsafe {
            let kind = ((*header).cmsg_level, (*header).cmsg_type);
            if let (libc::SOL_IP, libc::IP_RECVERR) | (libc::SOL_IPV6, libc::IPV6_RECVERR) = kind {
                let error = libc::CMSG_DATA(header).cast::<libc::sock_extended_err>();
                return Some(Some(error.read_unaligned().ee_errno.cast_signed()));
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    Some(None)
}

/// Bytes the peer of a TCP connection has not acknowledged, FIN included (`SIOCOUTQ`).
pub(crate) fn bytes_unacknowledged(fd: impl AsFd) -> Option<usize> {
    let mut left = 0_i32;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the call writes one integer to a live local.
    let rc = unsafe { libc::ioctl(fd, libc::TIOCOUTQ, &raw mut left) };
    (rc == 0).then_some(left.max(0) as usize)
}

/// `tcpi_bytes_acked` of `struct tcp_info` (`linux/tcp.h`, Linux 4.1).
pub(crate) fn bytes_acknowledged(fd: impl AsFd) -> Option<u64> {
    const WORDS: usize = 16;
    let mut info = [0_u64; WORDS];
    let mut len = size_of_val(&info) as libc::socklen_t;
    let (fd, value) = (fd.as_fd().as_raw_fd(), info.as_mut_ptr().cast());
    // SAFETY: the kernel writes at most `len` bytes to the array, which lives across the call.
    let rc =
        unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, value, &raw mut len) };
    // Behind 8 bytes of flags, 24 words of 32 bits, and two rates of 64 bits.
    (rc == 0 && len as usize == size_of_val(&info)).then(|| info[(8 + 24 * 4 + 16) / 8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_are_ipv4() {
        let parse = |text: &str| -> SocketAddr { text.parse().unwrap() };
        assert_eq!(canonical(parse("[::ffff:10.0.0.1]:5")), parse("10.0.0.1:5"));
        for text in ["10.1.2.3:80", "[2001:db8::1]:15008", "[fe80::1%3]:7"] {
            assert_eq!(canonical(parse(text)), parse(text));
        }
    }
}
