//! The ring: submission, waiting, completion.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use crate::buf::{Pool, RING_GROUP};
use crate::op::{After, Keep, OpId, OpTable};

/// Counters of one worker's ring. They only grow; all are totals since start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// `io_uring_enter(2)` calls.
    pub enters: u64,
    /// Completions taken from the ring.
    pub completions: u64,
    /// Operations submitted.
    pub submissions: u64,
    /// Times the completion queue overflowed (the kernel then keeps the entries, nothing is lost).
    pub overflows: u64,
    /// Receives that found the provided-buffer ring empty (`ENOBUFS`).
    pub starved: u64,
    /// Wake-ups from other threads.
    pub wakes: u64,
}

const USER_DATA_IGNORE: u64 = u64::MAX;
const USER_DATA_WAKE: u64 = u64::MAX - 1;

/// One ring with its operations. Field order: the ring closes before anything its operations own.
pub(crate) struct Driver {
    ring: IoUring,
    backlog: VecDeque<squeue::Entry>,
    pub(crate) ops: OpTable,
    pool: Pool,
    wake_fd: OwnedFd,
    /// Where the kernel puts the eventfd's counter; boxed so that its address is stable.
    wake_value: Box<u64>,
    pub(crate) counters: Counters,
    /// Multishot receives to stop after this turn; kept to reuse its memory.
    stop: Vec<OpId>,
}

impl Driver {
    /// Sets up the ring and its provided buffers.
    pub(crate) fn new(entries: u32, pool: &Pool) -> io::Result<Self> {
        let build = |no_sqarray: bool| {
            let mut builder = IoUring::builder();
            builder
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all()
                .setup_clamp()
                .setup_cqsize(entries * 4)
                .dontfork();
            if no_sqarray {
                builder.setup_no_sqarray();
            }
            builder.build(entries)
        };
        // NO_SQARRAY is Linux 6.6; without it the ring only costs one more indirection.
        let ring = build(true).or_else(|error| {
            if error.raw_os_error() == Some(libc::EINVAL) {
                build(false)
            } else {
                Err(error)
            }
        })?;
        // SAFETY: the pool outlives the ring (field order) or is leaked, and its entries array has
        // `ring_entries` elements, page aligned.
        unsafe {
            ring.submitter().register_buf_ring_with_flags(
                pool.ring_address(),
                pool.config().ring_entries,
                RING_GROUP,
                0,
            )?;
        }
        // SAFETY: eventfd has no memory-safety preconditions.
        let wake_fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if wake_fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut driver = Self {
            ring,
            backlog: VecDeque::new(),
            ops: OpTable::default(),
            pool: pool.clone(),
            // SAFETY: the descriptor was just created and nobody else owns it.
            wake_fd: unsafe { OwnedFd::from_raw_fd(wake_fd) },
            wake_value: Box::new(0),
            counters: Counters::default(),
            stop: Vec::new(),
        };
        driver.arm_wake();
        Ok(driver)
    }

    pub(crate) fn wake_fd(&self) -> RawFd {
        self.wake_fd.as_raw_fd()
    }

    fn arm_wake(&mut self) {
        let fd = Fd(self.wake_fd.as_raw_fd());
        let address = (&raw mut *self.wake_value).cast::<u8>();
        self.push(
            opcode::Read::new(fd, address, 8)
                .build()
                .user_data(USER_DATA_WAKE),
        );
    }

    /// Queues an entry; a full submission queue spills into the backlog.
    fn push(&mut self, entry: squeue::Entry) {
        self.counters.submissions += 1;
        if !self.backlog.is_empty() {
            self.backlog.push_back(entry);
            return;
        }
        // SAFETY: every entry points only to memory owned by the operation table, the pool or this
        // driver, all of which outlive the operation.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
    }

    /// Starts an operation with one completion. `build` makes the entry from what is kept.
    pub(crate) fn submit_once(
        &mut self,
        keep: Keep,
        build: impl FnOnce(&mut Keep) -> squeue::Entry,
    ) -> OpId {
        let id = self.ops.insert_once(keep);
        let entry = build(self.ops.keep_mut(id)).user_data(id.user_data());
        self.push(entry);
        id
    }

    /// Starts a multishot operation.
    pub(crate) fn submit_many(&mut self, keep: Keep, entry: squeue::Entry, accepts: bool) -> OpId {
        let id = self.ops.insert_many(keep, accepts);
        self.push(entry.user_data(id.user_data()));
        id
    }

