//! Receiving: multishot while messages are small, large single receives while the flow is bulk.
//!
//! Small mode arms one multishot receive; the kernel takes a ring block per message and an idle
//! connection holds none. When one wake-up finds several full blocks the flow is bulk: the
//! multishot is cancelled and single receives fill large blocks, which lets the socket buffer
//! gather data while the previous block is being sent. A flow that fills them gets huge ones while
//! there are any. A few short receives lead back to small mode. When the ring of blocks is empty
//! (`ENOBUFS`) a receive into an own record-sized block keeps the flow going, so that connections
//! whose readers lag cannot starve the others.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use crate::buf::Buf;
use crate::executor::Inner;
use crate::op::{MessageHeader, OpId, Operation, Socket};
use crate::sys::reset_on_close;

/// How bulk data is laid out in a large block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// One contiguous run, for data that is passed on as it is.
    Flat,
    /// One contiguous run, for data that is parsed (TLS records): in blocks that are still in the
    /// cache when it is.
    Parsed,
    /// Cut into segments with head and tail room, to be sealed into records where it lies.
    Segmented,
}

#[derive(Debug)]
enum Mode {
    Idle,
    Multi { op: OpId, stopping: bool },
    Single { op: OpId },
}

/// Bytes one wake-up must find before a flow counts as bulk.
const BULK_BYTES: usize = 16 * 1024;
/// Short bulk receives in a row before a flow counts as small again.
const SHORT_RECEIVES: u8 = 4;
/// A bulk receive below this is short.
const SHORT_BYTES: usize = 4 * 1024;
/// Room a carried-over buffer must have left to be received into again.
const CARRY_ROOM: usize = 64 * 1024;

/// The receiving half of a connection.
#[derive(Debug)]
pub struct ReadHalf {
    socket: Rc<Socket>,
    inner: Rc<Inner>,
    mode: Mode,
    placement: Placement,
    bulk: bool,
    /// The last bulk receive found as much as a large block holds.
    saturating: bool,
    starved: bool,
    short: u8,
    eof: bool,
    /// What ended it, if that was an error; told by every later receive.
    error: Option<i32>,
    header: Option<Box<MessageHeader>>,
}

impl ReadHalf {
    pub(crate) fn new(socket: Rc<Socket>, inner: Rc<Inner>) -> Self {
        Self {
            socket,
            inner,
            mode: Mode::Idle,
            placement: Placement::Flat,
            bulk: false,
            saturating: false,
            starved: false,
            short: 0,
            eof: false,
            error: None,
            header: None,
        }
    }

    /// Chooses the layout of bulk data; takes effect with the next receive.
    pub fn set_placement(&mut self, placement: Placement) {
        self.placement = placement;
    }

    /// Whether the flow currently counts as bulk.
    #[must_use]
    pub fn is_bulk(&self) -> bool {
        self.bulk
    }

