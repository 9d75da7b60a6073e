//! Local configuration: what is accepted, and what is said of what is not.

#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

use std::io::Write;

use control::dump;
use control::local::{LoadError, LocalConfig, parse};

/// The shape of upstream's example, extended.
const EXAMPLE: &str = r#"
workloads:
- {uid: cluster1//v1/Pod/default/local, name: local, namespace: default, serviceAccount: default,
   trustDomain: cluster.local, workloadIps: ["127.0.0.1"], protocol: HBONE, node: local,
   network: "",
   services: {"default/example.com": {80: 8080}, "default/example2.com": {80: 8080}}}
- {uid: cluster1//v1/Pod/default/local-tcp, name: local-tcp, namespace: default,
   serviceAccount: default,
   workloadIps: ["127.0.0.2"], protocol: TCP, node: local, network: "",
   services: {"default/example.com": {80: 8080}}}
- {uid: cluster1//v1/Pod/default/behind-wp, name: behind-wp, namespace: default,
   serviceAccount: default,
   workloadIps: ["127.0.0.6"], protocol: HBONE, node: remote, network: "",
   waypoint: {destination: "/127.0.0.5", hboneMtlsPort: 15008}, services: {}}
policies:
- name: deny-9999
  namespace: default
  scope: Namespace
  action: Allow
  dryRun: false
  rules:
  - - - notDestinationPorts: [9999]
services:
- {name: local, namespace: default, hostname: example.com, vips: ["/127.10.0.1"], ports: {80: 8080},
   subjectAltNames: ["spiffe://cluster.local/ns/default/sa/local"], canonical: true}
- {name: remote, namespace: default, hostname: example2.com, vips: ["remote/127.10.0.2"],
   ports: {80: 8080}, canonical: true}
"#;

const EVERY_KEY: &str = r#"
workloads:
- uid: c//Pod/n/w
  name: w
  namespace: n
  serviceAccount: sa
  trustDomain: td.example
  workloadIps: [10.0.0.1, "fd00::1"]
  protocol: HBONE
  networkMode: Standard
  network: net
  node: node-1
  hostname: w.internal
  workloadName: deploy
  workloadType: deployment
  canonicalName: app
  canonicalRevision: v1
  clusterId: c1
  locality: {region: r, zone: z, subzone: s}
  status: Healthy
  nativeTunnel: true
  applicationTunnel: {protocol: PROXY, port: 15088}
  waypoint: {destination: n/wp.example, hboneMtlsPort: 15008}
  networkGateway: {destination: other/10.9.9.9, hboneMtlsPort: 15009}
  authorizationPolicies: [n/p]
  capacity: 3
  services:
    n/s.example: {80: 8080, 443: 8443}
services:
- name: s
  namespace: n
  hostname: s.example
  vips: [net/10.96.0.1, "net/fd00::96"]
  cidrVips: [{network: net, cidr: 10.97.0.0/16}]
  ports: {80: 0, 443: 8443}
  subjectAltNames: ["spiffe://td.example/ns/n/sa/sa"]
  waypoint: {destination: /10.0.0.1, hboneMtlsPort: 15008}
  weightedWaypoints: [{destination: net/10.0.0.1, weight: 10}]
  loadBalancer: {routingPreferences: [Network, Region, Zone, Subzone, Node, Cluster],
    mode: Failover, healthPolicy: AllowAll}
  ipFamilies: Dual
  canonical: true
  visibility: Namespace
policies:
- name: p
  namespace: n
  scope: WorkloadSelector
  action: Deny
  dryRun: true
  rules:
  - - - namespaces: [{Exact: a}, {Prefix: b}]
        notNamespaces: [{Suffix: c}]
        serviceAccounts: [{namespace: a, serviceAccount: b}]
        notServiceAccounts: [{namespace: a, serviceAccount: c}]
        principals: [{Presence: []}]
        notPrincipals:
        - Exact: td.example/ns/n/sa/x
        sourceIps: [10.0.0.0/8, 192.0.2.1]
        notSourceIps: [10.1.0.0/16]
        destinationIps: ["fd00::/8"]
        notDestinationIps: [fd01::/16]
        destinationPorts: [80, 443]
        notDestinationPorts: [22]
"#;

fn refused(text: &str) -> String {
    let error = parse("mesh.yaml", text).unwrap_err().to_string();
    assert!(!error.contains('\n'), "more than one line: {error}");
    error
}

#[test]
fn the_example_is_accepted() {
    let snapshot = parse("mesh.yaml", EXAMPLE).unwrap();
    assert_eq!(snapshot.workloads().len(), 3);
    assert_eq!(snapshot.services().len(), 2);
    assert_eq!(snapshot.policies().len(), 1);
    let ip = "127.0.0.2".parse().unwrap();
    let workload = snapshot.workload_by_ip("", ip).unwrap();
    assert_eq!(
        workload.identity().uri(),
        "spiffe://cluster.local/ns/default/sa/default"
    );
    // The waypoint is not part of the example: said, not refused.
    assert_eq!(snapshot.warnings().len(), 1);
    assert!(
        snapshot.warnings()[0].contains("/127.0.0.5"),
        "{:?}",
        snapshot.warnings()
    );
}

