//! The mesh at one moment: immutable, indexed, shared by all workers.
//!
//! A snapshot is built whole ([`Snapshot::build`]) and never changes. Items refer to each other
//! by position, so nothing is counted or looked up by name on the way of a connection. What a
//! connection holds on to (an `Arc` of a workload) stays valid when a newer snapshot replaces
//! this one; [`Snapshot::current`] finds its successor.

use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use ipnet::IpNet;

use crate::node::NodeContext;
use crate::policy::Policy;
use crate::service::Service;
use crate::workload::Workload;

/// Workloads, services and policies, with the indexes that decisions need.
#[derive(Debug, Default)]
pub struct Snapshot {
    pub(crate) workloads: Box<[Arc<Workload>]>,
    pub(crate) services: Box<[Arc<Service>]>,
    pub(crate) policies: Box<[Arc<Policy>]>,
    pub(crate) by_uid: HashMap<Arc<str>, u32>,
    pub(crate) by_hostname: HashMap<Arc<str>, Positions>,
    pub(crate) networks: HashMap<Arc<str>, Network>,
    pub(crate) warnings: Vec<String>,
}

/// What the addresses of one network mean.
#[derive(Debug, Default)]
pub(crate) struct Network {
    pub(crate) workloads: HashMap<IpAddr, u32>,
    pub(crate) vips: HashMap<IpAddr, Positions>,
    /// Virtual address ranges by prefix length, longest first.
    pub(crate) ranges: Vec<(u8, HashMap<IpNet, Positions>)>,
}

/// Positions of the services that share a key: nearly always one, so that one is stored in
/// place and costs no further cache line.
#[derive(Debug, Default)]
pub(crate) enum Positions {
    #[default]
    None,
    One(u32),
    Several(Vec<u32>),
}

impl Snapshot {
    /// A mesh of nothing.
    pub fn empty() -> Self {
        Self::default()
    }

    /// The workload that has this address on this network.
    pub fn workload_by_ip(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        let index = self
            .networks
            .get(network)?
            .workloads
            .get(&ip.to_canonical())?;
        Some(&self.workloads[*index as usize])
    }

    /// The workload with this uid.
    pub fn workload_by_uid(&self, uid: &str) -> Option<&Arc<Workload>> {
        Some(&self.workloads[*self.by_uid.get(uid)? as usize])
    }

    /// The workload as this snapshot knows it, for one that may come from another snapshot.
    pub fn current(&self, workload: &Workload) -> Option<&Arc<Workload>> {
        match self.workloads.get(workload.index as usize) {
            Some(same) if same.uid == workload.uid => Some(same),
            _ => self.workload_by_uid(&workload.uid),
        }
    }

    /// The service with this key.
    pub fn service(&self, namespace: &str, hostname: &str) -> Option<&Arc<Service>> {
        let same_name = self.by_hostname.get(hostname)?;
        let mut services = same_name
            .iter()
            .map(|index| &self.services[*index as usize]);
        services.find(|service| *service.namespace == *namespace)
    }

    /// The service a client of `namespace` means by a hostname: its own namespace's, else the
    /// canonical one, else the preferred namespace's, else the first configured.
    pub fn service_by_hostname(
        &self,
        context: &NodeContext,
        namespace: &str,
        hostname: &str,
    ) -> Option<&Arc<Service>> {
        self.best(context, namespace, self.by_hostname.get(hostname)?)
    }

    /// The service a client of `namespace` means by a virtual address on the node's network;
    /// the order is that of [`Snapshot::service_by_hostname`]. Of address ranges, one of the
    /// client's own namespace wins, then the longest prefix.
    pub fn service_by_vip(
        &self,
        context: &NodeContext,
        namespace: &str,
        ip: IpAddr,
    ) -> Option<&Arc<Service>> {
        let network = self.networks.get(&*context.network)?;
        let ip = ip.to_canonical();
        let exact = network.vips.get(&ip);
        if let Some(service) = exact.and_then(|list| self.best(context, namespace, list)) {
            return Some(service);
        }
        let mut longest = None;
        for (prefix, ranges) in &network.ranges {
            let range = IpNet::new(ip, *prefix).map(|range| range.trunc());
            let Some(list) = range.ok().and_then(|range| ranges.get(&range)) else {
                continue;
            };
            match self.best(context, namespace, list) {
                Some(service) if *service.namespace == *namespace => return Some(service),
                found => longest = longest.or(found),
            }
        }
        longest
    }

    fn best(&self, context: &NodeContext, namespace: &str, list: &[u32]) -> Option<&Arc<Service>> {
        let preferred = context.preferred_service_namespace.as_deref();
        let mut best: Option<(u8, &Arc<Service>)> = None;
        for index in list {
            let service = &self.services[*index as usize];
            if !service.visible_from(namespace) {
                continue;
            }
            let rank = if *service.namespace == *namespace {
                3
            } else if service.canonical {
                2
            } else {
                u8::from(preferred == Some(&*service.namespace))
            };
            if best.is_none_or(|(best_rank, _)| rank > best_rank) {
                best = Some((rank, service));
            }
        }
        best.map(|(_, service)| service)
    }

    /// All workloads, in the order configured.
    pub fn workloads(&self) -> &[Arc<Workload>] {
        &self.workloads
    }

    /// All services, in the order configured.
    pub fn services(&self) -> &[Arc<Service>] {
        &self.services
    }

    /// All policies, in the order configured.
    pub fn policies(&self) -> &[Arc<Policy>] {
        &self.policies
    }

    /// What is doubtful but not wrong in the configuration, one line each: references to items
    /// that do not exist (they may still arrive) and ambiguous addresses.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl Positions {
    pub(crate) fn push(&mut self, position: u32) {
        match self {
            Self::None => *self = Self::One(position),
            Self::One(first) => *self = Self::Several(vec![*first, position]),
            Self::Several(positions) => positions.push(position),
        }
    }
}

impl Deref for Positions {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        match self {
            Self::None => &[],
            Self::One(position) => std::slice::from_ref(position),
            Self::Several(positions) => positions,
        }
    }
}
