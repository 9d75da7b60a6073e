//! What is not plain IP, ARP or neighbour discovery about oneself does not get past the programs,
//! whatever it hides. Frames are sent by AF_PACKET.

use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::Duration;

use redirect::{Driver, Redirection};
use socket2::{Domain, Protocol, Socket, Type};

use crate::ebpf::counter;
use crate::shared::{CLSACT, EBPF, HARDENED, Kind, check};
use crate::topology::frames::{ARP, IPV4, IPV6, ipv4, ipv4_with, syn, udp, vxlan};
use crate::topology::{
    APP1, APP2, NODE, PLAIN, REMOTE, Topology, UNDERLAY, ZTUNNEL, can_run, inside,
};

/// How long something that must not arrive is waited for.
const SILENCE: Duration = Duration::from_millis(60);
const PATIENCE: Duration = Duration::from_secs(10);
/// VLAN tags: 802.1Q, 802.1ad.
const Q: u16 = 0x8100;
const AD: u16 = 0x88a8;

/// Datagrams to port 9 of a host.
struct Inbox(UdpSocket);

impl Inbox {
    fn of(topology: &Topology, host: &str) -> Self {
        let socket = inside(&topology.netns(host), || {
            UdpSocket::bind("0.0.0.0:9").unwrap()
        });
        Self(socket)
    }

    fn gets_one(&self, patience: Duration) -> bool {
        self.0.set_read_timeout(Some(patience)).unwrap();
        self.0.recv(&mut [0; 100]).is_ok()
    }
}

/// All that a program has dropped for a reason, before and after; and no more than one each.
#[track_caller]
fn expect_one_drop(topology: &Topology, program: &str, reason: &str, work: impl FnOnce()) {
    let before = counter(topology, program, reason);
    work();
    let after = counter(topology, program, reason);
    assert_eq!(after, before + 1, "{program} {reason}");
}

/// How frames can be tagged. The stack takes off those of number 0.
const TAGS: [&[(u16, u16)]; 7] = [
    &[(Q, 0)],
    &[(Q, 0), (Q, 0)],
    &[(AD, 0)],
    &[(AD, 0), (Q, 0)],
    &[(Q, 0), (AD, 0), (Q, 0)],
    &[(Q, 5)],
    &[(Q, 0x6000), (Q, 0x2000)], // a priority, number 0
];

fn tagged_frames_are_dropped(kind: Kind) {
    let topology = Topology::new();
    let (remote, app1) = (Inbox::of(&topology, "remote"), Inbox::of(&topology, "app1"));
    let (gateway, pod) = (topology.mac("node", "va1"), topology.mac("app1", "eth0"));
    let out = |from: Ipv4Addr, tags: &[(u16, u16)]| {
        let packet = ipv4(17, (from, REMOTE), &udp(9, b"x"));
        topology.send_frame(("app1", "eth0"), gateway, tags, IPV4, &packet);
    };
    let into = |tags: &[(u16, u16)]| {
        let packet = ipv4(17, (PLAIN, APP1), &udp(9, b"x"));
        topology.send_frame(("node", "va1"), pod, tags, IPV4, &packet);
    };
    // Without the mesh these get through, any number of tags.
    for tags in [&[][..], &[(Q, 0), (Q, 0)], &[(AD, 0), (Q, 0)]] {
        out(APP2, tags);
        assert!(remote.gets_one(PATIENCE), "{tags:?}");
        into(tags);
        assert!(app1.gets_one(PATIENCE), "{tags:?}");
    }
    kind.install(&topology);
    out(APP1, &[]);
    assert!(remote.gets_one(PATIENCE));
    into(&[]);
    assert!(app1.gets_one(PATIENCE));
    for tags in TAGS {
        for from in [APP1, APP2, Ipv4Addr::new(8, 8, 8, 8)] {
            expect_one_drop(&topology, "app_outbound", "vlan", || out(from, tags));
            expect_one_drop(&topology, "app_outbound", "vlan", || {
                let packet = ipv4(6, (from, REMOTE), &syn(80));
                topology.send_frame(("app1", "eth0"), gateway, tags, IPV4, &packet);
            });
        }
        expect_one_drop(&topology, "app_inbound", "vlan", || into(tags));
        // To ztunnel, with the address of a pod: it would speak with that pod's identity.
        expect_one_drop(&topology, "ztunnel_guard", "vlan", || {
            let packet = ipv4(6, (APP1, REMOTE), &syn(80));
            let ztunnel = topology.mac("ztunnel", "eth0");
            topology.send_frame(("node", "vz"), ztunnel, tags, IPV4, &packet);
        });
    }
    assert!(!remote.gets_one(SILENCE) && !app1.gets_one(SILENCE));
    // What comes in tagged by the underlay takes the stack, and is caught behind it.
    let underlay = topology.mac("node", "und");
    for (to, program) in [(APP1, "app_inbound"), (ZTUNNEL, "ztunnel_guard")] {
        expect_one_drop(&topology, program, "spoofed", || {
            let packet = ipv4(6, (APP2, to), &syn(80));
            let tags = [(Q, 0), (Q, 0)];
            topology.send_frame(("remote", "und"), underlay, &tags, IPV4, &packet);
        });
    }
    // All of it is one pod's trouble: it goes on.
    let _ztunnel = kind.listeners(&topology);
    check(&topology, "app1", (REMOTE, 80), "outbound");
}

