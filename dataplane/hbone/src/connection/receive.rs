//! The receiving half: bytes to frames to events. DATA payload is passed on as it arrives; other
//! frames are parsed in place if they are whole, and collected in a bounded buffer if not.

use std::collections::VecDeque;

use crate::config::Role;
use crate::error::{ConnectionError, ErrorCode};
use crate::event::{Event, StreamId};
use crate::frame::{self, FrameHeader, HEADER_LEN, MAX_31, PREFACE, flag, kind, setting};

use super::send::SHUTDOWN_PING;
use super::{Connection, DEFAULT_WINDOW, Shutdown};

type Events = VecDeque<Event>;
type Outcome = Result<(), ConnectionError>;

/// Where in the byte stream we are.
#[derive(Debug)]
pub(super) struct Parser {
    expect: Expect,
    /// The beginning of a frame header or of a control frame that arrived in pieces.
    partial: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
enum Expect {
    /// The client preface, of which `matched` bytes have come.
    Preface { matched: u8 },
    /// A frame header.
    Header,
    /// Payload of DATA.
    Data(DataFrame),
    /// The first `want` bytes of a control frame's payload; the rest is skipped.
    Control { header: FrameHeader, want: u32 },
    /// Bytes without meaning: padding, unknown frames, GOAWAY debug data.
    Skip { remaining: u32 },
}

/// A DATA frame that is being received. Both windows were debited when its header came.
#[derive(Clone, Copy, Debug)]
struct DataFrame {
    stream: u32,
    /// Payload bytes to come, with the padding as long as its length is not known.
    remaining: u32,
    padding: u32,
    /// The next byte is the padding length.
    pad_length_due: bool,
    end_stream: bool,
}

impl Parser {
    pub(super) fn new(role: Role) -> Self {
        let expect = match role {
            Role::Client => Expect::Header,
            Role::Server => Expect::Preface { matched: 0 },
        };
        Self {
            expect,
            partial: Vec::new(),
        }
    }

    /// Returns `want` bytes of `input` from `at`, or None and keeps what there is.
    fn collect<'a>(&mut self, input: &'a [u8], at: usize, want: usize) -> Collected<'a> {
        let missing = want - self.partial.len();
        let piece = &input[at..input.len().min(at + missing)];
        if self.partial.is_empty() && piece.len() == want {
            return Collected::InPlace(piece);
        }
        self.partial.extend_from_slice(piece);
        if piece.len() < missing {
            return Collected::Incomplete;
        }
        Collected::Assembled(std::mem::take(&mut self.partial), piece.len())
    }

    /// Takes the buffer back for the next frame.
    fn recycle(&mut self, mut buffer: Vec<u8>) {
        if buffer.capacity() <= PARTIAL_KEPT {
            buffer.clear();
            self.partial = buffer;
        }
    }
}

enum Collected<'a> {
    InPlace(&'a [u8]),
    /// The bytes, and how many of them came from this input.
    Assembled(Vec<u8>, usize),
    Incomplete,
}

impl Connection {
    pub(super) fn parse(&mut self, input: &[u8], events: &mut Events) -> Outcome {
        let mut at = 0;
        while at < input.len() {
            at = match self.parser.expect {
                Expect::Header => self.on_header_bytes(input, at, events)?,
                Expect::Data(frame) if frame.pad_length_due => {
                    self.on_pad_length(frame, input[at], events)?;
                    at + 1
                }
                Expect::Data(frame) => self.on_data_bytes(frame, input, at, events),
                Expect::Control { header, want } => {
                    self.on_control_bytes(header, want, input, at, events)?
                }
                Expect::Skip { remaining } => {
                    let n = remaining.min(clamp_len(input.len() - at));
                    self.skip(remaining - n);
                    at + n as usize
                }
                Expect::Preface { matched } => {
                    self.on_preface_byte(matched, input[at])?;
                    at + 1
                }
            };
        }
        Ok(())
    }

