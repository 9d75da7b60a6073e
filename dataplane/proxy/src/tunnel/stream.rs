//! One stream of a tunnel, as its connection's task sees it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use hbone::{ErrorCode, StreamId};
use rt::buf::{Buf, Pool};
use telemetry::Happening;

use super::{Tunnel, TunnelError};

/// Queued pieces up to this size are packed together.
const PACK_MAX: usize = 2048;
/// With this much queued the application is slow, and every piece is packed.
const PACK_ALL: usize = 64 * 1024;

/// State of a stream, shared by the tunnel's reader and the stream's owner.
#[derive(Debug)]
pub(super) struct StreamShared {
    pub(super) id: StreamId,
    incoming: RefCell<VecDeque<Buf>>,
    queued: Cell<usize>,
    ended: Cell<bool>,
    reset: Cell<Option<ErrorCode>>,
    response: RefCell<Option<Response>>,
    receiver: RefCell<Option<Waker>>,
    sender: RefCell<Option<Waker>>,
}

/// Answer to a CONNECT request.
#[derive(Debug, Clone)]
pub(crate) struct Response {
    /// HTTP status.
    pub(crate) status: u16,
    /// The server workload's attributes.
    pub(crate) _baggage: Option<Box<str>>,
}

impl StreamShared {
    pub(super) fn new(id: StreamId) -> Self {
        Self {
            id,
            incoming: RefCell::default(),
            queued: Cell::new(0),
            ended: Cell::new(false),
            reset: Cell::new(None),
            response: RefCell::default(),
            receiver: RefCell::default(),
            sender: RefCell::default(),
        }
    }

    pub(super) fn wake(&self) {
        wake(&self.receiver);
        wake(&self.sender);
    }

    /// Queues received payload.
    pub(super) fn data(&self, piece: Buf, pool: &Pool) {
        let mut incoming = self.incoming.borrow_mut();
        self.queued.set(self.queued.get() + piece.len());
        let slow = piece.len() <= PACK_MAX || self.queued.get() > PACK_ALL;
        if incoming.is_empty() || !slow {
            incoming.push_back(piece);
        } else {
            pack(&mut incoming, &piece, pool);
        }
        wake(&self.receiver);
    }

    pub(super) fn end(&self) {
        self.ended.set(true);
        wake(&self.receiver);
    }

    pub(super) fn reset_by_peer(&self, code: ErrorCode) {
        self.reset.set(Some(code));
        self.wake();
    }

    pub(super) fn respond(&self, status: u16, baggage: Option<Box<str>>) {
        *self.response.borrow_mut() = Some(Response {
            status,
            _baggage: baggage,
        });
        wake(&self.receiver);
    }

    pub(super) fn writable(&self) {
        wake(&self.sender);
    }
}

/// Copies `piece` behind what is queued, into blocks of its own.
fn pack(incoming: &mut VecDeque<Buf>, mut piece: &[u8], pool: &Pool) {
    while !piece.is_empty() {
        match incoming.back_mut() {
            // A slice of a receive block has no tail room; only packed blocks have.
            Some(last) if last.tail_room() > 0 => {
                let n = piece.len().min(last.tail_room());
                last.extend_from_slice(&piece[..n]);
                piece = &piece[n..];
            }
            _ => incoming.push_back(pool.record()),
        }
    }
}

fn wake(slot: &RefCell<Option<Waker>>) {
    if let Some(waker) = slot.borrow_mut().take() {
        waker.wake();
    }
}

fn register(slot: &RefCell<Option<Waker>>, cx: &Context<'_>) {
    let mut slot = slot.borrow_mut();
    if !slot
        .as_ref()
        .is_some_and(|waker| waker.will_wake(cx.waker()))
    {
        *slot = Some(cx.waker().clone());
    }
}

/// Why a stream cannot go on.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum StreamFailure {
    /// Its tunnel ended.
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
    /// The peer reset it.
    #[error("stream reset by peer: {0}")]
    Reset(ErrorCode),
}

impl StreamFailure {
    /// The peer has not looked at the stream's request: it may be sent again (RFC 9113 8.7).
    pub(crate) fn is_unprocessed(&self) -> bool {
        matches!(self, Self::Reset(ErrorCode::REFUSED_STREAM))
    }

    /// The peer is done with the stream and means no harm.
    pub(crate) fn is_clean(&self) -> bool {
        matches!(self, Self::Reset(ErrorCode::NO_ERROR | ErrorCode::CANCEL))
    }
}

/// The owner's end of a stream. Dropping it before both directions have ended resets the stream.
#[derive(Debug)]
pub(crate) struct TunnelStream {
    tunnel: Rc<Tunnel>,
    shared: Rc<StreamShared>,
    finished: Cell<bool>,
    /// What a reset says if the stream is dropped before its end.
    parting: Cell<ErrorCode>,
    /// Bytes taken by `recv` and not given back yet.
    taken: Cell<usize>,
    /// Waits for a window.
    stalled: Cell<bool>,
}

impl TunnelStream {
    pub(super) fn new(tunnel: Rc<Tunnel>, shared: Rc<StreamShared>) -> Self {
        Self {
            tunnel,
            shared,
            finished: Cell::new(false),
            parting: Cell::new(ErrorCode::CANCEL),
            taken: Cell::new(0),
            stalled: Cell::new(false),
        }
    }

    /// Server: answers the request.
    pub(crate) fn respond(
        &self,
        status: u16,
        baggage: Option<&str>,
        end: bool,
    ) -> Result<(), hbone::StreamError> {
        self.tunnel
            .codec
            .borrow_mut()
            .respond(self.shared.id, status, baggage, end)?;
        if end {
            self.finished.set(true);
            // RFC 9113 8.1: NO_ERROR after a complete answer asks the client to stop sending.
            self.parting.set(ErrorCode::NO_ERROR);
        }
        self.tunnel.pump();
        Ok(())
    }

