//! What only the eBPF redirection promises.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use redirect::{Attach, BackEnd, EbpfSettings, ListenerMap, Redirection, Role};
use socket2::{Domain, Protocol, Socket, Type};

use crate::shared::{EBPF, Kind, check};
use crate::topology::{
    APP1, APP2, NODE, PLAIN, REMOTE, Server, Topology, UNDERLAY, ZTUNNEL, can_run, inside,
};

pub(crate) fn counter(topology: &Topology, program: &str, reason: &str) -> u64 {
    let status = EBPF.on_node(topology, |redirection: &mut dyn Redirection| {
        redirection.status().unwrap()
    });
    status.counters[program].get(reason).copied().unwrap_or(0)
}

/// Fails to connect and the reason's counter says why.
#[track_caller]
pub(crate) fn expect_drop(
    topology: &Topology,
    program: &str,
    reason: &str,
    work: impl FnOnce() -> bool,
) {
    let before = counter(topology, program, reason);
    assert!(!work(), "{program} {reason}: got through");
    let after = counter(topology, program, reason);
    assert!(after > before, "{program} {reason}: {before} then {after}");
}

#[test]
fn spoofed_sources_are_dropped() {
    if !can_run("spoofed_sources_are_dropped") {
        return;
    }
    let topology = Topology::new();
    EBPF.install(&topology);
    let _ztunnel = EBPF.listeners(&topology);
    let _remote = Server::app(&topology.netns("remote"), 80);
    let ask = |host: &str, source: Ipv4Addr, to| topology.ask_from(host, Some(source), to).is_ok();
    // A pod with the address of another mesh pod, of ztunnel, of the node, of a stranger.
    for source in [APP2, ZTUNNEL, NODE, REMOTE, Ipv4Addr::new(8, 8, 8, 8)] {
        expect_drop(&topology, "app_outbound", "spoofed", || {
            ask("app1", source, (REMOTE, 80))
        });
    }
    // A pod outside the mesh, and another node, with a mesh pod's address: to a mesh pod they
    // would pass for that pod's outbound traffic.
    expect_drop(&topology, "app_inbound", "spoofed", || {
        ask("plain", APP2, (APP1, 80))
    });
    expect_drop(&topology, "underlay_ingress", "spoofed", || {
        ask("remote", APP2, (APP1, 80))
    });
    expect_drop(&topology, "underlay_ingress", "spoofed", || {
        ask("remote", APP2, (ZTUNNEL, 15020))
    });
    // UDP from a spoofed source, too.
    let before = counter(&topology, "app_outbound", "spoofed");
    inside(&topology.netns("app1"), || {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP)).unwrap();
        socket.set_ip_transparent_v4(true).unwrap();
        socket.bind(&SocketAddr::from((APP2, 0)).into()).unwrap();
        socket
            .send_to(b"x", &SocketAddr::from((REMOTE, 53)).into())
            .unwrap();
    });
    assert_eq!(counter(&topology, "app_outbound", "spoofed"), before + 1);
}

#[test]
fn capture_ports_of_ztunnel_itself_are_closed() {
    if !can_run("capture_ports_of_ztunnel_itself_are_closed") {
        return;
    }
    let topology = Topology::new();
    EBPF.install(&topology);
    let _ztunnel = EBPF.listeners(&topology);
    let _admin = Server::app(&topology.netns("ztunnel"), 15020);
    for host in ["app1", "plain", "remote", "node"] {
        check(&topology, host, (ZTUNNEL, 15020), "app");
        for port in [15001, 15006, 15008] {
            expect_drop(&topology, "ztunnel_ingress", "capture_port", || {
                topology.ask(host, (ZTUNNEL, port)).is_ok()
            });
        }
    }
    // ztunnel's own connections on loopback are its own business.
    let _local = Server::app(&topology.netns("ztunnel"), 15000);
    check(&topology, "ztunnel", (Ipv4Addr::LOCALHOST, 15000), "app");
}

