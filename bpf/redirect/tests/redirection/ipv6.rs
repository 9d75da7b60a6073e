//! IPv6 through the eBPF redirection, and past the other one.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::path::Path;
use std::time::Duration;

use redirect::{Pod, Redirection, Role, Settings};
use socket2::{Domain, Protocol, Socket, Type};

use crate::ebpf::{counter, expect_drop};
use crate::shared::{EBPF, HARDENED};
use crate::topology::{APP1, Answer, Echo, REMOTE, Server, Topology, can_run, inside};

fn ip(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

const APP1_V6: &str = "fd00:1::11";
const APP2_V6: &str = "fd00:1::12";
const REMOTE_V6: &str = "fd00:2::11";

fn settings(topology: &Topology) -> Settings {
    let mut settings = topology.settings();
    settings.ztunnel.address_v6 = Some(ip("fd00:1::2"));
    settings.node.pod_cidrs = ["10.244.0.0/16", "fd00:1::/64", "fd00:2::/64"]
        .map(|cidr| cidr.parse().unwrap())
        .into();
    settings
}

fn pods(topology: &Topology) -> Vec<Pod> {
    let mut pods = topology.pods();
    pods[0].addresses.push(ip(APP1_V6).into());
    pods[1].addresses.push(ip(APP2_V6).into());
    pods
}

fn on_node<T: Send>(topology: &Topology, work: impl FnOnce(&mut dyn Redirection) -> T + Send) -> T {
    let settings = settings(topology);
    inside(&topology.netns("node"), || {
        work(EBPF.create(settings).as_mut())
    })
}

fn install(topology: &Topology) {
    topology.add_ipv6();
    on_node(topology, |redirection| {
        redirection.install().unwrap();
        redirection.add_pods(&pods(topology)).unwrap();
    });
}

fn ask(topology: &Topology, from: &str, to: (&str, u16)) -> Result<Answer, std::io::Error> {
    topology.ask_any(from, None, (ip(to.0), to.1).into())
}

#[track_caller]
fn check(topology: &Topology, from: &str, to: (&str, u16), label: &str) -> Answer {
    let answer = ask(topology, from, to).unwrap_or_else(|e| panic!("{from} -> {to:?}: {e}"));
    assert_eq!(answer.label, label, "{from} -> {to:?}: {answer:?}");
    assert_eq!(answer.local, (ip(to.0), to.1).into(), "{answer:?}");
    assert_eq!(answer.peer, answer.client, "{answer:?}");
    answer
}

#[test]
fn both_families_are_captured() {
    if !can_run("both_families_are_captured") {
        return;
    }
    let topology = Topology::new();
    topology.add_ipv6();
    let before = topology.traces();
    on_node(&topology, |redirection| {
        redirection.install().unwrap();
        redirection.add_pods(&pods(&topology)).unwrap();
    });
    let _ztunnel = EBPF.listeners(&topology);
    check(&topology, "app1", (REMOTE_V6, 80), "outbound");
    check(&topology, "app1", (APP2_V6, 8080), "outbound");
    check(&topology, "app1", (APP2_V6, 15008), "outbound");
    check(&topology, "app1", ("2001:db8::1", 443), "outbound");
    check(&topology, "remote", (APP1_V6, 80), "plain");
    check(&topology, "remote", (APP1_V6, 15008), "hbone");
    check(&topology, "plain", (APP2_V6, 80), "plain");
    check(&topology, "plain", (APP2_V6, 15008), "hbone");
    crate::shared::check_all_directions(&topology);
    // Neighbour discovery works with the programs in place.
    for host in ["node", "app1", "app2", "plain", "ztunnel"] {
        topology.ip(host, "-6 neigh flush all");
    }
    check(&topology, "app1", (REMOTE_V6, 80), "outbound");
    check(&topology, "plain", (APP2_V6, 80), "plain");
    on_node(&topology, |redirection| redirection.cleanup().unwrap());
    crate::shared::assert_same(&before, &topology.traces());
}

#[test]
fn the_node_and_ztunnel_itself_are_exempt() {
    if !can_run("the_node_and_ztunnel_itself_are_exempt") {
        return;
    }
    let topology = Topology::new();
    install(&topology);
    let _ztunnel = EBPF.listeners(&topology);
    let _app = Server::app6(&topology.netns("app1"), 8080);
    let _on_node = Server::app6(&topology.netns("node"), 10250);
    let _admin = Server::app6(&topology.netns("ztunnel"), 15020);
    check(&topology, "node", (APP1_V6, 8080), "app");
    check(&topology, "app1", ("fd00:9::1", 10250), "app");
    for host in ["app1", "plain", "remote", "node"] {
        check(&topology, host, ("fd00:1::2", 15020), "app");
        expect_drop(&topology, "ztunnel_ingress", "capture_port", || {
            ask(&topology, host, ("fd00:1::2", 15008)).is_ok()
        });
    }
    // ztunnel reaches pods and other nodes with the client's address.
    let _remote = Server::app6(&topology.netns("remote"), 8080);
    for (source, to) in [
        (REMOTE_V6, APP1_V6),
        (APP2_V6, APP1_V6),
        (APP1_V6, REMOTE_V6),
    ] {
        let to: SocketAddr = (ip(to), 8080).into();
        let answer = topology.ask_any("ztunnel", Some(ip(source).into()), to);
        let answer = answer.unwrap_or_else(|e| panic!("{source} -> {to}: {e}"));
        assert_eq!(answer.peer.ip(), IpAddr::from(ip(source)), "{answer:?}");
    }
}

#[test]
fn spoofed_ipv6_sources_are_dropped() {
    if !can_run("spoofed_ipv6_sources_are_dropped") {
        return;
    }
    let topology = Topology::new();
    install(&topology);
    let _ztunnel = EBPF.listeners(&topology);
    let _remote = Server::app6(&topology.netns("remote"), 80);
    let ask = |host: &str, source: &str, to: &str| {
        let to = (ip(to), 80).into();
        topology.ask_any(host, Some(ip(source).into()), to).is_ok()
    };
    expect_drop(&topology, "app_outbound", "spoofed", || {
        ask("app1", APP2_V6, REMOTE_V6)
    });
    for source in ["fd00:1::2", "fd00:9::1", "2001:db8::1"] {
        expect_drop(&topology, "app_outbound", "ipv6", || {
            ask("app1", source, REMOTE_V6)
        });
    }
    expect_drop(&topology, "app_inbound", "spoofed", || {
        ask("plain", APP2_V6, APP1_V6)
    });
    expect_drop(&topology, "underlay_ingress", "spoofed", || {
        ask("remote", APP2_V6, APP1_V6)
    });
}

/// Sends an IPv6 packet made by hand, without the Ethernet header.
fn send_raw(topology: &Topology, host: &str, packet: &[u8], to: Ipv6Addr) {
    inside(&topology.netns(host), || {
        // IPPROTO_RAW: the header is in the packet.
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::from(255))).unwrap();
        let to = SocketAddr::V6(SocketAddrV6::new(to, 0, 0, 0));
        socket.send_to(packet, &to.into()).unwrap();
    });
    // It may wait for neighbour discovery first.
    std::thread::sleep(Duration::from_millis(30));
}

