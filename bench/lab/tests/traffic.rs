//! Traffic through the mesh, on each redirection path: it arrives whole, from the right address,
//! encrypted between the nodes, accounted for, and not at all when a ztunnel is missing.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use lab::{Lab, Node, Redirect, UNDERLAY_INTERFACE};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{
    Case, Guarded, PATIENCE, Pattern, TestLab, accept, at, at_vip, check_echo, echo_server,
    eventually, run_cases, try_accept,
};

const MIB: u64 = 1 << 20;

const CASES: &[Case] = &[
    ("small_echoes_are_exact", small_echoes_are_exact),
    ("64_mib_each_way_are_exact", bulk_echo_is_exact),
    ("many_connections_at_once", many_connections_at_once),
    (
        "server_sees_the_clients_address",
        server_sees_the_clients_address,
    ),
    ("underlay_holds_no_plaintext", underlay_holds_no_plaintext),
    ("client_closes_first", client_closes_first),
    ("server_closes_first", server_closes_first),
    ("refused_connection_surfaces", refused_connection_surfaces),
    ("reset_by_the_server_surfaces", reset_by_the_server_surfaces),
    (
        "plain_pod_comes_in_and_is_reached",
        plain_pod_comes_in_and_is_reached,
    ),
    ("nodes_and_their_pods_talk", nodes_and_their_pods_talk),
    (
        "metrics_agree_with_the_traffic",
        metrics_agree_with_the_traffic,
    ),
    ("one_log_line_per_connection", one_log_line_per_connection),
    ("source_port_reuse", source_port_reuse),
    ("bulk_both_ways_side_by_side", bulk_both_ways_side_by_side),
    ("a_server_that_does_not_read", a_server_that_does_not_read),
    (
        "aborted_connections_cost_the_others_nothing",
        aborted_connections_cost_nothing,
    ),
    (
        "stalled_connections_do_not_stop_others",
        stalled_connections_do_not_stop_others,
    ),
    (
        "draining_lets_connections_finish",
        draining_lets_connections_finish,
    ),
    (
        "without_the_clients_ztunnel_nothing_passes",
        without_the_clients_ztunnel,
    ),
    (
        "without_the_servers_ztunnel_nothing_passes",
        without_the_servers_ztunnel,
    ),
];

#[test]
fn tunnel() {
    run_cases("tunnel", Redirect::Tunnel, CASES);
}

#[test]
fn ebpf() {
    run_cases("ebpf", Redirect::Ebpf, CASES);
}

/// The control: the same capture does find the marker where nothing encrypts, so that the case of
/// the other paths can fail.
#[test]
fn none() {
    let cases: &[Case] = &[
        ("underlay_holds_the_plaintext", |lab| {
            let capture = capture_marker(lab);
            assert!(
                contains(&capture, MARKER),
                "{} bytes without the marker",
                capture.len()
            );
        }),
        ("small_echoes_are_exact", |lab| {
            echo_sizes(lab, "server-b", at("server-b", 7000));
        }),
        ("client_closes_first", client_closes_first),
        ("server_closes_first", server_closes_first),
    ];
    run_cases("none", Redirect::None, cases);
}

