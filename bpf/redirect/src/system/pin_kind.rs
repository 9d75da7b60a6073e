//! Of what kind a pinned object is. Asking the kernel for a map's properties with the descriptor of
//! a link gives that link's, read as a map's: nonsense, and no error.
#![allow(
    unsafe_code,
    reason = "bpf(2), BPF_OBJ_GET: aya opens a pin only as what it is told"
)]

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

const BPF_OBJ_GET: libc::c_int = 7;

/// The part of `union bpf_attr` that BPF_OBJ_GET reads.
#[repr(C)]
struct Attributes {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// What can be pinned.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    Map,
    Link,
    /// A program, or what is yet to come.
    Other,
}

/// The kind of what is pinned there.
pub(crate) fn kind(pin: &Path) -> io::Result<Kind> {
    let object = open(pin)?;
    // The name of the object's file; both spellings of a link's have been in use.
    let name = fs::read_link(format!("/proc/self/fd/{}", object.as_raw_fd()))?;
    Ok(match name.to_str() {
        Some("anon_inode:bpf-map") => Kind::Map,
        Some("anon_inode:bpf-link" | "anon_inode:bpf_link") => Kind::Link,
        _ => Kind::Other,
    })
}

fn open(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let attributes = Attributes {
        pathname: path.as_ptr().expose_provenance() as u64,
        bpf_fd: 0,
        file_flags: 0,
    };
    // SAFETY: the kernel reads as many bytes of `attributes` as it is told there are, and through
    // `pathname` a string that ends with NUL; `path` lives until after the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_OBJ_GET,
            &raw const attributes,
            size_of::<Attributes>(),
        )
    };
    drop(path);
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let number = i32::try_from(result).map_err(io::Error::other)?;
    // SAFETY: BPF_OBJ_GET returned a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