#[test]
fn tagged_frames_are_dropped_tcx() {
    if can_run("tagged_frames_are_dropped_tcx") {
        tagged_frames_are_dropped(EBPF);
    }
}

#[test]
fn tagged_frames_are_dropped_clsact() {
    if can_run("tagged_frames_are_dropped_clsact") {
        tagged_frames_are_dropped(CLSACT);
    }
}

#[test]
fn other_ethertypes_are_dropped() {
    if !can_run("other_ethertypes_are_dropped") {
        return;
    }
    let topology = Topology::new();
    EBPF.install(&topology);
    let packet = ipv4(17, (APP1, REMOTE), &udp(9, b"x"));
    // MPLS, PPPoE, LLDP, RARP, TRILL, a frame of Ethernet in Ethernet, 802.3 with a length.
    for ethertype in [0x8847, 0x8864, 0x88cc, 0x8035, 0x22f3, 0x6558, 0x0030] {
        let places = [
            (
                "app_outbound",
                ("app1", "eth0"),
                topology.mac("node", "va1"),
            ),
            ("app_inbound", ("node", "va1"), topology.mac("app1", "eth0")),
            (
                "ztunnel_guard",
                ("node", "vz"),
                topology.mac("ztunnel", "eth0"),
            ),
        ];
        for (program, from, to) in places {
            expect_one_drop(&topology, program, "ethertype", || {
                topology.send_frame(from, to, &[], ethertype, &packet);
            });
        }
    }
}

#[test]
fn packets_in_packets_are_dropped() {
    if !can_run("packets_in_packets_are_dropped") {
        return;
    }
    let topology = Topology::new();
    EBPF.install(&topology);
    let raw = |protocol: i32| {
        inside(&topology.netns("remote"), || {
            let protocol = Some(Protocol::from(protocol));
            Socket::new(Domain::IPV4, Type::RAW, protocol).unwrap()
        })
    };
    let arrives = |socket: &Socket, patience| {
        socket.set_read_timeout(Some(patience)).unwrap();
        socket
            .recv(&mut [std::mem::MaybeUninit::uninit(); 100])
            .is_ok()
    };
    let gateway = topology.mac("node", "va1");
    let send = |packet: &[u8]| {
        topology.send_frame(("app1", "eth0"), gateway, &[], IPV4, packet);
    };
    let inner = ipv4(6, (APP2, ZTUNNEL), &syn(80));
    for protocol in [4_u8, 41, 47, 51, 55, 94, 97, 98, 108, 115, 137, 143] {
        let receiver = raw(protocol.into());
        for to in [NODE, UNDERLAY, REMOTE, APP2] {
            expect_one_drop(&topology, "app_outbound", "encapsulated", || {
                send(&ipv4(protocol, (APP1, to), &inner));
            });
        }
        // Nor by a second fragment.
        expect_one_drop(&topology, "app_outbound", "encapsulated", || {
            send(&ipv4_with(protocol, (APP1, REMOTE), 3, &[], &inner));
        });
        assert!(!arrives(&receiver, SILENCE), "protocol {protocol}");
    }
    // ESP, SCTP and ICMP do not say what they carry, or carry none.
    for protocol in [50_u8, 132, 1] {
        let receiver = raw(protocol.into());
        send(&ipv4(protocol, (APP1, REMOTE), &[8; 40]));
        assert!(arrives(&receiver, PATIENCE), "protocol {protocol}");
    }
    // Tunnels over UDP: to nodes and outside, not among pods. Options and fragments hide no port.
    for port in [4789, 4790, 8472, 6081, 6635] {
        let datagram = udp(port, &vxlan(7, gateway, &inner));
        for to in [NODE, UNDERLAY, Ipv4Addr::new(8, 8, 8, 8)] {
            let ends = (APP1, to);
            for packet in [
                ipv4(17, ends, &datagram),
                ipv4_with(17, ends, 0, &[1, 1, 1, 0], &datagram),
                ipv4_with(17, ends, 0x2000, &[], &datagram[..56]),
            ] {
                expect_one_drop(&topology, "app_outbound", "encapsulated", || send(&packet));
            }
        }
        let before = counter(&topology, "app_outbound", "passed");
        send(&ipv4(17, (APP1, APP2), &datagram));
        assert!(counter(&topology, "app_outbound", "passed") > before);
        // From a pod of another node, which is not checked there, to this one.
        expect_one_drop(&topology, "underlay_ingress", "encapsulated", || {
            let packet = ipv4(17, (REMOTE, UNDERLAY), &datagram);
            let node = topology.mac("node", "und");
            topology.send_frame(("remote", "und"), node, &[], IPV4, &packet);
        });
    }
}