#[test]
fn every_key_is_understood_and_dumped() {
    let snapshot = parse("mesh.yaml", EVERY_KEY).unwrap();
    let dump = dump::config_dump(&snapshot);
    let workload = &dump["workloads"][0];
    for (key, expected) in [
        ("uid", "\"c//Pod/n/w\""),
        ("workloadIps", "[\"10.0.0.1\",\"fd00::1\"]"),
        ("protocol", "\"HBONE\""),
        ("networkMode", "\"Standard\""),
        ("serviceAccount", "\"sa\""),
        ("trustDomain", "\"td.example\""),
        ("clusterId", "\"c1\""),
        ("status", "\"Healthy\""),
        ("nativeTunnel", "true"),
        ("capacity", "3"),
        ("authorizationPolicies", "[\"n/p\"]"),
        (
            "applicationTunnel",
            "{\"port\":15088,\"protocol\":\"PROXY\"}",
        ),
        (
            "waypoint",
            "{\"destination\":\"n/wp.example\",\"hboneMtlsPort\":15008}",
        ),
        (
            "networkGateway",
            "{\"destination\":\"other/10.9.9.9\",\"hboneMtlsPort\":15009}",
        ),
        (
            "locality",
            "{\"region\":\"r\",\"subzone\":\"s\",\"zone\":\"z\"}",
        ),
    ] {
        assert_eq!(workload[key].to_string(), expected, "{key}");
    }
    let service = &dump["services"][0];
    for (key, expected) in [
        ("vips", "[\"net/10.96.0.1\",\"net/fd00::96\"]"),
        (
            "cidrVips",
            "[{\"cidr\":\"10.97.0.0/16\",\"network\":\"net\"}]",
        ),
        ("ports", "{\"443\":8443,\"80\":0}"),
        ("ipFamilies", "\"Dual\""),
        ("visibility", "\"Namespace\""),
        (
            "endpoints",
            "{\"c//Pod/n/w\":{\"port\":{\"443\":8443,\"80\":8080},\"status\":\"Healthy\",\
             \"workloadUid\":\"c//Pod/n/w\"}}",
        ),
    ] {
        assert_eq!(service[key].to_string(), expected, "{key}");
    }
    assert_eq!(service["loadBalancer"]["mode"], "Failover");
    assert_eq!(service["loadBalancer"]["routingPreferences"][4], "Node");
    let rule = &dump["policies"][0]["rules"][0][0][0];
    assert_eq!(rule["namespaces"][1]["Prefix"], "b");
    assert_eq!(rule["principals"][0].to_string(), "{\"Presence\":[]}");
    assert_eq!(
        rule["sourceIps"].to_string(),
        "[\"10.0.0.0/8\",\"192.0.2.1/32\"]"
    );
    assert_eq!(dump["policies"][0]["dryRun"], true);
}

/// Dumped JSON is YAML, so what was dumped can be loaded again.
#[test]
fn a_dump_loads_again() {
    for text in [EXAMPLE, EVERY_KEY] {
        let first = dump::config_dump(&parse("first", text).unwrap());
        let second = dump::config_dump(&parse("second", &first.to_string()).unwrap());
        assert_eq!(first, second);
    }
}

#[test]
fn an_empty_mesh_must_be_meant() {
    assert_eq!(parse("mesh.yaml", "{}").unwrap().workloads().len(), 0);
    assert_eq!(
        parse("mesh.yaml", "workloads: []\n")
            .unwrap()
            .workloads()
            .len(),
        0
    );
    for text in ["", "\n\n", "# nothing\n", "---\n", "null", "~"] {
        let error = refused(text);
        assert!(
            error.starts_with("mesh.yaml: the mesh configuration is empty"),
            "{error}"
        );
    }
}

