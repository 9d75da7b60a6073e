//! Changes under live traffic.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use redirect::{ListenerMap, Redirection, Role};

use crate::shared::{CLSACT, EBPF, HARDENED, Kind, check};
use crate::topology::{
    APP1, APP2, Echo, NODE, PLAIN, REMOTE, Server, Talk, Topology, can_run, inside, run,
};

fn older_connections(redirection: &dyn Redirection) -> usize {
    let status = redirection.status().unwrap();
    status.back_end.ebpf().unwrap().older_connections
}

fn older(topology: &Topology) -> usize {
    EBPF.on_node(topology, |redirection| {
        redirection.expire().unwrap();
        older_connections(redirection)
    })
}

/// Out of the node, into the pod, and between two pods of the node.
#[test]
fn older_connections_survive_enrolment() {
    if !can_run("older_connections_survive_enrolment") {
        return;
    }
    let topology = Topology::new();
    let _echoes = ["remote", "app1", "app2"].map(|host| Echo::app(&topology.netns(host), 80));
    let mut talks: Vec<Talk> = [
        ("app1", REMOTE),
        ("remote", APP1),
        ("plain", APP1),
        ("app1", APP2),
        ("node", APP1),
    ]
    .map(|(from, to)| topology.talk(from, SocketAddr::from((to, 80))))
    .into();
    let mut ping_all = || talks.iter_mut().for_each(|talk| talk.ping().unwrap());
    ping_all();
    EBPF.install(&topology);
    let _ztunnel = EBPF.listeners(&topology);
    ping_all();
    assert!(older(&topology) >= 4);
    // Also when the agent starts anew.
    EBPF.install(&topology);
    ping_all();
    // New ones are captured.
    check(&topology, "app1", (REMOTE, 80), "outbound");
    check(&topology, "remote", (APP1, 80), "plain");
    // When they have ended nothing is left of them.
    drop(talks);
    let deadline = Instant::now() + Duration::from_secs(5);
    while older(&topology) > 0 {
        assert!(Instant::now() < deadline, "{} left", older(&topology));
        thread::sleep(Duration::from_millis(50));
    }
}

/// A pod that is added while ztunnel has been reaching it for another: that one's connection is
/// ztunnel's and stays so.
#[test]
fn connections_of_ztunnel_stay_ztunnels() {
    if !can_run("connections_of_ztunnel_stay_ztunnels") {
        return;
    }
    let topology = Topology::new();
    let _app2 = Echo::app(&topology.netns("app2"), 80);
    let pods = topology.pods();
    EBPF.on_node(&topology, |redirection| {
        redirection.install().unwrap();
        redirection.add_pods(&pods[..1]).unwrap();
    });
    let mut talk = topology.talk_from("ztunnel", APP1, SocketAddr::from((APP2, 80)));
    talk.ping().unwrap();
    EBPF.on_node(&topology, |redirection| {
        redirection.install().unwrap();
        redirection.add_pods(&pods[1..]).unwrap();
        assert_eq!(older_connections(redirection), 0);
    });
    for _ in 0..3 {
        talk.ping().unwrap();
    }
}

/// Segments that had to be sent again. Those that the other side then got twice were not lost but
/// late, as happens on a busy machine.
fn lost_segments(topology: &Topology, host: &str) -> u64 {
    let twice = ["TCPDSACKRecv", "TCPDSACKOfoRecv"];
    let twice: u64 = twice
        .iter()
        .map(|name| topology.snmp(host, "TcpExt:", name))
        .sum();
    topology
        .snmp(host, "Tcp:", "RetransSegs")
        .saturating_sub(twice)
}

