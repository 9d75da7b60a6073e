//! Where does a connection that arrived in a tunnel go?
//!
//! The answer is always an address of the workload the tunnel arrived at; what is resolved is
//! the port, and whether the peer had any business asking this workload.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use crate::address::{is_hostname, shown};
use crate::node::NodeContext;
use crate::route::Authority;
use crate::snapshot::Snapshot;
use crate::workload::{ApplicationProtocol, Workload};

/// Why a CONNECT request is refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InboundError {
    /// `:authority` is neither `ip:port` nor `host:port`.
    #[error("invalid :authority `{0}`: expected ip:port, [ipv6]:port or host:port, port 1-65535")]
    Authority(Box<str>),
    /// The request is for another workload.
    #[error(
        "ip mismatch: {connected} != {requested}: the client probably holds an outdated address"
    )]
    IpMismatch {
        /// Where the tunnel arrived.
        connected: IpAddr,
        /// What the request asks for.
        requested: IpAddr,
    },
    /// The hostname is no service's.
    #[error(
        "no service for target address: {0}: it was probably removed or has not been received yet"
    )]
    UnknownService(Box<str>),
    /// The service does not say which port of this workload is meant.
    #[error("no port for service {service}: port {port} has no target port on this workload")]
    NoPort {
        /// Namespace and hostname.
        service: Box<str>,
        /// Port the request asks for.
        port: u16,
    },
    /// The target is this proxy.
    #[error("attempted recursive call to ourselves: {0} is one of ztunnel's own ports")]
    OwnPort(SocketAddr),
    /// The workload wants a PROXY protocol header first.
    #[error(
        "workload {0} asks for applicationTunnel PROXY, which is not supported: use NONE or none"
    )]
    ProxyProtocol(Box<str>),
}

impl InboundError {
    /// The HTTP status to answer with.
    pub fn status(&self) -> u16 {
        match self {
            Self::Authority(_) | Self::IpMismatch { .. } => 400,
            Self::UnknownService(_)
            | Self::NoPort { .. }
            | Self::OwnPort(_)
            | Self::ProxyProtocol(_) => 503,
        }
    }
}

/// An authority, borrowed from its text.
enum Requested<'a> {
    Address(SocketAddr),
    Host(&'a str, u16),
}

impl<'a> Requested<'a> {
    fn parse(text: &'a str) -> Result<Self, InboundError> {
        let parsed = match text.parse::<SocketAddr>() {
            Ok(address) => {
                let ip = address.ip().to_canonical();
                Some(Self::Address(SocketAddr::new(ip, address.port())))
            }
            Err(_) => host_and_port(text).map(|(hostname, port)| Self::Host(hostname, port)),
        };
        parsed
            .filter(|requested| match requested {
                Self::Address(address) => address.port() != 0,
                Self::Host(_, port) => *port != 0,
            })
            .ok_or_else(|| InboundError::Authority(shown(text)))
    }
}

impl FromStr for Authority {
    type Err = InboundError;

    fn from_str(text: &str) -> Result<Self, InboundError> {
        Ok(match Requested::parse(text)? {
            Requested::Address(address) => Self::Address(address),
            Requested::Host(hostname, port) => Self::Host {
                hostname: hostname.into(),
                port,
            },
        })
    }
}

fn host_and_port(text: &str) -> Option<(&str, u16)> {
    let (hostname, port) = text.rsplit_once(':')?;
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    // Digits and dots only are an address with a mistake in it, not a name.
    let address_like = hostname.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let valid = digits && is_hostname(hostname) && !address_like;
    valid
        .then(|| port.parse().ok().map(|port| (hostname, port)))
        .flatten()
}

impl Authority {
    /// The port asked for.
    pub fn port(&self) -> u16 {
        match self {
            Self::Address(address) => address.port(),
            Self::Host { port, .. } => *port,
        }
    }
}

impl Snapshot {
    /// Resolves what a tunnel that arrived at `conn_dst`, an address of `local`, asks for.
    /// Authorization is a separate step, with the address this returns.
    ///
    /// # Errors
    /// The request must be refused with the error's [`InboundError::status`].
    pub fn resolve_inbound(
        &self,
        context: &NodeContext,
        local: &Workload,
        conn_dst: SocketAddr,
        authority: &str,
    ) -> Result<SocketAddr, InboundError> {
        let connected = conn_dst.ip().to_canonical();
        let port = match Requested::parse(authority)? {
            Requested::Address(address) => {
                let requested = address.ip();
                let ours = connected == requested
                    || local.application_tunnel.is_some()
                    || self.is_waypoint_of(context, local, requested);
                if !ours {
                    return Err(InboundError::IpMismatch {
                        connected,
                        requested,
                    });
                }
                local.application_port(address.port())
            }
            Requested::Host(hostname, port) => self.inbound_port(context, local, hostname, port)?,
        };
        let target = SocketAddr::new(connected, port);
        if context.is_own_port(port) {
            return Err(InboundError::OwnPort(target));
        }
        match local.application_tunnel {
            Some(tunnel) if tunnel.protocol == ApplicationProtocol::Proxy => {
                Err(InboundError::ProxyProtocol((&*local.uid).into()))
            }
            _ => Ok(target),
        }
    }

    /// Resolves what a connection in plain text to `conn_dst`, an address of a local workload,
    /// asks for: just that, unless it is one of this proxy's own ports. Authorization is a
    /// separate step.
    ///
    /// # Errors
    /// [`InboundError::OwnPort`].
    pub fn resolve_plain(
        &self,
        context: &NodeContext,
        conn_dst: SocketAddr,
    ) -> Result<SocketAddr, InboundError> {
        let target = SocketAddr::new(conn_dst.ip().to_canonical(), conn_dst.port());
        if context.is_own_port(target.port()) {
            return Err(InboundError::OwnPort(target));
        }
        Ok(target)
    }

    fn inbound_port(
        &self,
        context: &NodeContext,
        local: &Workload,
        hostname: &str,
        port: u16,
    ) -> Result<u16, InboundError> {
        let service = self
            .service_by_hostname(context, &local.namespace, hostname)
            .ok_or_else(|| InboundError::UnknownService(shown(hostname)))?;
        let endpoint = self
            .current(local)
            .and_then(|local| service.endpoint_of(local.index));
        let own = endpoint.and_then(|endpoint| endpoint.ports.get(&port));
        let target = own
            .or_else(|| service.ports.get(&port))
            .copied()
            .filter(|port| *port != 0);
        match (target, local.application_tunnel) {
            (Some(target), _) => Ok(local.application_port(target)),
            (None, Some(_)) => Ok(local.application_port(port)),
            (None, None) => Err(InboundError::NoPort {
                service: service.key().to_string().into(),
                port,
            }),
        }
    }
}
