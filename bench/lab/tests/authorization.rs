//! One verdict per source, destination and port: whatever the route is, and whether the pod is of
//! the client's node or of another. And whose an address is: redirection's word and the
//! configuration's, which may not agree.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use lab::{LabOptions, Redirect};
use serde_json::{Value, json};
use support::{
    Case, PATIENCE, TestLab, at, echo, eventually, program_with, run_cases, run_cases_on, unique,
};

const CASES: &[Case] = &[
    ("a_verdict_is_the_same_on_both_nodes", same_verdict),
    (
        "a_plain_connection_ends_with_its_permission",
        ends_with_permission,
    ),
    ("own_ports_of_hosts_outside_are_reached", outside_hosts),
    ("an_address_speaks_for_the_pod_that_has_it", reused_source),
    (
        "an_address_is_answered_by_the_pod_that_has_it",
        reused_destination,
    ),
    (
        "a_pod_that_is_configured_late_is_waited_for",
        configured_late,
    ),
];

#[test]
fn tunnel() {
    run_cases("tunnel", Redirect::Tunnel, CASES);
}

#[test]
fn ebpf() {
    run_cases("ebpf", Redirect::Ebpf, CASES);
}

#[test]
fn ebpf_with_tunnels_on_the_node() {
    let directory = tempfile::tempdir().unwrap();
    let tunnels = [("SAME_NODE_TUNNEL", "true")];
    let options = LabOptions {
        name: unique("own-tunnel"),
        redirect: Redirect::Ebpf,
        ztunnel: Some(program_with(directory.path(), "ztunnel", &tunnels)),
        ..LabOptions::default()
    };
    run_cases_on("ebpf_with_tunnels_on_the_node", &options, &CASES[..1]);
}

/// Both servers: of the client's node and of the other one.
const SERVERS: [&str; 2] = ["server-a", "server-b"];

/// How a client gets to a server.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// By its address; it is reached by a tunnel.
    Hbone,
    /// By a service's; it is reached by a tunnel.
    HboneService,
    /// By its address; in plain text, although it is enrolled.
    Tcp,
    /// By a service's; in plain text, although it is enrolled.
    TcpService,
    /// By its address, which a service of another namespace lists and does not balance.
    Passthrough,
    /// By its address; it is enrolled and not in the configuration.
    Unknown,
}

const WAYS: [Way; 6] = [
    Way::Hbone,
    Way::HboneService,
    Way::Tcp,
    Way::TcpService,
    Way::Passthrough,
    Way::Unknown,
];

impl Way {
    fn has_identity(self) -> bool {
        matches!(self, Self::Hbone | Self::HboneService)
    }

    fn protocol(self) -> &'static str {
        match self {
            Self::Tcp | Self::TcpService => "TCP",
            _ => "HBONE",
        }
    }

    fn to(self, server: &str, port: u16) -> SocketAddr {
        match self {
            Self::HboneService | Self::TcpService => support::at_vip(server, port),
            _ => at(server, port),
        }
    }
}

/// Each kind of policy has a port of its own. The second: whether a client with an identity is
/// allowed; the third: one without.
const PORTS: [(u16, bool, bool); 10] = [
    (8001, true, true),    // none
    (8002, true, false),   // STRICT
    (8003, true, false),   // ALLOW this client
    (8004, false, false),  // ALLOW another client
    (8005, false, false),  // DENY this address
    (8006, true, true),    // DENY another address
    (8007, false, true),   // DENY this client
    (15001, false, false), // ztunnel's own
    (15006, false, false),
    (15008, false, false),
];

fn policies() -> Value {
    let client =
        |account: &str| json!([{"Exact": format!("cluster.local/ns/default/sa/{account}")}]);
    let policy = |name: &str, action: &str, matches: Value| {
        json!({"name": name, "namespace": "istio-system", "scope": "Global", "action": action,
               "dryRun": false, "rules": [[[matches]]]})
    };
    let free = [8001, 8002, 8005, 8006, 8007, 15001, 15006, 15008];
    json!([
        policy("others", "Allow", json!({"destinationPorts": free})),
        policy(
            "strict",
            "Deny",
            json!({"destinationPorts": [8002],
            "notPrincipals": [{"Presence": []}]})
        ),
        policy(
            "client",
            "Allow",
            json!({"destinationPorts": [8003],
            "principals": client("client-a")})
        ),
        policy(
            "stranger",
            "Allow",
            json!({"destinationPorts": [8004],
            "principals": client("stranger")})
        ),
        policy(
            "address",
            "Deny",
            json!({"destinationPorts": [8005],
            "sourceIps": [format!("{}/32", at("client-a", 0).ip())]})
        ),
        policy(
            "other-address",
            "Deny",
            json!({"destinationPorts": [8006],
            "sourceIps": ["192.0.2.1/32"]})
        ),
        policy(
            "not-client",
            "Deny",
            json!({"destinationPorts": [8007],
            "principals": client("client-a")})
        ),
    ])
}