/// Pods come and go; the programs of all are replaced, as when the agent is upgraded. Meanwhile a
/// pod's traffic loses nothing.
fn traffic_goes_on(kind: Kind, change: impl Fn(&Topology, usize)) {
    let topology = Topology::new();
    kind.install(&topology);
    let map = topology.bpffs().join("listeners");
    let map = matches!(kind, Kind::Ebpf(_)).then_some(map.as_path());
    let _ztunnel = Echo::ztunnel(&topology.netns("ztunnel"), map);
    let lost = || {
        thread::sleep(Duration::from_millis(200));
        ["app1", "ztunnel"].map(|host| lost_segments(&topology, host))
    };
    let to = SocketAddr::from((REMOTE, 80));
    let mut talk = topology.talk("app1", to);
    talk.ping().unwrap();
    let before = lost();
    let done = AtomicBool::new(false);
    let pings = thread::scope(|scope| {
        let pinging = scope.spawn(|| {
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                talk.ping().unwrap();
                // And a new connection each time.
                topology.talk("app1", to).ping().unwrap();
                count += 1;
            }
            count
        });
        for round in 0..6 {
            change(&topology, round);
        }
        done.store(true, Ordering::Relaxed);
        pinging.join().unwrap()
    });
    assert!(pings > 5, "{pings} round trips only");
    assert_eq!(before, lost(), "segments lost");
}

fn app2_comes_and_goes(kind: Kind) {
    traffic_goes_on(kind, |topology, _| {
        let pod = &topology.pods()[1];
        kind.on_node(topology, |redirection: &mut dyn Redirection| {
            redirection.install().unwrap();
            redirection.remove_pod(&pod.uid).unwrap();
            redirection.add_pod(pod).unwrap();
        });
    });
}

macro_rules! with_live_traffic {
    ($($name:ident: $kind:expr, $work:expr;)+) => {
        $(#[test]
        fn $name() {
            if can_run(stringify!($name)) {
                $work($kind);
            }
        })+
    };
}

with_live_traffic! {
    others_are_not_touched_by_tcx: EBPF, app2_comes_and_goes;
    others_are_not_touched_by_clsact: CLSACT, app2_comes_and_goes;
    others_are_not_touched_by_iptables: HARDENED, app2_comes_and_goes;
}

#[test]
fn an_upgrade_loses_no_packet() {
    if !can_run("an_upgrade_loses_no_packet") {
        return;
    }
    for kind in [EBPF, CLSACT] {
        traffic_goes_on(kind, |topology, _| kind.install(topology));
    }
}

/// An agent of another version left a map that does not fit.
#[test]
fn maps_of_another_version_are_replaced() {
    if !can_run("maps_of_another_version_are_replaced") {
        return;
    }
    let topology = Topology::new();
    let before = topology.traces();
    EBPF.install(&topology);
    let _ztunnel = EBPF.listeners(&topology);
    check(&topology, "app1", (REMOTE, 80), "outbound");
    let pin = topology.bpffs().join("pods");
    std::fs::remove_file(&pin).unwrap();
    let make = format!(
        "bpftool map create {} type hash key 4 value 4 entries 4096 name pods",
        pin.display()
    );
    run(&make);
    EBPF.install(&topology);
    check(&topology, "app1", (REMOTE, 80), "outbound");
    check(&topology, "remote", (APP1, 80), "plain");
    EBPF.on_node(&topology, |redirection| redirection.cleanup().unwrap());
    crate::shared::assert_same(&before, &topology.traces());
}

