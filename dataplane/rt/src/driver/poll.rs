//! The epoll back end: operations are done by nonblocking calls, when sockets are ready.
//!
//! A socket is registered once, edge-triggered, with its first operation that finds nothing to do,
//! and leaves epoll when it closes. Per direction there is at most one operation that waits. An
//! operation is tried when it is submitted or when an edge has come; what it yields is entered into
//! the operation table as the ring's completions are. Blocks for received data come from the same
//! provided-buffer ring, whose head is kept here instead of in the kernel.
//!
//! Accepting and receiving go on for a bounded number of results, then others have their turn.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use super::{IoState, close_fd, eventfd};
use crate::buf::Pool;
use crate::op::{FollowUp, OpId, Operation, Readiness, Registration, Socket};
use crate::sys::{poll_now, set_nonblocking};

/// Results one multishot operation may yield before others have their turn.
const RESULTS_PER_TRY: usize = 16;
/// Events taken by one `epoll_wait(2)`.
const EVENTS: usize = 256;
const WAKE: u64 = u64::MAX;
/// Bits of an event after which reading tells something new.
const READ_EDGE: u32 = END | (libc::EPOLLIN | libc::EPOLLPRI) as u32;
const WRITE_EDGE: u32 = FAILURE_EDGE | libc::EPOLLOUT as u32;
const FAILURE_EDGE: u32 = (libc::EPOLLHUP | libc::EPOLLERR) as u32;
/// Of the sides of a socket, in their order.
const EDGES: [u32; 3] = [READ_EDGE, WRITE_EDGE, FAILURE_EDGE];

/// Bits of an event that tell of an end.
const END: u32 = (libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR) as u32;

/// A registered socket. Each of its directions is a side, and the wait for its failure is one.
#[derive(Debug, Clone, Copy, Default)]
struct Watched {
    waiting: [Option<OpId>; EDGES.len()],
    /// An edge has come since the last attempt that found nothing.
    ready: [bool; EDGES.len()],
    /// A receive may stop short of what is there: an edge told of the end of the stream, of an
    /// error, or of urgent data, at which receives stop.
    stops: bool,
}

pub(super) struct Epoll {
    epoll: OwnedFd,
    wake_fd: OwnedFd,
    watched: Vec<Watched>,
    freed: Rc<RefCell<Vec<u32>>>,
    /// Operations to try in this turn.
    tries: VecDeque<OpId>,
    cancelled: Vec<OpId>,
    /// Another thread has woken this one since the last turn.
    woken: bool,
    events: Vec<libc::epoll_event>,
}

