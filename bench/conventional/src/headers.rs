//! Headers that tell the other proxy about a connection.

use std::fmt::Write;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;

use http::{HeaderValue, Method, Request, Uri};
use mesh::{Service, Workload};

/// A CONNECT request for `authority` on behalf of `source` at `src`.
pub(crate) fn connect_request(
    authority: &str,
    src: SocketAddr,
    source: &Workload,
    service: Option<&Service>,
) -> Result<Request<()>, http::Error> {
    let forwarded = match service {
        Some(service) => format!("for=\"{src}\";host={}", service.hostname),
        None => format!("for=\"{src}\""),
    };
    let (high, low, span) = (random(), random(), random() | 1);
    Request::builder()
        .method(Method::CONNECT)
        .uri(Uri::try_from(authority)?)
        .header("baggage", baggage(source))
        .header("forwarded", forwarded)
        .header(
            "traceparent",
            format!("00-{high:016x}{low:016x}-{span:016x}-00"),
        )
        .body(())
}

/// `baggage` of a workload; values that do not fit into a header are left out altogether.
pub(crate) fn baggage(workload: &Workload) -> HeaderValue {
    let kind = match &*workload.workload_type {
        kind @ ("deployment" | "cronjob" | "job") => kind,
        _ => "pod",
    };
    let mut text = String::with_capacity(160);
    let mut add = |key: std::fmt::Arguments<'_>, value: &str| {
        if !value.is_empty() {
            let comma = if text.is_empty() { "" } else { "," };
            let _ = write!(text, "{comma}{key}={value}"); // writing to a String cannot fail
        }
    };
    add(format_args!("k8s.cluster.name"), &workload.cluster_id);
    add(format_args!("k8s.namespace.name"), &workload.namespace);
    add(format_args!("k8s.{kind}.name"), &workload.workload_name);
    add(format_args!("service.name"), &workload.canonical_name);
    let revision = &workload.canonical_revision;
    add(format_args!("service.version"), revision);
    let locality = &workload.locality;
    add(format_args!("cloud.region"), &locality.region);
    add(format_args!("cloud.availability_zone"), &locality.zone);
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// A random number for load balancing and trace ids; nothing secret depends on it.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(0_u8)
}
