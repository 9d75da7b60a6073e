//! The node that decisions are made for.

use std::sync::Arc;

use crate::ports;
use crate::workload::WorkloadConfig;

/// A workload by its name.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct WorkloadName {
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Pod name.
    pub name: Arc<str>,
    /// Kubernetes service account.
    pub service_account: Arc<str>,
    /// SPIFFE trust domain, if it is not any.
    pub trust_domain: Option<Arc<str>>,
}

impl WorkloadName {
    /// Whether this is the name of `workload`.
    pub fn names(&self, workload: &WorkloadConfig) -> bool {
        let domain = self.trust_domain.as_ref();
        workload.namespace == self.namespace
            && workload.name == self.name
            && workload.service_account == self.service_account
            && domain.is_none_or(|domain| *domain == workload.trust_domain)
    }
}

/// The node decisions are made for.
#[derive(Clone, Debug)]
pub struct NodeContext {
    /// Network the node is on (`NETWORK`).
    pub network: Arc<str>,
    /// The node's name (`NODE_NAME`).
    pub node: Arc<str>,
    /// Port HBONE is dialled on at workloads.
    pub hbone_port: u16,
    /// Ports of this proxy in a pod: connections to them would be to itself.
    pub own_ports: Arc<[u16]>,
    /// Namespace that wins among services of one hostname or address where neither the
    /// client's own nor a canonical one does (`PREFERED_SERVICE_NAMESPACE`).
    pub preferred_service_namespace: Option<Arc<str>>,
    /// The one workload that is served (`PROXY_WORKLOAD_INFO`); without it, all of the node.
    pub dedicated_to: Option<WorkloadName>,
}

impl NodeContext {
    /// A node with the standard ports ([`crate::ports`]).
    pub fn new(network: &str, node: &str) -> Self {
        Self {
            network: network.into(),
            node: node.into(),
            hbone_port: ports::INBOUND_HBONE,
            own_ports: Arc::from(ports::CAPTURED),
            preferred_service_namespace: None,
            dedicated_to: None,
        }
    }

    /// Whether `port` is one of this proxy's own.
    pub fn is_own_port(&self, port: u16) -> bool {
        self.own_ports.contains(&port)
    }

    /// Whether a workload is served here: it runs on this node, or is the one this is dedicated
    /// to.
    pub fn is_local(&self, workload: &WorkloadConfig) -> bool {
        match &self.dedicated_to {
            Some(name) => name.names(workload),
            None => workload.node == self.node,
        }
    }
}
