//! A timer with the kernel's resolution for the open loop: epoll's own timeout counts in whole
//! milliseconds.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// Wakes a poll at a given time.
#[derive(Debug)]
pub(crate) struct Timer {
    fd: TimerFd,
    armed_for: u64,
}

impl Timer {
    /// A timer that reports to `registry` under `token`.
    pub(crate) fn new(registry: &Registry, token: Token) -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let fd = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        let raw = fd.as_fd().as_raw_fd();
        registry.register(&mut SourceFd(&raw), token, Interest::READABLE)?;
        Ok(Self {
            fd,
            armed_for: u64::MAX,
        })
    }

    /// Fires at `due`; `now` and `due` are ns of the run's clock. A time already set is not set
    /// again. Setting clears an earlier expiry, so the descriptor never has to be read.
    pub(crate) fn arm(&mut self, now: u64, due: u64) -> io::Result<()> {
        if self.armed_for == due {
            return Ok(());
        }
        let wait = Duration::from_nanos(due.saturating_sub(now).max(1));
        let wait = TimeSpec::nanoseconds(i64::try_from(wait.as_nanos()).unwrap_or(i64::MAX));
        self.fd
            .set(Expiration::OneShot(wait), TimerSetTimeFlags::empty())?;
        self.armed_for = due;
        Ok(())
    }
}
