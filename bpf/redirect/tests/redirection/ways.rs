//! A connection takes one way in both directions, where a node's conntrack judges: kube-proxy's
//! rules in small on the node, every pair of ends that meets them, both families.

use std::net::{IpAddr, SocketAddr};

use redirect::{Pod, Redirection, Role, Settings};

use crate::shared::EBPF;
use crate::topology::{Answer, Echo, Server, Topology, can_run, inside, run};

/// The addresses of one family.
#[derive(Debug)]
pub(crate) struct Net {
    pub(crate) tool: &'static str,
    /// As pods know the node, on its underlay, and on an interface that nobody named.
    gateway: Option<&'static str>,
    pub(crate) underlay: &'static str,
    other: &'static str,
    pub(crate) app1: &'static str,
    pub(crate) app2: &'static str,
    pub(crate) plain: &'static str,
    ztunnel: &'static str,
    /// A pod of another node, that node, and a host outside the cluster.
    pub(crate) remote: &'static str,
    pub(crate) other_node: &'static str,
    pub(crate) outside: &'static str,
    /// The same, for which pods' addresses are masqueraded.
    masqueraded: &'static str,
    /// A pod of another node, behind a narrow link if there is one.
    pub(crate) deep: &'static str,
    pod_cidr: &'static str,
    /// Service addresses: this and a last digit.
    pub(crate) service: &'static str,
}

const V4: Net = Net {
    tool: "iptables",
    gateway: Some("10.244.1.1"),
    underlay: "172.31.9.1",
    other: "198.51.100.1",
    app1: "10.244.1.11",
    app2: "10.244.1.12",
    plain: "10.244.1.13",
    ztunnel: "10.244.1.2",
    remote: "10.244.2.11",
    other_node: "172.31.9.2",
    outside: "192.0.2.1",
    masqueraded: "192.0.2.2",
    deep: "10.244.2.99",
    pod_cidr: "10.244.0.0/16",
    service: "10.96.0.",
};

const V6: Net = Net {
    tool: "ip6tables",
    gateway: None, // link-local
    underlay: "fd00:9::1",
    other: "fd00:99::1",
    app1: "fd00:1::11",
    app2: "fd00:1::12",
    plain: "fd00:1::13",
    ztunnel: "fd00:1::2",
    remote: "fd00:2::11",
    other_node: "fd00:9::2",
    outside: "2001:db8::1",
    masqueraded: "2001:db8::2",
    deep: "fd00:2::99",
    pod_cidr: "fd00::/14",
    service: "fd00:96::",
};

pub(crate) const NETS: [&Net; 2] = [&V4, &V6];

/// Services by last digit, and node ports 30000 + digit: where they lead.
const REMOTE_POD: u16 = 1;
const LOCAL_POD: u16 = 2;
const PLAIN_POD: u16 = 3;
const API_SERVER: u16 = 4;
const HAIRPIN: u16 = 5;
/// Node port with externalTrafficPolicy Local: not masqueraded.
const LOCAL_POLICY: u16 = 6;

pub(crate) fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

fn bracketed(net: &Net, address: &str) -> String {
    if net.tool == "iptables" {
        format!("{address}:8080")
    } else {
        format!("[{address}]:8080")
    }
}

/// Runs lines of iptables on the node.
pub(crate) fn rules(topology: &Topology, net: &Net, lines: &[String]) {
    inside(&topology.netns("node"), || {
        for line in lines {
            run(&format!("{} -w {line}", net.tool));
        }
    });
}

