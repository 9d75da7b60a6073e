//! Two implementations in one mesh: our ztunnel on one node, the conventional peer, which shares no
//! code with its data path, on the other.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use lab::{LabOptions, Redirect};
use support::{
    Case, PATIENCE, Pattern, TestLab, accept, at, at_vip, check_echo, echo_server,
    echo_side_by_side, eventually, run_cases_on, script, unique, workspace_binary,
};

const MIB: u64 = 1 << 20;

const CASES: &[Case] = &[
    ("echoes_are_exact", echoes_are_exact),
    ("bulk_is_exact", bulk_is_exact),
    ("many_connections_at_once", many_connections_at_once),
    ("client_closes_first", client_closes_first),
    ("server_closes_first", server_closes_first),
    ("plain_pods", plain_pods),
    ("nobody_listens", nobody_listens),
    ("a_server_that_does_not_read", a_server_that_does_not_read),
    ("a_policy_that_denies", a_policy_that_denies),
    ("the_other_node_restarts", the_other_node_restarts),
];

#[test]
fn ours_on_node_a_and_conventional_on_node_b() {
    run("ours-conventional", "ztunnel", "conventional");
}

#[test]
fn conventional_on_node_a_and_ours_on_node_b() {
    run("conventional-ours", "conventional", "ztunnel");
}

fn run(test: &str, a: &str, b: &str) {
    let directory = tempfile::tempdir().unwrap();
    let options = LabOptions {
        name: unique(test),
        redirect: Redirect::Ebpf,
        ztunnel: Some(one_for_each_node(directory.path(), a, b)),
        ..LabOptions::default()
    };
    run_cases_on(test, &options, CASES);
}

/// A program that becomes another one on each node.
fn one_for_each_node(directory: &Path, a: &str, b: &str) -> PathBuf {
    let (a, b) = (workspace_binary(a), workspace_binary(b));
    let (a, b) = (a.display(), b.display());
    let text =
        format!("case $NODE_NAME in node-a) exec '{a}' \"$@\";; *) exec '{b}' \"$@\";; esac\n");
    script(directory, &text)
}

/// By address and by service, between the nodes and on each; from the client's own address.
fn echoes_are_exact(lab: &mut TestLab) {
    let pattern = Pattern::new(1);
    let sizes = [0, 1, 100, 16_383, 16_384, 16_385, 100_000, MIB + 1];
    let flows = [
        ("client-a", "server-b"),
        ("server-b", "server-a"),
        ("client-a", "server-a"),
    ];
    for (client, server) in flows {
        for to in [at(server, 8080), at_vip(server, 80)] {
            let echo = echo_server(lab.listen(server, 8080), sizes.len());
            for (seed, size) in (0..).zip(sizes) {
                check_echo(&lab.connect(client, to), &pattern, size, seed);
            }
            for peer in echo.join().unwrap() {
                assert_eq!(peer.ip(), lab.address(client), "{client} -> {to}");
            }
        }
    }
}

fn bulk_is_exact(lab: &mut TestLab) {
    let pattern = Pattern::new(2);
    for (client, server) in [("client-a", "server-b"), ("server-b", "server-a")] {
        let echo = echo_server(lab.listen(server, 8080), 1);
        let stream = lab.connect(client, at(server, 8080));
        check_echo(&stream, &pattern, 32 * MIB, 7);
        echo.join().unwrap();
    }
}

/// More than one tunnel has streams for.
fn many_connections_at_once(lab: &mut TestLab) {
    for pair in [("client-a", "server-b"), ("server-b", "server-a")] {
        echo_side_by_side(lab, pair, 250, &Pattern::new(3), 20_000);
    }
}

/// The answer arrives whole although the client has long ended its direction.
fn client_closes_first(lab: &mut TestLab) {
    let pattern = Pattern::new(4);
    for (client, server) in [("client-a", "server-b"), ("server-b", "server-a")] {
        let listener = lab.listen(server, 8080);
        let stream = lab.connect(client, at(server, 8080));
        let (served, _) = accept(&listener);
        pattern.send(&stream, 1000, 1, 100);
        stream.shutdown(Shutdown::Write).unwrap();
        pattern.receive(&served, 1000);
        pattern.send(&served, 3 * MIB, 2, 100_000);
        drop(served);
        pattern.receive(&stream, 3 * MIB);
    }
}

fn server_closes_first(lab: &mut TestLab) {
    let pattern = Pattern::new(5);
    for (client, server) in [("client-a", "server-b"), ("server-b", "server-a")] {
        let listener = lab.listen(server, 8080);
        let stream = lab.connect(client, at(server, 8080));
        let (served, _) = accept(&listener);
        pattern.send(&served, 1000, 1, 100);
        served.shutdown(Shutdown::Write).unwrap();
        pattern.receive(&stream, 1000);
        let sender = thread::spawn({
            let stream = stream.try_clone().unwrap();
            move || {
                Pattern::new(5).send(&stream, 3 * MIB, 2, 100_000);
                stream.shutdown(Shutdown::Write).unwrap();
            }
        });
        pattern.receive(&served, 3 * MIB);
        sender.join().unwrap();
    }
}

