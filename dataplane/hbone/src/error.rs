//! Errors and the RFC 9113 section 7 codes they are sent as.

use std::fmt;

use thiserror::Error;

use crate::hpack::HpackError;

/// Error code of RST_STREAM and GOAWAY (RFC 9113 section 7). Unknown codes are kept as they are.
#[derive(Clone, Copy, Eq, Hash, PartialEq)]
pub struct ErrorCode(pub u32);

impl ErrorCode {
    /// Graceful shutdown or end without failure.
    pub const NO_ERROR: Self = Self(0);
    /// The peer broke the protocol in a way that has no code of its own.
    pub const PROTOCOL_ERROR: Self = Self(1);
    /// Failure inside the sender of the code.
    pub const INTERNAL_ERROR: Self = Self(2);
    /// A window was exceeded or overflowed.
    pub const FLOW_CONTROL_ERROR: Self = Self(3);
    /// SETTINGS were not acknowledged in time.
    pub const SETTINGS_TIMEOUT: Self = Self(4);
    /// Frame for a stream that is closed.
    pub const STREAM_CLOSED: Self = Self(5);
    /// A frame has a length that its type or our settings forbid.
    pub const FRAME_SIZE_ERROR: Self = Self(6);
    /// The stream was not processed; it may be tried again.
    pub const REFUSED_STREAM: Self = Self(7);
    /// The stream is no longer wanted.
    pub const CANCEL: Self = Self(8);
    /// The header compression state is lost.
    pub const COMPRESSION_ERROR: Self = Self(9);
    /// The connection behind a CONNECT tunnel was reset.
    pub const CONNECT_ERROR: Self = Self(10);
    /// The peer causes load without progress.
    pub const ENHANCE_YOUR_CALM: Self = Self(11);
    /// The transport is not secure enough.
    pub const INADEQUATE_SECURITY: Self = Self(12);
    /// HTTP/1.1 is required instead.
    pub const HTTP_1_1_REQUIRED: Self = Self(13);

    /// Name of RFC 9113 section 7, or `UNKNOWN`.
    pub fn name(self) -> &'static str {
        usize::try_from(self.0)
            .ok()
            .and_then(|i| NAMES.get(i))
            .copied()
            .unwrap_or("UNKNOWN")
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.0)
    }
}

impl fmt::Debug for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The peer broke the connection; a GOAWAY with [`ConnectionError::code`] is in the output.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum ConnectionError {
    /// The first bytes are not the HTTP/2 client preface.
    #[error(
        "HTTP/2 preface: byte {offset} of 24 is 0x{found:02x}; the peer does not speak HTTP/2 \
         with prior knowledge (HTTP/1.1 client?)"
    )]
    Preface {
        /// Offset of the first wrong byte.
        offset: u8,
        /// The byte found.
        found: u8,
    },
    /// A frame has a forbidden length.
    #[error("HTTP/2 {frame} frame on stream {stream}: length {length} bytes, must be {allowed}")]
    FrameSize {
        /// Frame type.
        frame: &'static str,
        /// Stream identifier.
        stream: u32,
        /// Length found in the frame header.
        length: u32,
        /// The lengths allowed.
        allowed: &'static str,
    },
    /// A rule of the protocol was broken.
    #[error("HTTP/2 {frame} frame on stream {stream}: {reason}")]
    Protocol {
        /// Frame type.
        frame: &'static str,
        /// Stream identifier.
        stream: u32,
        /// The rule.
        reason: &'static str,
    },
    /// The peer sent more than the window or overflowed ours.
    #[error("HTTP/2 flow control on stream {stream}: {reason}")]
    FlowControl {
        /// Stream identifier, 0 for the connection.
        stream: u32,
        /// What happened.
        reason: &'static str,
    },
    /// Frame for a stream that the peer had already ended.
    #[error("HTTP/2 {frame} frame on stream {stream}: the peer had already ended this stream")]
    StreamClosed {
        /// Frame type.
        frame: &'static str,
        /// Stream identifier.
        stream: u32,
    },
    /// A header block cannot be decoded.
    #[error("HTTP/2 header block on stream {stream}: {source}")]
    Compression {
        /// Stream identifier.
        stream: u32,
        /// What is wrong in it.
        source: HpackError,
    },
    /// The peer causes work or memory without progress.
    #[error("HTTP/2 peer causes load without progress ({what}); faulty or hostile peer")]
    Flood {
        /// What there was too much of.
        what: &'static str,
    },
}