    /// Asks the kernel to cancel an operation; its completion still arrives.
    pub(crate) fn cancel(&mut self, id: OpId) {
        let entry = opcode::AsyncCancel::new(id.user_data()).build();
        self.push(entry.user_data(USER_DATA_IGNORE));
    }

    /// The owner of an operation is dropped: keep its resources until the kernel is done.
    pub(crate) fn abandon(&mut self, id: OpId) {
        if self.ops.abandon(id, &self.pool, close_fd) {
            self.cancel(id);
        }
    }

    /// Submits what is queued and, with `wait`, blocks until a completion arrives or `timeout`
    /// passes. Then takes up to `limit` completions.
    pub(crate) fn turn(
        &mut self,
        wait: bool,
        timeout: Option<Duration>,
        limit: usize,
    ) -> io::Result<()> {
        self.flush_backlog()?;
        let wait = wait && self.backlog.is_empty();
        self.enter(usize::from(wait), timeout)?;
        self.reap(limit);
        Ok(())
    }

    fn flush_backlog(&mut self) -> io::Result<()> {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `push`.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.backlog.pop_front();
                continue;
            }
            self.enter(0, None)?;
            if self.ring.submission().is_full() {
                return Ok(()); // the kernel took nothing: completions must be reaped first
            }
        }
        Ok(())
    }

    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> io::Result<()> {
        self.counters.enters += 1;
        let result = match timeout {
            Some(timeout) if want > 0 => {
                let spec = Timespec::from(timeout);
                let args = SubmitArgs::new().timespec(&spec);
                self.ring.submitter().submit_with_args(want, &args)
            }
            _ => self.ring.submit_and_wait(want),
        };
        match result {
            Ok(_) => Ok(()),
            // ETIME: the timeout passed. EINTR: a signal. EBUSY, EAGAIN: completions are to be
            // reaped or memory is short; the caller's loop comes back either way.
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    fn reap(&mut self, limit: usize) {
        let mut rearm_wake = false;
        if self.ring.submission().cq_overflow() {
            self.counters.overflows += 1;
        }
        let Self {
            ring,
            ops,
            pool,
            counters,
            stop,
            ..
        } = self;
        for entry in ring.completion().take(limit) {
            counters.completions += 1;
            match entry.user_data() {
                USER_DATA_IGNORE => continue,
                USER_DATA_WAKE => {
                    counters.wakes += 1;
                    rearm_wake = true;
                    continue;
                }
                _ => {}
            }
            let id = OpId::from_user_data(entry.user_data());
            let (result, flags) = (entry.result(), entry.flags());
            if result == -libc::ENOBUFS {
                counters.starved += 1;
            }
            let buffer = cqueue::buffer_select(flags);
            match ops.complete(id, result, buffer, cqueue::more(flags), pool) {
                After::Nothing => {}
                After::Close(fd) => close_fd(fd),
                After::Stop => stop.push(id),
            }
        }
        while let Some(id) = self.stop.pop() {
            self.cancel(id);
        }
        if rearm_wake {
            self.arm_wake();
        }
    }

    /// Cancels everything and waits until the kernel is done with all memory, at most `patience`.
    /// Returns whether it is.
    pub(crate) fn quiesce(&mut self, patience: Duration) -> bool {
        let deadline = std::time::Instant::now() + patience;
        for id in self.ops.pending() {
            self.cancel(id);
        }
        while self.ops.in_flight() > 0 {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() || self.turn(true, Some(left), usize::MAX).is_err() {
                return false;
            }
        }
        // The eventfd read is cancelled last; it writes to memory this driver owns.
        let entry = opcode::AsyncCancel::new(USER_DATA_WAKE).build();
        self.push(entry.user_data(USER_DATA_IGNORE));
        let wakes = self.counters.wakes;
        while self.counters.wakes == wakes {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() || self.turn_without_rearm(left).is_err() {
                return false;
            }
        }
        true
    }

    fn turn_without_rearm(&mut self, timeout: Duration) -> io::Result<()> {
        self.flush_backlog()?;
        self.enter(1, Some(timeout))?;
        for entry in self.ring.completion() {
            if entry.user_data() == USER_DATA_WAKE {
                self.counters.wakes += 1;
            }
        }
        Ok(())
    }

    /// The kernel would not finish: nothing it may still write to is ever freed.
    pub(crate) fn leak(&mut self) {
        self.pool.leak();
        std::mem::forget(std::mem::take(&mut self.ops));
        std::mem::forget(std::mem::take(&mut self.wake_value));
    }
}

fn close_fd(fd: i32) {
    // SAFETY: the descriptor came with a completion nobody owns, so nobody else closes it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}
