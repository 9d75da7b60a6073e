//! What the caller wants sent: streams, answers, DATA headers, resets, shutdown.

use crate::config::Role;
use crate::error::{ErrorCode, OpenError, StreamError};
use crate::event::StreamId;
use crate::frame::{self, FrameHeader, MAX_31, flag, kind};
use crate::headers::{self, ConnectRequest};
use crate::hpack;

use super::flow::{RecvWindow, SendWindow};
use super::streams::Stream;
use super::{Connection, DEFAULT_WINDOW, ID_MAX, Shutdown};

/// Control frames waiting to be sent.
#[derive(Debug, Default)]
pub(super) struct Output {
    bytes: Vec<u8>,
    /// The first bytes that were already sent.
    sent: usize,
    /// Automatic replies queued since the output was last empty.
    replies: u32,
}

impl Output {
    pub(super) fn pending(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    pub(super) fn consume(&mut self, n: usize) {
        debug_assert!(
            n <= self.pending().len(),
            "consumed more output than there is"
        );
        self.sent = (self.sent + n).min(self.bytes.len());
        if self.sent == self.bytes.len() {
            self.bytes.clear();
            self.bytes.shrink_to(KEPT);
            self.sent = 0;
            self.replies = 0;
        } else if self.sent > KEPT {
            // Partial writes must not let the sent part grow without end.
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }

    pub(super) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    pub(super) fn window_update(&mut self, stream: u32, increment: u32) {
        frame::write_window_update(&mut self.bytes, stream, increment);
    }

    pub(super) fn count_reply(&mut self) -> u32 {
        self.replies = self.replies.saturating_add(1);
        self.replies
    }
}

impl Connection {
    /// Client: opens a stream with a CONNECT request, queued in the output. DATA may be sent at
    /// once as far as HTTP/2 is concerned; HBONE waits for the response.
    ///
    /// # Errors
    /// See [`OpenError`]; nothing is queued then.
    pub fn open(&mut self, request: &ConnectRequest<'_>) -> Result<StreamId, OpenError> {
        self.check_open()?;
        if let Some(field) = request.invalid_field() {
            return Err(OpenError::InvalidValue { field });
        }
        let (size, max) = (request.list_size(), self.peer.max_header_list_size as usize);
        if size > max {
            return Err(OpenError::HeaderListTooLarge { size, max });
        }
        let id = self.next_id;
        self.next_id += 2;
        let mut block = self.begin_block();
        request.encode(&mut block);
        self.queue_block(id, &block, false);
        self.insert_stream(id, true);
        Ok(StreamId(id))
    }

    /// Server: answers a request. With `end_stream` nothing can be sent afterwards; the stream
    /// stays open until the peer ends or resets it, or `reset` is called (NO_ERROR after an
    /// error status tells the peer to stop sending).
    ///
    /// # Errors
    /// The stream is closed or already answered, or a value cannot be sent.
    pub fn respond(
        &mut self,
        id: StreamId,
        status: u16,
        baggage: Option<&str>,
        end_stream: bool,
    ) -> Result<(), StreamError> {
        let stream = id.0;
        let role = self.role;
        let state = self
            .streams
            .get_mut(stream)
            .ok_or(StreamError::Closed { stream })?;
        if role == Role::Client {
            return Err(StreamError::State {
                stream,
                reason: "a client cannot respond",
            });
        }
        if state.answered {
            return Err(StreamError::State {
                stream,
                reason: "the response is already sent",
            });
        }
        if !(200..=999).contains(&status) {
            return Err(StreamError::InvalidValue {
                stream,
                field: ":status",
            });
        }
        if baggage.is_some_and(|value| !headers::is_valid_value(value.as_bytes())) {
            return Err(StreamError::InvalidValue {
                stream,
                field: "baggage",
            });
        }
        state.answered = true;
        state.local_ended = end_stream;
        if status < 300 {
            self.answered();
        }
        let mut block = self.begin_block();
        hpack::status(&mut block, status);
        if let Some(baggage) = baggage {
            hpack::literal(&mut block, "baggage", baggage);
        }
        self.queue_block(stream, &block, end_stream);
        self.finish_if_ended(stream);
        Ok(())
    }

    /// The header of a DATA frame of `len` payload bytes, which the caller sends right behind it;
    /// debits both windows. `len` 0 with `end_stream` needs no window.
    ///
    /// # Errors
    /// The stream cannot send, or `len` exceeds `send_capacity` or `max_data_len`. Nothing is
    /// debited then.
    #[inline]
    pub fn data_header(
        &mut self,
        id: StreamId,
        len: usize,
        end_stream: bool,
    ) -> Result<[u8; frame::HEADER_LEN], StreamError> {
        let stream = id.0;
        let role = self.role;
        let window = self.send.available();
        let state = self
            .streams
            .get_mut(stream)
            .ok_or(StreamError::Closed { stream })?;
        if state.local_ended {
            return Err(StreamError::AlreadyEnded { stream });
        }
        if role == Role::Server && !state.answered {
            return Err(StreamError::State {
                stream,
                reason: "DATA before the response",
            });
        }
        let max = state
            .send
            .available()
            .min(window)
            .min(self.peer.max_frame_size);
        let length = match u32::try_from(len) {
            Ok(length) if length <= max => length,
            _ => {
                return Err(StreamError::Capacity {
                    stream,
                    len,
                    max: max as usize,
                });
            }
        };
        state.send.debit(length);
        self.send.debit(length);
        let mut flags = 0;
        if end_stream {
            state.local_ended = true;
            flags = flag::END_STREAM;
            self.finish_if_ended(stream);
        }
        self.progress(length);
        Ok(FrameHeader {
            length,
            kind: kind::DATA,
            flags,
            stream,
        }
        .bytes())
    }

    /// Ends the stream in both directions with RST_STREAM. Nothing happens if it is closed.
    /// `receive` appends no further events for it, but those it has appended before may still
    /// name it; data delivered by them still has to be released.
    pub fn reset(&mut self, id: StreamId, code: ErrorCode) {
        if self.streams.get(id.0).is_some() {
            self.queue_reset(id.0, code);
        }
    }

    /// Queues a PING; the answer is [`Event::Pong`](crate::Event::Pong) with the same payload.
    pub fn ping(&mut self, payload: [u8; 8]) {
        if self.shutdown != Shutdown::Dead {
            frame::write_ping(self.output.buffer(), false, payload);
        }
    }

    /// Announces the end and lets streams finish (RFC 9113 6.8). A server first sends GOAWAY with
    /// the highest identifier and a PING, and names the last stream when the answer is there, so
    /// that no request in flight is lost; a second call names it at once. A client names it at
    /// once. `is_closed` becomes true when the last stream is gone.
    pub fn shutdown_graceful(&mut self) {
        match (self.shutdown, self.role) {
            (Shutdown::None, Role::Server) => {
                self.shutdown = Shutdown::Announced;
                frame::write_go_away(self.output.buffer(), MAX_31, ErrorCode::NO_ERROR.0, b"");
                frame::write_ping(self.output.buffer(), false, SHUTDOWN_PING);
            }
            (Shutdown::None | Shutdown::Announced, _) => self.finish_shutdown(),
            (Shutdown::Final | Shutdown::Dead, _) => {}
        }
    }

    /// Ends the connection at once: queues GOAWAY and forgets all streams. Flush and close.
    pub fn go_away(&mut self, code: ErrorCode) {
        if self.shutdown != Shutdown::Dead {
            self.die(code, b"");
        }
    }

    pub(super) fn finish_shutdown(&mut self) {
        self.shutdown = Shutdown::Final;
        let last = self.last_processed;
        frame::write_go_away(self.output.buffer(), last, ErrorCode::NO_ERROR.0, b"");
    }

    pub(super) fn check_open(&self) -> Result<(), OpenError> {
        if self.role == Role::Server {
            return Err(OpenError::NotClient);
        }
        if self.shutdown != Shutdown::None || self.peer_go_away.is_some() {
            return Err(OpenError::GoingAway);
        }
        if self.next_id > ID_MAX {
            return Err(OpenError::IdsExhausted);
        }
        let max = self.streams_max();
        let active = self.streams.len();
        if active >= max {
            return Err(OpenError::Exhausted { active, max });
        }
        Ok(())
    }

    /// Streams that both sides allow at a time.
    pub(super) fn streams_max(&self) -> usize {
        let ours = self.config.max_concurrent_streams;
        ours.min(self.peer.max_concurrent_streams) as usize
    }

    /// Adds an open stream. Until the peer has acknowledged our SETTINGS it may still go by the
    /// default window.
    pub(super) fn insert_stream(&mut self, id: u32, tunnel: bool) {
        let window = match self.settings_acknowledged {
            true => self.config.stream_window,
            false => self.config.stream_window.max(DEFAULT_WINDOW),
        };
        self.streams.insert(Stream {
            id,
            send: SendWindow::new(self.peer.initial_window),
            recv: RecvWindow::new(window),
            local_ended: false,
            remote_ended: false,
            answered: false,
            tunnel,
        });
    }

    /// Queues RST_STREAM and forgets the stream.
    pub(super) fn queue_reset(&mut self, id: u32, code: ErrorCode) {
        frame::write_reset(self.output.buffer(), id, code.0);
        match self.streams.remove(id) {
            Some(stream) if stream.remote_ended => self.ended.add(id),
            _ => self.reset.add(id),
        }
    }

    fn begin_block(&mut self) -> Vec<u8> {
        let mut block = Vec::with_capacity(BLOCK_CAPACITY);
        if std::mem::take(&mut self.table_update_due) {
            hpack::table_size_update(&mut block);
        }
        block
    }

    fn queue_block(&mut self, id: u32, block: &[u8], end_stream: bool) {
        let frame_max = self.peer.max_frame_size as usize;
        frame::write_headers(self.output.buffer(), id, block, end_stream, frame_max);
    }
}

/// Payload of the PING between the two GOAWAY frames of a graceful shutdown.
pub(super) const SHUTDOWN_PING: [u8; 8] = *b"hbonebye";
/// Output buffer kept when everything is sent, in bytes.
const KEPT: usize = 16 << 10;
/// Enough for the header block of most requests, in bytes.
const BLOCK_CAPACITY: usize = 512;