fn workload(host: &str, name: &str, protocol: &str) -> Value {
    let node = if host.ends_with("-a") {
        "node-a"
    } else {
        "node-b"
    };
    json!({"uid": format!("Kubernetes//v1/Pod/default/{name}"), "name": name,
           "namespace": "default", "serviceAccount": name, "trustDomain": "cluster.local",
           "workloadIps": [at(host, 0).ip()], "protocol": protocol, "node": node, "network": "",
           "workloadName": name, "services": {}})
}

/// The mesh in which `way` is the way to both servers.
fn mesh(way: Way, policies: &Value) -> Value {
    let mut workloads = vec![workload("client-a", "client-a", "HBONE")];
    let mut services = Vec::new();
    let ports: serde_json::Map<_, _> = PORTS
        .iter()
        .map(|(port, ..)| (port.to_string(), json!(port)))
        .collect();
    for server in SERVERS {
        let mut of_server = workload(server, server, way.protocol());
        let key = format!("default/{server}.local");
        of_server["services"] = json!({ key: ports });
        if way != Way::Unknown {
            workloads.push(of_server);
            services.push(json!({"name": server, "namespace": "default",
                "hostname": format!("{server}.local"), "ports": ports,
                "vips": [format!("/{}", support::at_vip(server, 0).ip())]}));
        }
        if way == Way::Passthrough {
            services.push(json!({"name": server, "namespace": "elsewhere",
                "hostname": format!("{server}.elsewhere"), "ports": ports,
                "vips": [format!("/{}", at(server, 0).ip())],
                "loadBalancer": {"mode": "Passthrough"}}));
        }
    }
    json!({"workloads": workloads, "services": services, "policies": policies})
}

fn mesh_path(lab: &TestLab) -> PathBuf {
    lab.lab.directory().join("mesh.yaml")
}

/// Gives both ztunnels another configuration.
fn configure(lab: &TestLab, mesh: &Value) {
    let generation = |host| {
        lab.config_dump(host)["config"]["generation"]
            .as_u64()
            .unwrap()
    };
    let nodes = ["ztunnel-a", "ztunnel-b"].map(|host| (host, generation(host)));
    let text = format!("{mesh:#}\n");
    if fs::read_to_string(mesh_path(lab)).unwrap() == text {
        return;
    }
    fs::write(mesh_path(lab), text).unwrap();
    for (host, before) in nodes {
        eventually("the new configuration", || {
            (generation(host) > before).then_some(())
        });
    }
    thread::sleep(Duration::from_millis(300)); // the workers' turn
}

/// Echoes on these ports of the server until the test's process ends.
fn serve(lab: &TestLab, host: &str, ports: &[u16]) {
    for port in ports {
        let listener = lab.listen(host, *port);
        thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that is refused resets.
                thread::spawn(move || stream.map(echo));
            }
        });
    }
}

/// Whether bytes come back.
fn exchange(stream: &mut TcpStream) -> bool {
    let mut back = [0; 4];
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut back).is_ok()
}

fn is_allowed(lab: &TestLab, client: &str, to: SocketAddr) -> bool {
    lab.try_connect(client, to, PATIENCE)
        .is_ok_and(|mut stream| exchange(&mut stream))
}

/// Of [`SERVERS`], asked at once: a pod that is not known is waited for.
fn allowed(lab: &TestLab, client: &str, port: u16) -> [bool; 2] {
    thread::scope(|scope| {
        let ask = |server| scope.spawn(move || is_allowed(lab, client, at(server, port)));
        SERVERS.map(ask).map(|asked| asked.join().unwrap())
    })
}

fn all_ports() -> Vec<u16> {
    PORTS.iter().map(|(port, ..)| *port).collect()
}

