//! Ctrl-C without leaving labs behind: the signals are taken from a descriptor between trials.

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Holds SIGINT and SIGTERM back while it lives. Children start with them as usual.
#[derive(Debug)]
pub(super) struct Interrupt {
    signals: SigSet,
    descriptor: SignalFd,
}

impl Interrupt {
    /// Begins to hold the signals back, on this thread and those it starts.
    pub(super) fn hold() -> Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.add(Signal::SIGTERM);
        signals
            .thread_block()
            .context("blocking SIGINT and SIGTERM")?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let descriptor =
            SignalFd::with_flags(&signals, flags).context("watching SIGINT and SIGTERM")?;
        Ok(Self {
            signals,
            descriptor,
        })
    }

    /// Whether one has come since it was last asked.
    pub(super) fn came(&self) -> bool {
        matches!(self.descriptor.read_signal(), Ok(Some(_)))
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        // Cannot fail: the set is the one that was blocked.
        let _ = self.signals.thread_unblock();
    }
}