/// Both servers, by address and by their services' virtual addresses.
fn targets() -> [(&'static str, SocketAddr); 4] {
    [
        ("server-b", at("server-b", 8080)),
        ("server-a", at("server-a", 8080)),
        ("server-b", at_vip("server-b", 80)),
        ("server-a", at_vip("server-a", 80)),
    ]
}

fn echo_sizes(lab: &TestLab, server: &str, to: SocketAddr) {
    let pattern = Pattern::new(1);
    let sizes = [1, 2, 100, 1400, 16_383, 16_384, 16_385, 100_000, MIB + 1];
    let port = if to.port() == 80 { 8080 } else { to.port() };
    let echo = echo_server(lab.listen(server, port), sizes.len());
    for (seed, size) in (0..).zip(sizes) {
        check_echo(&lab.connect("client-a", to), &pattern, size, seed);
    }
    echo.join().unwrap();
}

fn small_echoes_are_exact(lab: &mut TestLab) {
    for (server, to) in targets() {
        echo_sizes(lab, server, to);
    }
}

fn bulk_echo_is_exact(lab: &mut TestLab) {
    let pattern = Pattern::new(2);
    for (seed, (server, to)) in (100..).zip(targets()) {
        let echo = echo_server(lab.listen(server, 8080), 1);
        let virtual_address = to.port() == 80;
        let size = if virtual_address { 8 * MIB } else { 64 * MIB };
        check_echo(&lab.connect("client-a", to), &pattern, size, seed);
        echo.join().unwrap();
    }
}

fn many_connections_at_once(lab: &mut TestLab) {
    const CONNECTIONS: usize = 200;
    let pattern = Pattern::new(3);
    for server in ["server-b", "server-a"] {
        let echo = echo_server(lab.listen(server, 8080), CONNECTIONS);
        let open: Vec<TcpStream> = (0..CONNECTIONS)
            .map(|_| lab.connect("client-a", at(server, 8080)))
            .collect();
        thread::scope(|scope| {
            for (seed, stream) in (0..).zip(&open) {
                let pattern = &pattern;
                scope.spawn(move || check_echo(stream, pattern, 20_000, seed));
            }
        });
        echo.join().unwrap();
    }
}

fn server_sees_the_clients_address(lab: &mut TestLab) {
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

const MARKER: &[u8] = b"zt-plaintext-marker-5c1f0a";

/// Sends the marker from client-a to server-b and back; returns what passed on the underlay.
fn capture_marker(lab: &TestLab) -> Vec<u8> {
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

fn underlay_holds_no_plaintext(lab: &mut TestLab) {
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

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

fn client_closes_first(lab: &mut TestLab) {
    let (request, response) = (Pattern::new(5), Pattern::new(6));
    for server in ["server-b", "server-a"] {
        let listener = lab.listen(server, 8080);
        let client = lab.connect("client-a", at(server, 8080));
        thread::scope(|scope| {
            scope.spawn(|| {
                let (served, _) = accept(&listener);
                // Only after the client's end has arrived does the server begin.
                request.receive(&served, 100_000);
                response.send(&served, MIB, 5, 64 << 10);
            });
            request.send(&client, 100_000, 6, 8 << 10);
            client.shutdown(Shutdown::Write).unwrap();
            response.receive(&client, MIB);
        });
    }
}

fn server_closes_first(lab: &mut TestLab) {
    let (request, response) = (Pattern::new(7), Pattern::new(8));
    for server in ["server-b", "server-a"] {
        let listener = lab.listen(server, 8080);
        let client = lab.connect("client-a", at(server, 8080));
        thread::scope(|scope| {
            scope.spawn(|| {
                let (served, _) = accept(&listener);
                response.send(&served, 100_000, 7, 8 << 10);
                served.shutdown(Shutdown::Write).unwrap();
                request.receive(&served, MIB);
            });
            response.receive(&client, 100_000);
            request.send(&client, MIB, 8, 64 << 10);
            client.shutdown(Shutdown::Write).unwrap();
        });
    }
}

/// What a client gets from a connection that leads nowhere: an error at connect, or the end
/// without a byte.
fn outcome(lab: &TestLab, client: &str, to: SocketAddr, limit: Duration) -> io::Result<usize> {
    let mut stream = lab.try_connect(client, to, limit)?;
    stream.set_read_timeout(Some(limit))?;
    // May fail already; the read says what happened.
    let _ = stream.write_all(b"hello?");
    stream.read(&mut [0; 64])
}

fn refused_connection_surfaces(lab: &mut TestLab) {
    for server in ["server-b", "server-a"] {
        let mark = lab.log_length("ztunnel-a");
        match outcome(lab, "client-a", at(server, 7999), Duration::from_secs(5)) {
            Ok(0) => {}
            Ok(n) => panic!("{server}: {n} bytes from a port where nothing listens"),
            Err(error) if is_timeout(&error) => panic!("{server}: the client hangs: {error}"),
            Err(_) => {}
        }
        eventually("an access log line with the error", || {
            let lines = lab.log_since("ztunnel-a", mark);
            let told = |line: &&String| line.contains(":7999") && line.contains("error=");
            lines.iter().find(told).cloned()
        });
    }
}

fn reset_by_the_server_surfaces(lab: &mut TestLab) {
    for server in ["server-b", "server-a"] {
        let listener = lab.listen(server, 8080);
        let mut client = lab.connect("client-a", at(server, 8080));
        client.write_all(b"unread").unwrap();
        let (mut served, _) = accept(&listener);
        served.read_exact(&mut [0; 3]).unwrap();
        // Closing with unread data in the queue resets the connection.
        drop(served);
        match client.read(&mut [0; 64]) {
            Ok(0) => {}
            Ok(n) => panic!("{server}: {n} bytes after a reset"),
            Err(error) => assert!(!is_timeout(&error), "{server}: the client hangs: {error}"),
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

fn plain_pod_comes_in_and_is_reached(lab: &mut TestLab) {
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
fn nodes_and_their_pods_talk(lab: &mut TestLab) {
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

/// Opens `count` connections from client-a to `server`; on each `up` bytes go there and `down`
/// bytes come back.
fn exchange(lab: &TestLab, server: &str, count: usize, up: usize, down: usize) {
    let listener = lab.listen(server, 8080);
    for _ in 0..count {
        let mut client = lab.connect("client-a", at(server, 8080));
        client.write_all(&vec![1; up]).unwrap();
        let (mut served, _) = accept(&listener);
        served.read_exact(&mut vec![0; up]).unwrap();
        served.write_all(&vec![2; down]).unwrap();
        drop(served);
        let mut got = Vec::new();
        client.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), down);
    }
}

fn metrics_agree_with_the_traffic(lab: &mut TestLab) {
    const COUNT: usize = 5;
    const UP: usize = 10_000;
    const DOWN: usize = 20_000;
    let reports = [
        ("ztunnel-a", "reporter=\"source\""),
        ("ztunnel-b", "reporter=\"destination\""),
    ];
    let read = |(ztunnel, reporter): (&str, &str)| {
        let labels = [
            reporter,
            "source_workload=\"client-a\"",
            "destination_workload=\"server-b\"",
            "connection_security_policy=\"mutual_tls\"",
            "source_principal=\"spiffe://cluster.local/ns/default/sa/client-a\"",
            "destination_principal=\"spiffe://cluster.local/ns/default/sa/server-b\"",
        ];
        let metrics = lab.metrics(ztunnel);
        [
            "connections_opened",
            "connections_closed",
            "sent_bytes",
            "received_bytes",
        ]
        .map(|family| metrics.sum(&format!("istio_tcp_{family}_total"), &labels))
    };
    let before = reports.map(read);
    exchange(lab, "server-b", COUNT, UP, DOWN);
    // Upstream's meaning on both sides: received is what the destination received (the request),
    // sent is what it sent (the response).
    let expected = [COUNT, COUNT, COUNT * DOWN, COUNT * UP].map(|n| n as u64);
    for (report, before) in reports.into_iter().zip(before) {
        let mut seen = [0; 4];
        let deadline = Instant::now() + PATIENCE;
        while seen != expected && Instant::now() < deadline {
            let now = read(report);
            seen = std::array::from_fn(|index| now[index] - before[index]);
            thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(seen, expected, "{report:?}: opened, closed, sent, received");
    }
}

fn one_log_line_per_connection(lab: &mut TestLab) {
    const COUNT: usize = 3;
    let sides = [
        ("ztunnel-a", "direction=\"outbound\""),
        ("ztunnel-b", "direction=\"inbound\""),
    ];
    let marks = sides.map(|(ztunnel, _)| lab.log_length(ztunnel));
    exchange(lab, "server-b", COUNT, 1234, 5678);
    for ((ztunnel, direction), mark) in sides.into_iter().zip(marks) {
        let own = |line: &String| line.contains("connection complete") && line.contains(direction);
        let lines = eventually("an access log line per connection", || {
            let lines: Vec<_> = lab
                .log_since(ztunnel, mark)
                .into_iter()
                .filter(own)
                .collect();
            (lines.len() >= COUNT).then_some(lines)
        });
        assert_eq!(lines.len(), COUNT, "{ztunnel}: {lines:#?}");
        for line in lines {
            let keys = [
                "src.addr=10.244.1.11:",
                "src.workload=\"client-a\"",
                "src.namespace=\"default\"",
                "src.identity=\"spiffe://cluster.local/ns/default/sa/client-a\"",
                "dst.hbone_addr=10.244.2.11:8080",
                "dst.workload=\"server-b\"",
                "dst.namespace=\"default\"",
                "dst.identity=\"spiffe://cluster.local/ns/default/sa/server-b\"",
                "duration=\"",
            ];
            for key in keys {
                assert!(line.contains(key), "{ztunnel}: no {key} in {line}");
            }
            // Each side's log speaks from its own workload's side.
            let (sent, received) = if ztunnel == "ztunnel-a" {
                (1234, 5678)
            } else {
                (5678, 1234)
            };
            let bytes = format!("bytes_sent={sent} bytes_recv={received} ");
            assert!(line.contains(&bytes), "{ztunnel}: no {bytes} in {line}");
        }
    }
}

/// A client that reuses its source port while the old connection may still be in TIME_WAIT.
fn source_port_reuse(lab: &mut TestLab) {
    let listener = lab.listen("server-b", 8080);
    let to = at("server-b", 8080);
    for round in 0..5 {
        let stream = lab
            .lab
            .on("client-a", || {
                let socket = socket2::Socket::new(
                    socket2::Domain::IPV4,
                    socket2::Type::STREAM,
                    Some(socket2::Protocol::TCP),
                )?;
                socket.set_reuse_address(true)?;
                // Closing then resets, so that the client itself holds no TIME_WAIT.
                socket.set_linger(Some(Duration::ZERO))?;
                socket.bind(&SocketAddr::from(([10, 244, 1, 11], 15999)).into())?;
                socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
                Ok::<_, io::Error>(TcpStream::from(socket))
            })
            .unwrap();
        let mut stream = stream.unwrap_or_else(|error| panic!("round {round}: {error}"));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&[round]).unwrap();
        let (mut served, _) = accept(&listener);
        let mut byte = [0];
        served.read_exact(&mut byte).unwrap();
        assert_eq!(byte[0], round);
        served.write_all(b"!").unwrap();
        stream.read_exact(&mut byte).unwrap();
        drop(served);
    }
}

fn bulk_both_ways_side_by_side(lab: &mut TestLab) {
    const CONNECTIONS: usize = 8;
    let pattern = Pattern::new(13);
    for server in ["server-b", "server-a"] {
        let echo = echo_server(lab.listen(server, 8080), CONNECTIONS);
        let open: Vec<TcpStream> = (0..CONNECTIONS)
            .map(|_| lab.connect("client-a", at(server, 8080)))
            .collect();
        thread::scope(|scope| {
            for (seed, stream) in (0..).zip(&open) {
                let pattern = &pattern;
                scope.spawn(move || check_echo(stream, pattern, 8 * MIB, seed));
            }
        });
        echo.join().unwrap();
    }
}

/// Writes the pattern to `stream` until nothing more is taken for a second; returns how much was.
fn fill(stream: &TcpStream, pattern: &Pattern, limit: u64) -> u64 {
    stream
        .set_write_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let mut written = 0;
    let mut to = stream;
    while written < limit {
        match to.write(pattern.at(written, 64 << 10)) {
            Ok(n) => written += n as u64,
            Err(error) if is_timeout(&error) => break,
            Err(error) => panic!("writing at {written}: {error}"),
        }
    }
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    written
}

/// Resident memory of the ztunnels together, in bytes.
fn ztunnel_memory(lab: &TestLab) -> u64 {
    let resident = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_ascii_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
            * 1024
    };
    lab.lab.ztunnel_pids().into_iter().map(resident).sum()
}

/// What a server does not read stays with the client, and arrives whole once it does.
fn a_server_that_does_not_read(lab: &mut TestLab) {
    const LIMIT: u64 = 256 * MIB;
    let pattern = Pattern::new(14);
    for server in ["server-b", "server-a"] {
        let listener = lab.listen(server, 8080);
        let client = lab.connect("client-a", at(server, 8080));
        let (served, _) = accept(&listener);
        let before = ztunnel_memory(lab);
        let written = fill(&client, &pattern, LIMIT);
        assert!(
            written < LIMIT / 2,
            "{server}: {written} bytes were taken for nobody"
        );
        let grown = ztunnel_memory(lab).saturating_sub(before);
        assert!(
            grown < 64 * MIB,
            "{server}: the ztunnels grew by {grown} bytes"
        );
        client.shutdown(Shutdown::Write).unwrap();
        pattern.receive(&served, written);
    }
}

/// Connections that end with data nobody has read must give back what they hold of the window of
/// the tunnel they share, whichever end gives up.
fn aborted_connections_cost_nothing(lab: &mut TestLab) {
    const ABORTED: usize = 10;
    let pattern = Pattern::new(17);
    let reset = |stream: TcpStream| {
        let socket = socket2::Socket::from(stream);
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    };
    for who in [
        "client",
        "server",
        "client while the server sends",
        "server that sends",
    ] {
        let listener = lab.listen("server-b", 8080);
        for _ in 0..ABORTED {
            let client = lab.connect("client-a", at("server-b", 8080));
            let (served, _) = accept(&listener);
            let sender = if who.contains("send") {
                &served
            } else {
                &client
            };
            sender
                .set_write_timeout(Some(Duration::from_millis(100)))
                .unwrap();
            let mut to = sender;
            let mut written = 0;
            while written < 64 * MIB {
                match to.write(pattern.at(written, 64 << 10)) {
                    Ok(n) => written += n as u64,
                    Err(_) => break,
                }
            }
            let (first, second) = if who.starts_with("client") {
                (client, served)
            } else {
                (served, client)
            };
            reset(first);
            // The other end gets to know by itself.
            thread::sleep(Duration::from_millis(20));
            drop(second);
        }
        drop(listener);
        let echo = echo_server(lab.listen("server-b", 8081), 6);
        for seed in 0..6 {
            let client = lab.connect("client-a", at("server-b", 8081));
            check_echo(&client, &pattern, 2 * MIB, seed);
        }
        echo.join().unwrap();
    }
}

/// Connections share tunnels; those that nobody reads must not take the others with them. That
/// holds for as many as leave something of the tunnel's window, which is four times a stream's.
fn stalled_connections_do_not_stop_others(lab: &mut TestLab) {
    const STALLED: usize = 3;
    let pattern = Pattern::new(15);
    let listener = lab.listen("server-b", 8080);
    let mut stalled = Vec::new();
    for _ in 0..STALLED {
        let client = lab.connect("client-a", at("server-b", 8080));
        let (served, _) = accept(&listener);
        fill(&client, &pattern, 64 * MIB);
        stalled.push((client, served));
    }
    drop(listener);
    let echo = echo_server(lab.listen("server-b", 8081), 4);
    for seed in 0..4 {
        let client = lab.connect("client-a", at("server-b", 8081));
        check_echo(&client, &pattern, 8 * MIB, seed);
    }
    echo.join().unwrap();
}

/// A ztunnel that is told to end takes nothing new, but lets what is open come to its end.
fn draining_lets_connections_finish(lab: &mut TestLab) {
    let pattern = Pattern::new(16);
    for (ztunnel, index) in [("ztunnel-a", 0), ("ztunnel-b", 1)] {
        let echo = echo_server(lab.listen("server-b", 8080), 1);
        let client = lab.connect("client-a", at("server-b", 8080));
        let pid = lab.lab.ztunnel_pids()[index];
        pattern.send(&client, 1000, 1, 100);
        let mut first = vec![0; 1000];
        (&client).read_exact(&mut first).unwrap();
        assert_eq!(first, pattern.at(0, 1000));
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGTERM).unwrap();
        // Under way when the signal comes, and going on for longer than anything else here.
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(100));
            (&client).write_all(b"still here").unwrap();
            let mut answer = [0; 10];
            (&client).read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"still here", "{ztunnel}");
        }
        let new = outcome(
            lab,
            "client-a",
            at("server-b", 7998),
            Duration::from_secs(1),
        );
        assert!(!matches!(new, Ok(1..)), "{ztunnel}: {new:?}");
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!((&client).read(&mut [0; 1]).unwrap(), 0);
        echo.join().unwrap();
        // Nothing is left to wait for: it ends well before the drain's deadline of 5 s.
        let start = Instant::now();
        lab.lab.stop_ztunnel(ztunnel).unwrap();
        assert!(
            start.elapsed() < Duration::from_secs(3),
            "{ztunnel} lingers"
        );
        lab.lab.start_ztunnel(ztunnel).unwrap();
        // The pids are in order of their start; keep node A's first.
        if ztunnel == "ztunnel-a" {
            lab.lab.stop_ztunnel("ztunnel-b").unwrap();
            lab.lab.start_ztunnel("ztunnel-b").unwrap();
        }
    }
}

/// Captured traffic must not reach the server when `ztunnel` is not there, and must again once it
/// is back.
fn fails_closed(lab: &mut TestLab, ztunnel: &str, flows: &[(&str, &str)]) {
    let pattern = Pattern::new(11);
    lab.lab.stop_ztunnel(ztunnel).unwrap();
    assert!(!lab.lab.status().ready, "ready without {ztunnel}");
    for (client, server) in flows {
        let listener = lab.listen(server, 8080);
        let got = outcome(lab, client, at(server, 8080), Duration::from_secs(2));
        assert!(
            !matches!(got, Ok(1..)),
            "{client} -> {server}: got an answer: {got:?}"
        );
        let reached = try_accept(&listener, Duration::from_millis(300));
        if let Some((mut served, peer)) = reached {
            served
                .set_read_timeout(Some(Duration::from_secs(1)))
                .unwrap();
            let bytes = served.read(&mut [0; 64]);
            panic!("{client} -> {server}: the server was reached by {peer}: {bytes:?}");
        }
    }
    lab.lab.start_ztunnel(ztunnel).unwrap();
    for (client, server) in flows {
        // Another port: what a ztunnel still tried for the first one may arrive by now.
        let echo = echo_server(lab.listen(server, 8081), 1);
        check_echo(&lab.connect(client, at(server, 8081)), &pattern, 50_000, 12);
        echo.join().unwrap();
    }
    let status = Lab::attach(lab.lab.name()).unwrap().status();
    assert!(status.ready, "{:?}", status.missing);
}

fn without_the_clients_ztunnel(lab: &mut TestLab) {
    fails_closed(
        lab,
        "ztunnel-a",
        &[("client-a", "server-b"), ("client-a", "server-a")],
    );
}

fn without_the_servers_ztunnel(lab: &mut TestLab) {
    fails_closed(
        lab,
        "ztunnel-b",
        &[("client-a", "server-b"), ("plain-b", "server-b")],
    );
}
