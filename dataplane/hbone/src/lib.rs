//! HBONE on the wire: HTTP/2 (RFC 9113) reduced to what CONNECT tunnels need, both roles.
//!
//! Sans-io: [`Connection::receive`] takes decrypted bytes and appends [`Event`]s whose ranges point
//! into those bytes; what must be sent is read from [`Connection::output`] (control frames) and
//! [`Connection::data_header`] (the 9 bytes in front of a payload that the caller sends from its
//! own buffer). No socket, clock, thread, lock or copy of payload.
//!
//! # Contract with the caller
//!
//! * Whatever is in `output()` goes on the wire before a DATA header obtained later, and a DATA
//!   frame (header and its payload) goes on the wire before control frames queued after it. In
//!   short: the order of calls is the order on the wire.
//! * Every payload byte delivered by [`Event::Data`] is handed back exactly once with
//!   [`Connection::release`], also after the stream was reset or closed; that is how the peer gets
//!   credit, so memory in front of a slow application stays bounded by the windows. Streams that
//!   hold what they got would stop the others: [`Connection::lend`] opens the connection's window
//!   for those, and the caller bounds what that may cost.
//! * [`Connection::pass_time`] is called now and then: what a peer does once in a while is no
//!   flood.
//! * After a [`ConnectionError`] the output ends with a GOAWAY: flush it and close.
//!
//! # Limits
//!
//! Everything a peer can make us remember is bounded by [`Config`]: streams, header blocks, the
//! HPACK table, partial frames, and replies that it does not read. Work without progress (PING,
//! SETTINGS, empty DATA, resets, ...) is charged to a budget that progress refills; a peer that
//! exhausts it is told ENHANCE_YOUR_CALM. Payload is never buffered here.
//!
//! Not implemented, because tunnels do not use it: server push (an error), priorities (ignored),
//! extended CONNECT (`:protocol` is malformed), sending trailers.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_types))]

mod config;
mod connection;
mod error;
mod event;
mod frame;
mod headers;
mod hpack;

pub use config::{Config, ConfigError, Role};
pub use connection::Connection;
pub use error::{ConnectionError, ErrorCode, OpenError, StreamError};
pub use event::{Event, StreamId};
pub use headers::{ConnectRequest, RequestHead};
pub use hpack::HpackError;

/// Bytes of an HTTP/2 frame header: the headroom to leave in front of a payload.
pub const FRAME_HEADER: usize = frame::HEADER_LEN;
