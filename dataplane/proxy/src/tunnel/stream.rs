//! One stream of a tunnel, as its connection's task sees it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use hbone::{ErrorCode, StreamId};
use rt::buf::Buf;
use telemetry::Event;

use super::queue::{self, Packing};
use super::{Tunnel, TunnelError};

/// State of a stream, shared by the tunnel's reader and the stream's owner.
#[derive(Debug)]
pub(super) struct StreamShared {
    pub(super) id: StreamId,
    incoming: RefCell<VecDeque<Buf>>,
    queued: Cell<usize>,
    /// Bytes that have arrived and not been released.
    held: Cell<usize>,
    /// Bytes of the blocks that they pin.
    pinned: Cell<usize>,
    /// Something was released since somebody began to watch.
    moves: Cell<bool>,
    /// The peer has credit for all that is held: the stream is gone.
    credited: Cell<bool>,
    ended: Cell<bool>,
    reset: Cell<Option<ErrorCode>>,
    /// Given up for want of memory: the bound.
    given_up: Cell<Option<usize>>,
    /// HTTP status that answers the CONNECT request.
    response: Cell<Option<u16>>,
    receiver: RefCell<Option<Waker>>,
    sender: RefCell<Option<Waker>>,
}

impl StreamShared {
    pub(super) fn new(id: StreamId) -> Self {
        Self {
            id,
            incoming: RefCell::default(),
            queued: Cell::new(0),
            held: Cell::new(0),
            pinned: Cell::new(0),
            moves: Cell::new(false),
            credited: Cell::new(false),
            ended: Cell::new(false),
            reset: Cell::new(None),
            given_up: Cell::new(None),
            response: Cell::default(),
            receiver: RefCell::default(),
            sender: RefCell::default(),
        }
    }

    pub(super) fn wake(&self) {
        wake(&self.receiver);
        wake(&self.sender);
    }

    /// Queues received payload. Returns the bytes of the blocks that it pins in addition.
    pub(super) fn data(&self, piece: Buf, tight: bool, packing: &mut Packing) -> usize {
        let mut incoming = self.incoming.borrow_mut();
        let (len, have) = (piece.len(), (self.held.get(), self.pinned.get()));
        let charge = queue::push(&mut incoming, piece, have, tight, packing);
        self.queued.set(self.queued.get() + len);
        self.held.set(have.0 + len);
        self.pinned.set(have.1 + charge);
        wake(&self.receiver);
        charge
    }

