//! System calls on sockets that have no memory but their own arguments to answer for.

use std::io;
use std::os::fd::RawFd;

/// Errors taken from a queue at once: it is bounded by the socket's buffer, and each is asked for.
const QUEUED_MAX: usize = 64;

/// Takes the error of a socket (`SO_ERROR`); 0: there is none. It is told once only.
pub(crate) fn take_error(fd: RawFd) -> io::Result<i32> {
    let mut code = 0_i32;
    let mut len = size_of::<i32>() as libc::socklen_t;
    let value = (&raw mut code).cast();
    // SAFETY: `code` lives across the call, and its own size is passed.
    let rc = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, value, &raw mut len) };
    if rc != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(code)
    }
}

/// Empties the error queue of a socket (`MSG_ERRQUEUE`, `ip(7)`): since Linux 5.9 ICMP errors for a
/// SYN lie there, asked for or not. Returns what the last one says.
pub(crate) fn take_queued_errors(fd: RawFd) -> Option<i32> {
    let mut last = None;
    for _ in 0..QUEUED_MAX {
        match take_queued_error(fd) {
            Some(code) => last = code.or(last),
            None => break,
        }
    }
    last
}

/// One error of the queue, if there is one, and its code, if it has one.
fn take_queued_error(fd: RawFd) -> Option<Option<i32>> {
    let mut control = [0_u64; 32];
    // SAFETY: msghdr is plain old data; all zeroes means no name, vectors and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: the header describes live storage, aligned for control messages.
    let n = unsafe {
        let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
        libc::recvmsg(fd, &raw mut message, flags)
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

/// Sets an integer socket option.
pub(crate) fn set_option(fd: RawFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: `value` lives across the call and its own size is passed.
    let rc = unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), len) };
    if rc != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
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

/// Makes the close of a socket send RST (`SO_LINGER` with zero time).
pub(crate) fn reset_on_close(fd: RawFd) -> io::Result<()> {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    let len = size_of::<libc::linger>() as libc::socklen_t;
    let value = (&raw const linger).cast();
    // SAFETY: `linger` lives across the call and its own size is passed.
    let rc = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, value, len) };
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