    fn on_preface_byte(&mut self, matched: u8, found: u8) -> Outcome {
        if PREFACE[usize::from(matched)] != found {
            return Err(ConnectionError::Preface {
                offset: matched,
                found,
            });
        }
        let matched = matched + 1;
        self.parser.expect = if usize::from(matched) == PREFACE.len() {
            Expect::Header
        } else {
            Expect::Preface { matched }
        };
        Ok(())
    }

    #[inline]
    fn on_header_bytes(
        &mut self,
        input: &[u8],
        at: usize,
        events: &mut Events,
    ) -> Result<usize, ConnectionError> {
        match self.parser.collect(input, at, HEADER_LEN) {
            Collected::InPlace(bytes) => {
                if let Some(bytes) = bytes.first_chunk() {
                    self.begin_frame(FrameHeader::parse(bytes), events)?;
                }
                Ok(at + HEADER_LEN)
            }
            Collected::Assembled(bytes, used) => {
                let header = bytes.first_chunk().map(FrameHeader::parse);
                self.parser.recycle(bytes);
                if let Some(header) = header {
                    self.begin_frame(header, events)?;
                }
                Ok(at + used)
            }
            Collected::Incomplete => Ok(input.len()),
        }
    }

    #[inline]
    fn begin_frame(&mut self, header: FrameHeader, events: &mut Events) -> Outcome {
        if header.length > self.config.max_frame_size {
            return Err(size_error(header, "at most our SETTINGS_MAX_FRAME_SIZE"));
        }
        if let Some(block) = &self.block
            && (header.kind != kind::CONTINUATION || header.stream != block.stream)
        {
            return Err(protocol(header, "a header block must be continued first"));
        }
        if header.kind == kind::DATA && self.peer_settings_received {
            return self.begin_data(header, events);
        }
        if !self.peer_settings_received && (header.kind != kind::SETTINGS || header.has(flag::ACK))
        {
            return Err(protocol(header, "the first frame must be SETTINGS"));
        }
        self.begin_control(header, events)
    }

    /// Checks what can be checked without the payload, and decides how much of it is needed.
    fn begin_control(&mut self, header: FrameHeader, events: &mut Events) -> Outcome {
        let on_stream = header.stream != 0;
        let (fits, allowed, stream_due) = match header.kind {
            kind::HEADERS => (true, "", Some(true)),
            kind::CONTINUATION if self.block.is_none() => {
                return Err(protocol(header, "no header block is open"));
            }
            kind::CONTINUATION => (true, "", Some(true)),
            // A wrong PRIORITY length would be a stream error; the frame has no effect anyway.
            kind::PRIORITY => (true, "", Some(true)),
            kind::RST_STREAM => (header.length == 4, "4", Some(true)),
            kind::PING => (header.length == 8, "8", Some(false)),
            kind::GOAWAY => (header.length >= 8, "at least 8", Some(false)),
            kind::WINDOW_UPDATE => (header.length == 4, "4", None),
            kind::SETTINGS if header.has(flag::ACK) => (header.length == 0, "0", Some(false)),
            kind::SETTINGS => (
                header.length.is_multiple_of(6),
                "a multiple of 6",
                Some(false),
            ),
            kind::PUSH_PROMISE => return Err(protocol(header, "server push is not enabled")),
            _ => (true, "", None),
        };
        match stream_due {
            Some(true) if !on_stream => return Err(protocol(header, "needs a stream")),
            Some(false) if on_stream => return Err(protocol(header, "belongs to stream 0")),
            _ if !fits => return Err(size_error(header, allowed)),
            _ => {}
        }
        let want = match header.kind {
            kind::HEADERS | kind::CONTINUATION => {
                self.check_block_size(header.length)?;
                header.length
            }
            kind::SETTINGS if header.length > SETTINGS_LEN_MAX => {
                return Err(ConnectionError::Flood {
                    what: "more than 256 settings in a frame",
                });
            }
            kind::GOAWAY => 8,
            kind::RST_STREAM | kind::PING | kind::WINDOW_UPDATE | kind::SETTINGS => header.length,
            _ => {
                self.charge(1, "PRIORITY or unknown frames")?;
                self.skip(header.length);
                return Ok(());
            }
        };
        if want == 0 {
            self.skip(0);
            return self.on_control(header, &[], events);
        }
        self.parser.expect = Expect::Control { header, want };
        Ok(())
    }

