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
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::net::{RecvFlags, SocketFlags, accept_with, recv};

use super::IoState;
use crate::buf::Pool;
use crate::op::{FollowUp, OpId, Operation, Readiness, Registration, Socket};
use crate::sys::{poll_now, set_nonblocking};

/// Results one multishot operation may yield before others have their turn.
const RESULTS_PER_TRY: usize = 16;
/// Events taken by one `epoll_wait(2)`.
const EVENTS: usize = 256;
const WAKE: u64 = u64::MAX;
/// Bits of an event after which reading tells something new.
const READ_EDGE: EventFlags = END.union(EventFlags::IN).union(EventFlags::PRI);
const WRITE_EDGE: EventFlags = FAILURE_EDGE.union(EventFlags::OUT);
const FAILURE_EDGE: EventFlags = EventFlags::HUP.union(EventFlags::ERR);
/// Of the sides of a socket, in their order.
const EDGES: [EventFlags; 3] = [READ_EDGE, WRITE_EDGE, FAILURE_EDGE];

/// Bits of an event that tell of an end.
const END: EventFlags = FAILURE_EDGE.union(EventFlags::RDHUP);

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
    events: Vec<epoll::Event>,
}

impl Epoll {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake_fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &wake_fd, EventData::new_u64(WAKE), flags)?;
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
                set_nonblocking(&**socket);
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
        let timeout = timeout.map(|timeout| {
            let milliseconds = timeout.as_nanos().div_ceil(1_000_000).min(i32::MAX as u128) as i64;
            Timespec {
                tv_sec: milliseconds / 1_000,
                tv_nsec: milliseconds % 1_000 * 1_000_000,
            }
        });
        self.events.clear();
        let room = spare_capacity(&mut self.events);
        match epoll::wait(&self.epoll, room, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        for event in &self.events {
            let (bits, data) = (event.flags, event.data.u64());
            if data == WAKE {
                state.counters.wakes += 1;
                self.woken = true;
                let _ = rustix::io::read(&self.wake_fd, &mut [0_u8; 8]); // it has counted enough
                continue;
            }
            let Some(watched) = self.watched.get_mut(data as usize) else {
                continue;
            };
            watched.stops |= bits.intersects(END | EventFlags::PRI);
            for (side, edge) in EDGES.into_iter().enumerate() {
                if !bits.intersects(edge) {
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
                // SAFETY: sendmsg(2) has returned and said that it has taken the last of the list
                // (a short send went on above); it copies.
                return unsafe { state.retire(id) };
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
            let flags = READ_EDGE | WRITE_EDGE | EventFlags::ET;
            let data = EventData::new_u64(index as u64);
            if let Err(error) = epoll::add(&self.epoll, &*socket, data, flags) {
                self.freed.borrow_mut().push(index as u32);
                return Err(error.raw_os_error());
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

fn finish(state: &mut IoState, id: OpId, result: i32, buffer: Option<u16>, more: bool) -> FollowUp {
    state.counters.completions += 1;
    // SAFETY: the result is that of the operation's own system call, which has returned and keeps
    // nothing, or an error without one; the block is the one it filled, and each is entered once.
    unsafe { state.ops.complete(id, result, buffer, more, &state.pool) }
}

/// One attempt. The result is that of the system call, or minus its error; with the ring block it
/// filled, for a multishot receive.
fn perform(operation: &mut Operation, pool: &Pool) -> (i32, Option<u16>) {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let result = match operation {
        Operation::Accept(socket) => {
            let accepted = accept_with(&**socket, SocketFlags::CLOEXEC);
            return (number(accepted.map(IntoRawFd::into_raw_fd)), None);
        }
        Operation::Receive(socket) => return receive(socket, pool),
        Operation::Recv(socket, buf) => {
            let received = recv(&**socket, buf.spare_mut(), RecvFlags::DONTWAIT);
            return (number(received.map(|(_, n)| n as i32)), None);
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

/// A result as io_uring gives it: minus the error.
fn number(result: rustix::io::Result<i32>) -> i32 {
    result.unwrap_or_else(|error| -error.raw_os_error())
}

fn receive(socket: &Socket, pool: &Pool) -> (i32, Option<u16>) {
    let Some((bid, ptr, len)) = pool.provided() else {
        return (-libc::ENOBUFS, None);
    };
    // SAFETY: a provided block is nobody's until it is taken, and `len` bytes at `ptr` lie inside
    // it. They need not be initialised.
    let block = unsafe { std::slice::from_raw_parts_mut(ptr.as_ptr().cast(), len as usize) };
    let block: &mut [MaybeUninit<u8>] = block;
    let result = number(recv(socket, block, RecvFlags::DONTWAIT).map(|(_, n)| n as i32));
    if result <= 0 {
        return (result, None);
    }
    pool.take_provided();
    (result, Some(bid))
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
    match poll_now(socket, events) {
        Ok(0) => -libc::EAGAIN,
        Ok(told) => i32::from(told),
        Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
    }
}
