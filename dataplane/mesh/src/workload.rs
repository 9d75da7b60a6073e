//! Workloads: the pods and other machines of the mesh.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::address::{GatewayAddress, NamespacedHostname, WaypointTarget};
use crate::identity::Identity;
use crate::policy::PolicySet;

/// A workload as configured. Absent fields take the values the control plane's protocol gives
/// them, also in local files: trust domain `cluster.local`, service account `default`, cluster
/// `Kubernetes`, capacity 1. (Upstream leaves the first three empty in local files, which makes
/// identities that are not SPIFFE IDs.)
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WorkloadConfig {
    /// Unique id over the whole mesh, such as `cluster1//v1/Pod/default/web-1`.
    pub uid: Arc<str>,
    /// Pod name.
    pub name: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Kubernetes service account.
    pub service_account: Arc<str>,
    /// SPIFFE trust domain.
    pub trust_domain: Arc<str>,
    /// Own addresses.
    pub workload_ips: Vec<IpAddr>,
    /// How the workload is reached.
    pub protocol: Protocol,
    /// Whether the workload shares its node's address.
    pub network_mode: NetworkMode,
    /// Network the addresses are meaningful on; empty is the unnamed network.
    #[serde(skip_serializing_if = "is_empty")]
    pub network: Arc<str>,
    /// Name of the node it runs on.
    pub node: Arc<str>,
    /// DNS name, for workloads without a fixed address.
    pub hostname: Arc<str>,
    /// Name of the controller (deployment, job, ...).
    pub workload_name: Arc<str>,
    /// Kind of the controller: deployment, cronjob, job, pod.
    pub workload_type: Arc<str>,
    /// Value of the canonical service name label.
    pub canonical_name: Arc<str>,
    /// Value of the canonical service revision label.
    pub canonical_revision: Arc<str>,
    /// Cluster it runs in.
    pub cluster_id: Arc<str>,
    /// Where it runs.
    #[serde(skip_serializing_if = "Locality::is_empty")]
    pub locality: Locality,
    /// Whether it is ready for traffic.
    pub status: HealthStatus,
    /// Whether it terminates HBONE itself.
    pub native_tunnel: bool,
    /// How its ztunnel hands tunnelled connections to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Proxy that connections addressed to this workload go through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<GatewayAddress>,
    /// Gateway of its network, for clients on other networks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_gateway: Option<GatewayAddress>,
    /// Keys (`namespace/name`) of the policies that select it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub authorization_policies: Vec<Arc<str>>,
    /// Relative weight in load balancing.
    pub capacity: u32,
    /// Services it is an endpoint of, with target port by service port.
    #[serde(skip_serializing)]
    pub services: BTreeMap<NamespacedHostname, BTreeMap<u16, u16>>,
}

/// How a workload accepts connections.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum Protocol {
    /// Plain TCP: not part of the mesh, or not captured.
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    /// mTLS tunnels to port 15008.
    #[serde(rename = "HBONE")]
    Hbone,
}

/// Whether a workload has addresses of its own.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum NetworkMode {
    /// Its own.
    #[default]
    Standard,
    /// The node's: several workloads share the address, so it identifies none.
    HostNetwork,
}

/// Whether a workload may receive traffic.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum HealthStatus {
    /// Ready.
    #[default]
    Healthy,
    /// Not ready.
    Unhealthy,
}

/// Place of a workload.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Locality {
    /// Region, such as `eu-west-1`.
    pub region: Arc<str>,
    /// Zone within the region.
    pub zone: Arc<str>,
    /// Subzone within the zone.
    pub subzone: Arc<str>,
}

/// How the receiving ztunnel passes a tunnelled connection on to the application.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ApplicationTunnel {
    /// What precedes the data.
    pub protocol: ApplicationProtocol,
    /// Port to connect to instead of the requested one; absent or 0 keeps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// What an application tunnel puts before the data.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum ApplicationProtocol {
    /// Nothing.
    #[serde(rename = "NONE")]
    None,
    /// A PROXY protocol version 2 header.
    #[serde(rename = "PROXY")]
    Proxy,
}

/// A workload of a [`Snapshot`](crate::Snapshot): its configuration, to which it dereferences,
/// and what was derived from it when the snapshot was built.
#[derive(Debug)]
pub struct Workload {
    pub(crate) config: WorkloadConfig,
    pub(crate) identity: Identity,
    /// `[identity]`, shared by every route to this workload.
    pub(crate) expected: Arc<[Identity]>,
    pub(crate) index: u32,
    pub(crate) waypoint: Option<WaypointTarget>,
    pub(crate) policies: Arc<PolicySet>,
}

impl Workload {
    /// The identity its certificates carry.
    pub fn identity(&self) -> Identity {
        self.identity.clone()
    }

    /// The identity, borrowed.
    pub fn identity_ref(&self) -> &Identity {
        &self.identity
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &WorkloadConfig {
        &self.config
    }

    /// The port its ztunnel connects to for `requested`, by the application tunnel if there is one.
    pub(crate) fn application_port(&self, requested: u16) -> u16 {
        let tunnel_port = self.application_tunnel.and_then(|tunnel| tunnel.port);
        tunnel_port.filter(|port| *port != 0).unwrap_or(requested)
    }
}

impl Deref for Workload {
    type Target = WorkloadConfig;

    fn deref(&self) -> &WorkloadConfig {
        &self.config
    }
}

impl Locality {
    fn is_empty(&self) -> bool {
        self.region.is_empty() && self.zone.is_empty() && self.subzone.is_empty()
    }
}

impl Default for Locality {
    fn default() -> Self {
        let empty: Arc<str> = Arc::from("");
        Self {
            region: empty.clone(),
            zone: empty.clone(),
            subzone: empty,
        }
    }
}

impl Default for WorkloadConfig {
    fn default() -> Self {
        let empty: Arc<str> = Arc::from("");
        Self {
            uid: empty.clone(),
            name: empty.clone(),
            namespace: empty.clone(),
            service_account: Arc::from("default"),
            trust_domain: Arc::from("cluster.local"),
            workload_ips: Vec::new(),
            protocol: Protocol::default(),
            network_mode: NetworkMode::default(),
            network: empty.clone(),
            node: empty.clone(),
            hostname: empty.clone(),
            workload_name: empty.clone(),
            workload_type: empty.clone(),
            canonical_name: empty.clone(),
            canonical_revision: empty,
            cluster_id: Arc::from("Kubernetes"),
            locality: Locality::default(),
            status: HealthStatus::default(),
            native_tunnel: false,
            application_tunnel: None,
            waypoint: None,
            network_gateway: None,
            authorization_policies: Vec::new(),
            capacity: 1,
            services: BTreeMap::new(),
        }
    }
}

fn is_empty(text: &Arc<str>) -> bool {
    text.is_empty()
}
