//! The tasks of a tunnel: handshake, reader, writer.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use hbone::{Event, Role, StreamId};
use rt::buf::{Buf, Pool};
use rt::net::{Placement, ReadHalf, TcpStream, WriteHalf};
use telemetry::{Fault, WorkerTelemetry};
use tls::{ClientHelloWatch, Handshake, HandshakeError, OpenError, Opened, SealError, Session};

use crate::gate::{Cpu, Displaced, Place};
use crate::memory::WorkerMemory;

use super::queue::Packing;
use super::{SEND_LOW, Tunnel, TunnelError, TunnelOwner, keepalive};

/// How long the writer tries to send what is left when a tunnel ends.
const LAST_FLUSH: Duration = Duration::from_secs(2);
/// How long, and for how many bytes, the peer of a failed handshake is listened to.
const PART_TIME: Duration = Duration::from_secs(1);
const PART_BYTES: usize = 256 * 1024;

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetupError {
    /// The transport failed during the handshake.
    #[error("io error during the TLS handshake: {0}")]
    Io(#[from] io::Error),
    /// TLS failed or the peer is not who it should be.
    #[error("tls error: {0}")]
    Tls(#[from] HandshakeError),
    /// The peer ended the transport during the handshake.
    #[error("tls error: connection closed during the handshake")]
    Closed,
    /// Others needed its place.
    #[error("tls error: the handshake was given up: {0}")]
    Displaced(#[from] Displaced),
}

/// What a worker gives its tunnels.
#[derive(Debug)]
pub(crate) struct Setup<'a> {
    /// Which side of the tunnel this is.
    pub(crate) role: Role,
    /// HTTP/2 settings.
    pub(crate) config: &'a hbone::Config,
    /// The handshake computes when it is its turn.
    pub(crate) cpu: &'a Cpu,
    /// What the handshake holds, and may lose while the peer is silent.
    pub(crate) place: Option<&'a Place>,
    /// Where errors are counted.
    pub(crate) telemetry: &'a WorkerTelemetry,
    /// What payload that arrives is charged to.
    pub(crate) memory: &'a Rc<WorkerMemory>,
    /// Silence after which the peer is asked for a sign of life, and the time for its answer.
    pub(crate) ping: (Duration, Duration),
}

/// An established connection, and what has been read of it already.
#[derive(Debug)]
pub(crate) struct Transport {
    read: ReadHalf,
    write: WriteHalf,
    early: VecDeque<Buf>,
}

impl From<TcpStream> for Transport {
    fn from(stream: TcpStream) -> Self {
        let (mut read, write) = stream.split();
        read.set_placement(Placement::Parsed);
        Self {
            read,
            write,
            early: VecDeque::new(),
        }
    }
}

impl Transport {
    /// Reads until a whole ClientHello is there. However small the pieces it comes in, it takes no
    /// more memory than its bytes and one block.
    pub(crate) async fn client_hello(&mut self) -> Result<(), SetupError> {
        let mut watch = ClientHelloWatch::default();
        let mut pieces = Vec::new();
        loop {
            if self.read.recv(&mut self.early).await? == 0 {
                return Err(SetupError::Closed);
            }
            let mut whole = false;
            for buf in &self.early {
                whole = whole || watch.advance(buf);
            }
            if whole && pieces.is_empty() {
                return Ok(());
            }
            for buf in self.early.drain(..) {
                pieces.extend_from_slice(&buf);
            }
            if whole {
                let pool = self.write.pool().clone();
                pool.copy_from(&pieces, |buf| self.early.push_back(buf));
                return Ok(());
            }
        }
    }

    /// Ends it by a reset.
    pub(crate) fn reset(self) {
        let _ = self.write.reset_on_close(); // the peer may be gone already
    }
}

/// Shakes hands over `transport` and starts the tunnel's tasks.
pub(crate) async fn run(
    transport: impl Into<Transport>,
    peer_addr: SocketAddr,
    handshake: Handshake,
    setup: &Setup<'_>,
    owner: Box<dyn TunnelOwner>,
) -> Result<Rc<Tunnel>, SetupError> {
    let Transport {
        mut read,
        mut write,
        mut early,
    } = transport.into();
    let shaken = shake(&mut read, &mut write, handshake, &mut early, setup).await;
    let session = match shaken {
        Ok(session) => session,
        Err(error) => {
            if matches!(error, SetupError::Tls(_)) {
                rt::spawn(part(read, write));
            }
            return Err(error);
        }
    };
    let pool = write.pool().clone();
    let tunnel = Tunnel::new(setup, session, write, peer_addr, owner);
    rt::spawn(write_loop(Rc::clone(&tunnel)));
    rt::spawn(keepalive::watch(Rc::downgrade(&tunnel), setup.ping));
    rt::spawn(read_loop(Rc::clone(&tunnel), read, early, pool));
    Ok(tunnel)
}

/// Ends a connection whose handshake failed so that the peer learns why. A client has finished its
/// handshake, and may have sent more, when the server looks at its certificate; closing with that
/// unread would reset the connection and take the alert along.
async fn part(mut read: ReadHalf, write: WriteHalf) {
    let _ = write.shutdown(); // gone already: nothing to tell
    let ended = async {
        let mut bufs = VecDeque::new();
        let mut left = PART_BYTES;
        while let Ok(n @ 1..) = read.recv(&mut bufs).await {
            bufs.clear();
            left = left.saturating_sub(n);
            if left == 0 {
                return;
            }
        }
    };
    let _ = rt::time::timeout(PART_TIME, ended).await;
}

/// Drives the handshake. What arrived behind it is left in `early`.
async fn shake(
    read: &mut ReadHalf,
    write: &mut WriteHalf,
    mut handshake: Handshake,
    early: &mut VecDeque<Buf>,
    &Setup { cpu, place, .. }: &Setup<'_>,
) -> Result<Session, SetupError> {
    let mut output = Vec::new();
    let mut progress = cpu.step(|| handshake.advance(&[], &mut output)).await;
    loop {
        if !output.is_empty() {
            write.push_copy(&output);
            output.clear();
            write.flush().await?;
        }
        if let Some(session) = progress?.established {
            return Ok(session);
        }
        if early.is_empty() {
            let received = match place {
                Some(place) => place.listen(read.recv(early)).await??,
                None => read.recv(early).await?,
            };
            if received == 0 {
                return Err(SetupError::Closed);
            }
        }
        let Some(mut buf) = early.pop_front() else {
            return Err(SetupError::Closed);
        };
        progress = cpu.step(|| handshake.advance(&buf, &mut output)).await;
        if let Ok(done) = &progress {
            buf.advance(done.consumed);
            if !buf.is_empty() {
                early.push_front(buf);
            }
        }
    }
}

/// Sends what is queued, once per turn of the worker, until the tunnel ends.
async fn write_loop(tunnel: Rc<Tunnel>) {
    loop {
        tunnel.flush.wait().await;
        if flush_unless_failed(&tunnel).await.is_err() {
            tunnel.ended.set(true);
            return;
        }
        if tunnel.closing.get() {
            break;
        }
    }
    let close = async {
        {
            let mut session = tunnel.session.borrow_mut();
            tunnel.out.borrow_mut().close(&mut session);
        }
        if flush(&tunnel).await.is_ok() {
            let _ = tunnel.out.borrow_mut().write().shutdown();
        }
    };
    let _ = rt::time::timeout(LAST_FLUSH, close).await;
    tunnel.ended.set(true);
    // The peer closes its side now; one that does not is not waited for.
    rt::time::sleep(LAST_FLUSH).await;
    if tunnel.error.borrow().is_none() {
        tunnel.fail(TunnelError::Drained);
    }
}

/// As [`flush`], but gives up waiting when the tunnel fails: a peer that does not read must not
/// keep what belongs to a tunnel that is over. What is left then has [`LAST_FLUSH`].
async fn flush_unless_failed(tunnel: &Rc<Tunnel>) -> Result<(), ()> {
    let mut flushed = pin!(flush(tunnel));
    poll_fn(|cx| {
        if let Poll::Ready(result) = flushed.as_mut().poll(cx) {
            return Poll::Ready(result);
        }
        while tunnel.failed.poll_wait(cx).is_ready() {
            if tunnel.error.borrow().is_some() {
                return Poll::Ready(Ok(()));
            }
        }
        Poll::Pending
    })
    .await
}

/// Seals and sends all that is queued now and meanwhile.
async fn flush(tunnel: &Rc<Tunnel>) -> Result<(), ()> {
    let result = poll_fn(|cx| {
        let mut out = tunnel.out.borrow_mut();
        let mut session = tunnel.session.borrow_mut();
        out.control(&mut session);
        let sealed = out.seal(&mut session);
        drop(session);
        match sealed {
            // Closed: the session has failed, and what is queued ends with the alert.
            Ok(()) | Err(SealError::Closed) => {}
            Err(error) => {
                return Poll::Ready(Err(TunnelError::Tls(error.to_string().into())));
            }
        }
        // Nothing waits for these bytes but the end of the tunnel.
        let polled = if tunnel.closing.get() {
            out.write().poll_flush(cx)
        } else {
            out.write().poll_hand_over(cx)
        };
        let low = out.pending_bytes() < SEND_LOW;
        drop(out);
        if low {
            tunnel.drained.notify();
        }
        polled.map(|result| result.map_err(|error| TunnelError::Io(Rc::new(error))))
    })
    .await;
    result.map_err(|error| tunnel.fail(error))
}

/// Receives and dispatches until the tunnel ends.
async fn read_loop(tunnel: Rc<Tunnel>, mut read: ReadHalf, early: VecDeque<Buf>, pool: Pool) {
    let mut reader = Reader {
        tunnel: &tunnel,
        packing: Packing::new(pool.clone()),
        pool,
        carry: None,
        events: VecDeque::new(),
        stream_errors: 0,
        opened: 0,
    };
    let mut bufs = early;
    loop {
        while let Some(buf) = bufs.pop_front() {
            if tunnel.error.borrow().is_some() {
                return;
            }
            match reader.bytes(buf) {
                Ok(None) => {}
                Ok(Some(rest)) => {
                    bufs.push_front(rest);
                    rt::next_turn().await; // others have waited for long enough
                    reader.opened = 0;
                }
                Err(error) => {
                    tunnel.fail(error);
                    return;
                }
            }
        }
        reader.opened = 0;
        let received = poll_fn(|cx| {
            while tunnel.stop.poll_wait(cx).is_ready() {
                if tunnel.error.borrow().is_some() {
                    return Poll::Ready(None);
                }
            }
            read.poll_recv(cx, &mut bufs, &mut reader.carry).map(Some)
        })
        .await;
        match received {
            None => return,
            Some(Ok(0)) => {
                tunnel.fail(TunnelError::Truncated);
                return;
            }
            Some(Ok(_)) => tunnel.note_heard(),
            Some(Err(error)) => {
                tunnel.fail(TunnelError::Io(Rc::new(error)));
                return;
            }
        }
    }
}

struct Reader<'a> {
    tunnel: &'a Rc<Tunnel>,
    pool: Pool,
    packing: Packing,
    /// An incomplete record.
    carry: Option<Buf>,
    events: VecDeque<Event>,
    /// Of those the codec has counted, how many are told.
    stream_errors: u64,
    /// Records opened in this turn.
    opened: u32,
}

/// Records opened in one turn of the worker: a receive may bring ten thousand that are very small,
/// and other connections wait meanwhile.
const RECORDS_PER_TURN: u32 = 256;

impl Reader<'_> {
    /// Opens every complete record in `buf`, and in what was carried over before it. Returns what
    /// is left for the next turn, if that is too many of them.
    fn bytes(&mut self, mut buf: Buf) -> Result<Option<Buf>, TunnelError> {
        while let Some(mut carry) = self.carry.take() {
            // The receive did not continue the carried bytes: complete their record by copying.
            let want = match Session::record_len(&carry) {
                Ok(Some(len)) => len,
                Ok(None) => Session::RECORD_HEADER,
                Err(error) => return Err(self.tls_failed(&error.into())),
            };
            let missing = want.saturating_sub(carry.len());
            if missing > 0 {
                if carry.tail_room() < missing {
                    carry = self.rehouse(&carry, want);
                }
                let n = missing.min(buf.len());
                carry.extend_from_slice(&buf[..n]);
                buf.advance(n);
            }
            match Session::record_len(&carry) {
                Ok(Some(len)) if len <= carry.len() => self.record(carry)?,
                Ok(_) => {
                    self.carry = Some(carry);
                    if buf.is_empty() {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(self.tls_failed(&error.into())),
            }
        }
        loop {
            if self.opened >= RECORDS_PER_TURN && !buf.is_empty() {
                return Ok(Some(buf));
            }
            match Session::record_len(&buf) {
                Ok(Some(len)) if len < buf.len() => self.record(buf.split_to(len))?,
                Ok(Some(len)) if len == buf.len() => return self.record(buf).map(|()| None),
                Ok(_) => break,
                Err(error) => return Err(self.tls_failed(&error.into())),
            }
        }
        self.carry = (!buf.is_empty()).then_some(buf);
        Ok(None)
    }

    /// Moves an incomplete record to a block with room for the `want` bytes of it: one for a
    /// record, which most fit. It may be a long time before the rest comes.
    fn rehouse(&self, carry: &[u8], want: usize) -> Buf {
        let mut buf = self.pool.record();
        buf.grow_head(buf.head_room());
        buf.truncate(0);
        if buf.tail_room() < want {
            buf = self.pool.large();
        }
        buf.extend_from_slice(carry);
        buf
    }

    fn record(&mut self, mut record: Buf) -> Result<(), TunnelError> {
        self.opened += 1;
        let opened = self.tunnel.session.borrow_mut().open(&mut record);
        match opened {
            Ok(Opened::Data(range)) => self.plaintext(record, range),
            Ok(Opened::Handled) => {
                // The writer takes the answer when it sends next: a peer that asks for key updates
                // and reads nothing gets one, not one for each.
                self.tunnel.flush.set();
                Ok(())
            }
            Ok(Opened::Closed) => Err(TunnelError::Closed),
            Err(error) => Err(self.tls_failed(&error)),
        }
    }

    fn tls_failed(&self, error: &OpenError) -> TunnelError {
        self.tunnel.session.borrow_mut().fail(error);
        self.send_control();
        let text = error.to_string().into();
        match error {
            OpenError::Alert(_) => TunnelError::TlsAlert(text),
            _ => TunnelError::Tls(text),
        }
    }

    fn send_control(&self) {
        let mut session = self.tunnel.session.borrow_mut();
        self.tunnel.out.borrow_mut().control(&mut session);
        self.tunnel.flush.set();
    }

    /// Feeds plaintext to the codec and its payload to the streams.
    fn plaintext(&mut self, mut record: Buf, range: Range<usize>) -> Result<(), TunnelError> {
        let result = {
            let mut codec = self.tunnel.codec.borrow_mut();
            let result = codec.receive(&record[range.clone()], &mut self.events);
            while self.stream_errors < codec.stream_errors() {
                self.stream_errors += 1;
                self.tunnel.telemetry.hbone_error(Fault::Stream);
            }
            result
        };
        record.truncate(range.end);
        record.advance(range.start);
        let mut position = 0;
        while let Some(event) = self.events.pop_front() {
            if let Event::Data { id, range } = event {
                record.advance(range.start - position);
                let piece = record.split_to(range.len());
                position = range.end;
                self.payload(id, piece);
            } else {
                self.event(event);
            }
        }
        self.look_after_windows();
        self.tunnel.pump();
        if let Err(error) = result {
            return Err(TunnelError::Http2(error));
        }
        if self.tunnel.codec.borrow().is_closed() {
            self.tunnel.finish();
        }
        Ok(())
    }

    /// Receivers that do not read hold nobody else up.
    fn look_after_windows(&self) {
        let tunnel = self.tunnel;
        if tunnel.memory.is_used_up() {
            tunnel.memory.make_room(&self.pool);
        }
        let mut codec = tunnel.codec.borrow_mut();
        if codec.wants_credit() {
            codec.lend();
        }
        if codec.is_calmed() && !tunnel.calmed.replace(true) {
            drop(codec);
            tunnel.telemetry.hbone_error(Fault::Flood);
            tracing::warn!(
                "tunnel from {}: too many of its streams come to nothing, it may open no more",
                tunnel.peer_addr
            );
        }
    }

    fn payload(&mut self, id: StreamId, piece: Buf) {
        let tunnel = self.tunnel;
        let memory = &tunnel.memory;
        let streams = tunnel.streams.borrow();
        match streams.get(&id.get()) {
            Some(stream) => {
                let charge = stream.data(piece, memory.is_tight(), &mut self.packing);
                drop(streams);
                memory.charge(charge, &self.pool);
            }
            None => {
                drop(streams);
                tunnel.release(id, piece.len());
            }
        }
    }

    fn event(&self, event: Event) {
        let tunnel = self.tunnel;
        let with = |id: StreamId, act: &dyn Fn(&super::StreamShared)| {
            let stream = tunnel.streams.borrow().get(&id.get()).cloned();
            if let Some(stream) = stream {
                act(&stream);
            }
        };
        match event {
            Event::Request { id, head } => {
                let stream = tunnel.attach(id);
                tunnel.admit(stream, *head);
            }
            // Its baggage is of use behind network gateways only, which tunnels do not pass.
            Event::Response { id, status, .. } => with(id, &|stream| stream.respond(status)),
            Event::End { id } => with(id, &|stream| stream.end()),
            Event::Reset { id, code } => {
                with(id, &|stream| {
                    stream.reset_by_peer(code);
                    tunnel.return_credit(stream);
                });
                tunnel.forget_waiting(id);
            }
            Event::Writable { id } => with(id, &|stream| stream.writable()),
            Event::GoAway { .. } | Event::Settings => tunnel.note_change(),
            Event::Pong(_) | Event::Data { .. } => {}
        }
    }
}
