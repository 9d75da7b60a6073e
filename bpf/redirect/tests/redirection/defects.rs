//! The defects of Istio's rules: there in the `faithful` variant, not in the `hardened` one. SYN
//! cookies are in `shared.rs`.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use redirect::{BackEnd, Iptables, Redirection, TunnelSettings, Variant};

use crate::shared::{FAITHFUL, HARDENED, Kind, check_all_directions};
use crate::topology::{APP1, NODE, Topology, can_run, inside};

const CONNECTIONS: usize = 40;

/// Takes its time before it accepts, as servers under load do; then answers what was sent early
/// and, with `last`, waits for the other side to close first.
fn slow_server(netns: &Path, port: u16, pause: Duration, last: bool) -> thread::JoinHandle<()> {
    let listener = inside(netns, || {
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap()
    });
    thread::spawn(move || {
        for _ in 0..CONNECTIONS {
            thread::sleep(pause);
            let (mut stream, _) = listener.accept().unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(2)))
                .unwrap();
            let mut byte = [0];
            if stream.read_exact(&mut byte).is_ok() {
                let _ = stream.write_all(&byte);
            }
            if last {
                let _ = stream.read(&mut byte);
            }
        }
    })
}

fn early_data(to: (Ipv4Addr, u16)) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to.into(), Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])
}

/// How many connections of a pod to a server on its own node fail.
fn failures_to_own_node(kind: Kind) -> usize {
    let topology = Topology::new();
    kind.install(&topology);
    let _ztunnel = kind.listeners(&topology);
    let pause = Duration::from_millis(3);
    let server = slow_server(&topology.netns("node"), 10250, pause, false);
    let failed = inside(&topology.netns("app1"), || {
        (0..CONNECTIONS)
            .filter(|_| early_data((NODE, 10250)).is_err())
            .count()
    });
    // A connection that was reset before it was accepted is accepted all the same.
    server.join().unwrap();
    failed
}

#[test]
fn connections_to_the_own_node_are_reset_by_faithful_rules_only() {
    if !can_run("connections_to_the_own_node_are_reset_by_faithful_rules_only") {
        return;
    }
    assert!(failures_to_own_node(FAITHFUL) > 0);
    assert_eq!(failures_to_own_node(HARDENED), 0);
}

/// Packets of the node's probes, closed by the node first, that end up with ztunnel.
fn leaked_by_probes(kind: Kind) -> u64 {
    let topology = Topology::new();
    kind.install(&topology);
    let _ztunnel = kind.listeners(&topology);
    let leaked = || {
        let status = kind.on_node(&topology, |redirection: &mut dyn Redirection| {
            redirection.status().unwrap()
        });
        let rules = status.counters["ztunnel"].iter();
        let plain = rules.filter(|(rule, _)| rule.contains("--on-port 15006"));
        plain.map(|(_, packets)| packets).sum::<u64>()
    };
    let app = slow_server(&topology.netns("app1"), 8080, Duration::ZERO, true);
    let before = leaked();
    inside(&topology.netns("node"), || {
        for _ in 0..CONNECTIONS {
            early_data((APP1, 8080)).unwrap();
        }
    });
    app.join().unwrap();
    thread::sleep(Duration::from_millis(300));
    leaked() - before
}

#[test]
fn answers_in_time_wait_leak_with_faithful_rules_only() {
    if !can_run("answers_in_time_wait_leak_with_faithful_rules_only") {
        return;
    }
    assert!(leaked_by_probes(FAITHFUL) > 0);
    assert_eq!(leaked_by_probes(HARDENED), 0);
}

#[test]
fn both_kinds_of_iptables_work() {
    if !can_run("both_kinds_of_iptables_work") {
        return;
    }
    let topology = Topology::new();
    let before = topology.traces();
    let rules = |tool: &str| {
        let shown = inside(&topology.netns("node"), || crate::topology::run(tool));
        shown.matches("ztunnel-").count()
    };
    let install = |iptables| {
        let mut settings = HARDENED.settings(&topology);
        settings.back_end = BackEnd::IptablesTunnel(TunnelSettings {
            variant: Variant::Hardened,
            iptables,
        });
        inside(&topology.netns("node"), || {
            let mut redirection = HARDENED.create(settings);
            redirection.install().unwrap();
            redirection.add_pods(&topology.pods()).unwrap();
        });
    };
    let _ztunnel = HARDENED.listeners(&topology);
    for (iptables, other) in [
        (Iptables::Legacy, "iptables-nft-save"),
        (Iptables::Nft, "iptables-legacy-save"),
    ] {
        install(iptables);
        check_all_directions(&topology);
        // Changing the kind leaves nothing of the other.
        assert_eq!(rules(other), 0);
    }
    HARDENED.on_node(&topology, |redirection| redirection.cleanup().unwrap());
    for tool in ["iptables-nft-save", "iptables-legacy-save"] {
        assert_eq!(rules(tool), 0);
    }
    crate::shared::assert_same(&before, &topology.traces());
}
