//! The io_uring back end: submission, waiting, completion.
//!
//! `COOP_TASKRUN` is not among the set-up flags: `DEFER_TASKRUN` replaces it (completion work runs
//! only inside `io_uring_enter`, so there is no interrupt to be cooperative about).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode, squeue};

use rustix::event::{EventfdFlags, eventfd};

use super::IoState;
use crate::buf::RING_GROUP;
use crate::op::{FollowUp, OpId, Operation, Readiness, Socket};

// No operation's: their top bit is clear (`OpId`).
const USER_DATA_IGNORE: u64 = u64::MAX;
const USER_DATA_WAKE: u64 = u64::MAX - 1;

// linux/io_uring.h
const ENTER_GETEVENTS: u32 = 1;
const ENTER_EXT_ARG: u32 = 1 << 3;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
const REGISTER_RING_FDS: u32 = 20;

/// `struct io_uring_getevents_arg`.
#[repr(C)]
struct GetEvents {
    sigmask: u64,
    sigmask_size: u32,
    min_wait_us: u32,
    timeout: u64,
}

/// `struct __kernel_timespec`.
#[repr(C)]
struct KernelTime {
    seconds: i64,
    nanoseconds: i64,
}

/// `struct io_uring_rsrc_update`.
#[repr(C)]
struct RingFd {
    offset: u32,
    reserved: u32,
    data: u64,
}

pub(super) struct Ring {
    ring: IoUring,
    /// What `io_uring_enter` is called with: an index of a registered ring, or the descriptor.
    enter_fd: i32,
    enter_flags: u32,
    backlog: VecDeque<squeue::Entry>,
    wake_fd: OwnedFd,
    /// Where the kernel puts the eventfd's counter; boxed so that its address is stable.
    wake_value: Box<u64>,
    /// What is to be done after the completions of a turn; kept to reuse its memory.
    next: Vec<(OpId, FollowUp)>,
    /// Silent sends that have been submitted and have not failed yet.
    silent: Vec<OpId>,
    /// The last turn could not retire them.
    unretired: bool,
    /// The next turn does not wait.
    no_wait: bool,
}

impl Ring {
    pub(super) fn new(entries: u32, completions: u32, state: &mut IoState) -> io::Result<Self> {
        let ring = build(entries, completions)?;
        let pool = &state.pool;
        // SAFETY: the pool outlives the ring (field order of the driver) or is leaked, and its
        // entries array has `ring_entries` elements, page aligned.
        unsafe {
            ring.submitter().register_buf_ring_with_flags(
                pool.ring_address(),
                pool.config().ring_entries,
                RING_GROUP,
                0,
            )?;
        }
        // Linux 5.18; without it each call looks the descriptor up.
        let (enter_fd, enter_flags) = match register_ring_fd(ring.as_raw_fd()) {
            Some(index) => (index, ENTER_REGISTERED_RING),
            None => (ring.as_raw_fd(), 0),
        };
        let mut this = Self {
            ring,
            enter_fd,
            enter_flags,
            backlog: VecDeque::new(),
            wake_fd: eventfd(0, EventfdFlags::CLOEXEC)?,
            wake_value: Box::new(0),
            next: Vec::new(),
            silent: Vec::new(),
            unretired: false,
            no_wait: false,
        };
        this.arm_wake();
        Ok(this)
    }

    pub(super) fn wake_fd(&self) -> RawFd {
        self.wake_fd.as_raw_fd()
    }

    /// The next turn does not wait.
    pub(super) fn no_wait(&mut self) {
        self.no_wait = true;
    }

    fn arm_wake(&mut self) {
        let fd = Fd(self.wake_fd.as_raw_fd());
        let address = (&raw mut *self.wake_value).cast::<u8>();
        let entry = opcode::Read::new(fd, address, 8).build();
        self.push(entry.user_data(USER_DATA_WAKE));
    }

