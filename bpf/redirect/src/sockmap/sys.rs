//! Two socket options that no safe crate has, and a system call.
#![allow(
    unsafe_code,
    reason = "getsockopt of options that nix and socket2 do not know; bpf(2) where aya does not fit"
)]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

const SO_MEMINFO: libc::c_int = 55;
const SO_NETNS_COOKIE: libc::c_int = 71;
/// `SK_MEMINFO_VARS` of `linux/sock_diag.h`; the first is what is unread.
const MEMINFO_WORDS: usize = 9;

fn get<T: Integers>(socket: BorrowedFd<'_>, option: libc::c_int, mut value: T) -> io::Result<T> {
    let mut length = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is valid for writes of `length` bytes while the call lasts, and `Integers`
    // promises that every bit pattern is one of its values: the kernel fills it with any bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Plain integers.
///
/// # Safety
/// Every bit pattern must be a value of the type.
unsafe trait Integers: Copy {}

// SAFETY: an integer.
unsafe impl Integers for u64 {}
// SAFETY: integers, with nothing between them.
unsafe impl Integers for [u32; MEMINFO_WORDS] {}

/// What the kernel knows the socket's network namespace by, for ever.
pub(crate) fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    get(socket, SO_NETNS_COOKIE, 0_u64)
}

/// Bytes charged to the socket's receive buffer.
pub(crate) fn receive_memory(socket: BorrowedFd<'_>) -> io::Result<u32> {
    get(socket, SO_MEMINFO, [0_u32; MEMINFO_WORDS]).map(|words| words[0])
}

/// What FIONREAD says.
pub(crate) fn unread(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, and `bytes` is one.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    if result == 0 {
        Ok(usize::try_from(bytes).unwrap_or(0))
    } else {
        Err(io::Error::last_os_error())
    }
}

const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_SK_MSG_VERDICT: u32 = 7;

/// The part of `union bpf_attr` that BPF_PROG_ATTACH reads.
#[repr(C)]
struct AttachAttributes {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

/// Runs `program` on each message of the sockets in `map`. Outlives this process. aya takes maps of
/// four-byte values only.
pub(crate) fn attach_to_messages(program: BorrowedFd<'_>, map: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = AttachAttributes {
        target_fd: map.as_raw_fd().cast_unsigned(),
        attach_bpf_fd: program.as_raw_fd().cast_unsigned(),
        attach_type: BPF_SK_MSG_VERDICT,
        attach_flags: 0,
    };
    // SAFETY: the kernel reads as many bytes of `attributes` as it is told there are; those of
    // `union bpf_attr` behind them count as zero.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attributes,
            size_of::<AttachAttributes>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
