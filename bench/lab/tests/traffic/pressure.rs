//! Bulk, backpressure, and neighbours on a tunnel that do not read or give up.

use std::fs;
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use crate::MIB;
use crate::closing::is_timeout;
use crate::support::{
    PATIENCE, Pattern, TestLab, accept, at, check_echo, echo_server, echo_side_by_side,
};

pub(super) fn bulk_both_ways_side_by_side(lab: &mut TestLab) {
    for server in ["server-b", "server-a"] {
        echo_side_by_side(lab, ("client-a", server), 8, &Pattern::new(13), 8 * MIB);
    }
}

/// Writes the pattern to `stream` until nothing more is taken for a second; returns how much was.
pub(super) fn fill(stream: &TcpStream, pattern: &Pattern, limit: u64) -> u64 {
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
pub(super) fn ztunnel_memory(lab: &TestLab) -> u64 {
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
pub(super) fn a_server_that_does_not_read(lab: &mut TestLab) {
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
pub(super) fn aborted_connections_cost_nothing(lab: &mut TestLab) {
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
pub(super) fn stalled_connections_do_not_stop_others(lab: &mut TestLab) {
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