    /// Queues an entry; a full submission queue spills into the backlog.
    fn push(&mut self, entry: squeue::Entry) {
        if !self.backlog.is_empty() {
            self.backlog.push_back(entry);
            return;
        }
        // SAFETY: every entry points only to memory that this ring owns, or an operation: the table
        // gives that up when the last completion has come, or by `retire`, which is unsafe and says
        // why there is none to come. The ring closes before table and pool are dropped, or these
        // are leaked.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.backlog.push_back(entry);
        }
    }

    pub(super) fn submit(&mut self, id: OpId, state: &mut IoState) {
        let silent = state.ops.is_silent(id);
        let mut entry = entry(state.ops.operation_mut(id));
        if silent {
            entry = entry.flags(squeue::Flags::SKIP_SUCCESS);
            self.silent.push(id);
        }
        self.push(entry.user_data(id.user_data()));
    }

    /// Waits until the socket of an operation takes more, or for what else it waits. With `change`,
    /// whatever ends a wait at once is told and the wait goes on.
    fn wait_for_room(&mut self, id: OpId, change: bool, state: &mut IoState) {
        let operation = state.ops.operation_mut(id);
        let readiness = match operation {
            Operation::Ready(_, readiness) => *readiness,
            _ => Readiness::Write,
        };
        let entry = poll(operation.socket(), readiness).multi(change);
        self.push(entry.build().user_data(id.user_data()));
    }

    pub(super) fn cancel(&mut self, id: OpId) {
        let entry = opcode::AsyncCancel::new(id.user_data()).build();
        let entry = entry.flags(squeue::Flags::SKIP_SUCCESS);
        self.push(entry.user_data(USER_DATA_IGNORE));
    }

    pub(super) fn turn(
        &mut self,
        state: &mut IoState,
        wait: bool,
        timeout: Option<Duration>,
        limit: usize,
    ) -> io::Result<()> {
        self.flush_backlog(state)?;
        let no_wait = std::mem::take(&mut self.no_wait) || self.unretired;
        let wait = wait && !no_wait && self.backlog.is_empty();
        self.enter(state, wait, timeout)?;
        self.reap(state, limit);
        self.retire(state);
        Ok(())
    }

    /// Hands what is queued to the kernel, without waiting.
    pub(super) fn submit_queued(&mut self, state: &mut IoState) -> io::Result<()> {
        self.flush_backlog(state)?;
        self.enter(state, false, None)
    }

    /// Whether a turn that does not wait has something to do: completions, or deferred work of the
    /// kernel that makes some.
    pub(super) fn has_work(&mut self) -> bool {
        if self.no_wait || self.unretired || !self.backlog.is_empty() {
            return true;
        }
        self.ring.submission().taskrun() || !self.ring.completion().is_empty()
    }

    fn flush_backlog(&mut self, state: &mut IoState) -> io::Result<()> {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: as in `push`.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.backlog.pop_front();
                continue;
            }
            self.enter(state, false, None)?;
            if self.ring.submission().is_full() {
                return Ok(()); // the kernel took nothing: completions must be reaped first
            }
        }
        Ok(())
    }

    fn enter(
        &mut self,
        state: &mut IoState,
        wait: bool,
        timeout: Option<Duration>,
    ) -> io::Result<()> {
        state.counters.enters += 1;
        let queued = self.ring.submission().len() as u32;
        // GETEVENTS also without waiting: only then does deferred completion work run.
        let mut flags = self.enter_flags | ENTER_GETEVENTS;
        let time;
        let mut events = GetEvents {
            sigmask: 0,
            sigmask_size: 0,
            min_wait_us: 0,
            timeout: 0,
        };
        let (mut arg, mut size) = (std::ptr::null(), 0);
        if let Some(timeout) = timeout.filter(|_| wait) {
            time = KernelTime {
                seconds: timeout.as_secs().min(1 << 40) as i64,
                nanoseconds: i64::from(timeout.subsec_nanos()),
            };
            events.timeout = (&raw const time).expose_provenance() as u64;
            flags |= ENTER_EXT_ARG;
            arg = &raw const events;
            size = size_of::<GetEvents>();
        }
        // SAFETY: the ring is set up, its entries obey `push`, and `arg` is null or points to
        // structures that live across the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.enter_fd,
                queued,
                u32::from(wait),
                flags,
                arg,
                size,
            )
        };
        if result >= 0 {
            return Ok(());
        }
        // ETIME: the timeout passed. EINTR: a signal. EBUSY, EAGAIN: completions are to be
        // reaped or memory is short; the caller's loop comes back either way.
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
            _ => Err(error),
        }
    }

    fn reap(&mut self, state: &mut IoState, limit: usize) {
        let mut rearm_wake = false;
        state.counters.overflows += u64::from(self.ring.submission().cq_overflow());
        let mut queue = self.ring.completion();
        for entry in (&mut queue).take(limit) {
            state.counters.completions += 1;
            match entry.user_data() {
                USER_DATA_IGNORE => continue,
                USER_DATA_WAKE => {
                    state.counters.wakes += 1;
                    rearm_wake = true;
                    continue;
                }
                _ => {}
            }
            let id = OpId::from_user_data(entry.user_data());
            let (result, flags) = (entry.result(), entry.flags());
            if result == -libc::ENOBUFS {
                state.counters.starved += 1;
                state.pool.grow();
            }
            let buffer = cqueue::buffer_select(flags);
            let more = cqueue::more(flags);
            // SAFETY: the entry is the kernel's, taken from its queue here and nowhere else, and
            // carries the name that the operation was submitted with.
            let follow_up = unsafe { state.ops.complete(id, result, buffer, more, &state.pool) };
            if follow_up != FollowUp::Nothing {
                self.next.push((id, follow_up));
            }
        }
        drop(queue);
        let mut next = std::mem::take(&mut self.next);
        for (id, follow_up) in next.drain(..) {
            match follow_up {
                FollowUp::Nothing => {}
                FollowUp::Stop => self.cancel(id),
                FollowUp::Wait => self.wait_for_room(id, false, state),
                FollowUp::WaitForChange => self.wait_for_room(id, true, state),
                FollowUp::Again => self.submit(id, state),
            }
        }
        self.next = next;
        if rearm_wake {
            self.arm_wake();
        }
    }

    /// Silent sends that have been submitted and did not fail have succeeded, and are over.
    ///
    /// Memory safety rests on this, so here is what it rests on. A send with `MSG_DONTWAIT` is
    /// attempted inside `io_uring_enter`, by the thread that submits it: the ring has no `SQPOLL`,
    /// and its entries no `IOSQE_ASYNC`, links or drain. `MSG_DONTWAIT` marks the request as one
    /// that must not wait (`REQ_F_NOWAIT`, set by `io_sendmsg_prep`), and such a request is neither
    /// armed for poll nor given to a thread of the kernel when the socket is full: it fails with
    /// `EAGAIN`. With `MSG_WAITALL` a short send fails too and says how much it sent. A failure
    /// takes `IOSQE_CQE_SKIP_SUCCESS` back (`req_set_fail`), so it has a completion, and that is in
    /// the queue, or has overflowed, when the call returns. What succeeded was copied by then (TCP
    /// and sockmap copy what `send` is given; nothing here is zero-copy). So: submitted, with no
    /// completion in a queue that is empty and has not overflowed, is sent and not referred to any
    /// more.
    ///
    /// It is no documented promise but how Linux 6.1 to 6.18 do it (`io_uring/net.c`,
    /// `io_uring/io_uring.c`). `what_silent_sends_owned_is_free_when_they_are_over` would notice
    /// another way (`driver/tests.rs`; it runs with `make test` on the machine's kernel and with
    /// `make test-kernels` on Debian's).
    fn retire(&mut self, state: &mut IoState) {
        if self.silent.is_empty() {
            return;
        }
        let submission = self.ring.submission();
        let overflow = submission.cq_overflow();
        let submitted = submission.is_empty();
        drop(submission);
        if overflow || !submitted || !self.backlog.is_empty() || !self.ring.completion().is_empty()
        {
            self.unretired = true;
            return;
        }
        self.unretired = false;
        for id in self.silent.drain(..) {
            // SAFETY: the kernel has taken every entry (`submitted`), and no completion is left
            // that could be this one's: it has been sent, and the kernel is done with it, as said
            // above. One that had failed is not silent any more, and this does nothing.
            unsafe { state.retire(id) };
        }
    }

    /// Cancels the read of the eventfd, which writes to memory this ring owns. Returns whether it
    /// has ended.
    pub(super) fn stop_wake(&mut self, state: &mut IoState, deadline: Instant) -> bool {
        let entry = opcode::AsyncCancel::new(USER_DATA_WAKE).build();
        self.push(entry.user_data(USER_DATA_IGNORE));
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.flush_backlog(state).is_err() {
                return false;
            }
            if self.enter(state, true, Some(left)).is_err() {
                return false;
            }
            if self
                .ring
                .completion()
                .any(|entry| entry.user_data() == USER_DATA_WAKE)
            {
                return true;
            }
        }
    }

    pub(super) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.wake_value));
    }
}

