//! Connections older than a pod's capture, when there is no place for them.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;

use aya::maps::{HashMap, Map, MapData};
use redirect::Redirection;

use crate::shared::{CLSACT, EBPF, Kind, check};
use crate::topology::{APP1, Echo, REMOTE, Topology, can_run, inside};

/// What `MAX_OLDER_FLOWS` of bpf/src/layout.h says.
const FLOWS_MAX: u32 = 262_144;
/// A pod's share, docs/node-agent.md.
const SHARE: usize = 8_192;

/// Puts connections of a pod that nobody knows into the map until it is full.
fn fill(bpffs: &Path) {
    let data = MapData::from_pin(bpffs.join("older_flows")).unwrap();
    let mut map: HashMap<_, [u8; 36], u8> = Map::from_map_data(data).unwrap().try_into().unwrap();
    for number in 0..FLOWS_MAX {
        let mut key = [0xfe; 36];
        key[..4].copy_from_slice(&number.to_ne_bytes());
        if map.insert(key, 1, 0).is_err() {
            return;
        }
    }
    panic!("{FLOWS_MAX} entries and one that was there: the map is larger than that");
}

fn broken(topology: &Topology) -> u64 {
    EBPF.on_node(topology, |redirection| redirection.older_broken())
}

/// A pod is captured although the node has no place for its older connections: these break, are
/// counted, and nothing goes past ztunnel. A restart of the agent is no different.
fn a_full_map_costs_older_connections_alone(kind: Kind) {
    let topology = Topology::new();
    let _echoes = ["remote", "app1", "app2"].map(|host| Echo::app(&topology.netns(host), 80));
    let pods = topology.pods();
    // app2 was here before the map was full.
    let mut kept = topology.talk("app2", SocketAddr::from((REMOTE, 80)));
    kept.ping().unwrap();
    kind.on_node(&topology, |redirection| {
        redirection.install().unwrap();
        redirection.add_pod(&pods[1]).unwrap();
    });
    kept.ping().unwrap();
    fill(&topology.bpffs());
    let mut out = topology.talk("app1", SocketAddr::from((REMOTE, 80)));
    let mut into = topology.talk("plain", SocketAddr::from((APP1, 80)));
    out.ping().unwrap();
    into.ping().unwrap();
    for round in 0..2 {
        kind.on_node(&topology, |redirection| {
            redirection.install().unwrap();
            assert!(
                redirection.try_pods(&pods).unwrap().is_empty(),
                "round {round}"
            );
        });
        let _ztunnel = kind.listeners(&topology);
        check(&topology, "app1", (REMOTE, 80), "outbound");
        check(&topology, "plain", (APP1, 80), "plain");
        assert!(out.ping().is_err(), "an older connection goes past ztunnel");
        assert!(
            into.ping().is_err(),
            "an older connection goes past ztunnel"
        );
        kept.ping().unwrap();
        assert_eq!(broken(&topology), 2);
    }
}

#[test]
fn a_full_map_costs_older_connections_alone_tcx() {
    if can_run("a_full_map_costs_older_connections_alone_tcx") {
        a_full_map_costs_older_connections_alone(EBPF);
    }
}

#[test]
fn a_full_map_costs_older_connections_alone_clsact() {
    if can_run("a_full_map_costs_older_connections_alone_clsact") {
        a_full_map_costs_older_connections_alone(CLSACT);
    }
}

/// One pod does not take the place of all others.
#[test]
fn a_pod_has_a_share_of_the_older_connections() {
    if !can_run("a_pod_has_a_share_of_the_older_connections") {
        return;
    }
    const OVER: usize = 50;
    let topology = Topology::new();
    let listener = inside(&topology.netns("remote"), || {
        TcpListener::bind(("0.0.0.0", 80)).unwrap()
    });
    let held: Vec<(TcpStream, TcpStream)> = inside(&topology.netns("app1"), || {
        let one = |_| {
            let client = TcpStream::connect((REMOTE, 80)).unwrap();
            (client, listener.accept().unwrap().0)
        };
        (0..SHARE + OVER).map(one).collect()
    });
    assert_eq!(held.len(), SHARE + OVER);
    EBPF.install(&topology);
    let _ztunnel = EBPF.listeners(&topology);
    check(&topology, "app1", (REMOTE, 80), "outbound");
    let status = EBPF.on_node(&topology, |redirection: &mut dyn Redirection| {
        redirection.status().unwrap()
    });
    let status = status.back_end.ebpf().unwrap();
    assert_eq!(status.older_connections, SHARE);
    assert_eq!(status.older_connections_broken, OVER as u64);
}
