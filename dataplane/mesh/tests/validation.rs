//! What is wrong with a mesh is said in one line that names the item, the field and the value.
#![allow(clippy::unwrap_used, reason = "a failed helper is a failed test")]

mod support;

use support::{error, snapshot};

/// Runs a table of pairs of lines: YAML, then part of the message about it.
fn check(table: &str, yaml: impl Fn(&str) -> String) {
    let lines: Vec<&str> = table.lines().filter(|line| !line.is_empty()).collect();
    assert!(!lines.is_empty());
    for pair in lines.chunks(2) {
        let wanted = pair[1].strip_prefix("  => ").unwrap();
        let text = error(&yaml(pair[0]));
        assert!(text.contains(wanted), "{}\n  {text}", pair[0]);
        assert!(!text.contains('\n'), "more than one line: {text}");
    }
}

const WHOLE: &str = "
workloads: [{name: w, namespace: n}]
  => workload `w`: uid `` must not be empty
workloads: [{uid: u, namespace: n}]
  => workload `u`: name `` must not be empty
workloads: [{uid: u, name: w}]
  => workload `u`: namespace `` must not be empty
workloads: [{uid: u, name: a, namespace: n}, {uid: u, name: b, namespace: n}]
  => workload `u` is configured twice: uid must be unique
services: [{namespace: n, hostname: h.example}]
  => service `n/h.example`: name `` must not be empty
services: [{name: s, hostname: h.example}]
  => service `/h.example`: namespace `` must not be empty
services: [{name: s, namespace: n}]
  => service `n/`: hostname `` is not a DNS name
services: [{name: a, namespace: n, hostname: h.x}, {name: b, namespace: n, hostname: h.x}]
  => service `n/h.x` is configured twice: namespace and hostname must be unique
policies: [{name: '', namespace: n}]
  => policy `n/`: name `` must not be empty
policies: [{name: p, namespace: n}, {name: p, namespace: n}]
  => policy `n/p` is configured twice: namespace and name must be unique
policies: [{name: p, namespace: n, rules: [[[{destinationPorts: [0]}]]]}]
  => policy `n/p`: destinationPorts `0` must be 1-65535
policies: [{name: p, namespace: n, rules: [[[{notDestinationPorts: [0]}]]]}]
  => policy `n/p`: notDestinationPorts `0` must be 1-65535
";

const WORKLOAD: &str = "
workloadIps: [10.0.0.9]
  => workload `u`: workloadIps `/10.0.0.9` already belongs to workload `holder`
workloadIps: [10.0.0.1, 10.0.0.1]
  => workload `u`: workloadIps `10.0.0.1` is listed twice
workloadIps: [10.0.0.1, '::ffff:10.0.0.1']
  => workload `u`: workloadIps `10.0.0.1` is listed twice
workloadIps: [0.0.0.0]
  => workload `u`: workloadIps `0.0.0.0` must be the address of one host
workloadIps: [224.0.0.1]
  => workloadIps `224.0.0.1` must be the address of one host
workloadIps: [255.255.255.255]
  => workloadIps `255.255.255.255` must be the address of one host
workloadIps: ['::']
  => workloadIps `::` must be the address of one host
protocol: HBONE
  => workload `u`: workloadIps `[]` must hold an address for protocol HBONE
trustDomain: 'a b'
  => workload `u`: identity trust domain `a b`
serviceAccount: 'a/b'
  => workload `u`: identity service account `a/b`
hostname: 'a b'
  => workload `u`: hostname `a b` is not a DNS name
waypoint: {destination: /10.0.0.9, hboneMtlsPort: 0}
  => workload `u`: waypoint `0` hboneMtlsPort must be 1-65535
networkGateway: {destination: /10.0.0.9, hboneMtlsPort: 0}
  => workload `u`: networkGateway `0` hboneMtlsPort must be 1-65535
authorizationPolicies: [p]
  => workload `u`: authorizationPolicies `p` is not namespace/name
services: {n/h.example: {80: 0}}
  => workload `u`: services `80: 0` must be 1-65535
services: {n/h.example: {0: 80}}
  => workload `u`: services `0: 80` must be 1-65535
";

const SERVICE: &str = "
ports: {0: 80}
  => service `n/h.example`: ports `0: 80` must be 1-65535
vips: [/0.0.0.0]
  => service `n/h.example`: vips `0.0.0.0` must be the address of one host
vips: [/10.0.0.1, /10.0.0.1]
  => service `n/h.example`: vips `/10.0.0.1` is listed twice