    fn on_control_bytes(
        &mut self,
        header: FrameHeader,
        want: u32,
        input: &[u8],
        at: usize,
        events: &mut Events,
    ) -> Result<usize, ConnectionError> {
        match self.parser.collect(input, at, want as usize) {
            Collected::InPlace(payload) => {
                self.skip(header.length - want);
                self.on_control(header, payload, events)?;
                Ok(at + payload.len())
            }
            Collected::Assembled(payload, used) => {
                self.skip(header.length - want);
                let outcome = self.on_control(header, &payload, events);
                self.parser.recycle(payload);
                outcome.map(|()| at + used)
            }
            Collected::Incomplete => Ok(input.len()),
        }
    }

    fn skip(&mut self, remaining: u32) {
        self.parser.expect = match remaining {
            0 => Expect::Header,
            _ => Expect::Skip { remaining },
        };
    }

    fn on_control(&mut self, header: FrameHeader, payload: &[u8], events: &mut Events) -> Outcome {
        match (header.kind, payload) {
            (kind::HEADERS, _) => self.on_headers(header, payload, events),
            (kind::CONTINUATION, _) => self.on_continuation(header, payload, events),
            (kind::SETTINGS, _) if header.has(flag::ACK) => self.on_settings_ack(),
            (kind::SETTINGS, _) => self.on_settings(header, payload, events),
            (kind::WINDOW_UPDATE, &[a, b, c, d]) => {
                let increment = u32::from_be_bytes([a, b, c, d]) & MAX_31;
                self.on_window_update(header, increment, events)
            }
            (kind::RST_STREAM, &[a, b, c, d]) => {
                self.on_reset(header, ErrorCode(u32::from_be_bytes([a, b, c, d])), events)
            }
            (kind::PING, _) => match payload.first_chunk() {
                Some(payload) => self.on_ping(header, *payload, events),
                None => Ok(()),
            },
            (kind::GOAWAY, &[a, b, c, d, e, f, g, h]) => {
                let last = u32::from_be_bytes([a, b, c, d]) & MAX_31;
                self.on_go_away(last, ErrorCode(u32::from_be_bytes([e, f, g, h])), events)
            }
            _ => Ok(()),
        }
    }

    #[inline]
    fn begin_data(&mut self, header: FrameHeader, events: &mut Events) -> Outcome {
        if !self.recv.debit(header.length) {
            let reason = "the peer exceeded the connection's window";
            return Err(ConnectionError::FlowControl { stream: 0, reason });
        }
        match self.streams.get_mut(header.stream) {
            Some(stream) if stream.remote_ended => {
                self.stream_error(header.stream, ErrorCode::STREAM_CLOSED, events)?;
            }
            Some(stream) if self.role == Role::Client && !stream.answered => {
                self.stream_error(header.stream, ErrorCode::PROTOCOL_ERROR, events)?;
            }
            Some(stream) => {
                if !stream.recv.debit(header.length) {
                    self.stream_error(header.stream, ErrorCode::FLOW_CONTROL_ERROR, events)?;
                }
            }
            None => self.check_absent(header)?,
        }
        let frame = DataFrame {
            stream: header.stream,
            remaining: header.length,
            padding: 0,
            pad_length_due: header.has(flag::PADDED),
            end_stream: header.has(flag::END_STREAM),
        };
        if header.length == 0 {
            if frame.pad_length_due {
                return Err(size_error(header, "at least 1 with padding"));
            }
            return self.end_data(frame, true, events);
        }
        self.parser.expect = Expect::Data(frame);
        self.refill(1);
        Ok(())
    }

