//! Where does an outbound connection go?
//!
//! In order: a service's virtual address goes to the service's waypoint, or else to one of its
//! endpoints; a workload's own address to the workload's waypoint, or else to it; anything else
//! passes through. Workloads that speak HBONE are reached by a tunnel, others in plain TCP.
//! A source that is itself the waypoint is not sent to it again (for services, too: upstream
//! leaves a waypoint behind a service to loop).

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::balance::Draw;
use crate::identity::Identity;
use crate::node::NodeContext;
use crate::service::{Endpoint, LoadBalancerMode, Service};
use crate::snapshot::Snapshot;
use crate::workload::{Protocol, Workload};

/// Where an outbound connection goes, and how.
#[derive(Clone, Debug)]
pub enum Route {
    /// Not to the mesh: plain TCP to the address the client asked for.
    Passthrough {
        /// That address.
        dst: SocketAddr,
    },
    /// Plain TCP to a workload that does not speak HBONE.
    Tcp {
        /// Address to connect to.
        dst: SocketAddr,
        /// The workload.
        workload: Arc<Workload>,
        /// The service the client asked for.
        service: Option<Arc<Service>>,
    },
    /// A tunnel.
    Hbone {
        /// Address to dial: a workload's or a waypoint's HBONE port.
        gateway: SocketAddr,
        /// What to ask it for: `:authority`.
        authority: Authority,
        /// The workload dialled (the waypoint's, if it is one).
        workload: Option<Arc<Workload>>,
        /// The service the client asked for.
        service: Option<Arc<Service>>,
        /// Identities the server may show.
        expected: Arc<[Identity]>,
        /// Further URIs it may show, where services list some that are not workload identities.
        extra_sans: Arc<[Arc<str>]>,
        /// Whether the server dialled is a waypoint.
        to_waypoint: bool,
    },
}

/// Destination of a CONNECT request; `Display` is the text of `:authority`.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Authority {
    /// By address.
    Address(SocketAddr),
    /// By name.
    Host {
        /// Service hostname.
        hostname: Arc<str>,
        /// Service port.
        port: u16,
    },
}

/// Why an outbound connection goes nowhere.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RouteError {
    /// The client connects to this proxy.
    #[error(
        "attempted recursive call to ourselves: {0} is one of ztunnel's own ports; the client \
         probably means another port"
    )]
    Recursive(SocketAddr),
    /// No endpoint can take the connection.
    #[error(
        "no healthy upstream: service {service} has no endpoint for port {port}: none is \
         configured, healthy, of the locality asked for, or the port is not the service's"
    )]
    NoHealthyUpstream {
        /// Namespace and hostname.
        service: Box<str>,
        /// Port the client asked for.
        port: u16,
    },
    /// A waypoint is configured that is not part of the mesh (fails closed: going around it
    /// would skip its policies).
    #[error(
        "unknown waypoint: {waypoint} of {of} is neither a service nor a workload; it was \
         probably removed or has not been received yet"
    )]
    UnknownWaypoint {
        /// The waypoint's destination.
        waypoint: Arc<str>,
        /// What it is the waypoint of.
        of: Box<str>,
    },
    /// The upstream workload is on another network.
    #[error(
        "workload {workload} is on network `{network}`, not on this node's `{own}`: tunnels \
         through network gateways are not supported; check NETWORK"
    )]
    OtherNetwork {
        /// Uid of the workload.
        workload: Arc<str>,
        /// Its network.
        network: Arc<str>,
        /// The node's network.
        own: Arc<str>,
    },
    /// The upstream workload is known by name only.
    #[error(
        "workload {workload} has no address{}: names are not resolved on demand; list \
         workloadIps of a family its service offers",
        .hostname.as_ref().map(|name| format!(", only hostname `{name}`")).unwrap_or_default()
    )]
    NoAddress {
        /// Uid of the workload.
        workload: Arc<str>,
        /// Its hostname, if it has one.
        hostname: Option<Arc<str>>,
    },
}

/// A connection on its way to a decision.
pub(crate) struct Query<'a> {
    pub(crate) snapshot: &'a Snapshot,
    pub(crate) context: &'a NodeContext,
    pub(crate) source: &'a Workload,
    pub(crate) dst: SocketAddr,
}