weightedWaypoints: [{destination: /10.0.0.1, weight: 0}]
  => service `n/h.example`: weightedWaypoints `weight: 0` needs a weight above 0
weightedWaypoints: [{destination: /10.0.0.1, weight: 1, hboneMtlsPort: 0}]
  => service `n/h.example`: weightedWaypoints `/10.0.0.1` hboneMtlsPort must be 1-65535
waypoint: {destination: /10.0.0.1, hboneMtlsPort: 0}
  => service `n/h.example`: waypoint `0` hboneMtlsPort must be 1-65535
endpoints: {a: {workloadUid: b}}
  => service `n/h.example`: endpoints `a` is not the workloadUid
";

#[test]
fn mistakes() {
    check(WHOLE, str::to_owned);
    check(WORKLOAD, |fields| {
        format!(
            "workloads:\n- {{uid: holder, name: h, namespace: n, workloadIps: [10.0.0.9]}}\n\
             - {{uid: u, name: w, namespace: n, {fields}}}\n"
        )
    });
    check(SERVICE, |fields| {
        format!("services:\n- {{name: s, namespace: n, hostname: h.example, {fields}}}\n")
    });
}

#[test]
fn hostile_names_are_escaped_and_shortened() {
    let long = "x".repeat(5_000);
    let text = error(&format!("workloads: [{{uid: \"a\\nb{long}\", name: w}}]"));
    assert!(text.starts_with("workload `a\\nbxxx"), "{text}");
    assert!(text.len() < 400, "{text}");
}

#[test]
fn who_gets_an_address_that_two_claim() {
    let pod = "{uid: c//Pod/n/p, name: p, namespace: n, workloadIps: [10.0.0.1]}";
    let hbone = "{uid: entry-h, name: h, namespace: n, workloadIps: [10.0.0.1], protocol: HBONE}";
    let plain = "{uid: entry-t, name: t, namespace: n, workloadIps: [10.0.0.1]}";
    let host =
        "{uid: host, name: o, namespace: n, workloadIps: [10.0.0.1], networkMode: HostNetwork}";
    let remote = "{uid: remote, name: r, namespace: n, workloadIps: [10.0.0.1], network: r}";
    for (first, second, expected) in [
        (pod, hbone, "p"),
        (hbone, pod, "p"),
        (hbone, plain, "h"),
        (plain, hbone, "h"),
        (plain, host, "t"),
        (host, plain, "t"),
        (remote, plain, "t"),
    ] {
        let mesh = snapshot(&format!("workloads: [{first}, {second}]"));
        let ip = "10.0.0.1".parse().unwrap();
        assert_eq!(
            &*mesh.workload_by_ip("", ip).unwrap().name,
            expected,
            "{first} {second}"
        );
    }
}

#[test]
fn absent_fields_take_the_control_planes_defaults() {
    for fields in ["", ", trustDomain: '', serviceAccount: '', clusterId: ''"] {
        let mesh = snapshot(&format!(
            "workloads: [{{uid: u, name: w, namespace: n{fields}}}]"
        ));
        let workload = mesh.workload_by_uid("u").unwrap();
        assert_eq!(
            workload.identity().uri(),
            "spiffe://cluster.local/ns/n/sa/default"
        );
        assert_eq!(
            (&*workload.cluster_id, workload.capacity),
            ("Kubernetes", 1)
        );
    }
}

#[test]
fn what_may_still_arrive_is_a_warning() {
    let mesh = snapshot(
        "workloads: [{uid: u, name: w, namespace: n, authorizationPolicies: [n/p], \
         waypoint: {destination: n/wp.example}, services: {n/later.example: {80: 80}}}]\n\
         services: [{name: s, namespace: n, hostname: h.example, vips: [/10.96.0.1], \
         waypoint: {destination: /10.9.9.9}, endpoints: {x: {workloadUid: x}}}, \
         {name: t, namespace: n, hostname: i.example, vips: [/10.96.0.1]}]",
    );
    let all = mesh.warnings().join("\n");
    for wanted in [
        "workload `u`: authorizationPolicies `n/p` is not a policy",
        "workload `u`: services `n/later.example` is not a service",
        "workload `u`: waypoint `n/wp.example` is neither a service nor a workload",
        "service `n/h.example`: waypoint `/10.9.9.9` is neither a service nor a workload",
        "service `n/h.example`: endpoints `x` is not a workload",
        "services `h.example` and `i.example` of namespace `n` both have vips `/10.96.0.1`",
    ] {
        assert!(all.contains(wanted), "{wanted}\nnot in\n{all}");
    }
    assert_eq!(mesh.warnings().len(), 6, "{all}");
}