/// What kube-proxy puts on a node in iptables mode, as far as it judges or translates.
pub(crate) fn judge(topology: &Topology, net: &Net) {
    let mut lines = vec![
        "-A FORWARD -m conntrack --ctstate INVALID -j DROP".to_owned(),
        "-t nat -N MASQ".to_owned(),
        "-t nat -A MASQ -j MARK --or-mark 0x4000".to_owned(),
        "-t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE".to_owned(),
        format!(
            "-t nat -A POSTROUTING -s {} -d {} -j MASQUERADE",
            net.pod_cidr, net.masqueraded
        ),
    ];
    for chain in ["PREROUTING", "OUTPUT"] {
        for (digit, pod) in [
            (REMOTE_POD, net.remote),
            (LOCAL_POD, net.app2),
            (PLAIN_POD, net.plain),
            (API_SERVER, net.other_node),
            (HAIRPIN, net.app1),
        ] {
            let to = bracketed(net, pod);
            let vip = format!(
                "-t nat -A {chain} -p tcp -d {}{digit} --dport 80",
                net.service
            );
            let port = format!(
                "-t nat -A {chain} -p tcp -m addrtype --dst-type LOCAL --dport {}",
                30000 + digit
            );
            // A service masquerades only what would come back to where it came from.
            lines.push(format!("{vip} -s {pod} -j MASQ"));
            lines.push(format!("{vip} -j DNAT --to-destination {to}"));
            lines.push(format!("{port} -j MASQ"));
            lines.push(format!("{port} -j DNAT --to-destination {to}"));
        }
        lines.push(format!(
            "-t nat -A {chain} -p tcp -m addrtype --dst-type LOCAL --dport {} \
             -j DNAT --to-destination {}",
            30000 + LOCAL_POLICY,
            bracketed(net, net.app2)
        ));
    }
    rules(topology, net, &lines);
}

fn settings(topology: &Topology) -> Settings {
    let mut settings = topology.settings();
    settings.ztunnel.address_v6 = Some(V6.ztunnel.parse().unwrap());
    settings.node.pod_cidrs = ["10.244.0.0/16", "fd00:1::/64", "fd00:2::/64"]
        .map(|cidr| cidr.parse().unwrap())
        .into();
    settings
}

fn pods(topology: &Topology) -> Vec<Pod> {
    let mut pods = topology.pods();
    pods[0].addresses.push(V6.app1.parse().unwrap());
    pods[1].addresses.push(V6.app2.parse().unwrap());
    pods
}

fn on_node<T: Send>(topology: &Topology, work: impl FnOnce(&mut dyn Redirection) -> T + Send) -> T {
    let settings = settings(topology);
    inside(&topology.netns("node"), || {
        work(EBPF.create(settings).as_mut())
    })
}

pub(crate) fn install(topology: &Topology) {
    on_node(topology, |redirection| {
        redirection.install().unwrap();
        redirection.add_pods(&pods(topology)).unwrap();
    });
}

/// Two families, hosts outside, an interface that the settings do not name.
pub(crate) fn cluster() -> Topology {
    let topology = Topology::new();
    topology.add_ipv6();
    topology.ip("node", "link add other0 type bridge");
    topology.ip("node", "link set other0 up");
    for net in NETS {
        let v6 = net.tool == "ip6tables";
        let bits = if v6 { "128 nodad" } else { "32" };
        // A default route, without which the node does not get as far as translating.
        let services = format!("{}/120", net.service);
        let services = if v6 {
            services
        } else {
            "10.96.0.0/24".to_owned()
        };
        topology.ip(
            "node",
            &format!("route add {services} via {}", net.other_node),
        );
        topology.ip("node", &format!("addr add {}/{bits} dev other0", net.other));
        for outside in [net.outside, net.masqueraded] {
            topology.ip("remote", &format!("addr add {outside}/{bits} dev lo"));
            let route = format!("route add {outside} via {}", net.other_node);
            topology.ip("node", &route);
        }
        topology.ip(
            "remote",
            &format!("route add {} via {}", net.other, net.underlay),
        );
    }
    topology
}

/// With redirection, kube-proxy's rules, and servers everywhere.
pub(crate) fn judged_cluster() -> (Topology, Vec<Server>) {
    let topology = cluster();
    install(&topology);
    for net in NETS {
        judge(&topology, net);
    }
    let mut servers = EBPF.listeners(&topology);
    for host in ["remote", "app1", "app2", "plain"] {
        servers.push(Server::app6(&topology.netns(host), 8080));
    }
    servers.push(Server::app6(&topology.netns("node"), 10250));
    servers.push(Server::app6(&topology.netns("ztunnel"), 15020));
    (topology, servers)
}