impl Epoll {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: epoll_create1 has no memory-safety preconditions.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just created and nobody else owns it.
        let epoll = unsafe { OwnedFd::from_raw_fd(fd) };
        let wake_fd = eventfd(libc::EFD_NONBLOCK)?;
        let flags = (libc::EPOLLIN | libc::EPOLLET) as u32;
        add(&epoll, wake_fd.as_raw_fd(), flags, WAKE)?;
        Ok(Self {
            epoll,
            wake_fd,
            watched: Vec::new(),
            freed: Rc::default(),
            tries: VecDeque::new(),
            cancelled: Vec::new(),
            woken: false,
            events: Vec::with_capacity(EVENTS),
        })
    }

    pub(super) fn wake_fd(&self) -> RawFd {
        self.wake_fd.as_raw_fd()
    }

    /// Tries an operation at once; it waits for an edge if there is nothing to do yet.
    pub(super) fn submit(&mut self, id: OpId, state: &mut IoState) {
        match state.ops.operation_mut(id) {
            Operation::Accept(socket) | Operation::Connect(socket, _) => {
                set_nonblocking(socket.raw());
            }
            _ => {}
        }
        self.attempt(id, state);
    }

    pub(super) fn cancel(&mut self, id: OpId) {
        self.cancelled.push(id);
    }

    pub(super) fn turn(
        &mut self,
        state: &mut IoState,
        wait: bool,
        timeout: Option<Duration>,
        limit: usize,
    ) -> io::Result<()> {
        let wait = wait && !self.has_work();
        state.counters.enters += 1;
        self.take_events(state, if wait { timeout } else { Some(Duration::ZERO) })?;
        self.woken = false;
        while let Some(id) = self.cancelled.pop() {
            if state.ops.pending_mut(id).is_some() {
                finish(state, id, -libc::ECANCELED, None, false);
            }
        }
        for _ in 0..self.tries.len().min(limit) {
            if let Some(id) = self.tries.pop_front() {
                self.attempt(id, state);
            }
        }
        Ok(())
    }

    /// Takes the events that are there.
    pub(super) fn poll_events(&mut self, state: &mut IoState) -> io::Result<()> {
        state.counters.enters += 1;
        self.take_events(state, Some(Duration::ZERO))
    }

    /// Whether a turn that does not wait has something to do.
    pub(super) fn has_work(&self) -> bool {
        self.woken || !self.tries.is_empty() || !self.cancelled.is_empty()
    }

    fn take_events(&mut self, state: &mut IoState, timeout: Option<Duration>) -> io::Result<()> {
        // Rounded up: a timer must be due when the wait for it is over.
        let milliseconds = timeout.map_or(-1, |timeout| {
            timeout.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i32
        });
        // SAFETY: the vector has room for EVENTS events, and the kernel says how many it wrote.
        let count = unsafe {
            let events = self.events.as_mut_ptr();
            libc::epoll_wait(self.epoll.as_raw_fd(), events, EVENTS as i32, milliseconds)
        };
        if count < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EINTR) => Ok(()),
                _ => Err(error),
            };
        }
        // SAFETY: the kernel has initialised this many events.
        unsafe { self.events.set_len(count as usize) };
        for event in &self.events {
            let (bits, data) = (event.events, event.u64);
            if data == WAKE {
                state.counters.wakes += 1;
                self.woken = true;
                let mut value = 0_u64;
                // SAFETY: reads eight bytes from the eventfd into a live local.
                unsafe { libc::read(self.wake_fd.as_raw_fd(), (&raw mut value).cast(), 8) };
                continue;
            }
            let Some(watched) = self.watched.get_mut(data as usize) else {
                continue;
            };
            watched.stops |= bits & (END | libc::EPOLLPRI as u32) != 0;
            for (side, edge) in EDGES.into_iter().enumerate() {
                if bits & edge == 0 {
                    continue;
                }
                match watched.waiting[side].take() {
                    Some(id) => self.tries.push_back(id),
                    None => watched.ready[side] = true,
                }
            }
        }
        Ok(())
    }

    /// Does what can be done of an operation now.
    fn attempt(&mut self, id: OpId, state: &mut IoState) {
        for _ in 0..RESULTS_PER_TRY {
            let IoState { ops, pool, .. } = state;
            let Some(operation) = ops.pending_mut(id) else {
                return; // cancelled meanwhile
            };
            let (result, buffer) = perform(operation, pool);
            if result == -libc::EAGAIN {
                match self.wait_for_edge(id, state) {
                    Ok(true) => return,
                    Ok(false) => continue,
                    Err(code) => return self.conclude(state, id, -code, None, false),
                }
            }
            let short = matches!(operation, Operation::Receive(_))
                && usize::try_from(result).is_ok_and(|n| n < pool.config().ring_payload() as usize);
            let more = match operation {
                Operation::Accept(_) => result >= 0,
                Operation::Receive(_) => result > 0,
                Operation::Send(_, list) if result >= 0 && (result as usize) < list.bytes() => {
                    list.sent(result as usize);
                    continue;
                }
                _ => false,
            };
            if result == -libc::ENOBUFS {
                state.counters.starved += 1;
                state.pool.grow();
            }
            if result >= 0 && state.ops.is_silent(id) {
                state.counters.completions += 1;
                return state.retire(id);
            }
            self.conclude(state, id, result, buffer, more);
            if !more {
                return;
            }
            // A receive that did not fill its block has emptied the socket: an edge comes next.
            if short && !self.stops_short(id, state) && self.wait_for_edge(id, state) == Ok(true) {
                return;
            }
        }
        self.tries.push_back(id); // there may be more: after the others
    }

    fn conclude(
        &mut self,
        state: &mut IoState,
        id: OpId,
        result: i32,
        buffer: Option<u16>,
        more: bool,
    ) {
        match finish(state, id, result, buffer, more) {
            FollowUp::Close(fd) => close_fd(fd),
            FollowUp::Stop => self.cancel(id),
            FollowUp::Wait | FollowUp::WaitForChange | FollowUp::Again => self.tries.push_back(id),
            FollowUp::Nothing => {}
        }
    }

    /// Registers the socket if need be. False: an edge came that nobody has answered, try again.
    fn wait_for_edge(&mut self, id: OpId, state: &mut IoState) -> Result<bool, i32> {
        let operation = state.ops.operation_mut(id);
        let side = match operation {
            Operation::Send(..)
            | Operation::Connect(..)
            | Operation::Ready(_, Readiness::Write) => 1,
            Operation::Ready(_, Readiness::Failure) => 2,
            _ => 0,
        };
        let socket = Rc::clone(operation.socket());
        let index = if let Some(registration) = socket.registration() {
            registration.index() as usize
        } else {
            let index = self.vacant();
            let bits = READ_EDGE | WRITE_EDGE | libc::EPOLLET as u32;
            if let Err(error) = add(&self.epoll, socket.raw(), bits, index as u64) {
                self.freed.borrow_mut().push(index as u32);
                return Err(error.raw_os_error().unwrap_or(libc::EIO));
            }
            let freed = Rc::clone(&self.freed);
            let index = index as u32;
            socket.register(Registration::new(index, freed));
            index as usize
        };
        let watched = &mut self.watched[index];
        if std::mem::take(&mut watched.ready[side]) {
            return Ok(false);
        }
        watched.waiting[side] = Some(id);
        Ok(true)
    }

    /// Whether more, or the end of the stream, may follow a short receive without another edge.
    fn stops_short(&self, id: OpId, state: &mut IoState) -> bool {
        let operation = state.ops.pending_mut(id);
        let index =
            operation.and_then(|operation| Some(operation.socket().registration()?.index()));
        index.is_none_or(|index| self.watched[index as usize].stops)
    }

    fn vacant(&mut self) -> usize {
        if let Some(index) = self.freed.borrow_mut().pop() {
            self.watched[index as usize] = Watched::default();
            return index as usize;
        }
        self.watched.push(Watched::default());
        self.watched.len() - 1
    }
}