fn build(entries: u32, completions: u32) -> io::Result<IoUring> {
    let build = |no_sqarray: bool| {
        let mut builder = IoUring::builder();
        builder
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_clamp()
            .setup_cqsize(completions)
            .dontfork();
        if no_sqarray {
            builder.setup_no_sqarray();
        }
        builder.build(entries)
    };
    // NO_SQARRAY is Linux 6.6; without it the ring only costs one more indirection.
    build(true).or_else(|error| {
        if error.raw_os_error() == Some(libc::EINVAL) {
            build(false)
        } else {
            Err(error)
        }
    })
}

/// Registers the ring's descriptor with this thread; the index it is known by then.
fn register_ring_fd(fd: RawFd) -> Option<i32> {
    let mut update = RingFd {
        offset: u32::MAX, // any index
        reserved: 0,
        data: fd as u64,
    };
    // SAFETY: one update structure is passed, which the kernel reads and writes during the call.
    let registered = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            fd,
            REGISTER_RING_FDS,
            &raw mut update,
            1_u32,
        )
    };
    (registered == 1).then_some(update.offset as i32)
}

fn poll(socket: &Socket, readiness: Readiness) -> opcode::PollAdd {
    let events = match readiness {
        Readiness::Read => libc::POLLIN | libc::POLLRDHUP,
        Readiness::Write => libc::POLLOUT,
        Readiness::Failure => 0, // errors are always told of
    };
    opcode::PollAdd::new(Fd(socket.raw()), events as u32)
}