impl ConnectionError {
    /// The code sent in GOAWAY.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Preface { .. } | Self::Protocol { .. } => ErrorCode::PROTOCOL_ERROR,
            Self::FrameSize { .. } => ErrorCode::FRAME_SIZE_ERROR,
            Self::FlowControl { .. } => ErrorCode::FLOW_CONTROL_ERROR,
            Self::StreamClosed { .. } => ErrorCode::STREAM_CLOSED,
            Self::Compression { .. } => ErrorCode::COMPRESSION_ERROR,
            Self::Flood { .. } => ErrorCode::ENHANCE_YOUR_CALM,
        }
    }
}

/// A stream cannot be opened. Nothing was queued.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum OpenError {
    /// As many streams are open as we or the peer allow.
    #[error("cannot open stream: {active} streams open, at most {max} allowed on this connection")]
    Exhausted {
        /// Streams open now.
        active: usize,
        /// Lower of our limit and the peer's SETTINGS_MAX_CONCURRENT_STREAMS.
        max: usize,
    },
    /// Either side has sent GOAWAY, or the connection has failed.
    #[error("cannot open stream: the connection is shutting down (GOAWAY)")]
    GoingAway,
    /// All 2^30 stream identifiers are used.
    #[error("cannot open stream: stream identifiers are used up, a new connection is needed")]
    IdsExhausted,
    /// The connection is a server: HBONE servers do not open streams.
    #[error("cannot open stream: only the client side of a connection opens streams")]
    NotClient,
    /// A value contains bytes a header may not contain.
    #[error(
        "cannot open stream: {field} is empty, has surrounding white space or control characters"
    )]
    InvalidValue {
        /// Name of the header.
        field: &'static str,
    },
    /// The peer's SETTINGS_MAX_HEADER_LIST_SIZE does not admit this request.
    #[error("cannot open stream: header list of {size} bytes, the peer accepts at most {max}")]
    HeaderListTooLarge {
        /// RFC 9113 6.5.2 size of the request.
        size: usize,
        /// The peer's limit.
        max: usize,
    },
}

/// An operation on a stream is not possible.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
pub enum StreamError {
    /// The stream is closed, was reset, or never existed.
    #[error("stream {stream}: closed or reset")]
    Closed {
        /// Stream identifier.
        stream: u32,
    },
    /// We have already ended our direction.
    #[error("stream {stream}: this side has already sent END_STREAM")]
    AlreadyEnded {
        /// Stream identifier.
        stream: u32,
    },
    /// DATA before the response, or a second response, or a response by a client.
    #[error("stream {stream}: {reason}")]
    State {
        /// Stream identifier.
        stream: u32,
        /// What is out of order.
        reason: &'static str,
    },
    /// More data than the windows or the peer's maximal frame allow.
    #[error("stream {stream}: DATA of {len} bytes, at most {max} can be sent now")]
    Capacity {
        /// Stream identifier.
        stream: u32,
        /// Length asked for.
        len: usize,
        /// Lower of `send_capacity` and `max_data_len`.
        max: usize,
    },
    /// A value contains bytes a header may not contain, or a status is not within 200..=999.
    #[error("stream {stream}: invalid {field} for a response")]
    InvalidValue {
        /// Stream identifier.
        stream: u32,
        /// Name of the header.
        field: &'static str,
    },
}

const NAMES: [&str; 14] = [
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_their_rfc_names() {
        assert_eq!(ErrorCode::CANCEL.to_string(), "CANCEL (8)");
        assert_eq!(
            ErrorCode::HTTP_1_1_REQUIRED.to_string(),
            "HTTP_1_1_REQUIRED (13)"
        );
        assert_eq!(ErrorCode(99).to_string(), "UNKNOWN (99)");
    }
}
