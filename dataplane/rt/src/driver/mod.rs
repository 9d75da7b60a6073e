//! The driver: starts operations, waits, and enters what completes into the operation table.
//!
//! Two back ends do the same operations ([`Operation`]): [`ring`] hands them to io_uring, [`poll`]
//! does them itself with nonblocking calls when epoll says that a socket is ready. Everything above
//! (sockets, tasks, timers) sees operations that complete later, and no difference.

mod poll;
mod ring;
mod spin;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::buf::Pool;
use crate::counters::Counters;
use crate::keepalive::{Keepalive, Young};
use crate::op::{Completion, OpId, OpTable, Operation, SendList, Socket};

use poll::Epoll;
use ring::Ring;
use spin::Spin;

/// What a worker does its operations with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backend {
    /// io_uring where it is allowed, else epoll.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// epoll and nonblocking system calls.
    Epoll,
}

/// What both back ends work on: operations, buffers, counters.
pub(crate) struct IoState {
    pub(crate) ops: OpTable,
    pub(crate) pool: Pool,
    pub(crate) counters: Counters,
    /// Lists for sends; a connection has one only while it sends.
    #[allow(clippy::vec_box, reason = "the kernel reads a list where it lies")]
    lists: Vec<Box<SendList>>,
    /// Connections without keepalive yet.
    young: Young,
}

/// Lists kept for reuse.
const LISTS: usize = 64;

#[allow(
    clippy::large_enum_variant,
    reason = "there is one per worker, on the ring's path"
)]
enum Engine {
    Ring(Ring),
    Epoll(Epoll),
}

/// One worker's operations. Field order: the ring closes before anything its operations own.
pub(crate) struct Driver {
    engine: Engine,
    state: IoState,
    spin: Spin,
}

impl Driver {
    /// Sets up a ring with provided buffers.
    pub(crate) fn with_ring(entries: u32, completions: u32, pool: &Pool) -> io::Result<Self> {
        let mut state = IoState::new(pool);
        let engine = Engine::Ring(Ring::new(entries, completions, &mut state)?);
        let spin = Spin::new(Duration::ZERO);
        Ok(Self {
            engine,
            state,
            spin,
        })
    }

    /// Sets up an epoll instance.
    pub(crate) fn with_epoll(pool: &Pool) -> io::Result<Self> {
        let engine = Engine::Epoll(Epoll::new()?);
        let state = IoState::new(pool);
        let spin = Spin::new(Duration::ZERO);
        Ok(Self {
            engine,
            state,
            spin,
        })
    }

    /// Before it sleeps the worker polls for work for at most `budget`, while that finds some.
    pub(crate) fn set_busy_poll(&mut self, budget: Duration) {
        self.spin = Spin::new(budget);
    }

    /// Descriptor other threads write to wake this worker.
    pub(crate) fn wake_fd(&self) -> RawFd {
        match &self.engine {
            Engine::Ring(ring) => ring.wake_fd(),
            Engine::Epoll(epoll) => epoll.wake_fd(),
        }
    }

    pub(crate) fn backend(&self) -> Backend {
        match self.engine {
            Engine::Ring(_) => Backend::IoUring,
            Engine::Epoll(_) => Backend::Epoll,
        }
    }

    /// Counts bytes that went through a pipe.
    pub(crate) fn spliced(&mut self, bytes: usize) {
        self.state.counters.spliced += bytes as u64;
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.state.counters
    }

    /// Operations the kernel has not finished.
    pub(crate) fn in_flight(&self) -> usize {
        self.state.ops.in_flight()
    }

    /// Starts an operation.
    pub(crate) fn start(&mut self, operation: Operation) -> OpId {
        let id = self.state.ops.insert(operation, false);
        self.submit(id);
        id
    }

    /// Starts a send that is to complete at once or fail, and says nothing when it succeeds: it
    /// costs no completion and no wake-up. What the socket does not take at once is sent as an
    /// ordinary operation under the same name.
    pub(crate) fn start_silent(&mut self, operation: Operation) -> OpId {
        let id = self.state.ops.insert(operation, true);
        self.submit(id);
        id
    }

    fn submit(&mut self, id: OpId) {
        self.state.counters.submissions += 1;
        match &mut self.engine {
            Engine::Ring(ring) => ring.submit(id, &mut self.state),
            Engine::Epoll(epoll) => epoll.submit(id, &mut self.state),
        }
    }

    /// The result of an operation with one completion, with what it owned.
    pub(crate) fn poll_once(&mut self, id: OpId, cx: &Context<'_>) -> Poll<(i32, Operation)> {
        let polled = self.state.ops.poll_once(id, cx);
        if polled.is_pending()
            && let Engine::Ring(ring) = &mut self.engine
            && self.state.ops.is_silent(id)
        {
            // Its end is known after the next submission, which must not wait for anything else.
            ring.no_wait();
        }
        polled
    }

    /// As [`Driver::poll_once`] for a silent send; none: it has succeeded.
    pub(crate) fn poll_silent(
        &mut self,
        id: OpId,
        cx: &Context<'_>,
    ) -> Poll<Option<(i32, Operation)>> {
        if self.state.ops.exists(id) {
            self.poll_once(id, cx).map(Some)
        } else {
            Poll::Ready(None)
        }
    }

