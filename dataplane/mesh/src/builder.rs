//! From configured items to a [`Snapshot`]: checks, indexes, resolved references.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use crate::address::{NamespacedHostname, WaypointTarget};
use crate::balance::Balancer;
use crate::error::{ItemKind, ItemRef, ModelError};
use crate::identity::Identity;
use crate::policy::{Policy, PolicyScope, PolicySet};
use crate::service::{Endpoint, HealthPolicy, Service, ServiceConfig};
use crate::snapshot::{Network, Positions, Snapshot};
use crate::validate;
use crate::workload::{HealthStatus, NetworkMode, Workload, WorkloadConfig};

impl Snapshot {
    /// Puts a mesh together.
    ///
    /// References to items that do not exist are warnings, not errors: a control plane may
    /// deliver them later. Routing through an unknown waypoint fails; an unknown policy or
    /// service is left out.
    ///
    /// # Errors
    /// An item is invalid, or two claim the same key or address. The first problem is reported.
    pub fn build(
        workloads: Vec<WorkloadConfig>,
        services: Vec<ServiceConfig>,
        policies: Vec<Policy>,
    ) -> Result<Self, ModelError> {
        let mut parts = Parts::default();
        parts.index_policies(policies)?;
        let identities = parts.index_workloads(workloads)?;
        parts.index_services(services)?;
        let endpoints = parts.collect_endpoints(&identities);
        let waypoints = parts.workload_waypoints();
        let service_waypoints = parts.service_waypoints();
        let services = parts.build_services(endpoints, service_waypoints);
        let workloads = parts.build_workloads(identities, waypoints);
        Ok(Self {
            workloads,
            services,
            policies: parts.policies.into(),
            by_uid: parts.by_uid,
            by_hostname: parts.by_hostname,
            networks: parts.networks,
            warnings: parts.warnings,
        })
    }
}

/// What has been put together so far.
#[derive(Default)]
pub(crate) struct Parts {
    pub(crate) workloads: Vec<WorkloadConfig>,
    pub(crate) services: Vec<ServiceConfig>,
    policies: Vec<Arc<Policy>>,
    by_uid: HashMap<Arc<str>, u32>,
    by_hostname: HashMap<Arc<str>, Positions>,
    by_policy_key: HashMap<String, u32>,
    global_policies: Vec<u32>,
    namespace_policies: HashMap<Arc<str>, Vec<u32>>,
    pub(crate) networks: HashMap<Arc<str>, Network>,
    pub(crate) warnings: Vec<String>,
}

fn positions(kind: ItemKind, count: usize) -> Result<std::ops::Range<u32>, ModelError> {
    u32::try_from(count)
        .map(|n| 0..n)
        .map_err(|_| ModelError::TooMany { kind, count })
}

impl Parts {
    fn index_policies(&mut self, policies: Vec<Policy>) -> Result<(), ModelError> {
        for (index, policy) in positions(ItemKind::Policy, policies.len())?.zip(policies) {
            let item = validate::policy(index, &policy)?;
            if self.by_policy_key.insert(policy.key(), index).is_some() {
                return Err(ModelError::Duplicate {
                    item,
                    unique: "namespace and name",
                });
            }
            match policy.scope {
                PolicyScope::Global => self.global_policies.push(index),
                PolicyScope::Namespace => {
                    let namespace = policy.namespace.clone();
                    self.namespace_policies
                        .entry(namespace)
                        .or_default()
                        .push(index);
                }
                PolicyScope::WorkloadSelector => {}
            }
            self.policies.push(Arc::new(policy));
        }
        Ok(())
    }

    fn index_workloads(
        &mut self,
        workloads: Vec<WorkloadConfig>,
    ) -> Result<Vec<Identity>, ModelError> {
        let mut identities = Vec::with_capacity(workloads.len());
        for (index, config) in positions(ItemKind::Workload, workloads.len())?.zip(workloads) {
            let config = validate::normalise(config);
            let item = validate::workload(index, &config)?;
            let identity = Identity::new(
                &config.trust_domain,
                &config.namespace,
                &config.service_account,
            );
            let identity = identity.map_err(|source| ModelError::Identity {
                item: item.clone(),
                source,
            })?;
            if self.by_uid.insert(config.uid.clone(), index).is_some() {
                return Err(ModelError::Duplicate {
                    item,
                    unique: "uid",
                });
            }
            self.workloads.push(config);
            self.index_addresses(index, item)?;
            identities.push(identity);
        }
        Ok(identities)
    }

