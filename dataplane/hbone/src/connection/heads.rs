//! Header blocks: assembling HEADERS and CONTINUATION, and what a decoded block means for its
//! stream.

use std::collections::VecDeque;

use crate::config::Role;
use crate::error::{ConnectionError, ErrorCode};
use crate::event::{Event, StreamId};
use crate::frame::{FrameHeader, flag};
use crate::headers::Fields;

use super::receive::{closed, protocol, size_error};
use super::{Connection, RESET_COST, Shutdown};

type Events = VecDeque<Event>;
type Outcome = Result<(), ConnectionError>;

/// A header block of which CONTINUATION frames are still to come.
#[derive(Debug)]
pub(super) struct Block {
    /// Its stream.
    pub(super) stream: u32,
    /// The HEADERS frame that began it.
    header: FrameHeader,
    bytes: Vec<u8>,
    continuations: u32,
}

/// What a header block is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Purpose {
    /// A new stream.
    Request,
    /// A new stream beyond our limit.
    Refused,
    /// The answer to our request.
    Response,
    /// The end of a message.
    Trailers,
    /// For a stream that is no longer wanted; decoded because HPACK has state.
    Ignored,
    /// For a stream on which no HEADERS may come; decoded for the same reason.
    Forbidden(ErrorCode),
}

impl Connection {
    /// Refuses header blocks that exceed the limit before they are buffered.
    pub(super) fn check_block_size(&self, length: u32) -> Outcome {
        let before = self.block.as_ref().map_or(0, |block| block.bytes.len());
        // Priority and padding are not part of the block.
        if before + length as usize > self.config.max_header_list_size as usize + FRAMING_MAX {
            return Err(ConnectionError::Flood {
                what: "header block above the limit",
            });
        }
        Ok(())
    }

    pub(super) fn on_headers(
        &mut self,
        header: FrameHeader,
        payload: &[u8],
        events: &mut Events,
    ) -> Outcome {
        let fragment = fragment(header, payload)?;
        if header.has(flag::END_HEADERS) {
            return self.on_block(header, fragment, events);
        }
        let bytes = fragment.to_vec();
        self.block = Some(Block {
            stream: header.stream,
            header,
            bytes,
            continuations: 0,
        });
        Ok(())
    }

    pub(super) fn on_continuation(
        &mut self,
        header: FrameHeader,
        payload: &[u8],
        events: &mut Events,
    ) -> Outcome {
        let Some(mut block) = self.block.take() else {
            return Err(protocol(header, "no header block is open"));
        };
        block.continuations += 1;
        if block.continuations > CONTINUATIONS_MAX {
            return Err(ConnectionError::Flood {
                what: "CONTINUATION frames",
            });
        }
        block.bytes.extend_from_slice(payload);
        if header.has(flag::END_HEADERS) {
            return self.on_block(block.header, &block.bytes, events);
        }
        self.block = Some(block);
        Ok(())
    }

    fn on_block(&mut self, header: FrameHeader, block: &[u8], events: &mut Events) -> Outcome {
        let purpose = self.purpose(header)?;
        let mut fields = Fields::new(self.config.max_header_list_size);
        self.decoder
            .decode(block, &mut |name, value| fields.push(name, value))
            .map_err(|source| ConnectionError::Compression {
                stream: header.stream,
                source,
            })?;
        let id = header.stream;
        let end = header.has(flag::END_STREAM);
        match purpose {
            Purpose::Ignored => {
                let cost = if self.calmed { RESET_COST } else { 1 };
                self.charge(cost, "header blocks for closed streams")
            }
            Purpose::Refused => self.stream_error(id, ErrorCode::REFUSED_STREAM, events),
            Purpose::Forbidden(code) => self.stream_error(id, code, events),
            _ if fields.too_large() => self.stream_error(id, ErrorCode::ENHANCE_YOUR_CALM, events),
            Purpose::Request => self.on_request(id, fields, end, events),
            Purpose::Response => self.on_response(id, fields, end, events),
            Purpose::Trailers if !end || fields.into_trailers().is_err() => {
                self.stream_error(id, ErrorCode::PROTOCOL_ERROR, events)
            }
            Purpose::Trailers => {
                self.remote_end(id, events);
                Ok(())
            }
        }
    }