    /// Whether no receive is under way and the next one would find what the socket has next.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        matches!(self.mode, Mode::Idle) && !self.eof && self.error.is_none()
    }

    /// The flow is small again.
    pub(crate) fn leave_bulk(&mut self) {
        self.bulk = false;
        self.short = 0;
    }

    pub(crate) fn socket(&self) -> &Rc<Socket> {
        &self.socket
    }

    pub(crate) fn inner(&self) -> &Rc<Inner> {
        &self.inner
    }

    /// Makes the final close of the connection send RST.
    ///
    /// # Errors
    /// That of `setsockopt(2)`.
    pub fn reset_on_close(&self) -> io::Result<()> {
        reset_on_close(&*self.socket)
    }

    /// Receives what is there into `out` and returns how many bytes; 0 is the end of the stream.
    /// Waits for the first byte only. Cancel safe: nothing received is lost.
    ///
    /// # Errors
    /// Those of `recv(2)`, such as `ECONNRESET`. A connection that has failed fails for good, also
    /// if it was a send that was told.
    pub async fn recv(&mut self, out: &mut VecDeque<Buf>) -> io::Result<usize> {
        poll_fn(|cx| self.poll_recv(cx, out, &mut None)).await
    }

    /// As [`ReadHalf::recv`], for parsers: `carry` is an incomplete record at the end of what was
    /// received before. If it is taken, the data handed out begins with its bytes, which do not
    /// count in the result.
    ///
    /// # Errors
    /// As [`ReadHalf::recv`].
    pub fn poll_recv(
        &mut self,
        cx: &Context<'_>,
        out: &mut VecDeque<Buf>,
        carry: &mut Option<Buf>,
    ) -> Poll<io::Result<usize>> {
        loop {
            if let Some(code) = self.error {
                return Poll::Ready(Err(io::Error::from_raw_os_error(code)));
            }
            if self.eof {
                // Not an end if the error was told to another operation.
                let failure = self.socket.failure();
                return Poll::Ready(
                    failure.map_or(Ok(0), |code| Err(io::Error::from_raw_os_error(code))),
                );
            }
            match self.mode {
                Mode::Idle => self.start(carry),
                Mode::Multi { op, .. } => {
                    if let Some(result) = ready!(self.poll_multi(op, cx, out)) {
                        return Poll::Ready(result);
                    }
                }
                Mode::Single { op } => {
                    let done = self.inner.driver.borrow_mut().poll_once(op, cx);
                    let (result, operation) = ready!(done);
                    self.mode = Mode::Idle;
                    let finished = self.finish_single(result, operation, out, carry);
                    if !self.eof {
                        return Poll::Ready(finished);
                    }
                }
            }
        }
    }

    fn start(&mut self, carry: &mut Option<Buf>) {
        if self.bulk || self.starved {
            let segmented = self.placement == Placement::Segmented;
            self.mode = Mode::Single {
                op: if segmented && self.bulk {
                    self.scatter()
                } else {
                    self.single(carry)
                },
            };
            return;
        }
        let operation = Operation::Receive(Rc::clone(&self.socket));
        let op = self.inner.driver.borrow_mut().start(operation);
        self.mode = Mode::Multi {
            op,
            stopping: false,
        };
    }

    /// A receive into one contiguous buffer, behind `carry` if there is one.
    fn single(&mut self, carry: &mut Option<Buf>) -> OpId {
        let buf = match carry.take() {
            Some(buf) if buf.tail_room() >= CARRY_ROOM => buf,
            Some(old) if self.bulk => {
                let mut buf = self.inner.pool.large();
                buf.extend_from_slice(&old);
                buf
            }
            other => {
                *carry = other;
                let pool = &self.inner.pool;
                let huge = self.saturating && self.placement == Placement::Flat;
                match (self.bulk, huge) {
                    (true, true) => pool.huge().unwrap_or_else(|| pool.large()),
                    (true, false) => pool.large(),
                    (false, _) => pool.record(),
                }
            }
        };
        let operation = Operation::Recv(Rc::clone(&self.socket), buf);
        self.inner.driver.borrow_mut().start(operation)
    }

    /// A receive scattered over the segments of a large block.
    fn scatter(&mut self) -> OpId {
        let mut header = self.header.take().unwrap_or_default();
        header.prepare(self.inner.pool.large(), self.inner.pool.config().payload);
        let operation = Operation::RecvMsg(Rc::clone(&self.socket), header);
        self.inner.driver.borrow_mut().start(operation)
    }

    fn finish_single(
        &mut self,
        result: i32,
        operation: Operation,
        out: &mut VecDeque<Buf>,
        carry: &mut Option<Buf>,
    ) -> io::Result<usize> {
        self.starved = false;
        if result < 0 {
            if let Operation::Recv(_, buf) = operation {
                *carry = (!buf.is_empty()).then_some(buf);
            }
            self.error = Some(-result);
            return Err(io::Error::from_raw_os_error(-result));
        }
        let received = result as usize;
        self.eof = received == 0;
        match operation {
            Operation::Recv(_, mut buf) => {
                // SAFETY: the kernel reports that it wrote `result` bytes at the tail.
                unsafe { buf.assume_tail(result as u32) };
                if received > 0 {
                    out.push_back(buf);
                } else if !buf.is_empty() {
                    *carry = Some(buf);
                }
            }
            Operation::RecvMsg(_, mut header) => {
                header.take_segments(received, out);
                self.header = Some(header);
            }
            _ => {}
        }
        self.note_bulk(received);
        Ok(received)
    }

    fn note_bulk(&mut self, received: usize) {
        self.saturating = received >= self.inner.pool.config().large_bytes();
        if received >= SHORT_BYTES {
            self.short = 0;
            return;
        }
        self.short += 1;
        if self.short >= SHORT_RECEIVES {
            self.short = 0;
            self.bulk = false;
        }
    }

    /// Drains queued completions. `None`: the multishot has ended and brought nothing, start again.
    fn poll_multi(
        &mut self,
        op: OpId,
        cx: &Context<'_>,
        out: &mut VecDeque<Buf>,
    ) -> Poll<Option<io::Result<usize>>> {
        let mut received = 0;
        let mut driver = self.inner.driver.borrow_mut();
        loop {
            match driver.poll_many(op, cx) {
                Poll::Pending if received == 0 => return Poll::Pending,
                Poll::Pending => break,
                Poll::Ready(None) => {
                    self.mode = Mode::Idle;
                    if received == 0 {
                        return Poll::Ready(None);
                    }
                    break;
                }
                Poll::Ready(Some(done)) if done.result > 0 => {
                    let Some(bid) = done.buffer else { continue };
                    out.push_back(self.inner.pool.take_ring(bid, done.result as u32));
                    received += done.result as usize;
                }
                Poll::Ready(Some(done)) => {
                    if let Some(bid) = done.buffer {
                        self.inner.pool.discard_ring(bid);
                    }
                    match -done.result {
                        0 => self.eof = true,
                        libc::ENOBUFS => self.starved = true,
                        libc::ECANCELED => {}
                        code => self.error = Some(code),
                    }
                    if (self.eof || self.error.is_some()) && received == 0 {
                        return Poll::Ready(None); // `poll_recv` tells
                    }
                    if self.eof {
                        break;
                    }
                }
            }
        }
        if received >= BULK_BYTES && !self.bulk {
            self.bulk = true;
            self.short = 0;
            if let Mode::Multi {
                op,
                stopping: stopping @ false,
            } = &mut self.mode
            {
                *stopping = true;
                driver.cancel(*op);
            }
        }
        Poll::Ready(Some(Ok(received)))
    }
}

impl Drop for ReadHalf {
    fn drop(&mut self) {
        if let Mode::Multi { op, .. } | Mode::Single { op } = self.mode {
            self.inner.driver.borrow_mut().abandon(op);
        }
    }
}
