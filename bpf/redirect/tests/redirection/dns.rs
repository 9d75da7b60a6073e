//! Capture of DNS, which is off unless asked for.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;

use redirect::{ListenerMap, Role, Settings};
use socket2::{Domain, Protocol, Socket, Type};

use crate::shared::{EBPF, FAITHFUL, HARDENED, Kind, check};
use crate::topology::{APP1, NODE, PLAIN, REMOTE, Server, Topology, can_run, inside};

fn dns_settings(kind: Kind, topology: &Topology) -> Settings {
    Settings {
        dns: true,
        ..kind.settings(topology)
    }
}

fn install(kind: Kind, topology: &Topology) {
    let settings = dns_settings(kind, topology);
    inside(&topology.netns("node"), || {
        let mut redirection = kind.create(settings);
        redirection.install().unwrap();
        redirection.add_pods(&topology.pods()).unwrap();
    });
}

fn udp(netns: &Path, address: SocketAddr, transparent: bool) -> UdpSocket {
    inside(netns, || {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).unwrap();
        socket.set_reuse_address(true).unwrap();
        if transparent {
            socket.set_ip_transparent_v4(true).unwrap();
        }
        socket.bind(&address.into()).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        socket.into()
    })
}

fn any(port: u16) -> SocketAddr {
    (Ipv4Addr::UNSPECIFIED, port).into()
}

#[test]
fn ebpf_brings_queries_to_ztunnel() {
    if !can_run("ebpf_brings_queries_to_ztunnel") {
        return;
    }
    let topology = Topology::new();
    install(EBPF, &topology);
    let netns = topology.netns("ztunnel");
    let server = udp(&netns, (Ipv6Addr::UNSPECIFIED, 15053).into(), true);
    let map = topology.bpffs().join("listeners");
    ListenerMap::open(&map)
        .unwrap()
        .set(Role::DnsUdp, 0, server.as_fd())
        .unwrap();
    let app = udp(&topology.netns("app1"), any(0), false);
    let mut buffer = [0; 16];
    for _ in 0..2 {
        app.send_to(b"question", (REMOTE, 53)).unwrap();
        let (_, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(from.ip().to_canonical(), APP1);
        // It answers with the address that was asked.
        let answering = udp(&netns, (REMOTE, 53).into(), true);
        let to = SocketAddr::new(from.ip().to_canonical(), from.port());
        answering.send_to(b"answer", to).unwrap();
        let (_, from) = app.recv_from(&mut buffer).unwrap();
        assert_eq!(from, (REMOTE, 53).into());
    }
    // Over TCP, too; a stranger's query to a mesh pod is not a query of that pod.
    let mut map = vec![Server::ztunnel(
        &netns,
        Role::DnsTcp,
        "dns",
        Some((&map, 0)),
    )];
    check(&topology, "app1", (REMOTE, 53), "dns");
    // Also to a cache on the node, as over UDP.
    topology.ip("node", "addr add 169.254.20.10/32 dev lo");
    inside(&topology.netns("node"), || {
        let mut redirection = EBPF.create(dns_settings(EBPF, &topology));
        redirection.follow_node().unwrap();
    });
    for cache in [NODE, Ipv4Addr::new(169, 254, 20, 10)] {
        check(&topology, "app1", (cache, 53), "dns");
        app.send_to(b"question", (cache, 53)).unwrap();
        assert_eq!(
            server.recv_from(&mut buffer).unwrap().1.ip().to_canonical(),
            APP1
        );
    }
    let plain = topology.bpffs().join("listeners");
    let plain = Some((plain.as_path(), 0));
    map.push(Server::ztunnel(&netns, Role::InboundPlain, "plain", plain));
    check(&topology, "plain", (APP1, 53), "plain");
    let inbound = udp(&topology.netns("app1"), any(53), false);
    let plain = udp(&topology.netns("plain"), any(0), false);
    plain.send_to(b"hello", (APP1, 53)).unwrap();
    assert_eq!(inbound.recv_from(&mut buffer).unwrap().1.ip(), PLAIN);
}

#[test]
fn iptables_brings_queries_to_ztunnel() {
    if !can_run("iptables_brings_queries_to_ztunnel") {
        return;
    }
    for kind in [FAITHFUL, HARDENED] {
        let topology = Topology::new();
        install(kind, &topology);
        let netns = topology.netns("ztunnel");
        let server = udp(&netns, any(15053), false);
        let app = udp(&topology.netns("app1"), any(0), false);
        let mut buffer = [0; 16];
        app.send_to(b"question", (REMOTE, 53)).unwrap();
        let (_, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(from.ip(), APP1);
        server.send_to(b"answer", from).unwrap();
        let (_, from) = app.recv_from(&mut buffer).unwrap();
        assert_eq!(from, (REMOTE, 53).into());
        // Over TCP Istio had it captured as any other.
        let _servers = kind.listeners(&topology);
        let _dns = Server::app(&netns, 15053);
        let answer = topology.ask("app1", (REMOTE, 53)).unwrap();
        let expected = if kind == HARDENED { "app" } else { "outbound" };
        assert_eq!(answer.label, expected);
        check(&topology, "app1", (REMOTE, 80), "outbound");
    }
}

#[test]
fn dns_is_left_alone_by_default() {
    if !can_run("dns_is_left_alone_by_default") {
        return;
    }
    for kind in [EBPF, HARDENED] {
        let topology = Topology::new();
        kind.install(&topology);
        let remote = udp(&topology.netns("remote"), any(53), false);
        let app = udp(&topology.netns("app1"), any(0), false);
        let mut buffer = [0; 16];
        app.send_to(b"question", (REMOTE, 53)).unwrap();
        let (_, from) = remote.recv_from(&mut buffer).unwrap();
        assert_eq!(from.ip(), APP1);
        remote.send_to(b"answer", from).unwrap();
        assert_eq!(app.recv_from(&mut buffer).unwrap().1, (REMOTE, 53).into());
    }
}
