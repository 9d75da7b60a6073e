//! What a tunnel that arrived may ask for.
#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

mod support;

use mesh::{Authority, InboundError, NodeContext, Snapshot};
use proptest::prelude::*;
use support::{addr, node, snapshot};

const MESH: &str = r#"
workloads:
- {uid: web, name: web, namespace: n, workloadIps: ["10.0.0.1", "fd00::1"], protocol: HBONE,
   services: {"n/web.example": {80: 8080}, "n/shared.example": {80: 1080}}}
- {uid: sick, name: sick, namespace: n, workloadIps: ["10.0.0.5"], protocol: HBONE,
   status: Unhealthy,
   services: {"n/web.example": {80: 8085}}}
- {uid: tunnel, name: tunnel, namespace: n, workloadIps: ["10.0.0.2"], protocol: HBONE,
   applicationTunnel: {protocol: NONE, port: 9000}}
- {uid: keep, name: keep, namespace: n, workloadIps: ["10.0.0.6"], protocol: HBONE,
   applicationTunnel: {protocol: NONE, port: 0}}
- {uid: proxy, name: proxy, namespace: n, workloadIps: ["10.0.0.3"], protocol: HBONE,
   applicationTunnel: {protocol: PROXY, port: 9000}}
- {uid: waypoint, name: waypoint, namespace: n, workloadIps: ["10.0.0.4"], protocol: HBONE,
   services: {"n/waypoint.example": {15008: 15008}}}
- {uid: behind, name: behind, namespace: n, workloadIps: ["10.0.1.1"], protocol: HBONE,
   waypoint: {destination: n/waypoint.example}}
- {uid: behind-ip, name: behind-ip, namespace: n, workloadIps: ["10.0.1.2"], protocol: HBONE,
   waypoint: {destination: /10.0.0.4}}
services:
- {name: web, namespace: n, hostname: web.example, vips: ["/10.96.0.1"], ports: {80: 80, 81: 8081,
   82: 0, 83: 15006}}
- {name: waypoint, namespace: n, hostname: waypoint.example, vips: ["/10.96.0.2"],
   ports: {15008: 15008}}
- {name: behind, namespace: n, hostname: behind.example, vips: ["/10.96.0.3"], ports: {80: 80},
   waypoint: {destination: n/waypoint.example}}
- {name: shared-m, namespace: m, hostname: shared.example, ports: {80: 2080}, canonical: true}
- {name: shared-n, namespace: n, hostname: shared.example, ports: {80: 80}}
"#;

fn ask(
    mesh: &Snapshot,
    uid: &str,
    conn_dst: &str,
    authority: &str,
) -> Result<String, InboundError> {
    let local = mesh.workload_by_uid(uid).unwrap();
    let resolved = mesh.resolve_inbound(&node(), local, addr(conn_dst), authority)?;
    Ok(resolved.to_string())
}

/// Workload, where the tunnel arrived, `:authority`, what it resolves to, why.
const RESOLVED: &[(&str, &str, &str, &str, &str)] = &[
    (
        "web",
        "10.0.0.1:15008",
        "10.0.0.1:8080",
        "10.0.0.1:8080",
        "own address",
    ),
    (
        "web",
        "[::ffff:10.0.0.1]:15008",
        "10.0.0.1:8080",
        "10.0.0.1:8080",
        "mapped listener",
    ),
    (
        "web",
        "10.0.0.1:15008",
        "[::ffff:10.0.0.1]:80",
        "10.0.0.1:80",
        "mapped authority",
    ),
    (
        "web",
        "[fd00::1]:15008",
        "[fd00::1]:8080",
        "[fd00::1]:8080",
        "own IPv6 address",
    ),
    (
        "web",
        "10.0.0.1:15008",
        "web.example:80",
        "10.0.0.1:8080",
        "endpoint's own port",
    ),
    (
        "web",
        "10.0.0.1:15008",
        "web.example:81",
        "10.0.0.1:8081",
        "service's target port",
    ),
    (
        "web",
        "10.0.0.1:15008",
        "shared.example:80",
        "10.0.0.1:1080",
        "own namespace first",
    ),
    (
        "sick",
        "10.0.0.5:15008",
        "web.example:80",
        "10.0.0.5:8085",
        "also when unhealthy",
    ),
    (
        "tunnel",
        "10.0.0.2:15008",
        "10.0.0.2:80",
        "10.0.0.2:9000",
        "application tunnel",
    ),
    (
        "tunnel",
        "10.0.0.2:15008",
        "10.99.9.9:80",
        "10.0.0.2:9000",
        "of any address",
    ),
    (
        "tunnel",
        "10.0.0.2:15008",
        "web.example:81",
        "10.0.0.2:9000",
        "of a service",
    ),
    (
        "tunnel",
        "10.0.0.2:15008",
        "web.example:99",
        "10.0.0.2:9000",
        "of any of its ports",
    ),
    (
        "keep",
        "10.0.0.6:15008",
        "10.99.9.9:80",
        "10.0.0.6:80",
        "port 0 keeps the port",
    ),
    (
        "waypoint",
        "10.0.0.4:15008",
        "10.0.1.1:80",
        "10.0.0.4:80",
        "we are its waypoint",
    ),
    (
        "waypoint",
        "10.0.0.4:15008",
        "10.0.1.2:80",
        "10.0.0.4:80",
        "by address, too",
    ),
    (
        "waypoint",
        "10.0.0.4:15008",
        "10.96.0.3:80",
        "10.0.0.4:80",
        "of a service",
    ),
];

