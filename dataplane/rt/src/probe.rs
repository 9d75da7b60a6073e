//! Start-up probe: can this process use io_uring, and if not, who refuses it?
//!
//! `io_uring_setup(2)` answers `EPERM` both when a seccomp filter or an LSM blocks it and when the
//! sysctl `kernel.io_uring_disabled` (Linux 6.6) forbids it; the probe tells them apart so that the
//! operator knows what to change.

use std::{fmt, fs, io};

use io_uring::{IoUring, Probe, opcode};

/// Why io_uring cannot be used. `Display` is one line with the remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The kernel has no io_uring system calls (`ENOSYS`).
    NotBuilt {
        /// Kernel release as `uname -r` prints it.
        release: String,
    },
    /// `kernel.io_uring_disabled` is 1 (needs `CAP_SYS_ADMIN` or the group) or 2 (off for all).
    Sysctl {
        /// Value of the sysctl.
        value: u32,
    },
    /// A seccomp filter or security module refuses the system call.
    Seccomp {
        /// `Seccomp:` of `/proc/self/status`: 2 means that a filter is in force.
        mode: u32,
    },
    /// Locked memory is exhausted (`ENOMEM`).
    Memory,
    /// The kernel is too old for a set-up flag or an operation.
    TooOld {
        /// Kernel release as `uname -r` prints it.
        release: String,
        /// What is missing.
        missing: &'static str,
    },
    /// Any other error of `io_uring_setup(2)`.
    Other {
        /// Its text.
        error: String,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotBuilt { release } => write!(
                f,
                "io_uring is not built into kernel {release} (ENOSYS): \
                 use a kernel with CONFIG_IO_URING, 6.1 or newer"
            ),
            Self::Sysctl { value } => write!(
                f,
                "io_uring is disabled by sysctl kernel.io_uring_disabled={value}: \
                 set it to 0 (allowed: 0 all, 1 privileged, 2 nobody)"
            ),
            Self::Seccomp { mode } => write!(
                f,
                "io_uring_setup is refused with EPERM while kernel.io_uring_disabled allows it: \
                 a seccomp filter (mode {mode}) or security module blocks it; use the seccomp \
                 profile in deploy/ (container defaults block io_uring)"
            ),
            Self::Memory => write!(
                f,
                "io_uring_setup failed with ENOMEM: raise RLIMIT_MEMLOCK or the memory limit of \
                 the container"
            ),
            Self::TooOld { release, missing } => {
                write!(
                    f,
                    "kernel {release} lacks {missing} for io_uring: 6.1 or newer is needed"
                )
            }
            Self::Other { error } => write!(f, "io_uring_setup failed: {error}"),
        }
    }
}

impl std::error::Error for Refusal {}

/// Operations that the ring back end uses.
const NEEDED: [(u8, &str); 8] = [
    (opcode::Accept::CODE, "IORING_OP_ACCEPT"),
    (opcode::Recv::CODE, "IORING_OP_RECV"),
    (opcode::RecvMsg::CODE, "IORING_OP_RECVMSG"),
    (opcode::Send::CODE, "IORING_OP_SEND"),
    (opcode::SendMsg::CODE, "IORING_OP_SENDMSG"),
    (opcode::Connect::CODE, "IORING_OP_CONNECT"),
    (opcode::PollAdd::CODE, "IORING_OP_POLL_ADD"),
    (opcode::AsyncCancel::CODE, "IORING_OP_ASYNC_CANCEL"),
];

/// Sets up and drops a small ring with the flags and operations the runtime needs.
///
/// # Errors
/// The [`Refusal`] that says who refuses and what to do.
pub fn check() -> Result<(), Refusal> {
    let ring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(8)
        .map_err(|error| classify(&error, sysctl(), seccomp_mode()))?;
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|error| Refusal::Other {
            error: error.to_string(),
        })?;
    for (code, missing) in NEEDED {
        if !probe.is_supported(code) {
            return Err(Refusal::TooOld {
                release: release(),
                missing,
            });
        }
    }
    Ok(())
}

/// Decides from the error and the two pieces of system state who refused.
pub(crate) fn classify(error: &io::Error, sysctl: Option<u32>, seccomp: u32) -> Refusal {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => Refusal::NotBuilt { release: release() },
        Some(libc::EPERM | libc::EACCES) => match sysctl {
            Some(value) if value > 0 => Refusal::Sysctl { value },
            _ => Refusal::Seccomp { mode: seccomp },
        },
        Some(libc::ENOMEM) => Refusal::Memory,
        Some(libc::EINVAL) => Refusal::TooOld {
            release: release(),
            missing: "IORING_SETUP_SINGLE_ISSUER and IORING_SETUP_DEFER_TASKRUN",
        },
        _ => Refusal::Other {
            error: error.to_string(),
        },
    }
}

fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

fn sysctl() -> Option<u32> {
    fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
        .ok()?
        .trim()
        .parse()
        .ok()
}

fn seccomp_mode() -> u32 {
    fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status.lines().find(|line| line.starts_with("Seccomp:"))?;
            line.split_whitespace().nth(1)?.parse().ok()
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_apart_who_refuses() {
        let error = |code| io::Error::from_raw_os_error(code);
        assert_eq!(
            classify(&error(libc::EPERM), Some(2), 0),
            Refusal::Sysctl { value: 2 }
        );
        assert_eq!(
            classify(&error(libc::EPERM), Some(0), 2),
            Refusal::Seccomp { mode: 2 }
        );
        assert_eq!(
            classify(&error(libc::EPERM), None, 2),
            Refusal::Seccomp { mode: 2 }
        );
        assert_eq!(classify(&error(libc::ENOMEM), Some(0), 0), Refusal::Memory);
        let old = classify(&error(libc::EINVAL), Some(0), 0);
        assert!(matches!(old, Refusal::TooOld { .. }), "{old}");
        let gone = classify(&error(libc::ENOSYS), None, 0);
        assert!(gone.to_string().contains("CONFIG_IO_URING"), "{gone}");
    }

    #[test]
    fn refusals_are_one_line() {
        for code in [
            libc::EPERM,
            libc::ENOSYS,
            libc::ENOMEM,
            libc::EINVAL,
            libc::EIO,
        ] {
            let text = classify(&io::Error::from_raw_os_error(code), Some(0), 2).to_string();
            assert!(!text.contains('\n') && text.len() > 20, "{text}");
        }
    }
}