/// A node whose network plugin has a VXLAN device opens whatever a pod sends it. What comes out has
/// any source address, and must not be ztunnel's in a mesh pod's name.
#[test]
fn what_a_node_opens_is_no_pods() {
    if !can_run("what_a_node_opens_is_no_pods") {
        return;
    }
    let topology = Topology::new();
    let device = format!("link add vx7 type vxlan id 7 dstport 8472 local {NODE}");
    topology.ip("node", &device);
    topology.ip("node", "link set vx7 up");
    topology.sysctl("node", "net/ipv4/conf/all/rp_filter", "0");
    topology.sysctl("node", "net/ipv4/conf/vx7/rp_filter", "0");
    EBPF.install(&topology);
    let _ztunnel = EBPF.listeners(&topology);
    let inside_mac = topology.mac("node", "vx7");
    let send = |host: &str, interface: &str, from: Ipv4Addr, inner: &[u8]| {
        let datagram = udp(8472, &vxlan(7, inside_mac, inner));
        let gateway = topology.mac("node", interface);
        let packet = ipv4(17, (from, NODE), &datagram);
        topology.send_frame((host, "eth0"), gateway, &[], IPV4, &packet);
    };
    let to_ztunnel = ipv4(6, (APP1, ZTUNNEL), &syn(80));
    let to_app = ipv4(6, (APP1, APP2), &syn(80));
    // A mesh pod does not get that far.
    let before = topology.received("node", "vx7");
    for inner in [&to_ztunnel, &to_app] {
        expect_one_drop(&topology, "app_outbound", "encapsulated", || {
            send("app1", "va1", APP1, inner);
        });
    }
    assert_eq!(topology.received("node", "vx7"), before);
    // Whoever is not in the mesh does, and fails at the next door.
    expect_one_drop(&topology, "ztunnel_guard", "spoofed", || {
        send("plain", "vp", PLAIN, &to_ztunnel);
    });
    expect_one_drop(&topology, "app_inbound", "spoofed", || {
        send("plain", "vp", PLAIN, &to_app);
    });
    assert_eq!(topology.received("node", "vx7"), before + 2);
}

