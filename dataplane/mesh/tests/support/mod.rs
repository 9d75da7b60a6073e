//! Shared by the integration tests: a mesh from YAML, and addresses from text.
#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use std::net::SocketAddr;

use mesh::{
    Authority, Identity, NodeContext, Policy, Route, ServiceConfig, Snapshot, WorkloadConfig,
};
use serde::Deserialize;

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Mesh {
    pub(crate) workloads: Vec<WorkloadConfig>,
    pub(crate) services: Vec<ServiceConfig>,
    pub(crate) policies: Vec<Policy>,
}

impl Mesh {
    pub(crate) fn build(self) -> Result<Snapshot, mesh::ModelError> {
        Snapshot::build(self.workloads, self.services, self.policies)
    }
}

pub(crate) fn parse(yaml: &str) -> Mesh {
    match serde_saphyr::from_str(yaml) {
        Ok(mesh) => mesh,
        Err(error) => panic!("{error}"),
    }
}

pub(crate) fn snapshot(yaml: &str) -> Snapshot {
    parse(yaml).build().unwrap()
}

pub(crate) fn error(yaml: &str) -> String {
    parse(yaml).build().unwrap_err().to_string()
}

pub(crate) fn node() -> NodeContext {
    NodeContext::new("", "node-a")
}

pub(crate) fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub(crate) fn id(text: &str) -> Identity {
    text.parse().unwrap()
}

/// A route in one line: what is dialled, what is asked for, and who must answer.
pub(crate) fn shown(route: &Route) -> String {
    match route {
        Route::Passthrough { dst } => format!("passthrough {dst}"),
        Route::Tcp { dst, workload, .. } => format!("tcp {dst} {}", workload.name),
        Route::Hbone {
            gateway,
            authority,
            workload,
            to_waypoint,
            ..
        } => {
            let name = workload.as_ref().map_or("?", |workload| &*workload.name);
            let kind = if *to_waypoint { "waypoint" } else { "hbone" };
            let authority: &Authority = authority;
            format!("{kind} {gateway} {authority} {name}")
        }
    }
}

/// Where a connection of the workload with this uid goes.
pub(crate) fn routed(snapshot: &Snapshot, source: &str, dst: &str, seed: u64) -> String {
    let source = snapshot.workload_by_uid(source).unwrap();
    match snapshot.route(&node(), source, addr(dst), seed) {
        Ok(route) => shown(&route),
        Err(error) => format!("error {error}"),
    }
}
