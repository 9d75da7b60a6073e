//! Headers that describe a connection to the other proxy.

use std::fmt::Write;
use std::net::SocketAddr;

use mesh::{Service, Workload};

/// `baggage` of a workload: upstream's keys in upstream's order, empty values left out.
pub(crate) fn baggage(workload: &Workload) -> String {
    let kind = match &*workload.workload_type {
        "deployment" | "cronjob" | "job" => &*workload.workload_type,
        _ => "pod",
    };
    let name = format!("k8s.{kind}.name");
    let pairs: [(&str, &str); 7] = [
        ("k8s.cluster.name", &workload.cluster_id),
        ("k8s.namespace.name", &workload.namespace),
        (&name, &workload.workload_name),
        ("service.name", &workload.canonical_name),
        ("service.version", &workload.canonical_revision),
        ("cloud.region", &workload.locality.region),
        ("cloud.availability_zone", &workload.locality.zone),
    ];
    let mut text = String::with_capacity(160);
    for (key, value) in pairs {
        if value.is_empty() {
            continue;
        }
        if !text.is_empty() {
            text.push(',');
        }
        let _ = write!(text, "{key}={value}"); // writing to a String cannot fail
    }
    text
}

/// `forwarded` (RFC 7239): the client, and the service it asked for.
pub(crate) fn forwarded(src: SocketAddr, service: Option<&Service>) -> String {
    match service {
        Some(service) => format!("for=\"{src}\";host={}", service.hostname),
        None => format!("for=\"{src}\""),
    }
}

/// `traceparent` (W3C Trace Context) with random identifiers, not sampled.
pub(crate) fn traceparent(random: [u64; 3]) -> String {
    format!(
        "00-{:016x}{:016x}-{:016x}-00",
        random[0],
        random[1],
        random[2] | 1
    )
}