    fn purpose(&mut self, header: FrameHeader) -> Result<Purpose, ConnectionError> {
        let id = header.stream;
        if let Some(stream) = self.streams.get(id) {
            return Ok(match () {
                () if stream.remote_ended => Purpose::Forbidden(ErrorCode::STREAM_CLOSED),
                () if self.role == Role::Client && !stream.answered => Purpose::Response,
                // RFC 9113 8.5: only DATA on a connected stream.
                () if stream.tunnel => Purpose::Forbidden(ErrorCode::PROTOCOL_ERROR),
                () => Purpose::Trailers,
            });
        }
        if self.ended.contains(id) {
            return Err(closed(header));
        }
        if !self.is_idle(id) {
            // A server cannot tell a skipped identifier from a forgotten one, except that it never
            // reset it; a client opened all of them.
            return if self.role == Role::Client || self.was_dropped(id) {
                Ok(Purpose::Ignored)
            } else {
                Err(protocol(
                    header,
                    "the identifier is lower than one already used",
                ))
            };
        }
        if self.role == Role::Client {
            return Err(protocol(header, "the stream was never opened"));
        }
        if id.is_multiple_of(2) {
            return Err(protocol(header, "a client uses odd identifiers"));
        }
        self.peer_highest = id;
        if self.shutdown == Shutdown::Final {
            return Ok(Purpose::Ignored);
        }
        let open = self.streams.len();
        if open >= self.config.max_concurrent_streams as usize {
            return Ok(Purpose::Refused);
        }
        self.last_processed = id;
        Ok(Purpose::Request)
    }

    /// Server: we reset the stream, or our GOAWAY excluded it.
    fn was_dropped(&self, id: u32) -> bool {
        self.reset.contains(id) || self.shutdown == Shutdown::Final && id > self.last_processed
    }

    fn on_request(&mut self, id: u32, fields: Fields, end: bool, events: &mut Events) -> Outcome {
        let Ok(head) = fields.into_request() else {
            return self.stream_error(id, ErrorCode::PROTOCOL_ERROR, events);
        };
        self.insert_stream(id, head.is_connect());
        events.push_back(Event::Request {
            id: StreamId(id),
            head: Box::new(head),
        });
        if end {
            self.remote_end(id, events);
        }
        Ok(())
    }

    fn on_response(&mut self, id: u32, fields: Fields, end: bool, events: &mut Events) -> Outcome {
        let Ok((status, baggage)) = fields.into_response() else {
            return self.stream_error(id, ErrorCode::PROTOCOL_ERROR, events);
        };
        if status < 200 {
            if end {
                return self.stream_error(id, ErrorCode::PROTOCOL_ERROR, events);
            }
            return self.charge(1, "interim responses");
        }
        if let Some(stream) = self.streams.get_mut(id) {
            stream.answered = true;
            stream.tunnel = status < 300;
        }
        events.push_back(Event::Response {
            id: StreamId(id),
            status,
            baggage,
        });
        if end {
            self.remote_end(id, events);
        }
        Ok(())
    }
}

/// The part of a HEADERS payload that belongs to the block (RFC 9113 6.2).
fn fragment(header: FrameHeader, payload: &[u8]) -> Result<&[u8], ConnectionError> {
    let mut rest = payload;
    let mut padding = 0;
    if header.has(flag::PADDED) {
        let (&length, tail) = rest
            .split_first()
            .ok_or_else(|| size_error(header, "at least 1 with padding"))?;
        (padding, rest) = (usize::from(length), tail);
    }
    if header.has(flag::PRIORITY) {
        rest = rest
            .get(5..)
            .ok_or_else(|| size_error(header, "at least 5 with priority"))?;
    }
    match rest.len().checked_sub(padding) {
        Some(length) => Ok(&rest[..length]),
        None => Err(protocol(header, "the padding is longer than the payload")),
    }
}

/// Padding and priority of a HEADERS frame, in bytes.
const FRAMING_MAX: usize = 1 + 5 + 255;
/// CONTINUATION frames of one block. 16 KiB frames need 4 for the default limit of a server.
const CONTINUATIONS_MAX: u32 = 64;