#[test]
fn what_is_resolved() {
    let mesh = snapshot(MESH);
    for &(uid, conn_dst, authority, expected, why) in RESOLVED {
        let got = ask(&mesh, uid, conn_dst, authority);
        assert_eq!(got.as_deref(), Ok(expected), "{authority} at {uid}: {why}");
    }
}

/// Workload, `:authority`, status, part of the message.
const REFUSED: &[(&str, &str, u16, &str)] = &[
    ("web", "", 400, "invalid :authority ``"),
    ("web", "10.0.0.1", 400, "invalid :authority"),
    ("web", "10.0.0.1:", 400, "invalid :authority"),
    ("web", "10.0.0.1:0", 400, "invalid :authority"),
    ("web", "10.0.0.1:65536", 400, "invalid :authority"),
    ("web", "10.0.0.1:+80", 400, "invalid :authority"),
    ("web", "10.0.0.300:80", 400, "invalid :authority"),
    ("web", "fd00::1:80", 400, "invalid :authority"),
    ("web", "[fd00::1]", 400, "invalid :authority"),
    ("web", ":80", 400, "invalid :authority"),
    ("web", "web.example:http", 400, "invalid :authority"),
    ("web", "web.example:80/", 400, "invalid :authority"),
    ("web", "http://web.example:80", 400, "invalid :authority"),
    ("web", "user@web.example:80", 400, "invalid :authority"),
    ("web", "web example:80", 400, "invalid :authority"),
    ("web", "w\r\nx:80", 400, "invalid :authority `w\\r\\nx:80`"),
    (
        "web",
        "10.0.0.9:80",
        400,
        "ip mismatch: 10.0.0.1 != 10.0.0.9",
    ),
    (
        "web",
        "[fd00::1]:80",
        400,
        "ip mismatch: 10.0.0.1 != fd00::1",
    ),
    ("web", "10.0.1.1:80", 400, "ip mismatch"),
    ("web", "10.96.0.1:80", 400, "ip mismatch"),
    ("waypoint", "10.96.0.1:80", 400, "ip mismatch"),
    (
        "web",
        "nothing.example:80",
        503,
        "no service for target address: nothing.example",
    ),
    (
        "web",
        "web.example:82",
        503,
        "no port for service n/web.example: port 82",
    ),
    (
        "web",
        "web.example:443",
        503,
        "no port for service n/web.example: port 443",
    ),
    (
        "web",
        "10.0.0.1:15008",
        503,
        "attempted recursive call to ourselves",
    ),
    (
        "web",
        "10.0.0.1:15001",
        503,
        "attempted recursive call to ourselves",
    ),
    (
        "web",
        "web.example:83",
        503,
        "recursive call to ourselves: 10.0.0.1:15006",
    ),
    ("proxy", "10.0.0.3:80", 503, "applicationTunnel PROXY"),
];

#[test]
fn what_is_refused_and_how() {
    let mesh = snapshot(MESH);
    for &(uid, authority, status, text) in REFUSED {
        let local = mesh.workload_by_uid(uid).unwrap();
        let conn_dst = format!("{}:15008", local.workload_ips[0]);
        let error = ask(&mesh, uid, &conn_dst, authority).unwrap_err();
        assert_eq!(error.status(), status, "{authority}: {error}");
        assert!(error.to_string().contains(text), "{authority}: {error}");
        assert!(!error.to_string().contains(['\n', '\r']), "{error:?}");
        assert!(error.to_string().len() < 400, "{error}");
    }
}

#[test]
fn a_hostname_has_at_most_253_bytes() {
    let mesh = snapshot(MESH);
    for (len, status) in [(253, 503), (254, 400), (60_000, 400)] {
        let authority = format!("{}:80", "a".repeat(len));
        let error = ask(&mesh, "web", "10.0.0.1:15008", &authority).unwrap_err();
        assert_eq!(error.status(), status, "{len}");
        assert!(error.to_string().len() < 400, "{error}");
    }
}

#[test]
fn own_ports_are_those_of_the_node() {
    let mesh = snapshot(MESH);
    let local = mesh.workload_by_uid("web").unwrap();
    let context = NodeContext {
        own_ports: [15080].into(),
        ..node()
    };
    let ask = |text| mesh.resolve_inbound(&context, local, addr("10.0.0.1:15008"), text);
    assert!(ask("10.0.0.1:15006").is_ok());
    assert_eq!(ask("10.0.0.1:15080").unwrap_err().status(), 503);
}

proptest! {
    #[test]
    fn addresses_round_trip(ip: std::net::IpAddr, port in 1_u16..) {
        let address = std::net::SocketAddr::new(ip.to_canonical(), port);
        let authority = Authority::Address(address);
        prop_assert_eq!(authority.to_string().parse::<Authority>().unwrap(), authority);
    }

    #[test]
    fn hostile_authorities_never_panic(text in "\\PC{0,40}", tail in "[\\[\\]:.0-9a-f]{0,30}") {
        let _ = text.parse::<Authority>();
        let _ = tail.parse::<Authority>();
        if let Ok(authority) = format!("{text}{tail}").parse::<Authority>() {
            prop_assert_ne!(authority.port(), 0);
        }
    }
}