/// Somebody removes the pins of all maps, and maybe of all links, and the agent has been started
/// anew: what runs has the maps, listeners and all. Open connections do not notice.
#[test]
fn pins_of_maps_that_are_gone_come_back() {
    if !can_run("pins_of_maps_that_are_gone_come_back") {
        return;
    }
    for kind in [EBPF, CLSACT] {
        let topology = Topology::new();
        kind.install(&topology);
        let bpffs = topology.bpffs();
        let _ztunnel = Echo::ztunnel(&topology.netns("ztunnel"), Some(&bpffs.join("listeners")));
        let to = SocketAddr::from((REMOTE, 80));
        let mut talk = topology.talk("app1", to);
        talk.ping().unwrap();
        let whole = kind.on_node(&topology, |redirection| redirection.inventory().unwrap());
        let maps = ["config", "pods", "pod_cidrs", "node_flows", "older_flows"];
        for name in maps.iter().chain(&["events", "counters", "listeners"]) {
            std::fs::remove_file(bpffs.join(name)).unwrap();
        }
        talk.ping().unwrap();
        kind.install(&topology);
        let now = kind.on_node(&topology, |redirection| redirection.inventory().unwrap());
        crate::shared::assert_same(&whole, &now);
        talk.ping().unwrap();
        // The listener is still there, and it counts on where it was.
        topology.talk("app1", to).ping().unwrap();
        let counters = kind.on_node(&topology, |redirection| {
            redirection.status().unwrap().counters
        });
        assert_eq!(counters["ztunnel_ingress"]["redirected"], 2, "{counters:?}");
    }
}

/// Two ztunnels overlap; the elder accepts what is its own before it goes. No connection fails.
#[test]
fn a_hand_over_drops_no_syn() {
    if !can_run("a_hand_over_drops_no_syn") {
        return;
    }
    let topology = Topology::new();
    EBPF.install(&topology);
    let map = topology.bpffs().join("listeners");
    let netns = topology.netns("ztunnel");
    let start = || Server::ztunnel(&netns, Role::Outbound, "outbound", Some((&map, 0)));
    let mut current = start();
    let done = AtomicBool::new(false);
    let connections = thread::scope(|scope| {
        let connecting = scope.spawn(|| {
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                check(&topology, "app1", (REMOTE, 80), "outbound");
                count += 1;
            }
            count
        });
        for _ in 0..10 {
            let next = start();
            thread::sleep(Duration::from_millis(60));
            drop(std::mem::replace(&mut current, next));
        }
        done.store(true, Ordering::Relaxed);
        connecting.join().unwrap()
    });
    assert!(connections > 20, "{connections} connections only");
    thread::sleep(Duration::from_millis(200));
    assert_eq!(lost_segments(&topology, "app1"), 0);
}

/// Another ztunnel in a namespace of its own takes over: new connections are its as soon as it is
/// configured and has registered its listeners, and until then refused. What the elder had open
/// ends: packets of a pod go to one ztunnel. At no time does anything get around both.
#[test]
fn a_ztunnel_in_another_namespace_takes_over() {
    if !can_run("a_ztunnel_in_another_namespace_takes_over") {
        return;
    }
    let topology = Topology::new();
    let before = topology.traces();
    EBPF.install(&topology);
    let map = topology.bpffs().join("listeners");
    let map = Some((map.as_path(), 0));
    let _app = Server::app(&topology.netns("remote"), 80);
    let elder = Server::ztunnel(&topology.netns("ztunnel"), Role::Outbound, "elder", map);
    check(&topology, "app1", (REMOTE, 80), "elder");
    let pin = topology.bpffs().join("listeners");
    let is_for = |host: &str| {
        inside(&topology.netns(host), || {
            ListenerMap::is_for_this_namespace(&pin).unwrap()
        })
    };
    assert!(is_for("ztunnel") && !is_for("plain"));
    let mut settings = topology.settings();
    settings.ztunnel = redirect::Ztunnel {
        netns: topology.netns("plain"),
        interface: "eth0".into(),
        host_interface: "vp".into(),
        address: PLAIN,
        address_v6: None,
    };
    let pods = topology.pods();
    inside(&topology.netns("node"), || {
        let mut redirection = EBPF.create(settings.clone());
        redirection.install().unwrap();
        redirection.add_pods(&pods).unwrap();
    });
    assert!(!is_for("ztunnel") && is_for("plain"));
    // The elder's listeners are in the map still, which must not mean that it is asked.
    let refused = topology.ask("app1", (REMOTE, 80));
    assert!(refused.is_err(), "{refused:?}");
    let _younger = Server::ztunnel(&topology.netns("plain"), Role::Outbound, "younger", map);
    check(&topology, "app1", (REMOTE, 80), "younger");
    drop(elder);
    check(&topology, "app1", (REMOTE, 80), "younger");
    inside(&topology.netns("node"), || {
        EBPF.create(settings).cleanup().unwrap();
    });
    crate::shared::assert_same(&before, &topology.traces());
}

