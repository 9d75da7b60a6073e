//! One HBONE connection: TLS records, HTTP/2 frames and the streams in them.
//!
//! Three tasks of one worker share a [`Tunnel`]: the reader opens records where they were received
//! and hands payload slices to streams; the writer seals what streams have queued and sends it; the
//! keepalive asks for signs of life. Streams ([`TunnelStream`]) belong to the connections' tasks.
//!
//! What makes it cheap: small DATA frames of all streams that are ready in one turn of the worker
//! share one TLS record and one send; large ones are sealed in the buffer they were received in.
//! Received payload is copied only where it would pin much more than itself ([`queue`]).
//!
//! Bounds: a stream queues at most its window. What streams hold whose receivers do not read is
//! lent again in the connection's window, so that none of them stops the others; all that is held
//! in the process has one bound ([`crate::memory`]). Payload that waits to be sent is bounded by
//! [`SEND_HIGH`] plus one frame, and a peer that lets answers pile up to [`SEND_MAX`] is given up.
//! As many requests are served at a time as the peer may have streams open, until their tasks have
//! ended: one whose stream is reset is not served any more, but counts as long as it has anything.

mod io;
mod keepalive;
mod outgoing;
mod queue;
mod stream;

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Instant;

use hbone::{ConnectRequest, ErrorCode, RequestHead, StreamId};
use rt::buf::{Buf, Pool};
use rt::sync::{Broadcast, Signal};
use telemetry::WorkerTelemetry;
use tls::Session;

use crate::memory::WorkerMemory;

pub(crate) use io::{Setup, SetupError, Transport, run};
use outgoing::Outgoing;
use stream::StreamShared;
pub(crate) use stream::{HeldStream, StreamFailure, TunnelStream};

/// Bytes waiting to be sent above which streams stop adding more.
pub(crate) const SEND_HIGH: usize = 512 * 1024;
/// Bytes below which they go on.
const SEND_LOW: usize = 256 * 1024;
/// Bytes waiting to be sent at which the peer is given up: streams stop long before, so the rest
/// are answers to a peer that asks and does not read.
const SEND_MAX: usize = SEND_HIGH + 1024 * 1024;

/// Why a tunnel ended. Shared by all its streams, hence cheap to clone.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum TunnelError {
    /// The transport failed.
    #[error("io error: {0}")]
    Io(Rc<std::io::Error>),
    /// The peer ended the tunnel in order.
    #[error("tunnel closed by peer")]
    Closed,
    /// The peer ended the transport and not TLS.
    #[error("tunnel cut off: the connection ended without close_notify")]
    Truncated,
    /// The peer broke HTTP/2.
    #[error("http2 error: {0}")]
    Http2(hbone::ConnectionError),
    /// The peer broke TLS.
    #[error("tls error: {0}")]
    Tls(Rc<str>),
    /// The peer reported an error by alert.
    #[error("tls error: {0}")]
    TlsAlert(Rc<str>),
    /// No answer to pings.
    #[error("tunnel lost: the peer does not answer PING")]
    KeepaliveTimeout,
    /// The peer makes us answer and takes no answers.
    #[error("tunnel given up: {0} bytes wait to be sent, the peer asks for more and reads nothing")]
    Unread(usize),
    /// Shut down by this side.
    #[error("connection closed due to connection drain")]
    Drained,
}

/// What the tunnel tells its owner.
pub(crate) trait TunnelOwner: fmt::Debug {
    /// Server: a peer asks for a stream.
    fn request(&self, tunnel: &Rc<Tunnel>, stream: TunnelStream, head: RequestHead);
}

/// A client tunnel's owner: the peer cannot open streams there.
#[derive(Debug)]
pub(crate) struct ClientSide;

impl TunnelOwner for ClientSide {
    fn request(&self, _: &Rc<Tunnel>, stream: TunnelStream, _: RequestHead) {
        drop(stream); // never happens: the codec refuses requests to a client
    }
}