impl Snapshot {
    /// Decides where a connection of `source` to `dst` goes. `seed` should be random: it decides
    /// between endpoints; equal seeds decide alike.
    ///
    /// # Errors
    /// The destination is part of the mesh but cannot be reached; the connection must be
    /// refused, not passed through.
    pub fn route(
        &self,
        context: &NodeContext,
        source: &Workload,
        dst: SocketAddr,
        seed: u64,
    ) -> Result<Route, RouteError> {
        let dst = SocketAddr::new(dst.ip().to_canonical(), dst.port());
        if dst.ip().is_loopback() && context.is_own_port(dst.port()) {
            return Err(RouteError::Recursive(dst));
        }
        let query = Query {
            snapshot: self,
            context,
            source,
            dst,
        };
        let mut draw = Draw::new(seed);
        if let Some(service) = self.service_by_vip(context, &source.namespace, dst.ip()) {
            return query.to_service(service, &mut draw);
        }
        match self.workload_by_ip(&context.network, dst.ip()) {
            Some(workload) => query.to_workload(workload, &mut draw),
            None => Ok(Route::Passthrough { dst }),
        }
    }
}

impl Query<'_> {
    fn to_service(&self, service: &Arc<Service>, draw: &mut Draw) -> Result<Route, RouteError> {
        if let Some(waypoint) = service.draw_waypoint(draw)
            && !self.snapshot.is_waypoint(waypoint, self.source)
        {
            return self.to_waypoint(waypoint, Some(service), draw);
        }
        if service.mode() == LoadBalancerMode::Passthrough {
            return Ok(Route::Passthrough { dst: self.dst });
        }
        let workloads = &self.snapshot.workloads;
        let candidate = service
            .balancer
            .pick(self.dst.port(), self.source, workloads, draw)
            .ok_or_else(|| self.no_upstream(service))?;
        let endpoint = &service.endpoints[candidate.endpoint as usize];
        let workload = &workloads[endpoint.workload as usize];
        self.check_network(workload)?;
        let ip = self.address_of(workload, endpoint)?;
        let port = if candidate.port == 0 {
            self.dst.port()
        } else {
            candidate.port
        };
        let target = SocketAddr::new(ip, port);
        Ok(self.direct(workload, Some((service, endpoint)), target))
    }

    fn to_workload(&self, workload: &Arc<Workload>, draw: &mut Draw) -> Result<Route, RouteError> {
        if let Some(waypoint) = &workload.waypoint
            && !self.snapshot.is_waypoint(waypoint, self.source)
        {
            return self.to_waypoint(waypoint, None, draw);
        }
        Ok(self.direct(workload, None, self.dst))
    }

    /// A workload, without a waypoint between.
    fn direct(
        &self,
        workload: &Arc<Workload>,
        via: Option<(&Arc<Service>, &Endpoint)>,
        target: SocketAddr,
    ) -> Route {
        let service = via.map(|(service, _)| service.clone());
        if workload.protocol == Protocol::Tcp {
            return Route::Tcp {
                dst: target,
                workload: workload.clone(),
                service,
            };
        }
        let (expected, extra_sans) = match via {
            Some((service, endpoint)) => (&endpoint.expected, service.extra_sans.clone()),
            None => (&workload.expected, Arc::default()),
        };
        Route::Hbone {
            gateway: SocketAddr::new(target.ip(), self.context.hbone_port),
            authority: Authority::Address(target),
            workload: Some(workload.clone()),
            service,
            expected: expected.clone(),
            extra_sans,
            to_waypoint: false,
        }
    }

    /// The requested address if the workload owns it, else one its service offers.
    fn address_of(&self, workload: &Workload, endpoint: &Endpoint) -> Result<IpAddr, RouteError> {
        let requested = self.dst.ip();
        if workload.workload_ips.contains(&requested) {
            return Ok(requested);
        }
        endpoint
            .address_like(requested)
            .ok_or_else(|| no_address(workload))
    }

    pub(crate) fn check_network(&self, workload: &Workload) -> Result<(), RouteError> {
        if workload.network == self.context.network {
            return Ok(());
        }
        Err(RouteError::OtherNetwork {
            workload: workload.uid.clone(),
            network: workload.network.clone(),
            own: self.context.network.clone(),
        })
    }

    fn no_upstream(&self, service: &Service) -> RouteError {
        let key = service.key().to_string();
        RouteError::NoHealthyUpstream {
            service: key.into(),
            port: self.dst.port(),
        }
    }
}

pub(crate) fn no_address(workload: &Workload) -> RouteError {
    let hostname = (!workload.hostname.is_empty()).then(|| workload.hostname.clone());
    RouteError::NoAddress {
        workload: workload.uid.clone(),
        hostname,
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Host { hostname, port } => write!(f, "{hostname}:{port}"),
        }
    }
}
