//! Waypoints: proxies that connections to a service or workload go through.
//!
//! Where one is configured ([`GatewayAddress`]) is resolved when a snapshot is built; what is not
//! known then fails closed, as going around it would skip its policies.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::address::{Destination, GatewayAddress, NamespacedHostname, WaypointTarget};
use crate::balance::Draw;
use crate::builder::Parts;
use crate::node::NodeContext;
use crate::route::{Authority, Query, Route, RouteError, no_address};
use crate::service::{Service, ServiceConfig};
use crate::snapshot::Snapshot;
use crate::workload::Workload;

impl Parts {
    fn resolve(&mut self, gateway: &GatewayAddress, of: &str) -> WaypointTarget {
        let port = gateway.hbone_mtls_port;
        let found = match &gateway.destination {
            Destination::Address(address) => self.networks.get(&address.network).and_then(|n| {
                let service = n
                    .vips
                    .get(&address.ip)
                    .and_then(|list| self.first_canonical(list));
                service
                    .map(|index| WaypointTarget::Service { index, port })
                    .or_else(|| {
                        let index = *n.workloads.get(&address.ip)?;
                        Some(WaypointTarget::Workload {
                            index,
                            ip: Some(address.ip),
                            port,
                        })
                    })
            }),
            Destination::Hostname(name) => self
                .service_index(name)
                .map(|index| WaypointTarget::Service { index, port })
                .or_else(|| {
                    let index = self.workload_by_hostname(name)?;
                    Some(WaypointTarget::Workload {
                        index,
                        ip: None,
                        port,
                    })
                }),
        };
        found.unwrap_or_else(|| {
            let destination: Arc<str> = gateway.destination.to_string().into();
            self.warnings.push(format!(
                "{of}: waypoint `{destination}` is neither a service nor a workload; connections \
                 to it will fail"
            ));
            WaypointTarget::Unknown { destination }
        })
    }

    fn first_canonical(&self, list: &[u32]) -> Option<u32> {
        let canonical = |index: &&u32| self.services[**index as usize].canonical;
        list.iter()
            .find(canonical)
            .or_else(|| list.first())
            .copied()
    }

    /// Linear, but only for waypoints that are named and no service.
    fn workload_by_hostname(&self, name: &NamespacedHostname) -> Option<u32> {
        let mut workloads = (0_u32..).zip(&self.workloads);
        let found = workloads.find(|(_, workload)| {
            workload.hostname == name.hostname && workload.namespace == name.namespace
        });
        found.map(|(index, _)| index)
    }

    pub(crate) fn workload_waypoints(&mut self) -> Vec<Option<WaypointTarget>> {
        let mut all = Vec::with_capacity(self.workloads.len());
        for position in 0..self.workloads.len() {
            let workload = &self.workloads[position];
            let Some(gateway) = workload.waypoint.clone() else {
                all.push(None);
                continue;
            };
            let of = format!("workload `{}`", workload.uid);
            all.push(Some(self.resolve(&gateway, &of)));
        }
        all
    }

    /// Waypoints of every service with the running sums of their weights.
    pub(crate) fn service_waypoints(&mut self) -> Vec<Box<[(u64, WaypointTarget)]>> {
        let mut all = Vec::with_capacity(self.services.len());
        for position in 0..self.services.len() {
            let service = &self.services[position];
            let of = format!("service `{}/{}`", service.namespace, service.hostname);
            let mut sum = 0;
            let configured = configured_waypoints(service);
            let resolve = |(weight, gateway): (u32, GatewayAddress)| {
                sum += u64::from(weight);
                (sum, self.resolve(&gateway, &of))
            };
            all.push(configured.into_iter().map(resolve).collect());
        }
        all
    }
}

fn configured_waypoints(service: &ServiceConfig) -> Vec<(u32, GatewayAddress)> {
    let weighted = service
        .weighted_waypoints
        .iter()
        .filter(|weighted| weighted.weight > 0);
    let mut configured: Vec<_> = weighted
        .map(|weighted| {
            let destination = weighted.destination.clone();
            let hbone_mtls_port = weighted.hbone_mtls_port;
            (
                weighted.weight,
                GatewayAddress {
                    destination,
                    hbone_mtls_port,
                },
            )
        })
        .collect();
    if configured.is_empty() {
        configured.extend(service.waypoint.clone().map(|waypoint| (1, waypoint)));
    }
    configured
}