    fn on_pad_length(&mut self, frame: DataFrame, padding: u8, events: &mut Events) -> Outcome {
        let padding = u32::from(padding);
        let Some(remaining) = (frame.remaining - 1).checked_sub(padding) else {
            return Err(ConnectionError::Protocol {
                frame: "DATA",
                stream: frame.stream,
                reason: "the padding is longer than the payload",
            });
        };
        let frame = DataFrame {
            remaining,
            padding,
            pad_length_due: false,
            ..frame
        };
        self.refund(frame.stream, padding + 1);
        if remaining == 0 {
            return self.end_data(frame, true, events);
        }
        self.parser.expect = Expect::Data(frame);
        Ok(())
    }

    #[inline]
    fn on_data_bytes(
        &mut self,
        mut frame: DataFrame,
        input: &[u8],
        at: usize,
        events: &mut Events,
    ) -> usize {
        let n = frame.remaining.min(clamp_len(input.len() - at));
        let end = at + n as usize;
        match self.streams.get_mut(frame.stream) {
            Some(stream) if !stream.remote_ended => {
                stream.recv.deliver(n);
                self.recv.deliver(n);
                events.push_back(Event::Data {
                    id: StreamId(frame.stream),
                    range: at..end,
                });
            }
            // The stream was reset or refused: nobody wants the rest, the credit goes back.
            _ => {
                self.recv.refund(n);
                self.announce_connection_credit();
            }
        }
        frame.remaining -= n;
        if frame.remaining > 0 {
            self.parser.expect = Expect::Data(frame);
        } else {
            self.skip(frame.padding);
            if frame.end_stream {
                self.remote_end(frame.stream, events);
            }
        }
        end
    }

    /// The payload of a DATA frame is complete; `empty` if there was none.
    fn end_data(&mut self, frame: DataFrame, empty: bool, events: &mut Events) -> Outcome {
        self.skip(frame.padding);
        if frame.end_stream {
            self.remote_end(frame.stream, events);
        } else if empty {
            self.charge(1, "empty DATA frames")?;
        }
        Ok(())
    }

    pub(super) fn remote_end(&mut self, id: u32, events: &mut Events) {
        if let Some(stream) = self.streams.get_mut(id)
            && !stream.remote_ended
        {
            stream.remote_ended = true;
            events.push_back(Event::End { id: StreamId(id) });
            self.finish_if_ended(id);
        }
    }

    /// Credit for bytes that are not delivered.
    fn refund(&mut self, stream: u32, n: u32) {
        if let Some(state) = self.streams.get_mut(stream)
            && !state.remote_ended
        {
            state.recv.refund(n);
            if let Some(increment) = state.recv.take_update() {
                self.output.window_update(stream, increment);
            }
        }
        self.recv.refund(n);
        self.announce_connection_credit();
    }

    /// A DATA frame for a stream that is not open: an error if the stream never was or the peer
    /// itself ended it; otherwise it was sent before our RST_STREAM or GOAWAY arrived.
    fn check_absent(&self, header: FrameHeader) -> Outcome {
        if self.is_idle(header.stream) {
            return Err(protocol(header, "the stream was never opened"));
        }
        if self.ended.contains(header.stream) {
            return Err(closed(header));
        }
        Ok(())
    }

    pub(super) fn is_idle(&self, id: u32) -> bool {
        let highest = match self.role {
            Role::Client => self.next_id - 1,
            Role::Server => self.peer_highest,
        };
        id.is_multiple_of(2) || id > highest
    }

