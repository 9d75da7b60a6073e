//! What goes in comes out: whole, from the right address, encrypted between the nodes.

use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use lab::{Node, UNDERLAY_INTERFACE};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::MIB;
use crate::support::{
    Guarded, Pattern, TestLab, at, at_vip, check_echo, echo_server, echo_side_by_side, eventually,
};

/// Both servers, by address and by their services' virtual addresses.
pub(super) fn targets() -> [(&'static str, SocketAddr); 4] {
    [
        ("server-b", at("server-b", 8080)),
        ("server-a", at("server-a", 8080)),
        ("server-b", at_vip("server-b", 80)),
        ("server-a", at_vip("server-a", 80)),
    ]
}

pub(super) fn echo_sizes(lab: &TestLab, server: &str, to: SocketAddr) {
    let pattern = Pattern::new(1);
    let sizes = [1, 2, 100, 1400, 16_383, 16_384, 16_385, 100_000, MIB + 1];
    let port = if to.port() == 80 { 8080 } else { to.port() };
    let echo = echo_server(lab.listen(server, port), sizes.len());
    for (seed, size) in (0..).zip(sizes) {
        check_echo(&lab.connect("client-a", to), &pattern, size, seed);
    }
    echo.join().unwrap();
}

pub(super) fn small_echoes_are_exact(lab: &mut TestLab) {
    for (server, to) in targets() {
        echo_sizes(lab, server, to);
    }
}

pub(super) fn bulk_echo_is_exact(lab: &mut TestLab) {
    let pattern = Pattern::new(2);
    for (seed, (server, to)) in (100..).zip(targets()) {
        let echo = echo_server(lab.listen(server, 8080), 1);
        let virtual_address = to.port() == 80;
        let size = if virtual_address { 8 * MIB } else { 64 * MIB };
        check_echo(&lab.connect("client-a", to), &pattern, size, seed);
        echo.join().unwrap();
    }
}

pub(super) fn many_connections_at_once(lab: &mut TestLab) {
    for server in ["server-b", "server-a"] {
        echo_side_by_side(lab, ("client-a", server), 200, &Pattern::new(3), 20_000);
    }
}

pub(super) fn server_sees_the_clients_address(lab: &mut TestLab) {
    let pattern = Pattern::new(4);
    let clients = [
        ("client-a", "server-b"),
        ("client-a", "server-a"),
        ("plain-b", "server-b"),
    ];
    for (client, server) in clients {
        let echo = echo_server(lab.listen(server, 8080), 3);
        for seed in 0..3 {
            check_echo(&lab.connect(client, at(server, 8080)), &pattern, 100, seed);
        }
        for peer in echo.join().unwrap() {
            assert_eq!(peer.ip(), lab.address(client), "{client} -> {server}");
        }
    }
}

pub(super) const MARKER: &[u8] = b"zt-plaintext-marker-5c1f0a";

/// Sends the marker from client-a to server-b and back; returns what passed on the underlay.
pub(super) fn capture_marker(lab: &TestLab) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("underlay.pcap");
    let mut command = lab.lab.command("node-a", "tcpdump").unwrap();
    command
        .args([
            "-i",
            UNDERLAY_INTERFACE,
            "-Z",
            "root",
            "-s",
            "0",
            "-U",
            "-w",
        ])
        .arg(&file);
    let mut tcpdump = Guarded(command.stderr(Stdio::piped()).spawn().unwrap());
    // tcpdump says "listening on" once the capture runs.
    let mut said = Vec::new();
    let mut stderr = tcpdump.0.stderr.take().unwrap();
    while !contains(&said, b"listening on") {
        let mut byte = [0];
        assert_eq!(
            stderr.read(&mut byte).unwrap(),
            1,
            "{}",
            String::from_utf8_lossy(&said)
        );
        said.push(byte[0]);
    }
    let echo = echo_server(lab.listen("server-b", 8080), 1);
    let mut stream = lab.connect("client-a", at("server-b", 8080));
    let mut answer = vec![0; MARKER.len()];
    for _ in 0..50 {
        stream.write_all(MARKER).unwrap();
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, MARKER);
    }
    drop(stream);
    echo.join().unwrap();
    // -U writes every packet at once, but the kernel hands them over in blocks.
    thread::sleep(Duration::from_millis(1500));
    kill(
        Pid::from_raw(i32::try_from(tcpdump.0.id()).unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    tcpdump.0.wait().unwrap();
    fs::read(file).unwrap()
}

pub(super) fn underlay_holds_no_plaintext(lab: &mut TestLab) {
    let capture = capture_marker(lab);
    assert!(
        capture.len() > 100 * MARKER.len(),
        "only {} bytes were captured",
        capture.len()
    );
    // Every packet of the tunnel names its port: the traffic did pass here.
    assert!(
        contains(&capture, &15008_u16.to_be_bytes()),
        "no HBONE on the underlay"
    );
    assert!(!contains(&capture, MARKER), "plaintext on the underlay");
}

pub(super) fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

pub(super) fn plain_pod_comes_in_and_is_reached(lab: &mut TestLab) {
    let pattern = Pattern::new(9);
    let plain = [
        "reporter=\"destination\"",
        "connection_security_policy=\"unknown\"",
    ];
    let opened = "istio_tcp_connections_opened_total";
    let before = lab.metrics("ztunnel-b").sum(opened, &plain);
    let echo = echo_server(lab.listen("server-b", 8080), 2);
    for seed in 0..2 {
        check_echo(
            &lab.connect("plain-b", at("server-b", 8080)),
            &pattern,
            300_000,
            seed,
        );
    }
    for peer in echo.join().unwrap() {
        assert_eq!(peer.ip(), lab.address("plain-b"));
    }
    eventually("two plaintext connections in ztunnel-b's metrics", || {
        (lab.metrics("ztunnel-b").sum(opened, &plain) == before + 2).then_some(())
    });
    for client in ["client-a", "server-b"] {
        let echo = echo_server(lab.listen("plain-b", 8080), 1);
        check_echo(
            &lab.connect(client, at("plain-b", 8080)),
            &pattern,
            300_000,
            10,
        );
        assert_eq!(echo.join().unwrap().len(), 1);
    }
}

/// A pod's probes by its own node, and a pod that calls a daemon on its node.
pub(super) fn nodes_and_their_pods_talk(lab: &mut TestLab) {
    let pattern = Pattern::new(10);
    for (node, pod) in [(Node::A, "server-a"), (Node::B, "server-b")] {
        let echo = echo_server(lab.listen(pod, 8080), 20);
        for seed in 0..20 {
            check_echo(
                &lab.connect(node.name(), at(pod, 8080)),
                &pattern,
                1000,
                seed,
            );
        }
        for peer in echo.join().unwrap() {
            assert_eq!(peer.ip(), node.gateway(), "the probe's source");
        }
        let echo = echo_server(lab.listen(node.name(), 9100), 20);
        let daemon = SocketAddr::from((node.gateway(), 9100));
        for seed in 0..20 {
            check_echo(&lab.connect(pod, daemon), &pattern, 1000, seed);
        }
        for peer in echo.join().unwrap() {
            assert_eq!(peer.ip(), lab.address(pod));
        }
    }
}