fn add(epoll: &OwnedFd, fd: RawFd, events: u32, data: u64) -> io::Result<()> {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: the event lives across the call.
    let rc = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) };
    if rc != 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn finish(state: &mut IoState, id: OpId, result: i32, buffer: Option<u16>, more: bool) -> FollowUp {
    state.counters.completions += 1;
    state.ops.complete(id, result, buffer, more, &state.pool)
}

/// One attempt. The result is that of the system call, or minus its error; with the ring block it
/// filled, for a multishot receive.
fn perform(operation: &mut Operation, pool: &Pool) -> (i32, Option<u16>) {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let result = match operation {
        Operation::Accept(socket) => {
            // SAFETY: null is allowed for the address.
            let fd = unsafe {
                let none = std::ptr::null_mut();
                libc::accept4(socket.raw(), none, std::ptr::null_mut(), libc::SOCK_CLOEXEC)
            };
            fd as isize
        }
        Operation::Receive(socket) => return receive(socket.raw(), pool),
        Operation::Recv(socket, buf) => {
            let (ptr, len) = buf.tail_ptr();
            // SAFETY: the buffer's tail room is valid for writes and exclusively owned.
            unsafe { libc::recv(socket.raw(), ptr.cast(), len as usize, flags) }
        }
        // SAFETY: the header's vectors point to tail room that it owns.
        Operation::RecvMsg(socket, header) => unsafe {
            libc::recvmsg(socket.raw(), header.message(), flags)
        },
        // SAFETY: the list's vectors point to bytes that it owns.
        Operation::Send(socket, list) => unsafe {
            libc::sendmsg(socket.raw(), list.message(), flags)
        },
        Operation::Connect(socket, addr) => {
            // SAFETY: address and length describe live, initialised storage.
            let rc = unsafe { libc::connect(socket.raw(), addr.as_ptr(), addr.len()) };
            rc as isize
        }
        Operation::Ready(socket, readiness) => return (is_ready(socket, *readiness), None),
    };
    if result >= 0 {
        return (result as i32, None);
    }
    let code = io::Error::last_os_error().raw_os_error();
    let code = match code.unwrap_or(libc::EIO) {
        // EALREADY: an edge that was not about the end of connecting.
        libc::EINPROGRESS | libc::EALREADY => libc::EAGAIN,
        libc::EISCONN if matches!(operation, Operation::Connect(..)) => return (0, None),
        code => code,
    };
    (-code, None)
}

fn receive(fd: RawFd, pool: &Pool) -> (i32, Option<u16>) {
    let Some((bid, ptr, len)) = pool.provided() else {
        return (-libc::ENOBUFS, None);
    };
    // SAFETY: a provided block is nobody's, and `len` bytes at `ptr` lie inside it.
    let result = unsafe { libc::recv(fd, ptr.as_ptr().cast(), len as usize, libc::MSG_DONTWAIT) };
    if result > 0 {
        pool.take_provided();
        return (result as i32, Some(bid));
    }
    if result == 0 {
        return (0, None);
    }
    let code = io::Error::last_os_error().raw_os_error();
    (-code.unwrap_or(libc::EIO), None)
}

fn is_ready(socket: &Socket, readiness: Readiness) -> i32 {
    let events = match readiness {
        Readiness::Read => libc::POLLIN | libc::POLLRDHUP,
        Readiness::Write => libc::POLLOUT,
        Readiness::Failure => {
            socket.fetch_error();
            let found = socket.failure().is_some();
            return if found {
                libc::POLLERR.into()
            } else {
                -libc::EAGAIN
            };
        }
    };
    match poll_now(socket.raw(), events) {
        Ok(0) => -libc::EAGAIN,
        Ok(told) => i32::from(told),
        Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
    }
}