    fn on_settings(&mut self, header: FrameHeader, payload: &[u8], events: &mut Events) -> Outcome {
        if self.peer_settings_received {
            self.charge(SETTINGS_COST, "SETTINGS")?;
        }
        self.peer_settings_received = true;
        let (entries, _) = payload.as_chunks::<6>();
        for &[i0, i1, v0, v1, v2, v3] in entries {
            let value = u32::from_be_bytes([v0, v1, v2, v3]);
            self.apply_setting(header, u16::from_be_bytes([i0, i1]), value)?;
        }
        frame::write_settings_ack(self.output.buffer());
        self.count_reply()?;
        events.push_back(Event::Settings);
        Ok(())
    }

    fn apply_setting(&mut self, header: FrameHeader, id: u16, value: u32) -> Outcome {
        match id {
            setting::HEADER_TABLE_SIZE => self.table_update_due = true,
            setting::ENABLE_PUSH if value > 1 || value == 1 && self.role == Role::Client => {
                return Err(protocol(
                    header,
                    "SETTINGS_ENABLE_PUSH has a forbidden value",
                ));
            }
            setting::MAX_CONCURRENT_STREAMS => self.peer.max_concurrent_streams = value,
            setting::INITIAL_WINDOW_SIZE => return self.apply_initial_window(value),
            setting::MAX_FRAME_SIZE if !(16_384..1 << 24).contains(&value) => {
                return Err(protocol(
                    header,
                    "SETTINGS_MAX_FRAME_SIZE not within 2^14..2^24",
                ));
            }
            setting::MAX_FRAME_SIZE => self.peer.max_frame_size = value,
            setting::MAX_HEADER_LIST_SIZE => self.peer.max_header_list_size = value,
            _ => {}
        }
        Ok(())
    }

    /// Moves the windows of all open streams by the difference (RFC 9113 6.9.2).
    fn apply_initial_window(&mut self, value: u32) -> Outcome {
        let overflow = |stream| ConnectionError::FlowControl {
            stream,
            reason: "SETTINGS_INITIAL_WINDOW_SIZE takes a window above 2^31-1",
        };
        if value > MAX_31 {
            return Err(overflow(0));
        }
        let delta = i64::from(value) - i64::from(self.peer.initial_window);
        self.peer.initial_window = value;
        for stream in self.streams.iter_mut() {
            let id = stream.id;
            self.unblocked |= stream.send.adjust(delta).map_err(|_| overflow(id))?;
        }
        Ok(())
    }

    fn on_settings_ack(&mut self) -> Outcome {
        if self.settings_acknowledged {
            return self.charge(1, "SETTINGS acknowledgements");
        }
        self.settings_acknowledged = true;
        self.decoder.acknowledged(self.config.header_table_size);
        if let Some(less) = DEFAULT_WINDOW.checked_sub(self.config.stream_window) {
            self.streams
                .iter_mut()
                .for_each(|stream| stream.recv.shrink(less));
        }
        Ok(())
    }

    fn on_window_update(
        &mut self,
        header: FrameHeader,
        increment: u32,
        events: &mut Events,
    ) -> Outcome {
        let overflow = "WINDOW_UPDATE takes the window above 2^31-1";
        let id = header.stream;
        if id == 0 {
            if increment == 0 {
                return Err(protocol(header, "the increment is 0"));
            }
            match self.send.adjust(i64::from(increment)) {
                Ok(unblocked) => self.unblocked |= unblocked,
                Err(_) => {
                    return Err(ConnectionError::FlowControl {
                        stream: 0,
                        reason: overflow,
                    });
                }
            }
            return Ok(());
        }
        let Some(at) = self.streams.find(id) else {
            // After the end of a stream these are in flight legitimately.
            return match self.is_idle(id) {
                true => Err(protocol(header, "the stream was never opened")),
                false => Ok(()),
            };
        };
        if increment == 0 {
            return self.stream_error(id, ErrorCode::PROTOCOL_ERROR, events);
        }
        let role = self.role;
        let stream = self.streams.at(at);
        let Ok(unblocked) = stream.send.adjust(i64::from(increment)) else {
            return self.stream_error(id, ErrorCode::FLOW_CONTROL_ERROR, events);
        };
        let may_send = !stream.local_ended && (role == Role::Client || stream.answered);
        if unblocked && may_send && self.send.available() > 0 {
            events.push_back(Event::Writable { id: StreamId(id) });
        }
        Ok(())
    }