/// ARP and neighbour discovery about others.
#[test]
fn a_pod_speaks_of_its_own_addresses_alone() {
    if !can_run("a_pod_speaks_of_its_own_addresses_alone") {
        return;
    }
    let topology = Topology::new();
    topology.add_ipv6();
    let ip = |text: &str| text.parse::<Ipv6Addr>().unwrap();
    let (own, other, link) = (ip("fd00:1::11"), ip("fd00:1::12"), ip("fe80::77"));
    let mut pods = topology.pods();
    pods[0].addresses.push(own.into());
    pods[1].addresses.push(other.into());
    EBPF.on_node(&topology, |redirection: &mut dyn Redirection| {
        redirection.install().unwrap();
        redirection.add_pods(&pods).unwrap();
    });
    let gateway = topology.mac("node", "va1");
    let send = |ethertype, payload: &[u8]| {
        topology.send_frame(("app1", "eth0"), gateway, &[], ethertype, payload);
    };
    let passes = |work: &dyn Fn()| {
        let before = counter(&topology, "app_outbound", "passed");
        work();
        let after = counter(&topology, "app_outbound", "passed");
        assert!(after > before, "did not pass");
    };
    let arp = |operation: u8, sender: Ipv4Addr, target: Ipv4Addr| {
        let mut packet = vec![0, 1, 8, 0, 6, 4, 0, operation, 2, 0, 0, 0, 0, 9];
        packet.extend(sender.octets());
        packet.extend([0; 6]);
        packet.extend(target.octets());
        packet
    };
    for operation in [1, 2] {
        passes(&|| send(ARP, &arp(operation, APP1, NODE)));
        passes(&|| send(ARP, &arp(operation, Ipv4Addr::UNSPECIFIED, APP1)));
        for sender in [APP2, NODE, ZTUNNEL, PLAIN] {
            expect_one_drop(&topology, "app_outbound", "neighbour", || {
                send(ARP, &arp(operation, sender, NODE));
            });
        }
    }
    let mut short = arp(1, APP1, NODE);
    short[4] = 8; // another link layer's
    expect_one_drop(&topology, "app_outbound", "neighbour", || send(ARP, &short));
    let nd = |kind: u8, from: Ipv6Addr, target: Ipv6Addr, extension: Option<u8>| {
        let mut packet = vec![0x60, 0, 0, 0, 0, 24, 58, 255];
        packet.extend(from.octets());
        packet.extend(ip("ff02::1").octets());
        if let Some(extension) = extension {
            packet[5] += 8;
            packet[6] = extension;
            let is_fragment = extension == 44;
            let rest = if is_fragment { [0, 1] } else { [1, 4] };
            packet.extend([58, 0, rest[0], rest[1], 0, 0, 0, 0]);
        }
        packet.extend([kind, 0, 0, 0, 0x20, 0, 0, 0]);
        packet.extend(target.octets());
        packet
    };
    for from in [own, link, Ipv6Addr::UNSPECIFIED] {
        for (kind, target) in [(135, other), (136, own), (136, link)] {
            passes(&|| send(IPV6, &nd(kind, from, target, None)));
        }
        passes(&|| send(IPV6, &nd(133, from, other, None)));
        // A router, a redirection, an advertisement of another; behind options, in a fragment.
        for (kind, target, extension) in [
            (134, own, None),
            (137, own, None),
            (136, other, None),
            (136, own, Some(0)),
            (136, own, Some(60)),
            (136, other, Some(44)),
        ] {
            expect_one_drop(&topology, "app_outbound", "neighbour", || {
                send(IPV6, &nd(kind, from, target, extension));
            });
        }
    }
    for kind in [133, 135, 136] {
        expect_one_drop(&topology, "app_outbound", "neighbour", || {
            send(IPV6, &nd(kind, other, own, None));
        });
        expect_one_drop(&topology, "app_outbound", "ipv6", || {
            send(IPV6, &nd(kind, ip("fd00:9::1"), own, None));
        });
    }
    expect_one_drop(&topology, "app_outbound", "ipv6", || {
        send(IPV6, &nd(136, own, ip("fd00:9::1"), None));
    });
}

/// Without an Ethernet header the programs would read what a sender chose.
#[test]
fn interfaces_without_ethernet_are_refused() {
    if !can_run("interfaces_without_ethernet_are_refused") {
        return;
    }
    let topology = Topology::new();
    topology.ip("node", "tuntap add dev tun7 mode tun");
    let mut settings = topology.settings();
    settings.node.interfaces.push("tun7".into());
    let error = inside(&topology.netns("node"), || {
        EBPF.create(settings).install().unwrap_err().to_string()
    });
    assert!(
        error.contains("tun7") && error.contains("no Ethernet header"),
        "{error}"
    );
    EBPF.install(&topology);
    let mut pod = topology.pods().swap_remove(0);
    pod.host_interface = "tun7".into();
    pod.uid = "tun".into();
    pod.addresses = vec![Ipv4Addr::new(10, 244, 1, 77).into()];
    let error = EBPF.on_node(&topology, |redirection| {
        redirection.install().unwrap();
        redirection.add_pod(&pod).unwrap_err().to_string()
    });
    assert!(error.contains("tun7") && error.contains("veth"), "{error}");
}

