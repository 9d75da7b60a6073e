//! The decision order of outbound connections.

mod support;

use std::collections::HashMap;
use std::sync::Arc;

use mesh::{NodeContext, Route, WorkloadName};
use support::{addr, id, node, parse, routed, snapshot};

const MESH: &str = r#"
workloads:
- {uid: c//Pod/ns1/client, name: client, namespace: ns1, serviceAccount: client,
   workloadIps: ["10.0.0.1", "fd00::1"], protocol: HBONE, node: node-a, services: {}}
- {uid: c//Pod/ns1/other, name: other, namespace: ns2, serviceAccount: other,
   workloadIps: ["10.0.0.2"], protocol: HBONE, services: {}}
- {uid: c//Pod/ns1/web, name: web, namespace: ns1, serviceAccount: web, workloadIps: ["10.0.1.1",
   "fd00::11"], protocol: HBONE,
   services: {"ns1/web.example": {80: 8080}, "ns1/tunnel.example": {80: 8080}}}
- {uid: c//Pod/ns1/plain, name: plain, namespace: ns1, workloadIps: ["10.0.1.2"], protocol: TCP,
   services: {"ns1/plain.example": {}}}
- {uid: c//Pod/ns1/behind, name: behind, namespace: ns1, workloadIps: ["10.0.1.3"], protocol: HBONE,
   waypoint: {destination: "ns1/waypoint.example", hboneMtlsPort: 15008},
   services: {"ns1/behind.example": {80: 80}}}
- {uid: c//Pod/ns1/behind-ip, name: behind-ip, namespace: ns1, workloadIps: ["10.0.1.4"],
   protocol: HBONE,
   waypoint: {destination: "/10.0.2.1", hboneMtlsPort: 15018}}
- {uid: c//Pod/ns1/behind-nothing, name: behind-nothing, namespace: ns1,
   workloadIps: ["10.0.1.5"], protocol: HBONE,
   waypoint: {destination: "ns1/gone.example"}}
- {uid: c//Pod/ns1/behind-named, name: behind-named, namespace: ns1, workloadIps: ["10.0.1.6"],
   protocol: HBONE,
   waypoint: {destination: "ns1/proxy.internal"}}
- {uid: c//Pod/ns1/waypoint, name: waypoint, namespace: ns1, serviceAccount: waypoint,
   workloadIps: ["10.0.2.1"], protocol: HBONE,
   hostname: proxy.internal, services: {"ns1/waypoint.example": {15008: 15009}}}
- {uid: c//Pod/ns1/sandwiched, name: sandwiched, namespace: ns1, workloadIps: ["10.0.2.2"],
   protocol: HBONE,
   applicationTunnel: {protocol: NONE, port: 9000}, services: {"ns1/sandwich.example": {}}}
- {uid: c//Pod/ns1/host, name: host, namespace: ns1, workloadIps: ["10.9.9.9"],
   networkMode: HostNetwork}
- {uid: c//Pod/ns1/far, name: far, namespace: ns1, workloadIps: ["10.0.1.1"], protocol: HBONE,
   network: remote,
   services: {"ns1/far.example": {80: 80}}}
- {uid: c//Pod/ns1/named, name: named, namespace: ns1, hostname: db.internal,
   services: {"ns1/named.example": {80: 80}}}
services:
- {name: web, namespace: ns1, hostname: web.example, vips: ["/10.96.0.1"], ports: {80: 0,
   81: 8081, 82: 0},
   subjectAltNames: ["spiffe://cluster.local/ns/ns1/sa/alias", "spiffe://other/thing",
   "spiffe://cluster.local/ns/ns1/sa/web"]}
- {name: plain, namespace: ns1, hostname: plain.example, vips: ["/10.96.0.2"], ports: {80: 8000}}
- {name: behind, namespace: ns1, hostname: behind.example, vips: ["/10.96.0.3"], ports: {80: 80}}
- {name: waypoint, namespace: ns1, hostname: waypoint.example, vips: ["/10.96.0.4"],
   ports: {15008: 15008}, subjectAltNames: ["spiffe://cluster.local/ns/ns1/sa/wp-alias"]}
- {name: tunnel, namespace: ns1, hostname: tunnel.example, vips: ["/10.96.0.5"], ports: {80: 80},
   waypoint: {destination: "ns1/waypoint.example"}}
- {name: empty, namespace: ns1, hostname: empty.example, vips: ["/10.96.0.6"], ports: {80: 80}}
- {name: pass, namespace: ns1, hostname: pass.example, vips: ["/10.96.0.7"], ports: {80: 80},
   loadBalancer: {mode: Passthrough}}