/// A part of the way takes smaller packets: ztunnel's socket learns it for TCP, the pod's for UDP.
/// Also where the segments come one by one, and when the node has sent all the ICMP errors that it
/// may: Linux does not limit those that say what size fits.
#[test]
fn the_paths_mtu_is_found() {
    if !can_run("the_paths_mtu_is_found") {
        return;
    }
    for one_by_one in [false, true] {
        let topology = Topology::new();
        EBPF.install(&topology);
        topology.narrow_underlay(1300);
        if one_by_one {
            for (host, link) in [("remote", "und"), ("ztunnel", "eth0")] {
                topology.ip(host, &format!("link set {link} gso_max_segs 1"));
            }
            spend_icmp_errors(&topology);
        }
        path_mtu_is_found(&topology);
    }
}

fn path_mtu_is_found(topology: &Topology) {
    let _remote = Echo::app(&topology.netns("remote"), 80);
    let to = SocketAddr::from((REMOTE, 80));
    let mut talk = topology.talk_from("ztunnel", APP1, to);
    let before = topology.snmp("node", "Icmp:", "OutDestUnreachs");
    talk.exchange(&vec![7; 300_000]).unwrap();
    assert!(topology.snmp("node", "Icmp:", "OutDestUnreachs") > before);
    let socket = inside(&topology.netns("app1"), || {
        std::net::UdpSocket::bind((APP1, 0)).unwrap()
    });
    socket.send_to(&[0; 1400], to).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !topology
        .ip("app1", &format!("route get {REMOTE}"))
        .contains("mtu 1300")
    {
        assert!(Instant::now() < deadline, "the pod was not told");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Has the node send errors to app1 until it sends no more for a long time.
fn spend_icmp_errors(topology: &Topology) {
    topology.sysctl("node", "net/ipv4/icmp_ratelimit", "1000000");
    let socket = inside(&topology.netns("app1"), || {
        std::net::UdpSocket::bind((APP1, 0)).unwrap()
    });
    let sent = || topology.snmp("node", "Icmp:", "OutDestUnreachs");
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let before = sent();
        for _ in 0..20 {
            // Refused: nobody is there. The error of one is told by the next.
            let _ = socket.send_to(&[0], (NODE, 9));
            thread::sleep(Duration::from_millis(1));
        }
        if sent() == before {
            return;
        }
        assert!(Instant::now() < deadline, "errors without limit");
    }
}

#[test]
fn drops_are_told() {
    if !can_run("drops_are_told") {
        return;
    }
    let topology = Topology::new();
    EBPF.install(&topology);
    EBPF.on_node(&topology, |redirection| {
        redirection.take_dropped(1000).unwrap();
    });
    topology
        .ask_from("app1", Some(APP2), (REMOTE, 80))
        .unwrap_err();
    topology.ask("app1", (REMOTE, 81)).unwrap_err();
    let dropped = EBPF.on_node(&topology, |redirection| {
        redirection.take_dropped(1000).unwrap()
    });
    let told: Vec<_> = dropped.iter().map(ToString::to_string).collect();
    let spoofed = |line: &&String| {
        line.starts_with("app_outbound spoofed: protocol 6 10.244.1.12:")
            && line.ends_with("-> 10.244.2.11:80 on va1")
    };
    assert!(told.iter().any(|line| spoofed(&line)), "{told:?}");
    let refused = |line: &&String| {
        line.starts_with("ztunnel_ingress no_listener: protocol 6 10.244.1.11:")
            && line.ends_with("-> 10.244.2.11:81")
    };
    assert!(told.iter().any(|line| refused(&line)), "{told:?}");
}