#[test]
fn each_cpu_gets_its_listener() {
    if !can_run("each_cpu_gets_its_listener") {
        return;
    }
    let topology = Topology::new();
    EBPF.install(&topology);
    let map = topology.bpffs().join("listeners");
    let cpus: Vec<usize> = (0..CpuSet::count())
        .filter(|&cpu| std::path::Path::new(&format!("/sys/devices/system/cpu/cpu{cpu}")).exists())
        .collect();
    let netns = topology.netns("ztunnel");
    let _servers: Vec<_> = cpus
        .iter()
        .map(|&cpu| {
            let label = format!("cpu{cpu}");
            Server::ztunnel(&netns, Role::Outbound, &label, Some((&map, cpu as u32)))
        })
        .collect();
    for _ in 0..10 {
        for &cpu in &cpus {
            let answer = inside(&topology.netns("node"), || {
                let mut set = CpuSet::new();
                set.set(cpu).unwrap();
                sched_setaffinity(Pid::from_raw(0), &set).unwrap();
                // Threads inherit the affinity; the SYN is processed where it is sent.
                topology.ask("app1", (REMOTE, 80)).unwrap()
            });
            assert_eq!(answer.label, format!("cpu{cpu}"));
        }
    }
}

#[test]
fn a_successor_takes_over_without_a_gap() {
    if !can_run("a_successor_takes_over_without_a_gap") {
        return;
    }
    let topology = Topology::new();
    EBPF.install(&topology);
    let map = topology.bpffs().join("listeners");
    let netns = topology.netns("ztunnel");
    let mut old = Server::ztunnel(&netns, Role::Outbound, "g0", Some((&map, 0)));
    for generation in 1..6 {
        let label = format!("g{generation}");
        let new = Server::ztunnel(&netns, Role::Outbound, &label, Some((&map, 0)));
        check(&topology, "app1", (REMOTE, 80), &label);
        drop(old);
        old = new;
        check(&topology, "app1", (REMOTE, 80), &label);
    }
}

#[test]
fn ipv6_is_no_way_around() {
    if !can_run("ipv6_is_no_way_around") {
        return;
    }
    let topology = Topology::new();
    for (host, address, gateway) in [("app1", "fd00::11", "va1"), ("plain", "fd00::13", "vp")] {
        topology.sysctl(host, "net/ipv6/conf/all/accept_dad", "0");
        topology.ip(host, &format!("addr add {address}/128 dev eth0 nodad"));
        topology.ip("node", &format!("addr add fe80::1/64 dev {gateway} nodad"));
        topology.ip(host, "route add default via fe80::1 dev eth0");
        topology.ip("node", &format!("route add {address}/128 dev {gateway}"));
    }
    topology.sysctl("node", "net/ipv6/conf/all/forwarding", "1");
    let connect = |from: &str, to: &str| {
        let to: SocketAddr = format!("[{to}]:80").parse().unwrap();
        inside(&topology.netns(from), || {
            std::net::TcpStream::connect_timeout(&to, Duration::from_millis(1500))
        })
    };
    let listen = |host: &str| {
        inside(&topology.netns(host), || {
            std::net::TcpListener::bind("[::]:80").unwrap()
        })
    };
    let (_app, _plain) = (listen("app1"), listen("plain"));
    connect("app1", "fd00::13").unwrap();
    connect("plain", "fd00::11").unwrap();
    EBPF.install(&topology);
    expect_drop(&topology, "app_outbound", "ipv6", || {
        connect("app1", "fd00::13").is_ok()
    });
    expect_drop(&topology, "app_inbound", "ipv6", || {
        connect("plain", "fd00::11").is_ok()
    });
    // Nor can it be learned on the link where that address is.
    topology.ip("node", "-6 neigh flush dev va1");
    connect("node", "fd00::11").unwrap_err();
    let neighbours = topology.ip("node", "-6 neigh show dev va1");
    let unlisted = |line: &&str| line.starts_with("fd00::11 ");
    let found = neighbours.lines().find(unlisted).unwrap();
    assert!(!found.contains("lladdr"), "{neighbours}");
}