    fn index_addresses(&mut self, index: u32, item: ItemRef) -> Result<(), ModelError> {
        let workload = &self.workloads[index as usize];
        let network = self.networks.entry(workload.network.clone()).or_default();
        if workload.network_mode == NetworkMode::HostNetwork {
            return Ok(());
        }
        for ip in &workload.workload_ips {
            let Some(holder) = network.workloads.insert(*ip, index) else {
                continue;
            };
            let other = &self.workloads[holder as usize];
            match precedence(other).cmp(&precedence(workload)) {
                std::cmp::Ordering::Less => {}
                std::cmp::Ordering::Greater => {
                    network.workloads.insert(*ip, holder);
                }
                std::cmp::Ordering::Equal => {
                    return Err(ModelError::AddressTaken {
                        item,
                        address: format!("{}/{ip}", workload.network).into(),
                        holder: (&*other.uid).into(),
                    });
                }
            }
        }
        Ok(())
    }

    fn index_services(&mut self, services: Vec<ServiceConfig>) -> Result<(), ModelError> {
        for (index, service) in positions(ItemKind::Service, services.len())?.zip(services) {
            let item = validate::service(index, &service)?;
            let same_name = self
                .by_hostname
                .entry(service.hostname.clone())
                .or_default();
            let mut others = same_name
                .iter()
                .map(|other| &self.services[*other as usize]);
            if others.any(|other| other.namespace == service.namespace) {
                let unique = "namespace and hostname";
                return Err(ModelError::Duplicate { item, unique });
            }
            same_name.push(index);
            for vip in &service.vips {
                let network = self.networks.entry(vip.network.clone()).or_default();
                let same_vip = network.vips.entry(vip.ip).or_default();
                for other in same_vip.iter().map(|other| &self.services[*other as usize]) {
                    if other.namespace == service.namespace {
                        self.warnings.push(format!(
                            "services `{}` and `{}` of namespace `{}` both have vips `{vip}`: the \
                             first is used",
                            other.hostname, service.hostname, service.namespace
                        ));
                    }
                }
                same_vip.push(index);
            }
            for range in &service.cidr_vips {
                let network = self.networks.entry(range.network.clone()).or_default();
                network.add_range(range.cidr.0, index);
            }
            self.services.push(service);
        }
        Ok(())
    }

    /// Endpoints of every service, by position of the workload.
    fn collect_endpoints(&mut self, identities: &[Identity]) -> Vec<BTreeMap<u32, Endpoint>> {
        let mut all = vec![BTreeMap::new(); self.services.len()];
        for (service, endpoints) in self.services.iter().zip(&mut all) {
            for (uid, listed) in &service.endpoints {
                let Some(index) = self.by_uid.get(uid).copied() else {
                    self.warnings.push(format!(
                        "service `{}/{}`: endpoints `{uid}` is not a workload",
                        service.namespace, service.hostname
                    ));
                    continue;
                };
                let endpoint = self.endpoint(service, index, &listed.port, listed.status);
                endpoints.insert(index, endpoint.with_identities(service, identities));
            }
        }
        for (index, workload) in (0_u32..).zip(&self.workloads) {
            for (key, ports) in &workload.services {
                let Some(service) = self.service_index(key) else {
                    self.warnings.push(format!(
                        "workload `{}`: services `{key}` is not a service",
                        workload.uid
                    ));
                    continue;
                };
                let config = &self.services[service as usize];
                let endpoint = self.endpoint(config, index, ports, workload.status);
                all[service as usize].insert(index, endpoint.with_identities(config, identities));
            }
        }
        all
    }

    fn endpoint(
        &self,
        service: &ServiceConfig,
        index: u32,
        ports: &BTreeMap<u16, u16>,
        status: HealthStatus,
    ) -> Endpoint {
        let workload = &self.workloads[index as usize];
        let policy = service.load_balancer.as_ref().map(|lb| lb.health_policy);
        let accepts = |ip: &&IpAddr| {
            service
                .ip_families
                .is_none_or(|families| families.accepts(**ip))
        };
        let mut offered = workload.workload_ips.iter().filter(accepts);
        let ipv4 = offered.clone().find(|ip| ip.is_ipv4()).copied();
        let ipv6 = offered.find(|ip| ip.is_ipv6()).copied();
        Endpoint {
            workload: index,
            workload_uid: workload.uid.clone(),
            ports: ports.clone(),
            status,
            eligible: status == HealthStatus::Healthy || policy == Some(HealthPolicy::AllowAll),
            ipv4,
            ipv6,
            expected: Arc::default(),
        }
    }

