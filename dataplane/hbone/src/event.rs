//! What a connection tells its caller.

use std::fmt;
use std::ops::Range;

use crate::error::ErrorCode;
use crate::headers::RequestHead;

/// Identifier of a stream: odd, never reused on a connection.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct StreamId(pub(crate) u32);

impl StreamId {
    /// The number on the wire, 0..=2^31-1 (0 only in [`Event::GoAway`]).
    pub fn get(self) -> u32 {
        self.0
    }
}

impl From<StreamId> for u32 {
    fn from(id: StreamId) -> Self {
        id.0
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Something the peer did, in the order in which it did it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Event {
    /// Server: the peer opened a stream. Answer with `respond` or `reset`. May be a method other
    /// than CONNECT, which deserves a 400.
    Request {
        /// The new stream.
        id: StreamId,
        /// Its request.
        head: Box<RequestHead>,
    },
    /// Client: the final answer to a CONNECT; interim (1xx) answers are skipped.
    Response {
        /// The stream.
        id: StreamId,
        /// 200..=999.
        status: u16,
        /// `baggage` of the peer.
        baggage: Option<Box<str>>,
    },
    /// Payload; a frame may arrive in several pieces. Never empty. To be released exactly once.
    Data {
        /// The stream.
        id: StreamId,
        /// Where the payload is in the `input` of this `receive` call.
        range: Range<usize>,
    },
    /// The peer will send nothing more on this stream (END_STREAM).
    End {
        /// The stream.
        id: StreamId,
    },
    /// The stream is gone in both directions: the peer reset it, or it broke the protocol on it
    /// and we did (RST_STREAM is in the output), or its GOAWAY excludes it (REFUSED_STREAM).
    Reset {
        /// The stream.
        id: StreamId,
        /// Why.
        code: ErrorCode,
    },
    /// `send_capacity` of this stream is positive again. May come without need.
    Writable {
        /// The stream.
        id: StreamId,
    },
    /// The peer will accept no further streams.
    GoAway {
        /// Highest stream of ours that the peer may still process.
        last: StreamId,
        /// Why.
        code: ErrorCode,
    },
    /// The peer's settings were applied: `max_data_len`, limits and windows may have changed.
    Settings,
    /// Answer to `ping` with the same payload.
    Pong([u8; 8]),
}