impl Service {
    /// One of its waypoints, by weight.
    pub(crate) fn draw_waypoint(&self, draw: &mut Draw) -> Option<&WaypointTarget> {
        match &*self.waypoints {
            [] => None,
            [(_, only)] => Some(only),
            several => {
                let total = several.last()?.0;
                let drawn = draw.below(total);
                let position = several.partition_point(|(sum, _)| *sum <= drawn);
                several.get(position).map(|(_, target)| target)
            }
        }
    }
}

impl Query<'_> {
    pub(crate) fn to_waypoint(
        &self,
        waypoint: &WaypointTarget,
        service: Option<&Arc<Service>>,
        draw: &mut Draw,
    ) -> Result<Route, RouteError> {
        let workloads = &self.snapshot.workloads;
        let (workload, gateway, expected, extra_sans) = match waypoint {
            WaypointTarget::Unknown { destination } => {
                return Err(self.unknown_waypoint(destination, service));
            }
            WaypointTarget::Workload { index, ip, port } => {
                let workload = &workloads[*index as usize];
                self.check_network(workload)?;
                let ip = ip.or_else(|| first_like(&workload.workload_ips, self.dst.ip()));
                let ip = ip.ok_or_else(|| no_address(workload))?;
                (
                    workload,
                    SocketAddr::new(ip, *port),
                    &workload.expected,
                    Arc::default(),
                )
            }
            WaypointTarget::Service { index, port } => {
                let proxies = &self.snapshot.services[*index as usize];
                let candidate = proxies
                    .balancer
                    .pick_waypoint(*port, self.source, workloads, draw)
                    .ok_or_else(|| RouteError::NoHealthyUpstream {
                        service: proxies.key().to_string().into(),
                        port: *port,
                    })?;
                let endpoint = &proxies.endpoints[candidate.endpoint as usize];
                let workload = &workloads[endpoint.workload as usize];
                self.check_network(workload)?;
                let ip = endpoint.address_like(self.dst.ip());
                let ip = ip.ok_or_else(|| no_address(workload))?;
                let port = if candidate.port == 0 {
                    *port
                } else {
                    candidate.port
                };
                let gateway = SocketAddr::new(ip, port);
                (
                    workload,
                    gateway,
                    &endpoint.expected,
                    proxies.extra_sans.clone(),
                )
            }
        };
        Ok(Route::Hbone {
            gateway,
            authority: Authority::Address(self.dst),
            workload: Some(workload.clone()),
            service: service.cloned(),
            expected: expected.clone(),
            extra_sans,
            to_waypoint: true,
        })
    }

    fn unknown_waypoint(&self, waypoint: &Arc<str>, of: Option<&Arc<Service>>) -> RouteError {
        let of = match of {
            Some(service) => format!("service {}", service.key()),
            None => format!("workload {}", self.dst.ip()),
        };
        RouteError::UnknownWaypoint {
            waypoint: waypoint.clone(),
            of: of.into(),
        }
    }
}

/// An address of the family of `requested`, else the first.
fn first_like(ips: &[IpAddr], requested: IpAddr) -> Option<IpAddr> {
    let same = ips.iter().find(|ip| ip.is_ipv4() == requested.is_ipv4());
    same.or_else(|| ips.first()).copied()
}

impl Snapshot {
    /// Whether `local` is the waypoint of the service or workload with this address.
    pub(crate) fn is_waypoint_of(
        &self,
        context: &NodeContext,
        local: &Workload,
        ip: IpAddr,
    ) -> bool {
        if let Some(service) = self.service_by_vip(context, &local.namespace, ip) {
            return service
                .waypoints
                .iter()
                .any(|(_, target)| self.is_waypoint(target, local));
        }
        let workload = self.workload_by_ip(&context.network, ip);
        let waypoint = workload.and_then(|workload| workload.waypoint.as_ref());
        waypoint.is_some_and(|target| self.is_waypoint(target, local))
    }

    /// Whether connections to this waypoint arrive at `workload`.
    pub(crate) fn is_waypoint(&self, target: &WaypointTarget, workload: &Workload) -> bool {
        let Some(workload) = self.current(workload) else {
            return false;
        };
        match target {
            WaypointTarget::Service { index, .. } => self.services[*index as usize]
                .endpoint_of(workload.index)
                .is_some(),
            WaypointTarget::Workload { index, .. } => *index == workload.index,
            WaypointTarget::Unknown { .. } => false,
        }
    }
}