    fn on_reset(&mut self, header: FrameHeader, code: ErrorCode, events: &mut Events) -> Outcome {
        let id = header.stream;
        match self.streams.remove(id) {
            Some(stream) => {
                if self.role == Role::Server && !stream.answered {
                    self.charge(RESET_COST, "streams reset before the response")?;
                }
                self.ended.add(id);
                events.push_back(Event::Reset {
                    id: StreamId(id),
                    code,
                });
                Ok(())
            }
            None if self.is_idle(id) => Err(protocol(header, "the stream was never opened")),
            None => self.charge(1, "resets of closed streams"),
        }
    }

    fn on_ping(&mut self, header: FrameHeader, payload: [u8; 8], events: &mut Events) -> Outcome {
        self.charge(1, "PING frames")?;
        if !header.has(flag::ACK) {
            frame::write_ping(self.output.buffer(), true, payload);
            return self.count_reply();
        }
        if self.shutdown == Shutdown::Announced && payload == SHUTDOWN_PING {
            self.finish_shutdown();
        } else {
            events.push_back(Event::Pong(payload));
        }
        Ok(())
    }

    fn on_go_away(&mut self, last: u32, code: ErrorCode, events: &mut Events) -> Outcome {
        self.charge(1, "GOAWAY frames")?;
        // A later GOAWAY may only lower the last stream; one that raises it changes nothing.
        let last = self.peer_go_away.map_or(last, |before| before.min(last));
        self.peer_go_away = Some(last);
        events.push_back(Event::GoAway {
            last: StreamId(last),
            code,
        });
        if self.role == Role::Client {
            let refused: Vec<u32> = self
                .streams
                .iter()
                .map(|stream| stream.id)
                .filter(|&id| id > last)
                .collect();
            for id in refused {
                self.streams.remove(id);
                self.reset.add(id);
                let code = ErrorCode::REFUSED_STREAM;
                events.push_back(Event::Reset {
                    id: StreamId(id),
                    code,
                });
            }
        }
        Ok(())
    }

    /// The peer broke a rule on one stream: resets it and tells the caller, if it knows the stream.
    pub(super) fn stream_error(
        &mut self,
        id: u32,
        code: ErrorCode,
        events: &mut Events,
    ) -> Outcome {
        self.charge(RESET_COST, "stream errors")?;
        if self.streams.get(id).is_some() {
            events.push_back(Event::Reset {
                id: StreamId(id),
                code,
            });
        }
        self.queue_reset(id, code);
        self.count_reply()
    }
}

pub(super) fn protocol(header: FrameHeader, reason: &'static str) -> ConnectionError {
    ConnectionError::Protocol {
        frame: header.name(),
        stream: header.stream,
        reason,
    }
}

pub(super) fn closed(header: FrameHeader) -> ConnectionError {
    ConnectionError::StreamClosed {
        frame: header.name(),
        stream: header.stream,
    }
}

pub(super) fn size_error(header: FrameHeader, allowed: &'static str) -> ConnectionError {
    let FrameHeader { length, stream, .. } = header;
    ConnectionError::FrameSize {
        frame: header.name(),
        stream,
        length,
        allowed,
    }
}

/// Length of a slice, as far as a frame can be long.
#[inline]
fn clamp_len(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Most bytes of SETTINGS in one frame: 256 settings.
const SETTINGS_LEN_MAX: u32 = 6 * 256;
/// Buffer kept for the next frame that arrives in pieces, in bytes.
const PARTIAL_KEPT: usize = 4096;
const SETTINGS_COST: u32 = 16;
const RESET_COST: u32 = 2;