/// Sends an IPv4 packet made by hand, without the Ethernet header.
fn send_raw(topology: &Topology, host: &str, packet: &[u8], to: Ipv4Addr) {
    inside(&topology.netns(host), || {
        let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))).unwrap();
        socket.set_header_included_v4(true).unwrap();
        socket
            .send_to(packet, &SocketAddr::from((to, 0)).into())
            .unwrap();
    });
}

/// A TCP SYN; `fragment` is the header's flags and offset, `options` a multiple of four bytes.
fn syn(from: Ipv4Addr, to: Ipv4Addr, fragment: u16, options: &[u8]) -> Vec<u8> {
    let header_words = 5 + options.len() / 4;
    let mut packet = vec![0x40 | header_words as u8, 0, 0, 0, 0, 1];
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, 6, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(options);
    packet.extend([
        0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0,
    ]);
    packet
}

#[test]
fn fragments_and_options_are_dropped() {
    if !can_run("fragments_and_options_are_dropped") {
        return;
    }
    const MORE_FRAGMENTS: u16 = 0x2000;
    let topology = Topology::new();
    EBPF.install(&topology);
    let _ztunnel = EBPF.listeners(&topology);
    let cases = [
        ("app1", APP1, REMOTE, "app_outbound"),
        ("remote", REMOTE, APP1, "underlay_ingress"),
        ("plain", PLAIN, APP1, "app_inbound"),
    ];
    for (host, from, to, program) in cases {
        expect_drop(&topology, program, "fragment", || {
            send_raw(&topology, host, &syn(from, to, MORE_FRAGMENTS, &[]), to);
            false
        });
        expect_drop(&topology, program, "fragment", || {
            send_raw(&topology, host, &syn(from, to, 3, &[]), to);
            false
        });
        expect_drop(&topology, program, "options", || {
            send_raw(&topology, host, &syn(from, to, 0, &[1, 1, 1, 0]), to);
            false
        });
    }
}

/// An ICMP "fragmentation needed" from a router about a packet that was sent.
fn packet_too_big(router: Ipv4Addr, sent: [SocketAddrV4; 2], protocol: u8) -> Vec<u8> {
    let [from, to] = sent;
    let mut inner = syn(*from.ip(), *to.ip(), 0, &[]);
    inner[9] = protocol;
    inner[20..22].copy_from_slice(&from.port().to_be_bytes());
    inner[22..24].copy_from_slice(&to.port().to_be_bytes());
    let mut message = vec![3, 4, 0, 0, 0, 0, 0x05, 0x00];
    message.extend(&inner[..28]);
    let sum: u32 = message
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | u32::from(w[1]))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = vec![0x45, 0, 0, 0, 0, 1, 0, 0, 64, 1, 0, 0];
    packet.extend(router.octets());
    packet.extend(from.ip().octets());
    packet.extend(message);
    packet
}