- {name: far, namespace: ns1, hostname: far.example, vips: ["/10.96.0.8"], ports: {80: 80}}
- {name: named, namespace: ns1, hostname: named.example, vips: ["/10.96.0.9"], ports: {80: 80}}
- {name: sandwich, namespace: ns1, hostname: sandwich.example, vips: ["/10.96.0.10"],
   ports: {80: 0}}
- {name: behind-sandwich, namespace: ns1, hostname: bs.example, vips: ["/10.96.0.11"],
   ports: {80: 80}, waypoint: {destination: "/10.96.0.10"}}
- {name: lost, namespace: ns1, hostname: lost.example, vips: ["/10.96.0.12"], ports: {80: 80},
   waypoint: {destination: "ns1/gone.example"}}
- {name: v6, namespace: ns1, hostname: v6.example, vips: ["/10.96.0.13"], ports: {80: 80},
   ipFamilies: IPv6,
   endpoints: {c//Pod/ns1/web: {workloadUid: c//Pod/ns1/web, port: {80: 8086}}}}
- {name: far-waypoint, namespace: ns1, hostname: fw.example, vips: ["/10.96.0.14"],
   ports: {80: 80}, waypoint: {destination: "remote/10.0.1.1"}}
"#;

#[test]
fn decision_order() {
    let mesh = snapshot(MESH);
    for (dst, expected) in [
        // Unknown to the mesh.
        ("192.0.2.1:443", "passthrough 192.0.2.1:443"),
        // Own ports are ours on loopback only.
        ("127.0.0.1:8080", "passthrough 127.0.0.1:8080"),
        ("10.0.1.1:15006", "hbone 10.0.1.1:15008 10.0.1.1:15006 web"),
        // By the workload's own address.
        ("10.0.1.1:9000", "hbone 10.0.1.1:15008 10.0.1.1:9000 web"),
        (
            "[::ffff:10.0.1.1]:9000",
            "hbone 10.0.1.1:15008 10.0.1.1:9000 web",
        ),
        (
            "[fd00::11]:9000",
            "hbone [fd00::11]:15008 [fd00::11]:9000 web",
        ),
        ("10.0.1.2:9000", "tcp 10.0.1.2:9000 plain"),
        // Addresses of nodes identify no workload.
        ("10.9.9.9:22", "passthrough 10.9.9.9:22"),
        // By service: endpoint mapping, then the service's target port.
        ("10.96.0.1:80", "hbone 10.0.1.1:15008 10.0.1.1:8080 web"),
        ("10.96.0.1:81", "hbone 10.0.1.1:15008 10.0.1.1:8081 web"),
        ("10.96.0.2:80", "tcp 10.0.1.2:8000 plain"),
        // Family of the service before family of the request.
        (
            "10.96.0.13:80",
            "hbone [fd00::11]:15008 [fd00::11]:8086 web",
        ),
        // Service waypoint: keeps the original destination, port mapped by its own service.
        (
            "10.96.0.5:80",
            "waypoint 10.0.2.1:15009 10.96.0.5:80 waypoint",
        ),
        (
            "10.96.0.5:12345",
            "waypoint 10.0.2.1:15009 10.96.0.5:12345 waypoint",
        ),
        // A waypoint's application tunnel takes a port its service does not list.
        (
            "10.96.0.11:80",
            "waypoint 10.0.2.2:15008 10.96.0.11:80 sandwiched",
        ),
        // A named port that only the application tunnel resolves.
        (
            "10.96.0.10:80",
            "hbone 10.0.2.2:15008 10.0.2.2:80 sandwiched",
        ),
        // Workload waypoint: only when addressed by the workload's own address.
        (
            "10.0.1.3:80",
            "waypoint 10.0.2.1:15009 10.0.1.3:80 waypoint",
        ),
        ("10.96.0.3:80", "hbone 10.0.1.3:15008 10.0.1.3:80 behind"),
        (
            "10.0.1.4:80",
            "waypoint 10.0.2.1:15018 10.0.1.4:80 waypoint",
        ),
        (
            "10.0.1.6:80",
            "waypoint 10.0.2.1:15008 10.0.1.6:80 waypoint",
        ),
        ("10.96.0.7:80", "passthrough 10.96.0.7:80"),
    ] {
        assert_eq!(
            routed(&mesh, "c//Pod/ns1/client", dst, 7),
            expected,
            "{dst}"
        );
    }
}

#[test]
fn refusals_name_what_is_wrong() {
    let mesh = snapshot(MESH);
    for (dst, wanted) in [
        (
            "127.0.0.1:15001",
            "attempted recursive call to ourselves: 127.0.0.1:15001",
        ),
        ("[::1]:15008", "attempted recursive call to ourselves"),
        (
            "10.96.0.6:80",
            "no healthy upstream: service ns1/empty.example has no endpoint for port 80",
        ),
        ("10.96.0.1:82", "no endpoint for port 82"),
        ("10.96.0.1:443", "no endpoint for port 443"),
        ("10.96.0.8:80", "c//Pod/ns1/far is on network `remote`"),
        (
            "10.96.0.9:80",
            "c//Pod/ns1/named has no address, only hostname `db.internal`",
        ),
        (
            "10.96.0.12:80",
            "unknown waypoint: ns1/gone.example of service ns1/lost.example",
        ),
        (
            "10.0.1.5:80",
            "unknown waypoint: ns1/gone.example of workload 10.0.1.5",
        ),
        ("10.96.0.14:80", "c//Pod/ns1/far is on network `remote`"),
    ] {
        let text = routed(&mesh, "c//Pod/ns1/client", dst, 7);
        assert!(text.starts_with("error "), "{dst}: {text}");
        assert!(text.contains(wanted), "{dst}: {text}");
        assert!(!text.contains('\n'), "{text}");
    }
}

#[test]
fn a_waypoint_is_not_sent_to_itself() {
    let mesh = snapshot(MESH);
    let from = |dst| routed(&mesh, "c//Pod/ns1/waypoint", dst, 1);
    assert_eq!(
        from("10.0.1.3:80"),
        "hbone 10.0.1.3:15008 10.0.1.3:80 behind"
    );
    assert_eq!(
        from("10.0.1.4:80"),
        "hbone 10.0.1.4:15008 10.0.1.4:80 behind-ip"
    );
    assert_eq!(
        from("10.96.0.5:80"),
        "hbone 10.0.1.1:15008 10.0.1.1:8080 web"
    );
}

#[test]
fn an_unhealthy_waypoint_still_is_itself() {
    let mut mesh = parse(MESH);
    let waypoint = mesh
        .workloads
        .iter_mut()
        .find(|w| &*w.name == "waypoint")
        .unwrap();
    waypoint.status = mesh::HealthStatus::Unhealthy;
    let mesh = mesh.build().unwrap();
    let route = routed(&mesh, "c//Pod/ns1/waypoint", "10.96.0.5:80", 1);
    assert_eq!(route, "hbone 10.0.1.1:15008 10.0.1.1:8080 web");
    let route = routed(&mesh, "c//Pod/ns1/client", "10.96.0.5:80", 1);
    assert!(
        route.contains("no healthy upstream: service ns1/waypoint.example"),
        "{route}"
    );
}

#[test]
fn expected_identities() {
    let mesh = snapshot(MESH);
    let source = mesh.workload_by_uid("c//Pod/ns1/client").unwrap();
    let expected = |dst| match mesh.route(&node(), source, addr(dst), 3).unwrap() {
        Route::Hbone {
            expected,
            extra_sans,
            service,
            ..
        } => {
            let names: Vec<String> = expected.iter().map(ToString::to_string).collect();
            (
                names,
                extra_sans.to_vec(),
                service.map(|service| service.name.to_string()),
            )
        }
        other => panic!("{other:?}"),
    };
    let name = |sa: &str| format!("spiffe://cluster.local/ns/ns1/sa/{sa}");
    assert_eq!(expected("10.0.1.1:80"), (vec![name("web")], vec![], None));
    let sans = vec!["spiffe://other/thing".into()];
    let web = (vec![name("alias"), name("web")], sans, Some("web".into()));
    assert_eq!(expected("10.96.0.1:80"), web);
    let waypoint = (
        vec![name("wp-alias"), name("waypoint")],
        vec![],
        Some("tunnel".into()),
    );
    assert_eq!(expected("10.96.0.5:80"), waypoint);
}

#[test]
fn the_dialled_port_is_the_nodes() {
    let mesh = snapshot(MESH);
    let source = mesh.workload_by_uid("c//Pod/ns1/client").unwrap();
    let context = NodeContext {
        hbone_port: 25008,
        ..node()
    };
    let route = mesh
        .route(&context, source, addr("10.0.1.1:80"), 0)
        .unwrap();
    assert_eq!(
        support::shown(&route),
        "hbone 10.0.1.1:25008 10.0.1.1:80 web"
    );
}

#[test]
fn a_dedicated_proxy_serves_its_workload_alone_wherever_that_runs() {
    let mesh = snapshot(MESH);
    let workload = mesh.workload_by_uid("c//Pod/ns1/client").unwrap();
    let mut context = NodeContext::new("", "another-node");
    assert!(!context.is_local(workload));
    let name = WorkloadName {
        namespace: Arc::clone(&workload.namespace),
        name: Arc::clone(&workload.name),
        service_account: Arc::clone(&workload.service_account),
        trust_domain: None,
    };
    context.dedicated_to = Some(name.clone());
    let local = mesh.workloads().iter().filter(|w| context.is_local(w));
    assert_eq!(local.count(), 1);
    assert!(context.is_local(workload));
    context.dedicated_to = Some(WorkloadName {
        trust_domain: Some("elsewhere".into()),
        ..name
    });
    assert!(!context.is_local(workload));
}

#[test]
fn another_network_has_its_own_addresses() {
    let mesh = snapshot(MESH);
    let source = mesh.workload_by_uid("c//Pod/ns1/client").unwrap();
    let context = NodeContext::new("remote", "node-z");
    let route = mesh
        .route(&context, source, addr("10.0.1.1:80"), 0)
        .unwrap();
    assert_eq!(
        support::shown(&route),
        "hbone 10.0.1.1:15008 10.0.1.1:80 far"
    );
    let route = mesh
        .route(&context, source, addr("10.96.0.1:80"), 0)
        .unwrap();
    assert_eq!(support::shown(&route), "passthrough 10.96.0.1:80");
    let route = mesh.route(
        &NodeContext::new("nowhere", ""),
        source,
        addr("10.0.1.1:80"),
        0,
    );
    assert_eq!(support::shown(&route.unwrap()), "passthrough 10.0.1.1:80");
}

const SHARED_VIP: &str = r#"
workloads:
- {uid: a, name: a, namespace: ns-a, workloadIps: ["10.0.0.1"],
   services: {"ns-a/x.example": {80: 1}, "ns-b/x.example": {80: 2}, "ns-c/x.example": {80: 3},
   "ns-d/x.example": {80: 4}, "ns-b/wide.example": {80: 11}, "ns-c/narrow.example": {80: 12},
   "ns-c/canonical.example": {80: 13}}}
- {uid: b, name: b, namespace: ns-b, workloadIps: ["10.0.0.2"]}
- {uid: c, name: c, namespace: ns-c, workloadIps: ["10.0.0.3"]}
- {uid: d, name: d, namespace: ns-d, workloadIps: ["10.0.0.4"]}
- {uid: e, name: e, namespace: ns-e, workloadIps: ["10.0.0.5"]}
services:
- {name: xa, namespace: ns-a, hostname: x.example, vips: ["/10.96.0.1"], ports: {80: 80},
   visibility: Namespace}
- {name: xb, namespace: ns-b, hostname: x.example, vips: ["/10.96.0.1"], ports: {80: 80}}
- {name: xd, namespace: ns-d, hostname: x.example, vips: ["/10.96.0.1"], ports: {80: 80}}
- {name: xc, namespace: ns-c, hostname: x.example, vips: ["/10.96.0.1"], ports: {80: 80},
   canonical: CANONICAL}
- {name: wide, namespace: ns-b, hostname: wide.example, cidrVips: [{network: "",
   cidr: 10.97.0.0/16}], ports: {80: 80}}
- {name: narrow, namespace: ns-c, hostname: narrow.example, cidrVips: [{network: "",
   cidr: 10.97.1.0/24}], ports: {80: 80}}
- {name: canonical, namespace: ns-c, hostname: canonical.example, cidrVips: [{network: "",
   cidr: 10.97.0.0/16}], canonical: true, ports: {80: 80}}
"#;

#[test]
fn one_vip_in_several_namespaces() {
    let canonical = snapshot(&SHARED_VIP.replace("CANONICAL", "true"));
    let plain = snapshot(&SHARED_VIP.replace("CANONICAL", "false"));
    let port = |mesh: &mesh::Snapshot, source: &str, dst: &str, preferred: Option<&str>| {
        let context = NodeContext {
            preferred_service_namespace: preferred.map(Into::into),
            ..node()
        };
        let source = mesh.workload_by_uid(source).unwrap();
        match mesh.route(&context, source, addr(dst), 0).unwrap() {
            Route::Tcp { dst, .. } => dst.port(),
            other => panic!("{other:?}"),
        }
    };
    let vip = "10.96.0.1:80";
    for (mesh, source, preferred, expected, why) in [
        (
            &canonical,
            "a",
            None,
            1,
            "own namespace, though hidden from others",
        ),
        (&canonical, "b", Some("ns-d"), 2, "own namespace before all"),
        (
            &canonical,
            "e",
            Some("ns-d"),
            3,
            "canonical before preferred",
        ),
        (&plain, "e", Some("ns-d"), 4, "preferred before first"),
        (&plain, "e", Some("ns-a"), 2, "preferred but hidden"),
        (&plain, "e", None, 2, "first that is visible"),
    ] {
        assert_eq!(port(mesh, source, vip, preferred), expected, "{why}");
    }
    for (source, dst, expected, why) in [
        ("e", "10.97.1.1:80", 12, "longest prefix"),
        (
            "b",
            "10.97.1.1:80",
            11,
            "own namespace before the longest prefix",
        ),
        ("e", "10.97.2.1:80", 13, "canonical among equal prefixes"),
    ] {
        assert_eq!(port(&plain, source, dst, None), expected, "{why}");
    }
}

#[test]
fn weighted_waypoints_are_drawn_by_weight() {
    let mesh = snapshot(
        r#"
workloads:
- {uid: client, name: client, namespace: n, workloadIps: ["10.0.0.1"]}
- {uid: w1, name: w1, namespace: n, workloadIps: ["10.0.0.2"], protocol: HBONE}
- {uid: w2, name: w2, namespace: n, workloadIps: ["10.0.0.3"], protocol: HBONE}
- {uid: w3, name: w3, namespace: n, workloadIps: ["10.0.0.4"], protocol: HBONE}
services:
- {name: s, namespace: n, hostname: s.example, vips: ["/10.96.0.1"], ports: {80: 80},
   waypoint: {destination: "/10.0.0.4"},
   weightedWaypoints: [{destination: "/10.0.0.2", weight: 90}, {destination: "/10.0.0.4",
   weight: 0}, {destination: "/10.0.0.3", weight: 10}]}
"#,
    );
    let mut seen: HashMap<String, u32> = HashMap::new();
    for seed in 0..10_000 {
        *seen
            .entry(routed(&mesh, "client", "10.96.0.1:80", seed))
            .or_default() += 1;
    }
    assert_eq!(seen.len(), 2, "{seen:?}");
    let first = f64::from(seen["waypoint 10.0.0.2:15008 10.96.0.1:80 w1"]);
    assert!((8_800.0..9_200.0).contains(&first), "{seen:?}");
}

#[test]
fn a_route_outlives_its_snapshot() {
    let old = snapshot(MESH);
    let source = old.workload_by_uid("c//Pod/ns1/waypoint").unwrap().clone();
    let mut newer = parse(MESH);
    newer.workloads.reverse();
    let newer = newer.build().unwrap();
    // The source of an older snapshot, at another position, is still known to be the waypoint.
    let route = newer
        .route(&node(), &source, addr("10.0.1.3:80"), 0)
        .unwrap();
    assert_eq!(
        support::shown(&route),
        "hbone 10.0.1.3:15008 10.0.1.3:80 behind"
    );
    assert_eq!(
        newer.current(&source).unwrap().identity(),
        source.identity()
    );
    assert_eq!(
        source.identity(),
        id("spiffe://cluster.local/ns/ns1/sa/waypoint")
    );
}

#[test]
fn a_waypoint_behind_a_shared_vip_is_the_canonical_one() {
    let mesh = snapshot(
        r#"
workloads:
- {uid: client, name: client, namespace: n, workloadIps: ["10.0.0.1"]}
- {uid: w1, name: w1, namespace: a, workloadIps: ["10.0.0.2"], protocol: HBONE,
   services: {"a/wp.example": {15008: 15008}}}
- {uid: w2, name: w2, namespace: b, workloadIps: ["10.0.0.3"], protocol: HBONE,
   services: {"b/wp.example": {15008: 15008}}}
services:
- {name: wp, namespace: a, hostname: wp.example, vips: ["/10.96.0.9"], ports: {15008: 15008}}
- {name: wp, namespace: b, hostname: wp.example, vips: ["/10.96.0.9"], ports: {15008: 15008},
   canonical: true}
- {name: s, namespace: n, hostname: s.example, vips: ["/10.96.0.1"], ports: {80: 80},
   waypoint: {destination: "/10.96.0.9"}}
"#,
    );
    let expected = "waypoint 10.0.0.3:15008 10.96.0.1:80 w2";
    assert_eq!(routed(&mesh, "client", "10.96.0.1:80", 0), expected);
}