fn same_verdict(lab: &mut TestLab) {
    for server in SERVERS {
        serve(lab, server, &all_ports());
    }
    let policies = policies();
    for way in WAYS {
        configure(lab, &mesh(way, &policies));
        let lab = &*lab;
        let verdicts: Vec<_> = thread::scope(|scope| {
            let ask = |(port, with, without): (u16, bool, bool)| {
                let right = if way.has_identity() { with } else { without };
                let right = right && way != Way::Unknown;
                SERVERS.map(|server| {
                    let is_allowed = move || is_allowed(lab, "client-a", way.to(server, port));
                    (server, port, right, scope.spawn(is_allowed))
                })
            };
            let asked: Vec<_> = PORTS.into_iter().flat_map(ask).collect();
            let answer =
                |(server, port, right, verdict): (_, _, _, thread::ScopedJoinHandle<'_, _>)| {
                    (server, port, right, verdict.join().unwrap())
                };
            asked.into_iter().map(answer).collect()
        });
        let wrong: Vec<_> = verdicts
            .iter()
            .filter(|(_, _, right, is_allowed)| right != is_allowed)
            .collect();
        assert!(
            wrong.is_empty(),
            "{way:?}: (server, port, right, allowed): {wrong:?}"
        );
    }
}

/// A connection of a plain route to a pod of the same node: both sides log it and count it, and a
/// policy that comes later ends it.
fn ends_with_permission(lab: &mut TestLab) {
    serve(lab, "server-a", &[8010]);
    configure(lab, &mesh(Way::Tcp, &json!([])));
    let counted = |reporter: &str| {
        let labels = [
            &*format!("reporter=\"{reporter}\""),
            "destination_workload=\"server-a\"",
        ];
        lab.metrics("ztunnel-a")
            .sum("istio_tcp_connections_opened_total", &labels)
    };
    let before = ["source", "destination"].map(counted);
    let mark = lab.log_length("ztunnel-a");
    let mut open = lab.connect("client-a", at("server-a", 8010));
    assert!(exchange(&mut open), "nothing denies it yet");
    let after = ["source", "destination"].map(counted);
    assert_eq!(after, before.map(|count| count + 1));
    let strict = json!([{"name": "strict", "namespace": "istio-system", "scope": "Global",
        "action": "Deny", "dryRun": false, "rules": [[[{"notPrincipals": [{"Presence": []}]}]]]}]);
    configure(lab, &mesh(Way::Tcp, &strict));
    let error = open.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    eventually("both sides tell why", || {
        let lines = lab.log_since("ztunnel-a", mark);
        let told = |direction: &str| {
            let direction = format!("direction=\"{direction}\"");
            let told = |line: &&String| line.contains("policy change") && line.contains(&direction);
            lines.iter().filter(told).count() == 1
        };
        (told("outbound") && told("inbound")).then_some(())
    });
}

/// A host that is not in the mesh may use the numbers of ztunnel's ports; ztunnel itself may not be
/// dialled there.
fn outside_hosts(lab: &mut TestLab) {
    let ports = [15001, 15006, 15008];
    serve(lab, "plain-b", &ports);
    let mark = lab.log_length("ztunnel-a");
    let mut known = mesh(Way::Hbone, &json!([]));
    configure(lab, &known);
    let refused = |to| !is_allowed(lab, "client-a", to);
    for port in ports {
        assert!(is_allowed(lab, "client-a", at("plain-b", port)), "{port}");
        for host in ["ztunnel-a", "ztunnel-b", "client-a"] {
            assert!(refused(at(host, port)), "{host} {port}");
        }
        assert!(refused(([127, 0, 0, 1], port).into()), "loopback {port}");
    }
    // The same where it is known, as a workload that is not captured.
    let workloads = known["workloads"].as_array_mut().unwrap();
    workloads.push(workload("plain-b", "plain-b", "TCP"));
    workloads.push(workload("ztunnel-a", "ztunnel-a", "TCP"));
    configure(lab, &known);
    for port in ports {
        assert!(is_allowed(lab, "client-a", at("plain-b", port)), "{port}");
        assert!(
            !is_allowed(lab, "client-a", at("ztunnel-a", port)),
            "{port}"
        );
    }
    let lines = lab.log_since("ztunnel-a", mark);
    let loops = lines.iter().filter(|line| line.contains("recursive"));
    assert!(loops.count() < 40, "connections went round in circles");
}

/// The agent of `host`'s node takes `host`'s address for another pod's from now on.
fn rename(lab: &TestLab, host: &str, name: &str) {
    let node = if host.ends_with("-a") {
        "node-a"
    } else {
        "node-b"
    };
    let path = lab.lab.directory().join(format!("{node}-agent.yaml"));
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let address = json!(at(host, 0).ip());
    for pod in config["pods"].as_array_mut().unwrap() {
        if pod["addresses"][0] == address {
            for key in ["uid", "name", "service_account"] {
                pod[key] = json!(name);
            }
        }
    }
    let mark = lab.log_length(node);
    fs::write(&path, format!("{config:#}\n")).unwrap();
    eventually("the agent has captured it", || {
        let lines = lab.log_since(node, mark);
        let applied = |line: &String| line.contains("configuration applied");
        lines.iter().any(applied).then_some(())
    });
    let table = lab.lab.directory().join(node).join("pods/table");
    let line = format!("{}\tdefault\t{name}\t{name}\t{name}\n", at(host, 0).ip());
    let text = fs::read_to_string(&table).unwrap();
    assert!(text.contains(&line), "{text}");
}