#[test]
fn unreadable_text_is_refused_with_its_place() {
    for (text, wanted) in [
        (
            "workloads:\n- {uid: a, nmae: b}",
            "mesh.yaml:2:12: unknown field `nmae`",
        ),
        ("workload: []", "mesh.yaml:1:1: unknown field `workload`"),
        ("workloads: {}", "mesh.yaml:1:12: "),
        (
            "workloads:\n- {protocol: hbone}",
            "mesh.yaml:2:14: unknown variant `hbone`",
        ),
        (
            "workloads:\n- {workloadIps: [10.0.0.300]}",
            "mesh.yaml:2:18: `10.0.0.300`: must be an IPv4 or IPv6 address",
        ),
        (
            "workloads:\n- {workloadIps: [\"10.0.0.301\"]}",
            "mesh.yaml:2:18: `10.0.0.301`: must be an IPv4 or IPv6 address",
        ),
        (
            "workloads:\n- {waypoint: {destination: nowhere}}",
            "mesh.yaml:2:28: `nowhere` is neither network/ip",
        ),
        (
            "workloads:\n- {services: {example.com: {80: 80}}}",
            "`example.com` is not namespace/hostname",
        ),
        (
            "workloads:\n- {services: {n/e.com: {80: 80000}}}",
            "mesh.yaml:2:29: `80000`: must be a number from 0 to 65535",
        ),
        (
            "workloads:\n- {uid: a, uid: b}",
            "mesh.yaml:2:12: `uid`: duplicate mapping key",
        ),
        (
            "services:\n- vips: [10.0.0.1]",
            "mesh.yaml:2:10: `10.0.0.1` is not network/ip",
        ),
        (
            "services:\n- cidrVips: [{cidr: 10.0.0.0/33}]",
            "`10.0.0.0/33` is not an address or CIDR",
        ),
        (
            "policies:\n- {name: p, namespace: n, rules: [[[{sourceIps: [10.0.0/8]}]]]}",
            "`10.0.0/8` is not an address or CIDR",
        ),
        (
            "policies:\n- {name: p, namespace: n, rules: [[[{principals: [{Prefx: x}]}]]]}",
            "unknown variant `Prefx`",
        ),
        (
            "policies:\n- {name: p, namespace: n, rules: [[{principals: []}]]}",
            "mesh.yaml:2:",
        ),
        ("policies:\n- {namespace: n}", "missing field `name`"),
        ("workloads: [", "mesh.yaml:1:"),
        ("a: b: c", "mesh.yaml:1:"),
        ("\u{0}", "mesh.yaml"),
    ] {
        let error = refused(text);
        assert!(error.contains(wanted), "{text:?}: {error}");
    }
}

#[test]
fn an_invalid_mesh_is_refused_with_the_place_of_the_item() {
    let text = "workloads:\n- {uid: a, name: a, namespace: n, workloadIps: [10.0.0.1]}\n\
                - uid: b\n  name: b\n  namespace: n\n  workloadIps: [10.0.0.1]\n";
    let error = refused(text);
    assert!(
        error.starts_with("mesh.yaml:3:3: workload `b`: workloadIps `/10.0.0.1`"),
        "{error}"
    );
    let text = "services:\n- {name: a, namespace: n, hostname: h, ports: {0: 1}}";
    let error = refused(text);
    assert!(
        error.starts_with("mesh.yaml:2:3: service `n/h`: ports `0: 1` must be"),
        "{error}"
    );
    let text = "policies:\n- {name: a, namespace: n}\n- {name: a, namespace: n}";
    let error = refused(text);
    assert!(
        error.starts_with("mesh.yaml:3:3: policy `n/a` is configured twice"),
        "{error}"
    );
}

#[test]
fn files_that_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let load = |name: &str| LocalConfig::File(dir.path().join(name)).load().unwrap_err();
    let text = load("missing.yaml").to_string();
    assert!(
        text.contains("missing.yaml: cannot read the mesh configuration"),
        "{text}"
    );
    assert!(text.contains("check LOCAL_XDS_PATH"), "{text}");
    std::fs::create_dir(dir.path().join("directory")).unwrap();
    assert!(matches!(load("directory"), LoadError::Read { .. }));
    let mut file = std::fs::File::create(dir.path().join("binary")).unwrap();
    file.write_all(&[0xff, 0xfe, 0x00]).unwrap();
    assert!(matches!(load("binary"), LoadError::Read { .. }));
    let huge = std::fs::File::create(dir.path().join("huge")).unwrap();
    huge.set_len(control::local::CONFIG_LEN_MAX + 1).unwrap();
    assert!(matches!(load("huge"), LoadError::TooLarge { .. }));
}

#[test]
fn settings_exclude_each_other() {
    let settings = LocalConfig::from_settings;
    assert!(matches!(
        settings(Some("/a"), Some("{}")),
        Err(LoadError::Both)
    ));
    assert_eq!(settings(None, None).unwrap(), None);
    assert_eq!(settings(Some(""), Some("")).unwrap(), None);
    assert_eq!(
        settings(Some("/a"), None).unwrap(),
        Some(LocalConfig::File("/a".into()))
    );
    let inline = settings(Some(""), Some("workloads: [{x: 1}]"))
        .unwrap()
        .unwrap();
    let error = inline.load().unwrap_err().to_string();
    assert!(
        error.starts_with("LOCAL_XDS:1:14: unknown field `x`"),
        "{error}"
    );
}

#[test]
fn a_large_mesh_fits_the_readers_limits() {
    let mut text = String::from("workloads:\n");
    for n in 0..12_000_u32 {
        let ip = std::net::Ipv4Addr::from(0x0a00_0000 + n);
        text.push_str(&format!(
            "- {{uid: c//Pod/n/w{n}, name: w{n}, namespace: n, serviceAccount: sa, node: node-{}, \
             workloadIps: [{ip}], protocol: HBONE, canonicalName: app, canonicalRevision: v1, \
             services: {{n/s.example: {{80: 8080}}}}}}\n",
            n % 100
        ));
    }
    text.push_str(
        "services:\n- {name: s, namespace: n, hostname: s.example, vips: [/10.96.0.1], \
        ports: {80: 80}}\n",
    );
    let snapshot = parse("mesh.yaml", &text).unwrap();
    assert_eq!(snapshot.workloads().len(), 12_000);
    assert_eq!(snapshot.services()[0].endpoints().len(), 12_000);
}