/// The path's MTU is ztunnel's to know: its socket has the pod's address. What went past the stack
/// is told past the stack; the rest goes where it may be translated, and to ztunnel from there.
#[test]
fn icmp_errors_about_tcp_go_to_ztunnel() {
    if !can_run("icmp_errors_about_tcp_go_to_ztunnel") {
        return;
    }
    let topology = Topology::new();
    let _on_node = Server::app(&topology.netns("node"), 10250);
    EBPF.install(&topology);
    let counts = || {
        ["underlay_ingress", "app_inbound"].map(|program| counter(&topology, program, "icmp_error"))
    };
    let send = |port: u16, to: (Ipv4Addr, u16), protocol| {
        let sent = [SocketAddrV4::new(APP1, port), SocketAddrV4::new(to.0, to.1)];
        let packet = packet_too_big(REMOTE, sent, protocol);
        send_raw(&topology, "remote", &packet, APP1);
    };
    send(40000, (REMOTE, 15008), 6);
    send(15008, (REMOTE, 40000), 6);
    assert_eq!(counts(), [2, 0]);
    send(40000, (REMOTE, 80), 6);
    // HBONE, but with a host that is no pod.
    send(40000, (Ipv4Addr::new(192, 0, 2, 1), 15008), 6);
    assert_eq!(counts(), [2, 2]);
    // About UDP, or about the pod's own connection with the node: the pod's.
    send(40000, (REMOTE, 15008), 17);
    let own = topology.ask("app1", (NODE, 10250)).unwrap().client.port();
    send(own, (NODE, 10250), 6);
    assert_eq!(counts(), [2, 2]);
    // Any other with the node's address is ztunnel's: for what the node masqueraded.
    send(8080, (NODE, 40000), 6);
    assert_eq!(counts(), [2, 3]);
}

#[test]
fn udp_passes() {
    if !can_run("udp_passes") {
        return;
    }
    let topology = Topology::new();
    EBPF.install(&topology);
    let bind = |host: &str| {
        let socket = inside(&topology.netns(host), || {
            std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53)).unwrap()
        });
        socket
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        socket
    };
    let (app, remote) = (bind("app1"), bind("remote"));
    let mut buffer = [0; 16];
    app.send_to(b"question", (REMOTE, 53)).unwrap();
    let (_, from) = remote.recv_from(&mut buffer).unwrap();
    assert_eq!(from, SocketAddr::from((APP1, 53)));
    remote.send_to(b"answer", from).unwrap();
    assert_eq!(
        app.recv_from(&mut buffer).unwrap().1,
        SocketAddr::from((REMOTE, 53))
    );
}

/// ztunnel connects to a pod with the client's address, also when that is the node's own.
#[test]
fn ztunnel_speaks_with_the_clients_address() {
    if !can_run("ztunnel_speaks_with_the_clients_address") {
        return;
    }
    let topology = Topology::new();
    let _app = Server::app(&topology.netns("app1"), 8080);
    let _remote = Server::app(&topology.netns("remote"), 8080);
    let _plain = Server::app(&topology.netns("plain"), 8080);
    EBPF.install(&topology);
    for (source, to) in [
        (REMOTE, APP1),
        (APP2, APP1),
        (PLAIN, APP1),
        (NODE, APP1),
        (UNDERLAY, APP1),
        (APP1, REMOTE),
        (APP1, PLAIN),
    ] {
        let answer = topology.ask_from("ztunnel", Some(source), (to, 8080));
        let answer = answer.unwrap_or_else(|e| panic!("{source} -> {to}: {e}"));
        assert_eq!(answer.peer.ip(), source, "{answer:?}");
    }
    // The node's own probes are not confused by it.
    for _ in 0..3 {
        check(&topology, "node", (APP1, 8080), "app");
    }
}

#[test]
fn ztunnels_off_cluster_traffic_passes_a_strict_filter() {
    if !can_run("ztunnels_off_cluster_traffic_passes_a_strict_filter") {
        return;
    }
    let topology = Topology::new();
    topology.ip("remote", "addr add 192.0.2.1/32 dev lo");
    topology.ip("node", "route add 192.0.2.0/24 via 172.31.9.2");
    for name in ["all", "vz", "va1", "und"] {
        topology.sysctl("node", &format!("net/ipv4/conf/{name}/rp_filter"), "1");
    }
    let before = topology.traces();
    let _remote = Server::app(&topology.netns("remote"), 80);
    EBPF.install(&topology);
    let _ztunnel = EBPF.listeners(&topology);
    check(&topology, "app1", (REMOTE, 80), "outbound");
    check(&topology, "remote", (APP1, 80), "plain");
    let outside = Ipv4Addr::new(192, 0, 2, 1);
    let answer = topology
        .ask_from("ztunnel", Some(APP1), (outside, 80))
        .unwrap();
    assert_eq!(answer.peer.ip(), APP1);
    EBPF.on_node(&topology, |redirection| redirection.cleanup().unwrap());
    crate::shared::assert_same(&before, &topology.traces());
}

