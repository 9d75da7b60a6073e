//! The driver: starts operations, waits, and enters what completes into the operation table.
//!
//! Two back ends do the same operations ([`Keep`]): [`ring`] hands them to io_uring, [`poll`] does
//! them itself with nonblocking calls when epoll says that a socket is ready. Everything above
//! (sockets, tasks, timers) sees operations that complete later, and no difference.

mod poll;
mod ring;
mod spin;

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::buf::Pool;
use crate::counters::Counters;
use crate::op::{Completion, Keep, OpId, OpTable, SendList};

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

/// What both back ends work on.
pub(crate) struct Books {
    pub(crate) ops: OpTable,
    pub(crate) pool: Pool,
    pub(crate) counters: Counters,
    /// Lists for sends; a connection has one only while it sends.
    #[allow(clippy::vec_box, reason = "the kernel reads a list where it lies")]
    lists: Vec<Box<SendList>>,
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
    books: Books,
    spin: Spin,
}

impl Driver {
    /// Sets up a ring with provided buffers.
    pub(crate) fn with_ring(entries: u32, completions: u32, pool: &Pool) -> io::Result<Self> {
        let mut books = Books::new(pool);
        let engine = Engine::Ring(Ring::new(entries, completions, &mut books)?);
        let spin = Spin::new(Duration::ZERO);
        Ok(Self {
            engine,
            books,
            spin,
        })
    }

    /// Sets up an epoll instance.
    pub(crate) fn with_epoll(pool: &Pool) -> io::Result<Self> {
        let engine = Engine::Epoll(Epoll::new()?);
        let books = Books::new(pool);
        let spin = Spin::new(Duration::ZERO);
        Ok(Self {
            engine,
            books,
            spin,
        })
    }

    /// Before it sleeps the worker looks for news for at most `patience`, while that finds some.
    pub(crate) fn set_busy_poll(&mut self, patience: Duration) {
        self.spin = Spin::new(patience);
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
        self.books.counters.spliced += bytes as u64;
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.books.counters
    }

    /// Operations the kernel has not finished.
    pub(crate) fn in_flight(&self) -> usize {
        self.books.ops.in_flight()
    }

    /// Starts an operation.
    pub(crate) fn start(&mut self, keep: Keep) -> OpId {
        let id = self.books.ops.insert(keep, false);
        self.submit(id);
        id
    }

    /// Starts a send that is to complete at once or fail, and says nothing when it succeeds: it
    /// costs no completion and no wake-up. What the socket does not take at once is sent as an
    /// ordinary operation under the same name.
    pub(crate) fn start_relaxed(&mut self, keep: Keep) -> OpId {
        let id = self.books.ops.insert(keep, true);
        self.submit(id);
        id
    }

    fn submit(&mut self, id: OpId) {
        self.books.counters.submissions += 1;
        match &mut self.engine {
            Engine::Ring(ring) => ring.submit(id, &mut self.books),
            Engine::Epoll(epoll) => epoll.submit(id, &mut self.books),
        }
    }

    /// The result of an operation with one completion, with what it owned.
    pub(crate) fn poll_once(&mut self, id: OpId, cx: &Context<'_>) -> Poll<(i32, Keep)> {
        let polled = self.books.ops.poll_once(id, cx);
        if polled.is_pending()
            && let Engine::Ring(ring) = &mut self.engine
            && self.books.ops.is_relaxed(id)
        {
            // Its end is known after the next submission, which must not wait for anything else.
            ring.hurry();
        }
        polled
    }

    /// As [`Driver::poll_once`] for a relaxed send; none: it has succeeded.
    pub(crate) fn poll_relaxed(&mut self, id: OpId, cx: &Context<'_>) -> Poll<Option<(i32, Keep)>> {
        if self.books.ops.exists(id) {
            self.poll_once(id, cx).map(Some)
        } else {
            Poll::Ready(None)
        }
    }

    /// An empty list for a send.
    pub(crate) fn list(&mut self) -> Box<SendList> {
        self.books.lists.pop().unwrap_or_default()
    }