/// A TCP SYN behind an extension header of eight bytes.
fn syn_behind(extension: u8, next: u8, from: Ipv6Addr, to: Ipv6Addr) -> Vec<u8> {
    let tcp = [
        0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0,
    ];
    let mut packet = vec![0x60, 0, 0, 0, 0, 28, extension, 64];
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend([next, 0, 1, 4, 0, 0, 0, 0]);
    packet.extend(tcp);
    packet
}

#[test]
fn extension_headers_do_not_hide_tcp() {
    if !can_run("extension_headers_do_not_hide_tcp") {
        return;
    }
    let topology = Topology::new();
    install(&topology);
    let _ztunnel = EBPF.listeners(&topology);
    let (app, remote) = (ip(APP1_V6), ip(REMOTE_V6));
    let cases = [
        ("app1", app, remote, "app_outbound"),
        ("remote", remote, app, "underlay_ingress"),
        ("plain", ip("fd00:1::13"), app, "app_inbound"),
    ];
    for (host, from, to, program) in cases {
        // Hop-by-hop options, destination options; destination options before more of them.
        for (extension, next) in [(0, 6), (60, 6), (60, 60)] {
            expect_drop(&topology, program, "options", || {
                send_raw(&topology, host, &syn_behind(extension, next, from, to), to);
                false
            });
        }
        expect_drop(&topology, program, "fragment", || {
            send_raw(&topology, host, &syn_behind(44, 6, from, to), to);
            false
        });
    }
    // UDP behind one passes, as a fragment does.
    let before = counter(&topology, "app_outbound", "passed");
    for extension in [44, 60] {
        let packet = syn_behind(extension, 17, app, remote);
        send_raw(&topology, "app1", &packet, remote);
    }
    assert!(counter(&topology, "app_outbound", "passed") >= before + 2);
}