/// Who dials from where, what, and who is to answer.
type Cell = (&'static str, Option<&'static str>, SocketAddr, &'static str);

/// Every cell that is not as it should be, told at once.
#[track_caller]
fn check_cells(topology: &Topology, cells: Vec<Cell>) -> Vec<Answer> {
    let (mut wrong, mut answers) = (Vec::new(), Vec::new());
    for (host, from, to, label) in cells {
        let source: Option<IpAddr> = from.map(|from| from.parse().unwrap());
        match topology.ask_any(host, source, to) {
            Ok(answer) if answer.label == label => answers.push(answer),
            other => wrong.push(format!("{host} {from:?} -> {to}: {label}, but {other:?}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    answers
}

/// ztunnel, with a mesh pod's address, to whatever is no pod's.
#[test]
fn what_ztunnel_dials_for_a_pod_comes_back_by_the_way_it_went() {
    if !can_run("what_ztunnel_dials_for_a_pod_comes_back_by_the_way_it_went") {
        return;
    }
    let (topology, _servers) = judged_cluster();
    for net in NETS {
        let vip = |digit: u16| at(&format!("{}{digit}", net.service), 80);
        let dial = |to, label| ("ztunnel", Some(net.app1), to, label);
        let seen = check_cells(
            &topology,
            vec![
                dial(at(net.outside, 8080), "app"),
                dial(at(net.other_node, 8080), "app"),
                dial(at(net.remote, 8080), "app"),
                dial(at(net.plain, 8080), "app"),
                dial(at(net.masqueraded, 8080), "app"),
                dial(vip(REMOTE_POD), "app"),
                dial(vip(PLAIN_POD), "app"),
                dial(vip(API_SERVER), "app"),
                // To a mesh pod of this node by way of the stack: plain text, from outside.
                dial(vip(LOCAL_POD), "plain"),
                dial(vip(HAIRPIN), "plain"),
            ],
        );
        let as_without_a_mesh = |answer: &Answer| answer.peer.ip() == ip(net.app1);
        assert!(seen[..4].iter().all(as_without_a_mesh), "{seen:?}");
        assert_eq!(
            seen[4].peer.ip(),
            ip(net.underlay),
            "masquerading is not skipped"
        );
        assert!(seen[5..9].iter().all(as_without_a_mesh), "{seen:?}");
        // Its own: to a control plane behind a service address, and whoever reads its metrics.
        check_cells(
            &topology,
            vec![
                ("ztunnel", None, vip(REMOTE_POD), "app"),
                ("ztunnel", None, vip(API_SERVER), "app"),
                ("remote", Some(net.outside), at(net.ztunnel, 15020), "app"),
                ("remote", Some(net.remote), at(net.ztunnel, 15020), "app"),
                ("app1", None, at(net.ztunnel, 15020), "app"),
                ("node", None, at(net.ztunnel, 15020), "app"),
            ],
        );
    }
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// To a mesh pod, from whoever may reach it without a mesh.
#[test]
fn what_comes_in_by_the_stack_is_answered_by_the_stack() {
    if !can_run("what_comes_in_by_the_stack_is_answered_by_the_stack") {
        return;
    }
    let (topology, _servers) = judged_cluster();
    for net in NETS {
        let port = |digit: u16| 30000 + digit;
        let mut cells = Vec::new();
        for from in [net.outside, net.other_node, net.remote] {
            for (to, label) in [
                (at(net.app1, 8080), "plain"),
                (at(net.app1, 15008), "hbone"),
                (at(net.underlay, port(LOCAL_POD)), "plain"),
                (at(net.underlay, port(HAIRPIN)), "plain"),
                (at(net.underlay, port(PLAIN_POD)), "app"),
                (at(net.other, port(LOCAL_POLICY)), "plain"),
            ] {
                cells.push(("remote", Some(from), to, label));
            }
        }
        for digit in [LOCAL_POD, LOCAL_POLICY] {
            cells.push(("plain", None, at(net.underlay, port(digit)), "plain"));
        }
        cells.push((
            "plain",
            None,
            at(&format!("{}{LOCAL_POD}", net.service), 80),
            "plain",
        ));
        cells.push(("plain", None, at(net.app1, 15008), "hbone"));
        // A probe, as a process of the node reaches a service, too.
        cells.push(("node", None, at(net.app1, 8080), "app"));
        cells.push((
            "node",
            None,
            at(&format!("{}{LOCAL_POD}", net.service), 80),
            "app",
        ));
        let seen = check_cells(&topology, cells);
        for answer in seen.iter().filter(|answer| answer.label == "hbone") {
            assert_eq!(answer.peer, answer.client, "{answer:?}");
        }
        // Policy Local keeps the client's address, masquerading hides it.
        assert_eq!(seen[5].peer, seen[5].client);
        assert_ne!(seen[2].peer.ip(), seen[2].client.ip());
    }
}

/// From a mesh pod to its node: to the node's own servers, and to whatever a node port leads to.
#[test]
fn a_pod_reaches_node_ports_on_every_address_of_its_node() {
    if !can_run("a_pod_reaches_node_ports_on_every_address_of_its_node") {
        return;
    }
    let (topology, _servers) = judged_cluster();
    for net in NETS {
        let mut cells: Vec<Cell> = Vec::new();
        for address in [Some(net.underlay), Some(net.other), net.gateway] {
            let Some(address) = address else { continue };
            for (port, label) in [
                (10250, "app"),
                (30000 + REMOTE_POD, "app"),
                (30000 + PLAIN_POD, "app"),
                (30000 + LOCAL_POD, "plain"),
                (30000 + HAIRPIN, "plain"),
                (30000 + LOCAL_POLICY, "plain"),
            ] {
                cells.push(("app1", None, at(address, port), label));
                // Two at once and one after the other, from new ports.
                cells.push(("app1", None, at(address, port), label));
            }
        }
        // The same ends by the direct way are ztunnel's as ever.
        cells.push(("app1", None, at(net.app2, 8080), "outbound"));
        check_cells(&topology, cells);
    }
}

/// ztunnel for a pod whose address another has put on a packet: still nobody's.
#[test]
fn a_translated_connection_is_no_way_to_take_a_pods_address() {
    if !can_run("a_translated_connection_is_no_way_to_take_a_pods_address") {
        return;
    }
    let (topology, _servers) = judged_cluster();
    for net in NETS {
        let service = at(&format!("{}{LOCAL_POD}", net.service), 80);
        for to in [service, at(net.underlay, 30000 + LOCAL_POLICY)] {
            crate::ebpf::expect_drop(&topology, "app_inbound", "spoofed", || {
                topology.ask_any("plain", Some(ip(net.app1)), to).is_ok()
            });
        }
        let to = at(net.underlay, 30000 + LOCAL_POLICY);
        crate::ebpf::expect_drop(&topology, "app_inbound", "spoofed", || {
            topology.ask_any("remote", Some(ip(net.app1)), to).is_ok()
        });
    }
}

/// The kubelet's probe has whatever address the node has towards the pod, and that may change.
#[test]
fn probes_from_any_address_of_the_node_reach_the_app() {
    if !can_run("probes_from_any_address_of_the_node_reach_the_app") {
        return;
    }
    let topology = cluster();
    // The agent is told of an address that pods do not know the node by.
    let mut settings = settings(&topology);
    settings.node.address = [172, 31, 9, 1].into();
    let on_node = |work: &(dyn Fn(&mut dyn Redirection) + Sync)| {
        let settings = settings.clone();
        inside(&topology.netns("node"), || {
            work(EBPF.create(settings).as_mut());
        });
    };
    on_node(&|redirection| {
        redirection.install().unwrap();
        redirection.add_pods(&pods(&topology)).unwrap();
    });
    let _ztunnel = EBPF.listeners(&topology);
    let _app = Server::app6(&topology.netns("app1"), 8080);
    let probe = |from: &str, to: &str| topology.ask_any("node", Some(ip(from)), at(to, 8080));
    for net in NETS {
        for from in [Some(net.underlay), Some(net.other), net.gateway] {
            let Some(from) = from else { continue };
            let answer = probe(from, net.app1).unwrap();
            assert_eq!((answer.label.as_str(), answer.peer.ip()), ("app", ip(from)));
        }
        let answer = topology.ask_any("node", None, at(net.app1, 8080)).unwrap();
        assert_eq!(answer.label, "app", "{answer:?}");
    }
    // Addresses come and go while everything runs.
    let new = [
        ("198.51.100.9", V4.app1, "32"),
        ("fd00:99::9", V6.app1, "128 nodad"),
    ];
    for (address, _, bits) in new {
        topology.ip("node", &format!("addr add {address}/{bits} dev other0"));
    }
    on_node(&|redirection| redirection.follow_node().unwrap());
    for (address, to, bits) in new {
        assert_eq!(probe(address, to).unwrap().label, "app", "{address}");
        topology.ip(
            "node",
            &format!(
                "addr del {address}/{} dev other0",
                bits.trim_end_matches(" nodad")
            ),
        );
    }
    on_node(&|redirection| redirection.follow_node().unwrap());
    // No longer the node's: what dials it is captured.
    for (address, _, _) in new {
        let answer = topology.ask_any("app1", None, at(address, 80)).unwrap();
        assert_eq!(answer.label, "outbound", "{address}");
    }
    // Services are no addresses of the node although IPVS puts them on an interface.
    topology.ip("node", "link add kube-ipvs0 type bridge");
    topology.ip("node", "addr add 10.96.0.1/32 dev kube-ipvs0");
    on_node(&|redirection| redirection.follow_node().unwrap());
    let answer = topology.ask_any("app1", None, at("10.96.0.1", 80)).unwrap();
    assert_eq!(answer.label, "outbound");
}

/// More than fits into what a handshake lets through, both ways, over every kind of way.
#[test]
fn long_conversations_keep_their_way() {
    if !can_run("long_conversations_keep_their_way") {
        return;
    }
    let topology = cluster();
    install(&topology);
    for net in NETS {
        judge(&topology, net);
    }
    let bpffs = topology.bpffs();
    let map = bpffs.join("listeners");
    let _plain = Echo::role(&topology.netns("ztunnel"), Role::InboundPlain, &map);
    let _echoes = ["remote", "plain"].map(|host| Echo::app(&topology.netns(host), 8080));
    let bytes = vec![7; 400_000];
    for net in NETS {
        let vip = |digit: u16| at(&format!("{}{digit}", net.service), 80);
        let cells = [
            ("ztunnel", Some(net.app1), at(net.outside, 8080)),
            ("ztunnel", Some(net.app1), vip(REMOTE_POD)),
            ("ztunnel", Some(net.app1), vip(LOCAL_POD)),
            ("app1", None, at(net.underlay, 30000 + REMOTE_POD)),
            ("app1", None, at(net.other, 30000 + LOCAL_POD)),
            ("app1", None, at(net.other, 30000 + LOCAL_POLICY)),
            ("remote", Some(net.outside), at(net.app1, 8080)),
            (
                "remote",
                Some(net.remote),
                at(net.underlay, 30000 + LOCAL_POLICY),
            ),
        ];
        for (host, from, to) in cells {
            let mut talk = topology.talk_any(host, from.map(ip), to);
            for message in [&bytes[..100], &bytes, &bytes[..1]] {
                let done = talk.exchange(message);
                done.unwrap_or_else(|e| panic!("{host} {from:?} -> {to}: {e}"));
            }
        }
    }
}

/// Forgets what was noted of connections, as when others have pushed it out.
fn forget_stack_flows(topology: &Topology) -> usize {
    let pin = topology.bpffs().join("stack_flows");
    let pin = pin.display();
    let shown = run(&format!("bpftool -j map dump pinned {pin}"));
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let all = shown.as_array().unwrap();
    for entry in all {
        let key = entry["key"].as_array().unwrap();
        let key: Vec<_> = key.iter().map(|byte| byte.as_str().unwrap()).collect();
        let key = key.join(" ").replace("0x", "");
        run(&format!("bpftool map delete pinned {pin} key hex {key}"));
    }
    all.len()
}

/// The notes are bounded, and a pod that dials its node without end costs others' connections
/// nothing: they are noted again.
#[test]
fn a_connection_whose_note_was_pushed_out_goes_on() {
    if !can_run("a_connection_whose_note_was_pushed_out_goes_on") {
        return;
    }
    let topology = cluster();
    install(&topology);
    let map = topology.bpffs().join("listeners");
    let _plain = Echo::role(&topology.netns("ztunnel"), Role::InboundPlain, &map);
    let _remote = Echo::app(&topology.netns("remote"), 8080);
    let mut talks = Vec::new();
    for net in NETS {
        judge(&topology, net);
        for digit in [REMOTE_POD, LOCAL_POD, LOCAL_POLICY] {
            talks.push(topology.talk("app1", at(net.underlay, 30000 + digit)));
        }
        let service = at(&format!("{}{LOCAL_POD}", net.service), 80);
        talks.push(topology.talk_any("ztunnel", Some(ip(net.app1)), service));
    }
    for _ in 0..3 {
        talks.iter_mut().for_each(|talk| talk.ping().unwrap());
        // For each of the pod's, and for those to another mesh pod that are not masqueraded.
        assert!(forget_stack_flows(&topology) >= 10);
    }
}