    /// Takes back a list that has been sent.
    pub(crate) fn keep_list(&mut self, list: Box<SendList>) {
        self.books.keep_list(list);
    }

    /// Frees what is kept for reuse.
    pub(crate) fn trim(&mut self) {
        self.books.lists = Vec::new();
    }

    /// Takes the next queued completion of a multishot operation. `Ready(None)`: it has ended and
    /// its slot is free again.
    pub(crate) fn poll_many(&mut self, id: OpId, cx: &Context<'_>) -> Poll<Option<Completion>> {
        self.books.ops.poll_many(id, cx)
    }

    /// Asks for an operation to be cancelled; its completion still arrives.
    pub(crate) fn cancel(&mut self, id: OpId) {
        self.books.counters.submissions += 1;
        match &mut self.engine {
            Engine::Ring(ring) => ring.cancel(id),
            Engine::Epoll(epoll) => epoll.cancel(id),
        }
    }

    /// The owner of an operation is dropped: keep its resources until the kernel is done.
    pub(crate) fn abandon(&mut self, id: OpId) {
        let relaxed = self.books.ops.is_relaxed(id);
        if !self.books.ops.abandon(id, &self.books.pool, close_fd) {
            return;
        }
        match &mut self.engine {
            // It cannot linger in the kernel; but its socket must not stay open until something
            // else ends the next wait.
            Engine::Ring(ring) if relaxed => ring.hurry(),
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
            Engine::Ring(ring) => ring.turn(&mut self.books, wait, timeout, limit),
            Engine::Epoll(epoll) => epoll.turn(&mut self.books, wait, timeout, limit),
        }
    }

    /// Submits what is queued and looks for news without sleeping. Returns whether there is some.
    fn busy_poll(&mut self, timeout: Option<Duration>) -> io::Result<bool> {
        let Self {
            engine,
            books,
            spin,
        } = self;
        match engine {
            Engine::Ring(ring) => {
                ring.submit_queued(books)?;
                Ok(spin.look(timeout, || ring.has_news()))
            }
            Engine::Epoll(epoll) => {
                let mut result = Ok(());
                let news = spin.look(timeout, || {
                    result = epoll.poll_events(books);
                    result.is_err() || epoll.has_news()
                });
                result.map(|()| news)
            }
        }
    }

    /// Cancels everything and waits until the kernel is done with all memory, at most `patience`.
    /// Returns whether it is.
    pub(crate) fn quiesce(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        for id in self.books.ops.pending() {
            self.cancel(id);
        }
        while self.in_flight() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.turn(true, Some(left), usize::MAX).is_err() {
                return false;
            }
        }
        match &mut self.engine {
            Engine::Ring(ring) => ring.stop_wake(&mut self.books, deadline),
            Engine::Epoll(_) => true,
        }
    }

    /// The kernel would not finish: nothing it may still write to is ever freed.
    pub(crate) fn leak(&mut self) {
        self.books.pool.leak();
        std::mem::forget(std::mem::take(&mut self.books.ops));
        if let Engine::Ring(ring) = &mut self.engine {
            ring.leak();
        }
    }
}

impl Books {
    fn new(pool: &Pool) -> Self {
        Self {
            ops: OpTable::default(),
            pool: pool.clone(),
            counters: Counters::default(),
            lists: Vec::new(),
        }
    }

    /// A relaxed send has succeeded.
    fn settle(&mut self, id: OpId) {
        if let Some(list) = self.ops.settle(id) {
            self.keep_list(list);
        }
    }

    fn keep_list(&mut self, mut list: Box<SendList>) {
        list.clear();
        if self.lists.len() < LISTS {
            self.lists.push(list);
        }
    }
}

/// An eventfd for wake-ups.
fn eventfd(flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: eventfd has no memory-safety preconditions.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just created and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn close_fd(fd: i32) {
    // SAFETY: the descriptor came with a completion nobody owns, so nobody else closes it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}