/// A pod's address that nobody listed is not a way around, in neither direction.
#[test]
fn unlisted_addresses_are_dropped() {
    if !can_run("unlisted_addresses_are_dropped") {
        return;
    }
    let topology = Topology::new();
    topology.add_ipv6();
    EBPF.install(&topology);
    let _ztunnel = EBPF.listeners(&topology);
    let _servers = [
        Server::app6(&topology.netns("app1"), 80),
        Server::app6(&topology.netns("remote"), 80),
    ];
    expect_drop(&topology, "app_outbound", "ipv6", || {
        ask(&topology, "app1", (REMOTE_V6, 80)).is_ok()
    });
    // What the pod says of that address is dropped, too, so that nobody finds it.
    let mac = topology.ip("app1", "-br link show dev eth0");
    let mac = mac.split_whitespace().nth(2).unwrap();
    let known = format!("neigh replace {APP1_V6} lladdr {mac} dev va1 nud permanent");
    topology.ip("node", &known);
    for host in ["plain", "remote"] {
        expect_drop(&topology, "app_inbound", "ipv6", || {
            ask(&topology, host, (APP1_V6, 80)).is_ok()
        });
    }
    crate::shared::check(&topology, "app1", (REMOTE, 80), "outbound");
}

#[test]
fn older_ipv6_connections_survive() {
    if !can_run("older_ipv6_connections_survive") {
        return;
    }
    let topology = Topology::new();
    topology.add_ipv6();
    let _remote = Echo::app(&topology.netns("remote"), 80);
    let mut talk = topology.talk("app1", (ip(REMOTE_V6), 80).into());
    talk.ping().unwrap();
    on_node(&topology, |redirection| {
        redirection.install().unwrap();
        redirection.add_pods(&pods(&topology)).unwrap();
    });
    for _ in 0..3 {
        talk.ping().unwrap();
    }
    let map = topology.bpffs().join("listeners");
    let map: Option<(&Path, u32)> = Some((&map, 0));
    let _ztunnel = Server::ztunnel(&topology.netns("ztunnel"), Role::Outbound, "outbound", map);
    check(&topology, "app1", (REMOTE_V6, 80), "outbound");
    assert!(topology.ask("app1", (APP1, 1)).is_err());
}

/// The tunnel path does not carry IPv6: TCP of captured pods is dropped, both ways, and counted.
/// Whoever is not captured, the node itself and other protocols pass, and all do afterwards.
#[test]
fn tcp_by_ipv6_does_not_get_past_the_tunnel_path() {
    if !can_run("tcp_by_ipv6_does_not_get_past_the_tunnel_path") {
        return;
    }
    let topology = Topology::new();
    topology.add_ipv6();
    let before = topology.traces();
    let _remote = Server::app6(&topology.netns("remote"), 80);
    let _app1 = Server::app6(&topology.netns("app1"), 80);
    let passes = |from, to| ask(&topology, from, (to, 80)).is_ok();
    assert!(passes("app1", REMOTE_V6) && passes("remote", APP1_V6));
    HARDENED.on_node(&topology, |redirection| {
        redirection.install().unwrap();
        redirection.add_pods(&pods(&topology)).unwrap();
    });
    assert!(!passes("app1", REMOTE_V6) && !passes("remote", APP1_V6));
    assert!(passes("node", APP1_V6));
    let counters = HARDENED.on_node(&topology, |redirection| {
        redirection.status().unwrap().counters
    });
    let dropped = &counters["node_ipv6"];
    for rule in ["-i va1", "-o va1"] {
        assert!(dropped.keys().any(|key| key.contains(rule)), "{dropped:?}");
    }
    // A pod that is no longer captured is left alone.
    HARDENED.on_node(&topology, |redirection| {
        redirection.install().unwrap();
        redirection.remove_pod(&topology.pods()[0].uid).unwrap();
    });
    assert!(passes("app1", REMOTE_V6) && passes("remote", APP1_V6));
    HARDENED.on_node(&topology, |redirection| redirection.cleanup().unwrap());
    crate::shared::assert_same(&before, &topology.traces());
}
