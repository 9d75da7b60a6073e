//! Services: names and virtual addresses that stand for a set of workloads.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::address::{
    Destination, GatewayAddress, NamespacedHostname, NetworkAddress, NetworkCidr, WaypointTarget,
    default_hbone_port,
};
use crate::balance::Balancer;

pub use crate::balance::{HealthPolicy, LoadBalancer, LoadBalancerMode, Scope};
pub use crate::endpoint::{Endpoint, EndpointConfig};

/// A service as configured.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ServiceConfig {
    /// Kubernetes name.
    pub name: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// DNS name.
    pub hostname: Arc<str>,
    /// Virtual addresses.
    pub vips: Vec<NetworkAddress>,
    /// Virtual address ranges.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cidr_vips: Vec<NetworkCidr>,
    /// Target port by service port; target 0 means that only the endpoints know it.
    pub ports: BTreeMap<u16, u16>,
    /// Further identities a server of this service may show, as URIs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subject_alt_names: Vec<Arc<str>>,
    /// Proxy that connections addressed to this service go through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<GatewayAddress>,
    /// Several of them, one drawn for each connection. Takes precedence over `waypoint`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// How endpoints are chosen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_balancer: Option<LoadBalancer>,
    /// Address families offered; absent means all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_families: Option<IpFamilies>,
    /// Preferred among services of several namespaces that share a hostname or address.
    pub canonical: bool,
    /// Who may use it.
    #[serde(skip_serializing_if = "Visibility::is_public")]
    pub visibility: Visibility,
    /// Endpoints by workload uid, in addition to those that workloads declare themselves.
    pub endpoints: BTreeMap<Arc<str>, EndpointConfig>,
}

/// One of a service's weighted waypoints.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WeightedWaypoint {
    /// Where it is.
    pub destination: Destination,
    /// Share of the connections, relative to the sum of all weights.
    pub weight: u32,
    /// Port it accepts HBONE on.
    #[serde(default = "default_hbone_port")]
    pub hbone_mtls_port: u16,
}

/// Address families of a service.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum IpFamilies {
    /// IPv4 and IPv6.
    Dual,
    /// IPv4 only.
    #[serde(rename = "IPv4")]
    Ipv4,
    /// IPv6 only.
    #[serde(rename = "IPv6")]
    Ipv6,
}

/// Who may use a service.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum Visibility {
    /// Every namespace.
    #[default]
    Public,
    /// Its own namespace.
    Namespace,
}

/// A service of a [`Snapshot`](crate::Snapshot): its configuration, to which it dereferences,
/// with endpoints resolved.
#[derive(Debug)]
pub struct Service {
    pub(crate) config: ServiceConfig,
    /// Sorted by position of the workload.
    pub(crate) endpoints: Box<[Endpoint]>,
    pub(crate) balancer: Balancer,
    /// Waypoints with the running sum of their weights; one entry for a single waypoint.
    pub(crate) waypoints: Box<[(u64, WaypointTarget)]>,
    /// Subject alternative names that are not workload identities.
    pub(crate) extra_sans: Arc<[Arc<str>]>,
}

impl Service {
    /// The configuration it was built from.
    pub fn config(&self) -> &ServiceConfig {
        &self.config
    }

    /// Its endpoints, also those that take no part in load balancing for want of health.
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// The endpoint that is the workload at this position of the snapshot.
    pub(crate) fn endpoint_of(&self, workload: u32) -> Option<&Endpoint> {
        let position = self
            .endpoints
            .binary_search_by_key(&workload, |e| e.workload)
            .ok()?;
        self.endpoints.get(position)
    }

    /// Its primary key.
    pub fn key(&self) -> NamespacedHostname {
        NamespacedHostname {
            namespace: self.namespace.clone(),
            hostname: self.hostname.clone(),
        }
    }

    pub(crate) fn mode(&self) -> LoadBalancerMode {
        self.config
            .load_balancer
            .as_ref()
            .map_or(LoadBalancerMode::Standard, |lb| lb.mode)
    }

    pub(crate) fn visible_from(&self, namespace: &str) -> bool {
        self.visibility == Visibility::Public || *self.namespace == *namespace
    }
}

impl Deref for Service {
    type Target = ServiceConfig;

    fn deref(&self) -> &ServiceConfig {
        &self.config
    }
}

impl IpFamilies {
    pub(crate) fn accepts(self, ip: IpAddr) -> bool {
        match self {
            Self::Dual => true,
            Self::Ipv4 => ip.is_ipv4(),
            Self::Ipv6 => ip.is_ipv6(),
        }
    }
}

impl Visibility {
    fn is_public(&self) -> bool {
        *self == Self::Public
    }
}

impl Default for ServiceConfig {
    fn default() -> Self {
        let empty: Arc<str> = Arc::from("");
        Self {
            name: empty.clone(),
            namespace: empty.clone(),
            hostname: empty,
            vips: Vec::new(),
            cidr_vips: Vec::new(),
            ports: BTreeMap::new(),
            subject_alt_names: Vec::new(),
            waypoint: None,
            weighted_waypoints: Vec::new(),
            load_balancer: None,
            ip_families: None,
            canonical: false,
            visibility: Visibility::default(),
            endpoints: BTreeMap::new(),
        }
    }
}