    /// Client: waits for the answer.
    pub(crate) async fn response(&self) -> Result<Response, StreamFailure> {
        poll_fn(|cx| {
            if let Some(response) = self.shared.response.borrow_mut().take() {
                return Poll::Ready(Ok(response));
            }
            if let Some(failure) = self.failure() {
                return Poll::Ready(Err(failure));
            }
            register(&self.shared.receiver, cx);
            Poll::Pending
        })
        .await
    }

    /// Ready when the stream takes nothing any more.
    pub(crate) fn poll_failure(&self, cx: &Context<'_>) -> Poll<StreamFailure> {
        if let Some(failure) = self.failure() {
            return Poll::Ready(failure);
        }
        register(&self.shared.sender, cx);
        Poll::Pending
    }

    /// Whether the peer had sent all it wanted to, when or before it left.
    pub(crate) fn is_complete(&self) -> bool {
        self.shared.ended.get()
    }

    /// Why it cannot go on, if it cannot.
    pub(crate) fn failure(&self) -> Option<StreamFailure> {
        if let Some(code) = self.shared.reset.get() {
            return Some(StreamFailure::Reset(code));
        }
        self.tunnel.error().map(StreamFailure::Tunnel)
    }

    /// Takes all queued payload; 0 bytes is the end of the peer's direction. Every byte taken is to
    /// be given back by [`TunnelStream::release`] once it has reached its receiver; what is not is
    /// given back when the stream is dropped, because the window is shared with other streams.
    pub(crate) async fn recv(&self, out: &mut VecDeque<Buf>) -> Result<usize, StreamFailure> {
        poll_fn(|cx| {
            let queued = self.shared.queued.replace(0);
            if queued > 0 {
                self.taken.set(self.taken.get() + queued);
                out.append(&mut self.shared.incoming.borrow_mut());
                return Poll::Ready(Ok(queued));
            }
            if self.shared.ended.get() {
                return Poll::Ready(Ok(0));
            }
            match self.failure() {
                Some(failure) if failure.is_clean() => Poll::Ready(Ok(0)),
                Some(failure) => Poll::Ready(Err(failure)),
                None => {
                    register(&self.shared.receiver, cx);
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Gives the peer credit for `n` bytes.
    pub(crate) fn release(&self, n: usize) {
        let n = n.min(self.taken.get());
        self.taken.set(self.taken.get() - n);
        self.tunnel.release(self.shared.id, n);
    }

    /// Queues all of `bufs` as the windows and the congestion of the tunnel allow.
    pub(crate) async fn send(&self, bufs: &mut VecDeque<Buf>) -> Result<(), StreamFailure> {
        poll_fn(|cx| self.poll_send(cx, bufs)).await
    }

    fn poll_send(
        &self,
        cx: &Context<'_>,
        bufs: &mut VecDeque<Buf>,
    ) -> Poll<Result<(), StreamFailure>> {
        let id = self.shared.id;
        while let Some(mut buf) = bufs.pop_front() {
            if let Some(failure) = self.failure() {
                return Poll::Ready(Err(failure));
            }
            if self.tunnel.is_congested() {
                self.tunnel.drained.register(cx);
                bufs.push_front(buf);
                return Poll::Pending;
            }
            let capacity = {
                let codec = self.tunnel.codec.borrow();
                codec
                    .send_capacity(id)
                    .min(codec.max_data_len())
                    .min(FRAME_PAYLOAD)
            };
            if capacity == 0 {
                if !self.stalled.replace(true) {
                    self.tunnel.telemetry.happened(Happening::WindowStall);
                }
                register(&self.shared.sender, cx);
                bufs.push_front(buf);
                return Poll::Pending;
            }
            self.stalled.set(false);
            if buf.len() > capacity {
                let front = buf.split_to(capacity);
                bufs.push_front(std::mem::replace(&mut buf, front));
            }
            if self.tunnel.queue_data(id, buf).is_err() {
                let failure = self.failure();
                return Poll::Ready(Err(failure.unwrap_or_else(|| TunnelError::Closed.into())));
            }
        }
        Poll::Ready(Ok(()))
    }

    /// The tunnel it is in.
    pub(crate) fn tunnel(&self) -> &Rc<Tunnel> {
        &self.tunnel
    }

    /// What was sent is not all: the peer is told when the stream is dropped (RFC 9113 8.5).
    pub(crate) fn cut_off(&self) {
        self.parting.set(ErrorCode::CONNECT_ERROR);
    }

    /// Ends our direction.
    pub(crate) fn finish(&self) -> Result<(), StreamFailure> {
        self.finished.set(true);
        match self.tunnel.queue_end(self.shared.id) {
            Ok(()) => Ok(()),
            Err(_) => match self.failure() {
                Some(failure) if !failure.is_clean() => Err(failure),
                _ => Ok(()),
            },
        }
    }
}

/// Most payload of one DATA frame: with its header it fills one record.
const FRAME_PAYLOAD: usize = tls::Session::MAX_PLAINTEXT - hbone::FRAME_HEADER;

impl Drop for TunnelStream {
    fn drop(&mut self) {
        let id = self.shared.id;
        if !(self.finished.get() && self.shared.ended.get()) {
            self.tunnel.reset(id, self.parting.get());
        }
        // Payload that nobody takes any more still counts against the connection's window.
        let left = std::mem::take(&mut *self.shared.incoming.borrow_mut());
        let left = left.iter().map(|buf| buf.len()).sum::<usize>() + self.taken.get();
        if left > 0 {
            self.tunnel.release(id, left);
        }
        self.tunnel.detach(id);
    }
}
