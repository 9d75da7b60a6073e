//! What telemetry knows about one proxied connection, and the names that metrics and log give it.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use mesh::{Identity, Service, Workload};

/// Which side's proxy reports a connection; the first metric label.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Reporter {
    /// The client's side: outbound.
    Source,
    /// The server's side: inbound.
    Destination,
}

impl Reporter {
    /// Both, in the order of their indices.
    pub(crate) const ALL: [Self; 2] = [Self::Source, Self::Destination];

    /// The label's value.
    pub fn label(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }

    /// What the access log calls it.
    pub fn direction(self) -> &'static str {
        match self {
            Self::Source => "outbound",
            Self::Destination => "inbound",
        }
    }
}

/// How the connection is secured between the two proxies; `connection_security_policy`.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum Security {
    /// Not by TLS of the mesh: plaintext, passthrough, or from pod to pod of this node in one hop.
    #[default]
    Unknown,
    /// HBONE: mutual TLS with both identities proved.
    MutualTls,
}

impl Security {
    /// The label's value.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::MutualTls => "mutual_tls",
        }
    }
}

/// Why a connection ended, for `response_flags`.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub enum ResponseFlags {
    /// `-`: nothing special, also for errors after the connection was established.
    #[default]
    None,
    /// `DENY`: an authorization policy refused it.
    Deny,
    /// `CONNECT`: the next hop could not be reached.
    Connect,
    /// `TLS_FAILURE`: the TLS handshake with the next hop failed.
    TlsFailure,
    /// `H2_HANDSHAKE_FAILURE`: the next hop does not speak HTTP/2 as expected.
    H2HandshakeFailure,
    /// `NETWORK_POLICY`: a timeout that looks like a network policy dropping packets.
    NetworkPolicy,
    /// `IDENTITY_ERROR`: no certificate for the workload, or not the expected peer.
    IdentityError,
    /// `CERT_REVOKED`: the peer's certificate is on the revocation list.
    CertRevoked,
}

impl ResponseFlags {
    /// The label's value.
    pub fn label(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertRevoked => "CERT_REVOKED",
        }
    }
}

/// The `:authority` of an HBONE request, for the log's `dst.hbone_addr`.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum HboneTarget {
    /// An address and port.
    Address(SocketAddr),
    /// A host name with its port, `host:port`.
    Host(Arc<str>),
}

impl From<SocketAddr> for HboneTarget {
    fn from(address: SocketAddr) -> Self {
        Self::Address(address)
    }
}

impl fmt::Display for HboneTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host(host) => f.write_str(host),
        }
    }
}

/// Everything the metric labels and the access log need about one connection.
///
/// Cheap to build and to keep: every part is a reference count or a few bytes.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Whose proxy reports.
    pub reporter: Reporter,
    /// The client, where the mesh knows it.
    pub source: Option<Arc<Workload>>,
    /// The server, where the mesh knows it.
    pub destination: Option<Arc<Workload>>,
    /// The service the client asked for, if it did not ask for a workload.
    pub service: Option<Arc<Service>>,
    /// The client's identity, for which somebody has to vouch: TLS inbound, and redirection where
    /// the client is a pod of this node, as only that pod's packets bear its address. Without
    /// either there is none: policies match none, metrics and log name none.
    pub source_identity: Option<Identity>,
    /// The server's identity: proved by TLS, or that of the pod of this node that is connected to
    /// without a tunnel. Without it the metrics name the one `destination` should have, as
    /// upstream's do, and the log names none.
    pub destination_identity: Option<Identity>,
    /// How the two proxies secure it.
    pub security: Security,
    /// The client's address, as it came.
    pub src: SocketAddr,
    /// The next hop's address: with HBONE that of the tunnel.
    pub dst: SocketAddr,
    /// With HBONE, where the tunnel's far end connects to.
    pub hbone_dst: Option<HboneTarget>,
}

impl ConnectionInfo {
    /// A connection of which nothing but the addresses is known.
    pub fn new(reporter: Reporter, src: SocketAddr, dst: SocketAddr) -> Self {
        Self {
            reporter,
            source: None,
            destination: None,
            service: None,
            source_identity: None,
            destination_identity: None,
            security: Security::Unknown,
            src,
            dst,
            hbone_dst: None,
        }
    }
}
