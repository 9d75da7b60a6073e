//! Other proxies in ztunnel's place: each carries traffic whole, encrypted between the nodes, and
//! with the client's address where it can; what is not installed is skipped by name.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::fs;
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use lab::peers::{self, Place, ProxyKind};
use lab::{CertificateAuthority, LabOptions, Node, Redirect, UNDERLAY_INTERFACE};
use support::{
    Guarded, Pattern, TestLab, at, can_run, check_echo, echo_server, eventually, turn, unique,
    workspace_binary,
};

const MIB: u64 = 1 << 20;
const MARKER: &[u8] = b"zt-plaintext-marker-77d0";

/// The program of `kind`, or a line that says why the test is skipped.
fn installed(test: &str, kind: ProxyKind) -> Option<PathBuf> {
    match kind.program() {
        Ok(program) => Some(program),
        Err(reason) => {
            eprintln!("skipped: {test}: {reason}");
            None
        }
    }
}

/// What a proxy is expected to do.
#[derive(Clone, Copy, Debug)]
struct Expected {
    /// The server sees the client's address.
    client_address: bool,
    /// Pods of one node reach each other.
    same_node: bool,
    /// Where the other node's proxy is reached.
    port: u16,
}

fn carries(test: &str, redirect: Redirect, kind: ProxyKind, program: PathBuf, expected: Expected) {
    if !can_run(test) {
        return;
    }
    let _turn = turn();
    let lab = TestLab::with(&LabOptions {
        name: unique(test),
        redirect,
        ztunnel: Some(program),
        proxy: kind,
        ..LabOptions::default()
    });
    eventually("the lab says it is ready", || {
        lab.lab.status().ready.then_some(())
    });
    let servers: &[&str] = if expected.same_node {
        &["server-b", "server-a"]
    } else {
        &["server-b"]
    };
    for server in servers {
        // None is empty: HAProxy may drop a connection that ends before its own has begun.
        let sizes = [1, 100, 70_000, 8 * MIB];
        let echo = echo_server(lab.listen(server, 8080), sizes.len());
        for (size, seed) in sizes.into_iter().zip(0..) {
            let client = lab.connect("client-a", at(server, 8080));
            check_echo(&client, &Pattern::new(seed), size, seed);
        }
        let own = lab.address("client-a");
        for peer in echo.join().unwrap() {
            assert_eq!(
                peer.ip() == own,
                expected.client_address,
                "{server}: {peer}"
            );
        }
    }
    encrypts(&lab, expected.port);
}

/// Traffic between the nodes passes the underlay by the proxies' port and not in the clear.
fn encrypts(lab: &TestLab, port: u16) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("underlay.pcap");
    let mut command = lab.lab.command("node-a", "tcpdump").unwrap();
    command
        .args(["-i", UNDERLAY_INTERFACE, "-U", "-Z", "root", "-w"])
        .arg(&file)
        .stderr(Stdio::null());
    let capture = Guarded(command.spawn().unwrap());
    eventually("tcpdump captures", || {
        (fs::metadata(&file).ok()?.len() >= 24).then_some(())
    });
    let echo = echo_server(lab.listen("server-b", 9000), 1);
    let client = lab.connect("client-a", at("server-b", 9000));
    let text: Vec<u8> = MARKER.repeat(100);
    std::io::Write::write_all(&mut &client, &text).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut back = Vec::new();
    std::io::Read::read_to_end(&mut &client, &mut back).unwrap();
    assert!(back == text, "the marker came back different");
    echo.join().unwrap();
    let held = |wanted: &[u8]| {
        let bytes = fs::read(&file).unwrap();
        bytes.windows(wanted.len()).any(|window| window == wanted)
    };
    eventually("the capture is written", || {
        (fs::metadata(&file).ok()?.len() > text.len() as u64).then_some(())
    });
    // The kernel hands packets over in blocks.
    std::thread::sleep(Duration::from_millis(1200));
    drop(capture);
    assert!(held(&port.to_be_bytes()), "nothing went to port {port}");
    assert!(!held(MARKER), "plaintext on the underlay");
}