#[test]
fn a_pod_with_a_new_interface_is_captured_again() {
    if !can_run("a_pod_with_a_new_interface_is_captured_again") {
        return;
    }
    let topology = Topology::new();
    for kind in [EBPF, Kind::Ebpf(Attach::Clsact)] {
        kind.install(&topology);
        let _ztunnel = kind.listeners(&topology);
        topology.ip("node", "link del va1");
        topology.pod("app1", APP1, "va1");
        kind.install(&topology);
        check(&topology, "app1", (REMOTE, 80), "outbound");
        check(&topology, "remote", (APP1, 80), "plain");
        kind.on_node(&topology, |redirection| redirection.cleanup().unwrap());
    }
}

#[test]
fn an_underlay_that_is_no_longer_one_is_left_alone() {
    if !can_run("an_underlay_that_is_no_longer_one_is_left_alone") {
        return;
    }
    let topology = Topology::new();
    for attach in [Attach::Auto, Attach::Clsact] {
        let kind = Kind::Ebpf(attach);
        let mut settings = kind.settings(&topology);
        settings.node.interfaces.push("vp".into());
        inside(&topology.netns("node"), || {
            kind.create(settings).install().unwrap();
        });
        let count = || {
            let shown = inside(&topology.netns("node"), || {
                crate::topology::run("bpftool net show")
            });
            // bpftool of old does not show tcx; its pins do.
            let pins = std::fs::read_dir(topology.bpffs()).unwrap();
            let name = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
            let pinned = pins
                .flatten()
                .map(name)
                .filter(|n| n.starts_with("underlay_ingress_"));
            shown.matches("underlay_ingress").count() + pinned.count()
        };
        assert!(count() >= 2);
        kind.install(&topology);
        assert_eq!(count(), 1);
        kind.on_node(&topology, |redirection| redirection.cleanup().unwrap());
    }
}

#[test]
fn wrong_listeners_and_maps_are_refused() {
    if !can_run("wrong_listeners_and_maps_are_refused") {
        return;
    }
    let topology = Topology::new();
    let error = ListenerMap::open(&topology.bpffs().join("listeners")).unwrap_err();
    assert!(error.to_string().contains("No such file"), "{error}");
    EBPF.install(&topology);
    let error = ListenerMap::open(&topology.bpffs().join("pods")).unwrap_err();
    assert!(!error.to_string().contains('\n'), "{error}");
    let mut map = ListenerMap::open(&topology.bpffs().join("listeners")).unwrap();
    let file = File::open("/dev/null").unwrap();
    let error = map
        .set(Role::Outbound, 0, std::os::fd::AsFd::as_fd(&file))
        .unwrap_err();
    assert!(error.to_string().contains("Outbound of CPU 0"), "{error}");
    let error = map
        .set(Role::Outbound, 1024, std::os::fd::AsFd::as_fd(&file))
        .unwrap_err();
    assert!(error.to_string().contains("below 1024"), "{error}");
}

#[test]
fn pins_must_be_on_a_bpffs() {
    if !can_run("pins_must_be_on_a_bpffs") {
        return;
    }
    let topology = Topology::new();
    let mut settings = topology.settings();
    settings.back_end = BackEnd::Ebpf(EbpfSettings {
        bpffs: topology.dir().join("plain"),
        attach: Attach::Auto,
    });
    let error = inside(&topology.netns("node"), || {
        EBPF.create(settings).install().unwrap_err().to_string()
    });
    assert!(error.contains("not on a BPF file system"), "{error}");
    assert!(!topology.dir().join("state").exists() && !topology.dir().join("plain").exists());
}