fn plain_pods(lab: &mut TestLab) {
    let pattern = Pattern::new(6);
    let flows = [
        ("plain-b", "server-b"),
        ("client-a", "plain-b"),
        ("server-b", "plain-b"),
    ];
    for (client, server) in flows {
        let echo = echo_server(lab.listen(server, 8080), 1);
        let stream = lab.connect(client, at(server, 8080));
        check_echo(&stream, &pattern, 300_000, 1);
        let peers = echo.join().unwrap();
        assert_eq!(peers[0].ip(), lab.address(client), "{client} -> {server}");
    }
}

/// What a client gets that is refused: never a byte, and not nothing at all either.
fn refused(lab: &TestLab, client: &str, server: &str, port: u16) {
    let Ok(mut stream) = lab.try_connect(client, at(server, port), PATIENCE) else {
        return;
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let _ = stream.write_all(b"hello?"); // may fail already; the read says what happened
    match stream.read(&mut [0; 64]) {
        Ok(n) => assert_eq!(n, 0, "{client} got {n} bytes from {server}:{port}"),
        Err(error) => assert!(
            error.kind() != io::ErrorKind::WouldBlock,
            "{client} hangs on {server}:{port}"
        ),
    }
}

fn nobody_listens(lab: &mut TestLab) {
    for (client, node, server) in [
        ("client-a", "ztunnel-a", "server-b"),
        ("server-b", "ztunnel-b", "server-a"),
    ] {
        let mark = lab.log_length(node);
        refused(lab, client, server, 7999);
        eventually("an access log line with the error", || {
            let lines = lab.log_since(node, mark);
            let told = |line: &&String| line.contains(":7999") && line.contains("error=");
            lines.iter().find(told).cloned()
        });
    }
}

/// The tunnel's windows hold what the server does not read; others on the tunnel go on.
fn a_server_that_does_not_read(lab: &mut TestLab) {
    let pattern = Pattern::new(8);
    for (client, server) in [("client-a", "server-b"), ("server-b", "server-a")] {
        let listener = lab.listen(server, 8080);
        let mut stalled = lab.connect(client, at(server, 8080));
        let (held, _) = accept(&listener);
        stalled
            .set_write_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        let block = vec![7; 256 << 10];
        let mut written = 0_u64;
        while written < 256 * MIB {
            match stalled.write(&block) {
                Ok(n) => written += n as u64,
                Err(_) => break,
            }
        }
        assert!(
            written < 64 * MIB,
            "{written} bytes for a server that sleeps"
        );
        let echo = echo_server(listener, 1);
        check_echo(&lab.connect(client, at(server, 8080)), &pattern, MIB, 1);
        echo.join().unwrap();
        drop((stalled, held));
    }
}

/// Denied by the other implementation, which tells by status 401.
fn a_policy_that_denies(lab: &mut TestLab) {
    let path = lab.lab.directory().join("mesh.yaml");
    let before = fs::read_to_string(&path).unwrap();
    let policy = "policies:\n\
        - name: deny-6379\n  namespace: default\n  scope: Namespace\n  action: Deny\n  \
        rules:\n  - - - destinationPorts: [6379]\n        principals:\n        \
        - Exact: cluster.local/ns/default/sa/client-a\n        \
        - Exact: cluster.local/ns/default/sa/server-b\n";
    let with_policy = before.replace("policies: []\n", policy);
    assert_ne!(before, with_policy);
    let reload = |text: &str| {
        let marks = ["ztunnel-a", "ztunnel-b"].map(|host| (host, lab.log_length(host)));
        fs::write(&path, text).unwrap();
        for (host, mark) in marks {
            eventually("both nodes have the new configuration", || {
                let lines = lab.log_since(host, mark);
                let loaded = |line: &String| line.contains("mesh configuration loaded");
                lines.iter().any(loaded).then_some(())
            });
        }
    };
    reload(&with_policy);
    for (client, node, server) in [
        ("client-a", "ztunnel-a", "server-b"),
        ("server-b", "ztunnel-b", "server-a"),
    ] {
        let listener = lab.listen(server, 6379);
        let mark = lab.log_length(node);
        refused(lab, client, server, 6379);
        eventually("the client's node was told 401", || {
            let lines = lab.log_since(node, mark);
            let told = |line: &String| line.contains(":6379") && line.contains("401");
            lines.iter().any(told).then_some(())
        });
        listener.set_nonblocking(true).unwrap();
        assert!(
            listener.accept().is_err(),
            "a denied connection got through"
        );
    }
    reload(&before);
    let echo = echo_server(lab.listen("server-b", 6379), 1);
    let stream = lab.connect("client-a", at("server-b", 6379));
    check_echo(&stream, &Pattern::new(9), 1000, 1);
    echo.join().unwrap();
}

/// Tunnels into the node that restarts are dead; new connections get new ones.
fn the_other_node_restarts(lab: &mut TestLab) {
    let pattern = Pattern::new(10);
    for (client, server, node) in [
        ("client-a", "server-b", "ztunnel-b"),
        ("server-b", "server-a", "ztunnel-a"),
    ] {
        let echo = echo_server(lab.listen(server, 8080), 1);
        check_echo(&lab.connect(client, at(server, 8080)), &pattern, 1000, 1);
        echo.join().unwrap();
        lab.lab.stop_ztunnel(node).unwrap();
        lab.lab.start_ztunnel(node).unwrap();
        let echo = echo_server(lab.listen(server, 8080), 1);
        check_echo(&lab.connect(client, at(server, 8080)), &pattern, 1000, 2);
        echo.join().unwrap();
    }
    let status = lab.lab.status();
    assert!(status.ready, "{:?}", status.missing);
}
