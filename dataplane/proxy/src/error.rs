//! Why a connection did not come to be, or ended early. Messages are upstream's where it has one.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use hbone::ConnectionError;
use mesh::{DenyReason, Identity, InboundError, RouteError};
use telemetry::{Fault, ResponseFlags};
use tls::HandshakeError;

use crate::pods::Nobody;
use crate::relay::Who;
use crate::tunnel::{SetupError, StreamFailure, TunnelError};

/// An error of one proxied connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    /// The accepted socket cannot tell its addresses: the client is gone already.
    #[error("io error: {0}")]
    Io(#[from] io::Error),
    /// The client's address belongs to no workload of this node.
    #[error(
        "failed to fetch information about local workload: no workload on node {node} has \
         address {ip}; {why}"
    )]
    UnknownSource {
        /// The client.
        ip: IpAddr,
        /// This node.
        node: Box<str>,
        /// As far as is known.
        why: Nobody,
    },
    /// The destination is not a workload of this node.
    #[error("workload not found: no workload on node {node} has address {ip}; {why}")]
    UnknownDestination {
        /// Where the connection was to go.
        ip: IpAddr,
        /// This node.
        node: Box<str>,
        /// As far as is known.
        why: Nobody,
    },
    /// The pod of this node that would be reached is not one that was meant.
    #[error(
        "tls error: {ip} is of {found} now, which is none of the identities expected there: the \
         configuration is probably out of date"
    )]
    OtherIdentity {
        /// The destination.
        ip: IpAddr,
        /// Whose it is.
        found: Identity,
    },
    /// No way to the destination.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// The request inside a tunnel is refused.
    #[error(transparent)]
    Inbound(#[from] InboundError),
    /// Not a CONNECT request.
    #[error("method {0} is not CONNECT")]
    Method(Box<str>),
    /// The destination is this proxy itself.
    #[error("attempted recursive call to ourselves: {0} is one of ztunnel's own ports")]
    Recursive(SocketAddr),
    /// A policy refuses it.
    #[error("connection closed due to policy rejection: {0}")]
    Denied(DenyReason),
    /// A policy allowed it at first and does not any more.
    #[error("connection closed due to policy change: {0}")]
    Revoked(DenyReason),
    /// Too many handshakes at once.
    #[error(
        "tls error: {addr}: {max} handshakes of this worker are under way and as many wait; \
         raise ZTUNNEL_HANDSHAKES_MAX if these are honest peers"
    )]
    HandshakeOverload {
        /// The other end.
        addr: SocketAddr,
        /// The bound.
        max: usize,
    },
    /// The next hop refuses.
    #[error("connection failed: {addr}: {error}")]
    Connect {
        /// The next hop.
        addr: SocketAddr,
        /// What `connect(2)` said.
        error: io::Error,
    },
    /// The next hop does not answer.
    #[error("connection timed out: {addr}: deadline has elapsed")]
    ConnectTimeout {
        /// The next hop.
        addr: SocketAddr,
    },
    /// The next hop's HBONE port does not answer.
    #[error(
        "connection timed out, maybe a NetworkPolicy is blocking HBONE port {}: {addr}: \
         deadline has elapsed", .addr.port()
    )]
    HboneTimeout {
        /// The next hop.
        addr: SocketAddr,
    },
    /// The tunnel to the next hop cannot be set up.
    #[error("{addr}: {error}")]
    Setup {
        /// The next hop.
        addr: SocketAddr,
        /// What failed.
        error: SetupError,
    },
    /// The handshake takes too long.
    #[error("tls error: {addr}: the handshake did not finish in time")]
    HandshakeTimeout {
        /// The other end.
        addr: SocketAddr,
    },
    /// No certificate.
    #[error("identity error: {0}")]
    Identity(#[from] identity::NoCertificate),
    /// The next hop refused the CONNECT request.
    #[error("http status: {}", status_text(*.0))]
    Status(u16),
    /// The tunnel or the stream in it failed.
    #[error(transparent)]
    Stream(#[from] StreamFailure),
    /// One side of an established connection is no more.
    #[error("connection lost: {side}: {error}")]
    Lost {
        /// Which.
        side: Who,
        /// What its socket said.
        error: io::Error,
    },
    /// What several connections waited for has failed.
    #[error(transparent)]
    Shared(Rc<Self>),
    /// The tunnel takes no stream although it is new.
    #[error("http2 error: {0}")]
    Open(#[from] hbone::OpenError),
}

impl ProxyError {
    /// The metric label that goes with the error.
    pub(crate) fn flags(&self) -> ResponseFlags {
        match self {
            Self::Shared(error) => error.flags(),
            Self::Denied(_) | Self::Status(401) => ResponseFlags::Deny,
            Self::HboneTimeout { .. } => ResponseFlags::NetworkPolicy,
            Self::Setup { .. }
            | Self::HandshakeTimeout { .. }
            | Self::HandshakeOverload { .. }
            | Self::OtherIdentity { .. } => ResponseFlags::TlsFailure,
            Self::Identity(_) => ResponseFlags::IdentityError,
            Self::Open(_) => ResponseFlags::H2HandshakeFailure,
            Self::Io(_) | Self::Lost { .. } | Self::Stream(_) | Self::Revoked(_) => {
                ResponseFlags::None
            }
            Self::UnknownSource { .. }
            | Self::UnknownDestination { .. }
            | Self::Route(_)
            | Self::Inbound(_)
            | Self::Method(_)
            | Self::Recursive(_)
            | Self::Connect { .. }
            | Self::ConnectTimeout { .. }
            | Self::Status(_) => ResponseFlags::Connect,
        }
    }

    /// What the log says of it if the connection was refused early: its kind, by which lines are
    /// summed up where there are many, and itself.
    pub(crate) fn told(&self) -> (&'static str, &dyn fmt::Display) {
        (self.kind(), self)
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Shared(error) => error.kind(),
            Self::UnknownSource { .. } => "unknown source",
            Self::UnknownDestination { .. } | Self::OtherIdentity { .. } => "unknown destination",
            Self::Route(_) => "no route",
            Self::Inbound(_) | Self::Method(_) => "bad request",
            Self::Recursive(_) => "recursive call",
            Self::Denied(_) | Self::Revoked(_) => "policy",
            Self::HandshakeOverload { .. } => "handshake overload",
            Self::Setup { .. } | Self::HandshakeTimeout { .. } => "handshake",
            Self::Identity(_) => "no certificate",
            Self::Io(_)
            | Self::Connect { .. }
            | Self::ConnectTimeout { .. }
            | Self::HboneTimeout { .. }
            | Self::Status(_)
            | Self::Stream(_)
            | Self::Lost { .. }
            | Self::Open(_) => "connection",
        }
    }

    /// HTTP status that tells a tunnel's client (spec of HBONE: 400, 401 and 503 only).
    pub(crate) fn status(&self) -> u16 {
        match self {
            Self::Shared(error) => error.status(),
            Self::Inbound(error) => error.status(),
            Self::Method(_) => 400,
            Self::Denied(_) => 401,
            Self::Io(_)
            | Self::UnknownSource { .. }
            | Self::UnknownDestination { .. }
            | Self::OtherIdentity { .. }
            | Self::Route(_)
            | Self::Recursive(_)
            | Self::Revoked(_)
            | Self::HandshakeOverload { .. }
            | Self::Connect { .. }
            | Self::ConnectTimeout { .. }
            | Self::HboneTimeout { .. }
            | Self::Setup { .. }
            | Self::HandshakeTimeout { .. }
            | Self::Identity(_)
            | Self::Status(_)
            | Self::Stream(_)
            | Self::Lost { .. }
            | Self::Open(_) => 503,
        }
    }
}

fn status_text(status: u16) -> String {
    let reason = match status {
        400 => " Bad Request",
        401 => " Unauthorized",
        403 => " Forbidden",
        404 => " Not Found",
        502 => " Bad Gateway",
        503 => " Service Unavailable",
        504 => " Gateway Timeout",
        _ => "",
    };
    format!("{status}{reason}")
}

impl SetupError {
    /// As which metric it counts.
    fn fault(&self) -> Fault {
        match self {
            Self::Io(_) => Fault::Io,
            Self::Closed => Fault::HandshakeClosed,
            Self::Displaced(_) => Fault::HandshakeTimeout,
            Self::Tls(HandshakeError::Refused(_)) => Fault::TlsRefused,
            Self::Tls(HandshakeError::Alert(_)) => Fault::TlsAlert,
            Self::Tls(HandshakeError::Closed) => Fault::HandshakeClosed,
            Self::Tls(_) => Fault::Handshake,
        }
    }
}

impl ProxyError {
    /// As which metric it counts, if a tunnel could not be set up.
    pub(crate) fn fault(&self) -> Option<Fault> {
        match self {
            Self::Setup { error, .. } => Some(error.fault()),
            Self::HandshakeTimeout { .. } => Some(Fault::HandshakeTimeout),
            Self::HandshakeOverload { .. } => Some(Fault::HandshakeOverload),
            _ => None,
        }
    }
}

impl TunnelError {
    /// As which metric it counts, unless it is an orderly end.
    pub(crate) fn fault(&self) -> Option<Fault> {
        Some(match self {
            Self::Io(_) => Fault::Io,
            Self::Truncated => Fault::Truncated,
            Self::Http2(error) => match error {
                ConnectionError::Preface { .. } => Fault::Preface,
                ConnectionError::FrameSize { .. } => Fault::FrameSize,
                ConnectionError::Protocol { .. } => Fault::Protocol,
                ConnectionError::FlowControl { .. } => Fault::FlowControl,
                ConnectionError::StreamClosed { .. } => Fault::StreamClosed,
                ConnectionError::Compression { .. } => Fault::Compression,
                ConnectionError::Flood { .. } => Fault::Flood,
            },
            Self::TlsAlert(_) => Fault::TlsAlert,
            Self::Tls(_) => Fault::TlsRecord,
            Self::KeepaliveTimeout => Fault::Keepalive,
            Self::Unread(_) => Fault::Unread,
            Self::Closed | Self::Drained => return None,
        })
    }
}