    /// An empty list for a send.
    pub(crate) fn list(&mut self) -> Box<SendList> {
        self.state.lists.pop().unwrap_or_default()
    }

    /// Takes back a list that has been sent.
    pub(crate) fn recycle_list(&mut self, list: Box<SendList>) {
        self.state.recycle_list(list);
    }

    /// Turns keepalive on for `socket` with the next [`Driver::trim`], if it is still there.
    pub(crate) fn keep_alive(&mut self, socket: &Rc<Socket>, keepalive: Keepalive) {
        self.state.young.add(socket, keepalive);
    }

    /// Whether there is something to trim, buffers included.
    pub(crate) fn has_spare(&self) -> bool {
        self.state.pool.has_spare() || !self.state.young.is_empty()
    }

    /// Frees what is kept for reuse, and does what could wait.
    pub(crate) fn trim(&mut self) {
        self.state.lists = Vec::new();
        self.state.young.settle();
    }

    /// Takes the next queued completion of a multishot operation. `Ready(None)`: it has ended and
    /// its slot is free again.
    pub(crate) fn poll_many(&mut self, id: OpId, cx: &Context<'_>) -> Poll<Option<Completion>> {
        self.state.ops.poll_many(id, cx)
    }

    /// Asks for an operation to be cancelled; its completion still arrives.
    pub(crate) fn cancel(&mut self, id: OpId) {
        self.state.counters.submissions += 1;
        match &mut self.engine {
            Engine::Ring(ring) => ring.cancel(id),
            Engine::Epoll(epoll) => epoll.cancel(id),
        }
    }

    /// The owner of an operation is dropped: keep its resources until the kernel is done.
    pub(crate) fn abandon(&mut self, id: OpId) {
        let silent = self.state.ops.is_silent(id);
        if !self.state.ops.abandon(id, &self.state.pool) {
            return;
        }
        match &mut self.engine {
            // It cannot linger in the kernel; but its socket must not stay open until something
            // else ends the next wait.
            Engine::Ring(ring) if silent => ring.no_wait(),
            _ => self.cancel(id),
        }
    }

    /// Submits what is queued and, with `wait`, blocks until a completion arrives or `timeout`
    /// passes. Then enters up to `limit` completions.
    pub(crate) fn turn(
        &mut self,
        wait: bool,
        timeout: Option<Duration>,
        limit: usize,
    ) -> io::Result<()> {
        let wait = wait && !(self.spin.is_due() && self.busy_poll(timeout)?);
        match &mut self.engine {
            Engine::Ring(ring) => ring.turn(&mut self.state, wait, timeout, limit),
            Engine::Epoll(epoll) => epoll.turn(&mut self.state, wait, timeout, limit),
        }
    }

    /// Submits what is queued and polls for work without sleeping. Returns whether there is some.
    fn busy_poll(&mut self, timeout: Option<Duration>) -> io::Result<bool> {
        let Self {
            engine,
            state,
            spin,
        } = self;
        match engine {
            Engine::Ring(ring) => {
                ring.submit_queued(state)?;
                Ok(spin.poll(timeout, || ring.has_work()))
            }
            Engine::Epoll(epoll) => {
                let mut result = Ok(());
                let work = spin.poll(timeout, || {
                    result = epoll.poll_events(state);
                    result.is_err() || epoll.has_work()
                });
                result.map(|()| work)
            }
        }
    }

    /// Cancels everything and waits until the kernel is done with all memory, at most `limit`.
    /// Returns whether it is.
    pub(crate) fn quiesce(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        for id in self.state.ops.pending() {
            self.cancel(id);
        }
        while self.in_flight() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.turn(true, Some(left), usize::MAX).is_err() {
                return false;
            }
        }
        match &mut self.engine {
            Engine::Ring(ring) => ring.stop_wake(&mut self.state, deadline),
            Engine::Epoll(_) => true,
        }
    }

    /// The kernel would not finish: nothing it may still write to is ever freed.
    pub(crate) fn leak(&mut self) {
        self.state.pool.leak();
        std::mem::forget(std::mem::take(&mut self.state.ops));
        if let Engine::Ring(ring) = &mut self.engine {
            ring.leak();
        }
    }
}

impl IoState {
    fn new(pool: &Pool) -> Self {
        Self {
            ops: OpTable::default(),
            pool: pool.clone(),
            counters: Counters::default(),
            lists: Vec::new(),
            young: Young::default(),
        }
    }

    /// A silent send has succeeded.
    ///
    /// # Safety
    /// As [`OpTable::retire`].
    unsafe fn retire(&mut self, id: OpId) {
        // SAFETY: the caller's promise.
        if let Some(list) = unsafe { self.ops.retire(id) } {
            self.recycle_list(list);
        }
    }

    fn recycle_list(&mut self, mut list: Box<SendList>) {
        list.clear();
        if self.lists.len() < LISTS {
            self.lists.push(list);
        }
    }
}