/// As upstream: in dedicated mode the tunnel comes from ztunnel's own address.
const STRANGER: Expected = Expected {
    client_address: false,
    same_node: false,
    port: 15008,
};

#[test]
fn our_own_dedicated_as_a_stranger() {
    let (kind, program) = (ProxyKind::Dedicated, workspace_binary("ztunnel"));
    carries("stranger", Redirect::Tunnel, kind, program, STRANGER);
}

/// The lab registers its listeners: it knows nothing of that.
#[test]
fn our_own_dedicated_as_a_stranger_on_ebpf() {
    let (kind, program) = (ProxyKind::Dedicated, workspace_binary("ztunnel"));
    carries("stranger-ebpf", Redirect::Ebpf, kind, program, STRANGER);
}

#[test]
fn conventional_on_ebpf() {
    let expected = Expected {
        client_address: true,
        same_node: true,
        port: 15008,
    };
    let program = workspace_binary("conventional");
    carries(
        "conventional",
        Redirect::Ebpf,
        ProxyKind::Shared,
        program,
        expected,
    );
}

fn foreign(kind: ProxyKind, port: u16) {
    let expected = Expected {
        client_address: true,
        same_node: true,
        port,
    };
    if let Some(program) = installed(kind.name(), kind) {
        carries(kind.name(), Redirect::Tunnel, kind, program, expected);
    }
}

#[test]
fn envoy_as_a_tcp_proxy() {
    foreign(ProxyKind::EnvoyTcp, 9000);
}

#[test]
fn envoy_speaking_hbone() {
    foreign(ProxyKind::EnvoyHbone, 15008);
}

#[test]
fn haproxy_on_ebpf() {
    let expected = Expected {
        client_address: true,
        same_node: true,
        port: 9000,
    };
    if let Some(program) = installed("haproxy_on_ebpf", ProxyKind::Haproxy) {
        let kind = ProxyKind::Haproxy;
        carries("haproxy-ebpf", Redirect::Ebpf, kind, program, expected);
    }
}

#[test]
fn haproxy() {
    foreign(ProxyKind::Haproxy, 9000);
}

/// Runs `program` over the configuration it gets on each node; it must find nothing wrong.
fn check(directory: &Path, mut run: impl FnMut(&Place, &Path) -> Command) {
    let authority = CertificateAuthority::generate("cluster.local").unwrap();
    for node in Node::ALL {
        let tls = peers::write_certificates(&authority, directory, node).unwrap();
        let place = Place {
            node,
            tls,
            threads: 2,
        };
        let output = run(&place, &directory.join("config.json"))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{node:?}: {text}");
    }
}

#[test]
fn envoy_accepts_its_configurations() {
    let Some(program) = installed("envoy_accepts_its_configurations", ProxyKind::EnvoyTcp) else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    for kind in [ProxyKind::EnvoyTcp, ProxyKind::EnvoyHbone] {
        check(directory.path(), |place, file| {
            fs::write(file, peers::envoy::config(kind, place).to_string()).unwrap();
            let mut command = Command::new(&program);
            command
                .args(["--mode", "validate"])
                .args(peers::envoy::arguments(file, place));
            command
        });
    }
}

#[test]
fn haproxy_accepts_its_configuration() {
    let Some(program) = installed("haproxy_accepts_its_configuration", ProxyKind::Haproxy) else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    check(directory.path(), |place, file| {
        fs::write(file, peers::haproxy::config(place)).unwrap();
        let mut command = Command::new(&program);
        command.arg("-c").args(peers::haproxy::arguments(file));
        command
    });
}

#[test]
fn setup_installs_the_version_that_is_looked_for() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/setup.sh");
    let text = fs::read_to_string(script).unwrap();
    let line = format!("envoy_version={}", peers::ENVOY_VERSION);
    assert!(text.lines().any(|found| found == line), "no line `{line}`");
}
