//! Errors reach the socket whose packet caused them: refusals by resets and by ICMP, path MTU.
//! With conntrack judging, in both families, past the node's stack and through it.

use std::io::ErrorKind;
use std::net::SocketAddr;

use redirect::Role;

use crate::topology::{Echo, Topology, can_run, inside, run};
use crate::ways::{NETS, Net, at, cluster, install, ip, judge, judged_cluster, rules};

/// More than any segment, and than what a handshake lets through.
const LONG: usize = 300_000;

/// The kernel's bounds on ICMP errors are not what is tried here.
fn unlimited_icmp(topology: &Topology) {
    for host in ["node", "remote", "app1"] {
        for name in ["net/ipv4/icmp_ratelimit", "net/ipv6/icmp/ratelimit"] {
            topology.sysctl(host, name, "0");
        }
    }
}

/// Has `host` refuse what is for this port, by a reset (even ports) or by ICMP (odd ones).
fn refuse(topology: &Topology, net: &Net, host: &str, chain: &str, port: u16) {
    let how = match (port.is_multiple_of(2), net.tool) {
        (true, _) => "tcp-reset",
        (false, "iptables") => "icmp-port-unreachable",
        (false, _) => "icmp6-port-unreachable",
    };
    let line = format!("-I {chain} -p tcp --dport {port} -j REJECT --reject-with {how}");
    inside(&topology.netns(host), || {
        run(&format!("{} -w {line}", net.tool));
    });
}

const ON_THE_NODE: [u16; 2] = [8090, 8091];
const ON_THE_OTHER_NODE: [u16; 2] = [8092, 8093];
const IN_THE_POD: [u16; 2] = [8094, 8095];
const TO_THE_NODE: [u16; 2] = [8096, 8097];
/// Of HBONE, which a node without redirection refuses.
const HBONE: u16 = 15008;

