//! A ztunnel that drains, and one that is missing: nothing passes without it.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use lab::Lab;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::closing::outcome;
use crate::support::{Pattern, TestLab, at, check_echo, echo_server, try_accept};

/// A ztunnel that is told to end takes nothing new, but lets what is open come to its end, and then
/// waits no longer: the drain's deadline is 5 s. A machine may be slow for once, so it has three
/// tries to be quicker than that.
pub(super) fn draining_lets_connections_finish(lab: &mut TestLab) {
    const QUICK: Duration = Duration::from_secs(3);
    for (ztunnel, index) in [("ztunnel-a", 0), ("ztunnel-b", 1)] {
        let mut took = Vec::new();
        while took.last().is_none_or(|last| *last >= QUICK) {
            assert!(took.len() < 3, "{ztunnel} lingers: {took:?}");
            took.push(drained(lab, ztunnel, index));
        }
    }
}

/// Drains `ztunnel` beside a connection that goes on; how long it took to end behind that.
fn drained(lab: &mut TestLab, ztunnel: &str, index: usize) -> Duration {
    let pattern = Pattern::new(16);
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
    // Nothing is left to wait for.
    let start = Instant::now();
    lab.lab.stop_ztunnel(ztunnel).unwrap();
    let took = start.elapsed();
    lab.lab.start_ztunnel(ztunnel).unwrap();
    // The pids are in order of their start; keep node A's first.
    if ztunnel == "ztunnel-a" {
        lab.lab.stop_ztunnel("ztunnel-b").unwrap();
        lab.lab.start_ztunnel("ztunnel-b").unwrap();
    }
    took
}

/// Captured traffic must not reach the server when `ztunnel` is not there, and must again once it
/// is back.
pub(super) fn fails_closed(lab: &mut TestLab, ztunnel: &str, flows: &[(&str, &str)]) {
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

pub(super) fn without_the_clients_ztunnel(lab: &mut TestLab) {
    fails_closed(
        lab,
        "ztunnel-a",
        &[("client-a", "server-b"), ("client-a", "server-a")],
    );
}

pub(super) fn without_the_servers_ztunnel(lab: &mut TestLab) {
    fails_closed(
        lab,
        "ztunnel-b",
        &[("client-a", "server-b"), ("plain-b", "server-b")],
    );
}
