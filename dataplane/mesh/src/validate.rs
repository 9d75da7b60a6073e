//! Checks of single items, before they are put together.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::address::{GatewayAddress, is_hostname, shown};
use crate::error::{ItemKind, ItemRef, ModelError};
use crate::policy::{Match, Policy};
use crate::service::ServiceConfig;
use crate::workload::{Protocol, WorkloadConfig};

const PORT_RANGE: &str = "must be 1-65535; 0 is no port";
const HBONE_PORT_RANGE: &str = "hboneMtlsPort must be 1-65535, usually 15008";
const NOT_EMPTY: &str = "must not be empty: the field is probably missing or misspelt";
const UNICAST: &str = "must be the address of one host, not unspecified, multicast or broadcast";

impl ItemRef {
    pub(crate) fn new(kind: ItemKind, index: u32, key: &str) -> Self {
        Self {
            kind,
            index,
            key: shown(key),
        }
    }

    fn wrong<T>(
        &self,
        field: &'static str,
        value: impl std::fmt::Display,
        problem: &'static str,
    ) -> Result<T, ModelError> {
        let value = format!("`{}`", shown(&value.to_string())).into();
        Err(ModelError::Field {
            item: self.clone(),
            field,
            value,
            problem,
        })
    }

    fn not_empty(&self, field: &'static str, value: &str) -> Result<(), ModelError> {
        if value.is_empty() {
            self.wrong(field, value, NOT_EMPTY)
        } else {
            Ok(())
        }
    }

    fn addresses<'a>(
        &self,
        field: &'static str,
        ips: impl Iterator<Item = &'a IpAddr>,
    ) -> Result<(), ModelError> {
        for ip in ips {
            let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
            if ip.is_unspecified() || ip.is_multicast() || broadcast {
                return self.wrong(field, ip, UNICAST);
            }
        }
        Ok(())
    }

    fn gateway(
        &self,
        field: &'static str,
        gateway: Option<&GatewayAddress>,
    ) -> Result<(), ModelError> {
        match gateway {
            Some(gateway) if gateway.hbone_mtls_port == 0 => self.wrong(field, 0, HBONE_PORT_RANGE),
            _ => Ok(()),
        }
    }

    /// Ports and, unless `target_zero`, targets must not be 0.
    fn ports(
        &self,
        field: &'static str,
        ports: &BTreeMap<u16, u16>,
        target_zero: bool,
    ) -> Result<(), ModelError> {
        for (port, target) in ports {
            if *port == 0 || (*target == 0 && !target_zero) {
                return self.wrong(field, format!("{port}: {target}"), PORT_RANGE);
            }
        }
        Ok(())
    }
}

pub(crate) fn workload(index: u32, config: &WorkloadConfig) -> Result<ItemRef, ModelError> {
    let named = if config.uid.is_empty() {
        &config.name
    } else {
        &config.uid
    };
    let item = ItemRef::new(ItemKind::Workload, index, named);
    item.not_empty("uid", &config.uid)?;
    item.not_empty("name", &config.name)?;
    item.not_empty("namespace", &config.namespace)?;
    item.addresses("workloadIps", config.workload_ips.iter())?;
    for (position, ip) in config.workload_ips.iter().enumerate() {
        if config.workload_ips[..position].contains(ip) {
            return item.wrong("workloadIps", ip, "is listed twice");
        }
    }
    let unreachable = config.workload_ips.is_empty()
        && config.hostname.is_empty()
        && config.network_gateway.is_none();
    if config.protocol == Protocol::Hbone && unreachable {
        return item.wrong(
            "workloadIps",
            "[]",
            "must hold an address for protocol HBONE: tunnels to it need one",
        );
    }
    if !config.hostname.is_empty() && !is_hostname(&config.hostname) {
        return item.wrong("hostname", &config.hostname, "is not a DNS name");
    }
    item.gateway("waypoint", config.waypoint.as_ref())?;
    item.gateway("networkGateway", config.network_gateway.as_ref())?;
    for policy in &config.authorization_policies {
        if !policy
            .split_once('/')
            .is_some_and(|(ns, name)| !ns.is_empty() && !name.is_empty())
        {
            return item.wrong("authorizationPolicies", policy, "is not namespace/name");
        }
    }
    for ports in config.services.values() {
        item.ports("services", ports, false)?;
    }
    Ok(item)
}

pub(crate) fn service(index: u32, config: &ServiceConfig) -> Result<ItemRef, ModelError> {
    let key = format!("{}/{}", config.namespace, config.hostname);
    let item = ItemRef::new(ItemKind::Service, index, &key);
    item.not_empty("name", &config.name)?;
    item.not_empty("namespace", &config.namespace)?;
    if !is_hostname(&config.hostname) {
        return item.wrong(
            "hostname",
            &config.hostname,
            "is not a DNS name, such as example.com",
        );
    }
    item.addresses("vips", config.vips.iter().map(|vip| &vip.ip))?;
    for (position, vip) in config.vips.iter().enumerate() {
        if config.vips[..position].contains(vip) {
            return item.wrong("vips", vip, "is listed twice");
        }
    }
    item.ports("ports", &config.ports, true)?;
    item.gateway("waypoint", config.waypoint.as_ref())?;
    for waypoint in &config.weighted_waypoints {
        if waypoint.hbone_mtls_port == 0 {
            let (field, destination) = ("weightedWaypoints", &waypoint.destination);
            return item.wrong(field, destination, HBONE_PORT_RANGE);
        }
    }
    let total: u64 = config
        .weighted_waypoints
        .iter()
        .map(|w| u64::from(w.weight))
        .sum();
    if !config.weighted_waypoints.is_empty() && total == 0 {
        return item.wrong(
            "weightedWaypoints",
            "weight: 0",
            "needs a weight above 0 somewhere",
        );
    }
    for (uid, endpoint) in &config.endpoints {
        if *uid != endpoint.workload_uid {
            return item.wrong("endpoints", uid, "is not the workloadUid of its own entry");
        }
        item.ports("endpoints", &endpoint.port, false)?;
    }
    Ok(item)
}

pub(crate) fn policy(index: u32, policy: &Policy) -> Result<ItemRef, ModelError> {
    let item = ItemRef::new(ItemKind::Policy, index, &policy.key());
    item.not_empty("name", &policy.name)?;
    let matches = || policy.rules.iter().flatten().flatten();
    let has_zero = |ports: fn(&Match) -> &Vec<u16>| matches().any(|m| ports(m).contains(&0));
    if has_zero(|m| &m.destination_ports) {
        return item.wrong("destinationPorts", 0, PORT_RANGE);
    }
    if has_zero(|m| &m.not_destination_ports) {
        return item.wrong("notDestinationPorts", 0, PORT_RANGE);
    }
    Ok(item)
}

/// Puts addresses and defaults of a workload into their one form.
pub(crate) fn normalise(mut config: WorkloadConfig) -> WorkloadConfig {
    for ip in &mut config.workload_ips {
        *ip = ip.to_canonical();
    }
    let default = WorkloadConfig::default();
    for (field, default) in [
        (&mut config.trust_domain, default.trust_domain),
        (&mut config.service_account, default.service_account),
        (&mut config.cluster_id, default.cluster_id),
    ] {
        if field.is_empty() {
            *field = Arc::clone(&default);
        }
    }
    config
}
