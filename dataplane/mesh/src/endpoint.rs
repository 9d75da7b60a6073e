//! Endpoints of services.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::identity::Identity;
use crate::workload::HealthStatus;

/// An endpoint listed with its service.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EndpointConfig {
    /// The workload.
    pub workload_uid: Arc<str>,
    /// Target port by service port.
    #[serde(default)]
    pub port: BTreeMap<u16, u16>,
    /// Whether it may receive traffic.
    #[serde(default)]
    pub status: HealthStatus,
}

/// An endpoint of a service of a [`Snapshot`](crate::Snapshot).
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Position of the workload in the snapshot.
    pub(crate) workload: u32,
    /// Uid of the workload.
    pub workload_uid: Arc<str>,
    /// Target port by service port, as this endpoint declares it.
    pub ports: BTreeMap<u16, u16>,
    /// Health at the time the snapshot was built.
    pub status: HealthStatus,
    /// Whether it takes part in load balancing under the service's health policy.
    pub eligible: bool,
    /// First address of each family the service offers.
    pub(crate) ipv4: Option<IpAddr>,
    pub(crate) ipv6: Option<IpAddr>,
    /// Identities its server may show: the service's, then the workload's own.
    pub(crate) expected: Arc<[Identity]>,
}

impl Endpoint {
    /// The address to use for a client that asked for `requested`: the same family if possible.
    pub(crate) fn address_like(&self, requested: IpAddr) -> Option<IpAddr> {
        if requested.is_ipv4() {
            self.ipv4.or(self.ipv6)
        } else {
            self.ipv6.or(self.ipv4)
        }
    }
}