    pub(crate) fn service_index(&self, key: &NamespacedHostname) -> Option<u32> {
        let same_name = self.by_hostname.get(&key.hostname)?;
        let found = |index: &&u32| self.services[**index as usize].namespace == key.namespace;
        same_name.iter().find(found).copied()
    }

    fn build_services(
        &mut self,
        endpoints: Vec<BTreeMap<u32, Endpoint>>,
        waypoints: Vec<Box<[(u64, WaypointTarget)]>>,
    ) -> Box<[Arc<Service>]> {
        let configs = std::mem::take(&mut self.services);
        let parts = configs.into_iter().zip(endpoints).zip(waypoints);
        let build = |((config, endpoints), waypoints): ((ServiceConfig, BTreeMap<_, _>), _)| {
            let endpoints: Box<[Endpoint]> = endpoints.into_values().collect();
            Arc::new(Service {
                balancer: Balancer::new(
                    &config.ports,
                    config.load_balancer.as_ref(),
                    &endpoints,
                    &self.workloads,
                ),
                extra_sans: extra_sans(&config),
                config,
                endpoints,
                waypoints,
            })
        };
        parts.map(build).collect()
    }

    fn build_workloads(
        &mut self,
        identities: Vec<Identity>,
        waypoints: Vec<Option<WaypointTarget>>,
    ) -> Box<[Arc<Workload>]> {
        let configs = std::mem::take(&mut self.workloads);
        let mut sets = HashMap::new();
        let parts = (0_u32..).zip(configs).zip(identities).zip(waypoints);
        let build = |(((index, config), identity), waypoint)| {
            let policies = self.policy_set(&config, &mut sets);
            let expected = Arc::from([Identity::clone(&identity)]);
            Arc::new(Workload {
                policies,
                config,
                identity,
                expected,
                index,
                waypoint,
            })
        };
        parts.map(build).collect()
    }

    /// The policies of a workload: those of global scope, those of its namespace, and those it
    /// names.
    fn policy_set(
        &mut self,
        workload: &WorkloadConfig,
        sets: &mut HashMap<Vec<u32>, Arc<PolicySet>>,
    ) -> Arc<PolicySet> {
        let mut indexes = self.global_policies.clone();
        indexes.extend(
            self.namespace_policies
                .get(&workload.namespace)
                .into_iter()
                .flatten(),
        );
        for key in &workload.authorization_policies {
            match self.by_policy_key.get(&**key) {
                Some(index) => indexes.push(*index),
                None => self.warnings.push(format!(
                    "workload `{}`: authorizationPolicies `{key}` is not a policy; left out",
                    workload.uid
                )),
            }
        }
        indexes.sort_unstable();
        indexes.dedup();
        let policies = &self.policies;
        let build = |indexes: &Vec<u32>| {
            let policies = indexes
                .iter()
                .map(|index| policies[*index as usize].clone());
            Arc::new(PolicySet::new(policies))
        };
        sets.entry(indexes).or_insert_with_key(build).clone()
    }
}

impl Network {
    fn add_range(&mut self, range: ipnet::IpNet, service: u32) {
        let prefix = range.prefix_len();
        let position = self.ranges.iter().position(|(other, _)| *other <= prefix);
        let position = position.unwrap_or(self.ranges.len());
        if self
            .ranges
            .get(position)
            .is_none_or(|(other, _)| *other != prefix)
        {
            self.ranges.insert(position, (prefix, HashMap::new()));
        }
        self.ranges[position]
            .1
            .entry(range)
            .or_default()
            .push(service);
    }
}

impl Endpoint {
    fn with_identities(mut self, service: &ServiceConfig, identities: &[Identity]) -> Self {
        let own = &identities[self.workload as usize];
        let listed = service
            .subject_alt_names
            .iter()
            .filter_map(|san| san.parse().ok());
        let mut expected: Vec<Identity> = listed.filter(|identity| identity != own).collect();
        expected.push(own.clone());
        self.expected = expected.into();
        self
    }
}

fn extra_sans(service: &ServiceConfig) -> Arc<[Arc<str>]> {
    let names = service.subject_alt_names.iter();
    names
        .filter(|san| san.parse::<Identity>().is_err())
        .cloned()
        .collect()
}

/// Of two workloads with one address: a pod is preferred, then one that speaks HBONE.
fn precedence(workload: &WorkloadConfig) -> (bool, bool) {
    (
        workload.uid.contains("//Pod/"),
        workload.protocol == crate::workload::Protocol::Hbone,
    )
}
