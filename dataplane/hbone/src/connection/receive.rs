//! The receiving half: bytes to frames to events. DATA payload is passed on as it arrives; other
//! frames are parsed in place if they are whole, and collected in a bounded buffer if not.

use std::collections::VecDeque;

use crate::config::Role;
use crate::error::{ConnectionError, ErrorCode};
use crate::event::{Event, StreamId};
use crate::frame::{FrameHeader, HEADER_LEN, MAX_31, PREFACE, flag, kind};

use super::Connection;

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
            return self.end_empty_data(frame, events);
        }
        self.parser.expect = Expect::Data(frame);
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
            return self.end_empty_data(frame, events);
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
                self.progress(n);
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

    /// A DATA frame without payload is complete.
    fn end_empty_data(&mut self, frame: DataFrame, events: &mut Events) -> Outcome {
        self.skip(frame.padding);
        if frame.end_stream {
            self.remote_end(frame.stream, events);
            return Ok(());
        }
        self.charge(1, "empty DATA frames")
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