/// The same questions where iptables is asked: the stack has taken tags off by then. Nobody but the
/// node and ztunnel gets anything into the tunnels between them.
#[test]
fn nobody_else_speaks_in_the_tunnels() {
    if !can_run("nobody_else_speaks_in_the_tunnels") {
        return;
    }
    let topology = Topology::new();
    HARDENED.install(&topology);
    let _ztunnel = HARDENED.listeners(&topology);
    let status = HARDENED.on_node(&topology, |redirection| redirection.status().unwrap());
    if status.back_end.iptables_tunnel().unwrap().driver != Some(Driver::Vxlan) {
        // The frames below are VXLAN's.
        return;
    }
    check(&topology, "app1", (REMOTE, 80), "outbound");
    check(&topology, "remote", (APP1, 80), "plain");
    // What these say by themselves is not to be counted.
    for (host, prefix) in [("node", ""), ("ztunnel", "p")] {
        for name in ["istioin", "istioout"] {
            let name = format!("net/ipv6/conf/{prefix}{name}/disable_ipv6");
            topology.sysctl(host, &name, "1");
        }
    }
    std::thread::sleep(SILENCE);
    let received = || {
        [("node", "istioin"), ("node", "istioout")]
            .into_iter()
            .chain([("ztunnel", "pistioin"), ("ztunnel", "pistioout")])
            .map(|(host, interface)| topology.received(host, interface))
            .collect::<Vec<_>>()
    };
    let before = received();
    let inner = ipv4(6, (APP2, REMOTE), &syn(80));
    let senders = [
        (("app1", "eth0"), topology.mac("node", "va1"), APP1),
        (("plain", "eth0"), topology.mac("node", "vp"), PLAIN),
        (("remote", "und"), topology.mac("node", "und"), REMOTE),
    ];
    for (from, gateway, own) in senders {
        for (to, ids, peers) in [
            (NODE, [1000, 1001], ["istioin", "istioout"]),
            (ZTUNNEL, [1000, 1001], ["pistioin", "pistioout"]),
        ] {
            let host = if to == NODE { "node" } else { "ztunnel" };
            for (id, peer) in ids.into_iter().zip(peers) {
                let datagram = udp(6081, &vxlan(id, topology.mac(host, peer), &inner));
                // Their own addresses, and the ones that the tunnels are between.
                for source in [own, NODE, ZTUNNEL] {
                    let packet = ipv4(17, (source, to), &datagram);
                    topology.send_frame(from, gateway, &[], IPV4, &packet);
                }
            }
        }
    }
    std::thread::sleep(SILENCE);
    assert_eq!(received(), before, "in the tunnels");
    // Nor does a pod get a packet opened by the node's other tunnels.
    let rules = || {
        HARDENED.on_node(&topology, |redirection| {
            let counters = redirection.counters().unwrap();
            let dropped = counters["node"].iter();
            let dropped = dropped.filter(|(rule, _)| rule.ends_with(" src -j DROP"));
            dropped.map(|(_, packets)| packets).sum::<u64>()
        })
    };
    let gateway = topology.mac("node", "va1");
    let packets = [
        ipv4(4, (APP1, NODE), &inner),
        ipv4(47, (APP1, NODE), &inner),
        ipv4(17, (APP1, NODE), &udp(8472, &vxlan(7, gateway, &inner))),
    ];
    for packet in packets {
        let before = rules();
        topology.send_frame(("app1", "eth0"), gateway, &[], IPV4, &packet);
        assert_eq!(rules(), before + 1);
    }
    // A SYN behind tags is captured like any other.
    let before = topology.received("ztunnel", "pistioout");
    let packet = ipv4(6, (APP1, REMOTE), &syn(80));
    topology.send_frame(("app1", "eth0"), gateway, &[(Q, 0), (Q, 0)], IPV4, &packet);
    std::thread::sleep(SILENCE);
    assert_eq!(topology.received("ztunnel", "pistioout"), before + 1);
}