/// The submission queue entry of an operation.
fn entry(operation: &mut Operation) -> squeue::Entry {
    match operation {
        Operation::Accept(socket) => opcode::AcceptMulti::new(Fd(socket.raw()))
            .flags(libc::SOCK_CLOEXEC)
            .build(),
        Operation::Receive(socket) => opcode::RecvMulti::new(Fd(socket.raw()), RING_GROUP).build(),
        Operation::Recv(socket, buf) => {
            let room = buf.spare_mut();
            let (ptr, len) = (room.as_mut_ptr().cast(), room.len() as u32);
            opcode::Recv::new(Fd(socket.raw()), ptr, len).build()
        }
        Operation::RecvMsg(socket, header) => {
            opcode::RecvMsg::new(Fd(socket.raw()), header.message()).build()
        }
        Operation::Connect(socket, addr) => {
            opcode::Connect::new(Fd(socket.raw()), addr.as_ptr(), addr.len()).build()
        }
        // io_uring tells of the end of what the peer sends as well, and may do so at once: of the
        // wait for a failure only changes are of interest.
        Operation::Ready(socket, readiness) => poll(socket, *readiness)
            .multi(*readiness == Readiness::Failure)
            .build(),
        Operation::Send(socket, list) => {
            let fd = Fd(socket.raw());
            // DONTWAIT: waiting for room is ours (`op::phase`). The kernel's own also goes on at
            // the wrong place of the vector where sockmap has a hand in a short send
            // (`tcp_bpf_sendmsg`). WAITALL: a short send fails, so that a silent one tells.
            let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL | libc::MSG_DONTWAIT;
            if let Some((base, len)) = list.only_vector() {
                return opcode::Send::new(fd, base, len).flags(flags).build();
            }
            opcode::SendMsg::new(fd, list.message())
                .flags(flags as u32)
                .build()
        }
    }
}