fn log_has(lab: &TestLab, host: &str, mark: usize, words: &[&str]) {
    eventually("the log says who, what and why", || {
        let lines = lab.log_since(host, mark);
        let has = |line: &String| words.iter().all(|word| line.contains(word));
        lines.iter().any(has).then_some(())
    });
}

/// The address of client-a goes to another pod while the configuration still has the old one.
fn reused_source(lab: &mut TestLab) {
    let only_old = json!([{"name": "only-old", "namespace": "default", "scope": "Namespace",
        "action": "Allow", "dryRun": false, "rules": [[[{"principals":
            [{"Exact": "cluster.local/ns/default/sa/client-a"}]}]]]}]);
    let old = mesh(Way::Hbone, &only_old);
    configure(lab, &old);
    for server in SERVERS {
        serve(lab, server, &[8020]);
    }
    assert_eq!(allowed(lab, "client-a", 8020), [true; 2]);
    let mark = lab.log_length("ztunnel-a");
    rename(lab, "client-a", "newcomer");
    assert_eq!(
        allowed(lab, "client-a", 8020),
        [false; 2],
        "as the former owner"
    );
    let words = [
        "redirection says it is pod default/newcomer",
        "default/client-a",
        "10.244.1.11",
    ];
    log_has(lab, "ztunnel-a", mark, &words);
    // As itself, once the configuration knows it, and that is somebody else.
    let mut new = old;
    new["workloads"][0] = workload("client-a", "newcomer", "HBONE");
    configure(lab, &new);
    assert_eq!(
        allowed(lab, "client-a", 8020),
        [false; 2],
        "it is not allowed"
    );
    new["policies"] = json!([]);
    configure(lab, &new);
    assert_eq!(allowed(lab, "client-a", 8020), [true; 2], "as itself");
    rename(lab, "client-a", "client-a");
}

/// The address of each server goes to another pod while the configuration still has the old one:
/// by tunnel, by one hop, and in plain text from outside the mesh.
fn reused_destination(lab: &mut TestLab) {
    let old = mesh(Way::Hbone, &json!([]));
    configure(lab, &old);
    for server in SERVERS {
        serve(lab, server, &[8030]);
        assert!(is_allowed(lab, "client-a", at(server, 8030)), "{server}");
        rename(lab, server, "newcomer");
    }
    let lab = &*lab;
    thread::scope(|scope| {
        for (client, server) in [
            ("client-a", "server-a"),
            ("client-a", "server-b"),
            ("plain-b", "server-b"),
            ("plain-b", "server-a"),
        ] {
            scope.spawn(move || {
                let reached = is_allowed(lab, client, at(server, 8030));
                assert!(
                    !reached,
                    "{client} reached whoever has the address of {server}"
                );
            });
        }
    });
    for (host, address) in [("ztunnel-a", "10.244.1.12"), ("ztunnel-b", "10.244.2.11")] {
        let words = ["workload not found", address, "default/newcomer"];
        log_has(lab, host, 0, &words);
    }
    let mut new = old;
    for server in SERVERS {
        let workloads = new["workloads"].as_array_mut().unwrap();
        for known in workloads {
            if known["name"] == server {
                let name = "newcomer";
                let uid = format!("Kubernetes//v1/Pod/default/{name}/{server}");
                *known = workload(server, name, "HBONE");
                known["uid"] = json!(uid);
            }
        }
    }
    configure(lab, &new);
    for (client, server) in [("client-a", "server-a"), ("client-a", "server-b")] {
        assert!(
            is_allowed(lab, client, at(server, 8030)),
            "{client} {server}"
        );
    }
    for server in SERVERS {
        rename(lab, server, server);
    }
}

/// A connection of a pod that the configuration does not have as redirection has it is kept until
/// it does.
fn configured_late(lab: &mut TestLab) {
    serve(lab, "server-b", &[8040]);
    let right = mesh(Way::Hbone, &json!([]));
    let mut stale = right.clone();
    stale["workloads"][0] = workload("client-a", "former", "HBONE");
    configure(lab, &stale);
    let mut waiting = lab.connect("client-a", at("server-b", 8040));
    thread::sleep(Duration::from_millis(200));
    configure(lab, &right);
    assert!(exchange(&mut waiting), "it was not waited for");
}