#[derive(Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u32(u32::from(byte));
        }
    }

    fn write_u32(&mut self, id: u32) {
        // Fibonacci hashing: stream ids count up, the table wants them spread.
        self.0 = (self.0 ^ u64::from(id)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type Streams = HashMap<u32, Rc<StreamShared>, BuildHasherDefault<IdHasher>>;

/// One established HBONE connection.
pub(crate) struct Tunnel {
    session: RefCell<Session>,
    codec: RefCell<hbone::Connection>,
    out: RefCell<Outgoing>,
    streams: RefCell<Streams>,
    /// Client: told when there may be room for streams, and of the tunnel's end.
    changed: OnceCell<Rc<Signal>>,
    /// The writer has something to do.
    flush: Signal,
    /// The reader shall look at `error`.
    stop: Signal,
    /// The writer shall look at `error`, also while it sends.
    failed: Signal,
    /// Less than [`SEND_LOW`] waits to be sent.
    drained: Broadcast,
    error: RefCell<Option<TunnelError>>,
    /// Nothing more will be sent: the writer finishes and closes.
    closing: Cell<bool>,
    /// close_notify and all before it have left, or never will.
    ended: Cell<bool>,
    last_heard: Cell<Instant>,
    /// Receives so far.
    heard: Cell<u64>,
    idle_since: Cell<Instant>,
    peer_addr: SocketAddr,
    owner: Box<dyn TunnelOwner>,
    telemetry: WorkerTelemetry,
    /// The peer refused a stream although its limit is not reached: none is opened before another
    /// one has ended.
    refusing: Cell<bool>,
    /// What its streams hold is charged to this.
    memory: Rc<WorkerMemory>,
    pool: Pool,
    /// Server: requests whose tasks have not ended, and how many there may be.
    served: Cell<usize>,
    served_max: usize,
    /// Requests that wait until there are fewer. Their streams count as open for the codec.
    waiting: RefCell<VecDeque<(TunnelStream, RequestHead)>>,
    /// It has been told that the peer's streams come to nothing.
    calmed: Cell<bool>,
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel")
            .field("peer", &self.peer_addr)
            .field("streams", &self.streams.borrow().len())
            .field("error", &self.error)
            .finish_non_exhaustive()
    }
}

impl Tunnel {
    fn new(
        setup: &Setup<'_>,
        session: Session,
        write: rt::net::WriteHalf,
        peer_addr: SocketAddr,
        owner: Box<dyn TunnelOwner>,
    ) -> Rc<Self> {
        let now = Instant::now();
        let pool = write.pool().clone();
        let tunnel = Rc::new(Self {
            session: RefCell::new(session),
            codec: RefCell::new(hbone::Connection::new(setup.role, setup.config)),
            out: RefCell::new(Outgoing::new(write)),
            streams: RefCell::default(),
            changed: OnceCell::new(),
            flush: Signal::default(),
            stop: Signal::default(),
            failed: Signal::default(),
            drained: Broadcast::default(),
            error: RefCell::default(),
            closing: Cell::new(false),
            ended: Cell::new(false),
            last_heard: Cell::new(now),
            heard: Cell::new(0),
            idle_since: Cell::new(now),
            peer_addr,
            owner,
            telemetry: setup.telemetry.clone(),
            refusing: Cell::new(false),
            memory: Rc::clone(setup.memory),
            pool,
            served: Cell::new(0),
            served_max: setup.config.max_concurrent_streams as usize,
            waiting: RefCell::default(),
            calmed: Cell::new(false),
        });
        setup.memory.add(&tunnel);
        tunnel.pump();
        tunnel
    }

    /// Who is at the other end, as proved by its certificate.
    pub(crate) fn peer(&self) -> tls::Peer {
        self.session.borrow().peer().clone()
    }

    /// Transport address of the other end.
    pub(crate) fn peer_addr(&self) -> SocketAddr {
        self.peer_addr
    }

    /// The reason why this tunnel takes no more streams, if it ended.
    pub(crate) fn error(&self) -> Option<TunnelError> {
        self.error.borrow().clone()
    }

    /// Whether nothing more will be sent.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.get()
    }

    /// Whether a stream could be opened now, and would not have to wait for streams whose
    /// receivers have stopped reading and hold the window that all of them share.
    pub(crate) fn can_open(&self) -> bool {
        let codec = self.codec.borrow();
        let alive = self.error.borrow().is_none() && !self.closing.get();
        alive && !self.refusing.get() && codec.can_open() && !codec.is_crowded()
    }

    /// Since when no stream is open, if none is.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        self.streams
            .borrow()
            .is_empty()
            .then(|| self.idle_since.get())
    }

    /// How many streams could be opened now: [`Tunnel::can_open`] in numbers.
    pub(crate) fn room(&self) -> usize {
        match self.can_open() {
            true => self.codec.borrow().room(),
            false => 0,
        }
    }

    /// Has `changed` set when a stream has ended, the peer takes more of them, or the tunnel ends.
    pub(crate) fn tell_changes(&self, changed: Rc<Signal>) {
        let _ = self.changed.set(changed); // a tunnel is added to one pool, once
    }

    fn note_change(&self) {
        if let Some(changed) = self.changed.get() {
            changed.set();
        }
    }

    /// Client: opens a stream with a CONNECT request.
    pub(crate) fn open(
        self: &Rc<Self>,
        request: &ConnectRequest<'_>,
    ) -> Result<TunnelStream, hbone::OpenError> {
        if self.closing.get() || self.error.borrow().is_some() {
            return Err(hbone::OpenError::GoingAway);
        }
        let id = self.codec.borrow_mut().open(request)?;
        self.pump();
        Ok(self.attach(id))
    }

    fn attach(self: &Rc<Self>, id: StreamId) -> TunnelStream {
        let shared = Rc::new(StreamShared::new(id));
        self.streams
            .borrow_mut()
            .insert(id.get(), Rc::clone(&shared));
        TunnelStream::new(Rc::clone(self), shared)
    }

    /// The peer has refused a stream that it might have taken: leaves it alone until one of the
    /// others ends, and for good if there is none.
    pub(crate) fn note_refusal(&self) {
        if self.streams.borrow().is_empty() {
            self.shutdown_graceful();
        } else {
            self.refusing.set(true);
        }
    }

    /// Server: a request has arrived. It is served now, or when one of those before it has ended.
    fn admit(self: &Rc<Self>, stream: TunnelStream, head: RequestHead) {
        if self.served.get() >= self.served_max {
            self.waiting.borrow_mut().push_back((stream, head));
            return;
        }
        self.served.set(self.served.get() + 1);
        stream.note_served();
        self.owner.request(self, stream, head);
    }

    /// Serves requests that have waited, as many as there is room for.
    fn admit_waiting(self: &Rc<Self>) {
        while self.served.get() < self.served_max {
            let Some((stream, head)) = self.waiting.borrow_mut().pop_front() else {
                return;
            };
            if !stream.is_gone() {
                self.admit(stream, head);
            }
        }
    }

    /// The stream of a request is gone: if it has waited it is forgotten.
    fn forget_waiting(&self, id: StreamId) {
        let mut waiting = self.waiting.borrow_mut();
        let at = waiting.iter().rposition(|(stream, _)| stream.id() == id);
        let gone = at.and_then(|at| waiting.remove(at));
        drop(waiting);
        drop(gone); // it looks at the tunnel
    }

    /// Streams whose payload pins memory.
    pub(crate) fn held_streams(self: &Rc<Self>, out: &mut Vec<HeldStream>) {
        let streams = self.streams.borrow();
        out.extend(streams.values().filter_map(|stream| stream.held_by(self)));
    }

    fn detach(&self, id: StreamId, served: bool) {
        if served {
            self.served.set(self.served.get() - 1);
        }
        let mut streams = self.streams.borrow_mut();
        streams.remove(&id.get());
        self.refusing.set(false);
        if streams.is_empty() {
            self.idle_since.set(Instant::now());
        }
        drop(streams);
        self.note_change();
        if self.codec.borrow().is_closed() {
            self.finish();
        }
    }

    /// Announces the end; streams finish, then the tunnel closes.
    pub(crate) fn shutdown_graceful(&self) {
        self.codec.borrow_mut().shutdown_graceful();
        self.pump();
        if self.codec.borrow().is_closed() {
            self.finish();
        }
    }

    /// Ends the tunnel at once, with GOAWAY.
    pub(crate) fn abort(&self, error: TunnelError, code: ErrorCode) {
        self.codec.borrow_mut().go_away(code);
        self.pump();
        self.fail(error);
    }

    /// Records the end, tells every stream, and lets the writer send what is left.
    fn fail(&self, error: TunnelError) {
        if self.error.borrow().is_none() {
            // What happens to a tunnel that is closing anyway is no news.
            if let Some(fault) = error.fault().filter(|_| !self.closing.get()) {
                self.telemetry.hbone_error(fault);
            }
            *self.error.borrow_mut() = Some(error);
        }
        for stream in self.streams.borrow().values() {
            stream.wake();
        }
        drop(std::mem::take(&mut *self.waiting.borrow_mut()));
        self.note_change();
        self.drained.notify();
        self.failed.set();
        self.finish();
    }

    /// The peer has said something.
    fn note_heard(&self) {
        self.last_heard.set(Instant::now());
        self.heard.set(self.heard.get() + 1);
    }

    /// What the keepalive looks at.
    fn signs(&self) -> keepalive::Signs {
        let (queued, taken) = self.out.borrow().progress();
        keepalive::Signs {
            last_heard: self.last_heard.get(),
            heard: self.heard.get(),
            queued,
            taken,
        }
    }

    fn finish(&self) {
        self.closing.set(true);
        self.flush.set();
        self.stop.set();
    }

    /// Moves control frames from the codec into the record under construction.
    fn pump(&self) {
        let mut codec = self.codec.borrow_mut();
        let n = codec.output().len();
        if n == 0 {
            return;
        }
        let sealed = {
            let mut session = self.session.borrow_mut();
            self.out.borrow_mut().append(&mut session, codec.output())
        };
        codec.consume_output(n);
        drop(codec);
        self.sealed(sealed);
        let waiting = self.out.borrow().pending_bytes();
        if waiting > SEND_MAX && self.error.borrow().is_none() {
            self.fail(TunnelError::Unread(waiting));
        }
    }

    /// After queueing: wakes the writer, or ends the tunnel when sealing is no longer possible.
    fn sealed(&self, result: Result<(), tls::SealError>) {
        match result {
            Ok(()) => self.flush.set(),
            Err(error) if self.error.borrow().is_none() => {
                self.fail(TunnelError::Tls(error.to_string().into()));
            }
            Err(_) => {}
        }
    }

    /// Whether streams should wait before they queue more.
    fn is_congested(&self) -> bool {
        self.out.borrow().pending_bytes() > SEND_HIGH
    }

    /// Queues one DATA frame whose payload is `buf`; the windows must allow it.
    fn queue_data(&self, id: StreamId, buf: Buf) -> Result<(), hbone::StreamError> {
        self.pump();
        let header = self.codec.borrow_mut().data_header(id, buf.len(), false)?;
        let sealed = {
            let mut session = self.session.borrow_mut();
            self.out.borrow_mut().data(&mut session, header, buf)
        };
        self.sealed(sealed);
        Ok(())
    }

    /// Queues END_STREAM.
    fn queue_end(&self, id: StreamId) -> Result<(), hbone::StreamError> {
        self.pump();
        let header = self.codec.borrow_mut().data_header(id, 0, true)?;
        let sealed = {
            let mut session = self.session.borrow_mut();
            self.out.borrow_mut().append(&mut session, &header)
        };
        self.sealed(sealed);
        Ok(())
    }

    /// Gives credit for payload that has reached its receiver.
    fn release(&self, id: StreamId, n: usize) {
        self.codec.borrow_mut().release(id, n);
        self.pump();
    }

    /// The worker's buffer memory.
    #[cfg(test)]
    pub(crate) fn pool(&self) -> Pool {
        self.pool.clone()
    }

    /// Seals with new keys from now on.
    #[cfg(test)]
    pub(crate) fn update_keys(&self, ask_peer: bool) {
        self.session.borrow_mut().update_keys(ask_peer);
        self.flush.set();
    }

    /// Payload bytes that have arrived and that nobody has taken or released.
    #[cfg(test)]
    pub(crate) fn held_bytes(&self) -> usize {
        let streams = self.streams.borrow();
        streams.values().map(|stream| stream.held_bytes()).sum()
    }

    fn reset(&self, id: StreamId, code: ErrorCode) {
        self.codec.borrow_mut().reset(id, code);
        self.pump();
    }
}