    /// `n` bytes have reached their receiver. Returns the bytes of blocks that are free by that.
    fn discharge(&self, n: usize) -> usize {
        let (held, pinned) = (self.held.get(), self.pinned.get());
        self.moves.set(true);
        let n = n.min(held);
        let freed = match held - n {
            0 => pinned,
            // Which blocks they were is not known: a part of them.
            _ => (pinned as u64 * n as u64 / held as u64) as usize,
        };
        self.held.set(held - n);
        self.pinned.set(pinned - freed);
        freed
    }

    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        self.held.get()
    }

    pub(super) fn end(&self) {
        self.ended.set(true);
        wake(&self.receiver);
    }

    pub(super) fn reset_by_peer(&self, code: ErrorCode) {
        self.reset.set(Some(code));
        self.wake();
    }

    pub(super) fn respond(&self, status: u16) {
        self.response.set(Some(status));
        wake(&self.receiver);
    }

    pub(super) fn writable(&self) {
        wake(&self.sender);
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
    /// Its receiver does not read, and the memory for what tunnels hold is used up.
    #[error(
        "stream given up: its receiver takes nothing and the {0} bytes for data that tunnels hold \
         are used up (ZTUNNEL_TUNNEL_MEMORY_BYTES)"
    )]
    GivenUp(usize),
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
    /// It counts against the requests that its tunnel serves at a time.
    served: Cell<bool>,
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
            served: Cell::new(false),
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
    pub(crate) async fn response(&self) -> Result<u16, StreamFailure> {
        poll_fn(|cx| {
            if let Some(status) = self.shared.response.take() {
                return Poll::Ready(Ok(status));
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

    /// Server: the request is being served from now on.
    pub(super) fn note_served(&self) {
        self.served.set(true);
    }

    pub(crate) fn id(&self) -> StreamId {
        self.shared.id
    }

    /// Whether the peer had sent all it wanted to, when or before it left.
    pub(crate) fn is_complete(&self) -> bool {
        // What was queued of one that is given up is lost.
        self.shared.ended.get() && self.shared.given_up.get().is_none()
    }

    /// Whether nobody waits for what becomes of it.
    pub(crate) fn is_gone(&self) -> bool {
        self.failure().is_some()
    }

    /// Why it cannot go on, if it cannot.
    pub(crate) fn failure(&self) -> Option<StreamFailure> {
        if let Some(limit) = self.shared.given_up.get() {
            return Some(StreamFailure::GivenUp(limit));
        }
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
                out.append(&mut self.shared.incoming.borrow_mut());
                return Poll::Ready(Ok(queued));
            }
            if self.is_complete() {
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
        self.tunnel.released(&self.shared, n);
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
                    self.tunnel.telemetry.count_event(Event::WindowStall);
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
        drop(std::mem::take(&mut *self.shared.incoming.borrow_mut()));
        self.tunnel.released(&self.shared, self.shared.held.get());
        self.tunnel.detach(id, self.served.get());
        if self.served.get() {
            // At once: a drain must not find that nothing is left to do.
            self.tunnel.admit_waiting();
        }
    }
}

/// A stream that may be given up where memory runs out.
#[derive(Debug)]
pub(crate) struct HeldStream {
    tunnel: Rc<Tunnel>,
    shared: Rc<StreamShared>,
}

impl HeldStream {
    /// Bytes of the blocks that its payload pins.
    pub(crate) fn charge(&self) -> usize {
        self.shared.pinned.get()
    }

    /// Whether its receiver has taken anything since [`HeldStream::begin_watch`].
    pub(crate) fn moves(&self) -> bool {
        self.shared.moves.get()
    }

    /// Notes from now on whether its receiver takes anything.
    pub(crate) fn begin_watch(&self) {
        self.shared.moves.set(false);
    }

    /// Resets it: both applications see their connection reset.
    pub(crate) fn give_up(&self, limit: usize) {
        let shared = &self.shared;
        shared.given_up.set(Some(limit));
        self.tunnel.reset(shared.id, ErrorCode::ENHANCE_YOUR_CALM);
        self.tunnel.return_credit(shared);
        shared.queued.set(0);
        drop(std::mem::take(&mut *shared.incoming.borrow_mut()));
        self.tunnel.forgo_charge(shared);
        shared.wake();
    }
}

impl StreamShared {
    /// As [`HeldStream`], if it pins anything.
    pub(super) fn held_by(self: &Rc<Self>, tunnel: &Rc<Tunnel>) -> Option<HeldStream> {
        (self.pinned.get() > 0 && self.given_up.get().is_none()).then(|| HeldStream {
            tunnel: Rc::clone(tunnel),
            shared: Rc::clone(self),
        })
    }
}

impl Tunnel {
    /// `n` bytes of a stream have reached their receiver: credit for the peer, and memory.
    fn released(&self, shared: &StreamShared, n: usize) {
        let n = n.min(shared.held.get());
        if n == 0 {
            return;
        }
        let freed = shared.discharge(n);
        self.memory.discharge(freed, &self.pool);
        if !shared.credited.get() {
            self.release(shared.id, n);
        }
    }

    /// The stream is gone: what of it is still held counts against no window, whoever holds it.
    pub(super) fn return_credit(&self, shared: &StreamShared) {
        if !shared.credited.replace(true) && shared.held.get() > 0 {
            self.release(shared.id, shared.held.get());
        }
    }

    /// What the stream's task still has it lets go of at once.
    fn forgo_charge(&self, shared: &StreamShared) {
        let freed = shared.pinned.replace(0);
        self.memory.discharge(freed, &self.pool);
    }
}
