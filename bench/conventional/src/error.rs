//! Why a connection did not come to be, or ended early.

use std::io;
use std::net::{IpAddr, SocketAddr};

use http::StatusCode;
use mesh::{DenyReason, InboundError, RouteError};

use crate::identity::IdentityError;

/// An error of one proxied connection; one line.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("io error: {0}")]
    Io(#[from] io::Error),
    #[error("no workload on node {node} has address {ip}: it is not in the configuration (yet)")]
    UnknownWorkload { ip: IpAddr, node: Box<str> },
    #[error(transparent)]
    Route(#[from] RouteError),
    #[error(transparent)]
    Inbound(#[from] InboundError),
    #[error("method is not CONNECT")]
    Method,
    #[error("attempted recursive call to ourselves: {0} is one of our own ports")]
    Recursive(SocketAddr),
    #[error("connection closed due to policy rejection: {0}")]
    Denied(DenyReason),
    #[error("connection failed: {addr}: {error}")]
    Connect { addr: SocketAddr, error: io::Error },
    #[error("{what} with {addr} did not finish in time")]
    Timeout {
        what: &'static str,
        addr: SocketAddr,
    },
    #[error("tls error: {addr}: {error}")]
    Tls { addr: SocketAddr, error: io::Error },
    #[error("identity error: {0}")]
    Identity(#[from] IdentityError),
    #[error("http2 error: {0}")]
    H2(#[from] h2::Error),
    #[error("http error: {0}")]
    Http(#[from] http::Error),
    #[error("http status: {0}")]
    Status(StatusCode),
    #[error("the tunnel ended")]
    TunnelEnded,
}

impl Error {
    /// What a tunnel's client is told.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Inbound(error) => {
                StatusCode::from_u16(error.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE)
            }
            Self::Method => StatusCode::BAD_REQUEST,
            Self::Denied(_) => StatusCode::UNAUTHORIZED,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}