/// Whoever stands in between refuses; the dialler is told at once, as without a mesh.
#[test]
fn a_refusal_reaches_whoever_dialled() {
    if !can_run("a_refusal_reaches_whoever_dialled") {
        return;
    }
    let (topology, _servers) = judged_cluster();
    unlimited_icmp(&topology);
    let mut wrong = Vec::new();
    for net in NETS {
        let mut cells: Vec<(&str, Option<&str>, SocketAddr)> = Vec::new();
        for port in ON_THE_NODE {
            refuse(&topology, net, "node", "FORWARD", port);
            for to in [net.outside, net.other_node, net.remote, net.plain] {
                cells.push(("ztunnel", Some(net.app1), at(to, port)));
            }
        }
        for port in ON_THE_OTHER_NODE.into_iter().chain([HBONE]) {
            refuse(&topology, net, "remote", "INPUT", port);
            cells.push(("ztunnel", Some(net.app1), at(net.remote, port)));
            cells.push(("ztunnel", Some(net.app1), at(net.outside, port)));
        }
        // ztunnel speaks with the client's address here, which is another node's, or this node's.
        for port in IN_THE_POD {
            refuse(&topology, net, "app1", "INPUT", port);
            for from in [net.remote, net.outside, net.app2, net.plain, net.underlay] {
                cells.push(("ztunnel", Some(from), at(net.app1, port)));
            }
        }
        for port in TO_THE_NODE {
            refuse(&topology, net, "node", "INPUT", port);
            cells.push(("app1", None, at(net.underlay, port)));
        }
        // A service without endpoints.
        let service = format!("{}{}", net.service, 9);
        let line = format!("-I FORWARD -p tcp -d {service} -j REJECT");
        rules(&topology, net, &[line]);
        cells.push(("ztunnel", Some(net.app1), at(&service, 80)));
        for (host, from, to) in cells {
            let result = topology.ask_any(host, from.map(ip), to);
            if result.as_ref().err().map(std::io::Error::kind) != Some(ErrorKind::ConnectionRefused)
            {
                wrong.push(format!("{host} {from:?} -> {to}: {result:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A pod behind a link with a smaller MTU, two hops away: `plain` by way of the other node.
fn narrow_link(topology: &Topology) {
    let (remote, plain) = (topology.name("remote"), topology.name("plain"));
    run(&format!(
        "ip link add deep netns {remote} type veth peer name deep netns {plain}"
    ));
    for (host, last) in [("remote", 1), ("plain", 2)] {
        topology.sysctl(host, "net/ipv6/conf/deep/accept_dad", "0");
        topology.ip(host, "link set deep mtu 1300 up");
        topology.ip(host, &format!("addr add 172.31.8.{last}/24 dev deep"));
        topology.ip(host, &format!("addr add fd00:8::{last}/64 dev deep nodad"));
        topology.sysctl(host, "net/ipv4/ip_forward", "1");
        topology.sysctl(host, "net/ipv6/conf/all/forwarding", "1");
    }
    for (net, bits, router, pod) in [
        (NETS[0], "32", "172.31.8.1", "172.31.8.2"),
        (NETS[1], "128 nodad", "fd00:8::1", "fd00:8::2"),
    ] {
        let deep = net.deep;
        topology.ip("plain", &format!("addr add {deep}/{bits} dev lo"));
        topology.ip("remote", &format!("route add {deep} via {pod}"));
        for to in [net.app1, net.underlay] {
            topology.ip("plain", &format!("route add {to} via {router} src {deep}"));
        }
    }
}

/// Established connections and new ones, past the stack and through it, translated or not, to
/// both kinds of ztunnel's sockets and to the pod's own.
#[test]
fn the_paths_mtu_is_found_on_every_way() {
    if !can_run("the_paths_mtu_is_found_on_every_way") {
        return;
    }
    let topology = cluster();
    narrow_link(&topology);
    unlimited_icmp(&topology);
    install(&topology);
    let map = topology.bpffs().join("listeners");
    let ztunnel = topology.netns("ztunnel");
    let _ztunnel =
        [Role::InboundPlain, Role::InboundHbone].map(|role| Echo::role(&ztunnel, role, &map));
    let _deep = [8080, 15008].map(|port| Echo::app(&topology.netns("plain"), port));
    let bytes = vec![7; LONG];
    let mut wrong = Vec::new();
    for net in NETS {
        judge(&topology, net);
        let service = format!("{}{}", net.service, 7);
        let deep = at(net.deep, 8080);
        let lines = [
            format!("-t nat -A PREROUTING -p tcp -d {service} -j DNAT --to {deep}"),
            "-t nat -A PREROUTING -p tcp --dport 30007 -j MASQ".to_owned(),
            format!("-t nat -A PREROUTING -p tcp --dport 30007 -j DNAT --to {deep}"),
        ];
        rules(&topology, net, &lines);
        for (host, from, to) in [
            ("ztunnel", Some(net.app1), deep),
            ("ztunnel", Some(net.app1), at(net.deep, 15008)),
            ("ztunnel", Some(net.app1), at(&service, 80)),
            ("app1", None, at(net.underlay, 30007)),
            ("plain", Some(net.deep), at(net.app1, 8080)),
            ("plain", Some(net.deep), at(net.app1, 15008)),
            // To app1, masqueraded.
            ("plain", Some(net.deep), at(net.underlay, 30005)),
        ] {
            // What an earlier one has found out is not known.
            for host in ["ztunnel", "app1", "node"] {
                topology.ip(host, "-4 route flush cache");
                topology.ip(host, "-6 route flush cache");
            }
            for which in ["established", "new"] {
                let mut talk = topology.talk_any(host, from.map(ip), to);
                talk.ping().unwrap();
                if let Err(error) = talk.exchange(&bytes) {
                    wrong.push(format!("{host} {from:?} -> {to}, {which}: {error}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Connections that are older than the capture are the pod's own, and so is what is said of them.
#[test]
fn older_connections_find_the_paths_mtu() {
    if !can_run("older_connections_find_the_paths_mtu") {
        return;
    }
    let topology = cluster();
    unlimited_icmp(&topology);
    let _remote = Echo::app(&topology.netns("remote"), 8080);
    let mut talks: Vec<_> = NETS
        .iter()
        .map(|net| topology.talk("app1", at(net.remote, 8080)))
        .collect();
    talks.iter_mut().for_each(|talk| talk.ping().unwrap());
    install(&topology);
    topology.narrow_underlay(1300);
    for talk in &mut talks {
        talk.exchange(&vec![7; LONG]).unwrap();
    }
}
