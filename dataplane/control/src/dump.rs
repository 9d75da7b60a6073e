//! A snapshot as JSON, in the shapes of upstream's `/config_dump`, which
//! `istioctl ztunnel-config` reads. Costs as much memory as the configuration: for operators,
//! not for polling.

use mesh::{Service, Snapshot};
use serde::Serialize;
use serde_json::{Map, Value, json};

/// The part of `/config_dump` that describes the mesh: `workloads`, `services`, `policies`.
pub fn config_dump(snapshot: &Snapshot) -> Value {
    json!({
        "workloads": workloads(snapshot),
        "services": services(snapshot),
        "policies": policies(snapshot),
    })
}

/// All workloads.
pub fn workloads(snapshot: &Snapshot) -> Value {
    snapshot
        .workloads()
        .iter()
        .map(|workload| value(workload.config()))
        .collect()
}

/// All services, with the endpoints that take part in load balancing.
pub fn services(snapshot: &Snapshot) -> Value {
    snapshot
        .services()
        .iter()
        .map(|service| service_value(service))
        .collect()
}

/// All policies.
pub fn policies(snapshot: &Snapshot) -> Value {
    snapshot
        .policies()
        .iter()
        .map(|policy| value(&**policy))
        .collect()
}

fn service_value(service: &Service) -> Value {
    let eligible = service
        .endpoints()
        .iter()
        .filter(|endpoint| endpoint.eligible);
    let endpoints: Map<String, Value> = eligible
        .map(|endpoint| {
            let fields = json!({
                "workloadUid": &*endpoint.workload_uid,
                "port": endpoint.ports,
                "status": endpoint.status,
            });
            (endpoint.workload_uid.to_string(), fields)
        })
        .collect();
    let mut fields = value(service.config());
    fields["endpoints"] = Value::Object(endpoints);
    fields
}

/// Configuration types have string keys and no fallible parts, so this cannot fail; if one
/// ever does, the dump shows where instead of ending.
fn value(item: &impl Serialize) -> Value {
    serde_json::to_value(item).unwrap_or_else(|error| json!({ "error": error.to_string() }))
}
