//! One ztunnel after another in one namespace: connections come without a pause, and none of them
//! notices.
//!
//! `LAB_HANDOVERS` says how often (2 by default, 20 in `make soak`).
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/mod.rs"]
mod support;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use lab::Redirect;
use support::{PATIENCE, TestLab, at, can_run, turn};

/// Short connections a second, all flows together.
const RATE: u64 = 1_000;
/// How long a long connection lives: less than a drain may take (5 s by default).
const LONG: Duration = Duration::from_secs(3);
/// Where short and long connections go.
const PORT: u16 = 8090;

/// Client and server: captured from a pod, to another node and to the same; by a tunnel from the
/// other node, and in plain text from there.
const FLOWS: [(&str, &str); 4] = [
    ("client-a", "server-b"),
    ("client-a", "server-a"),
    ("server-b", "server-a"),
    ("plain-b", "server-a"),
];

/// What has happened so far.
#[derive(Debug, Default)]
struct Tally {
    stop: AtomicBool,
    short: AtomicU64,
    long: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Tally {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn failed(&self, what: &str, error: &io::Error) {
        self.failures
            .lock()
            .unwrap()
            .push(format!("{what}: {error}"));
    }
}

/// Echoes on every connection until it ends; each in a thread of its own.
fn serve(listener: TcpListener) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            let _ = thread::Builder::new()
                .stack_size(128 << 10)
                .spawn(move || support::echo(stream));
        }
    });
}

fn exchange(mut stream: &TcpStream) -> io::Result<()> {
    let mut back = [0; 16];
    stream.write_all(b"are you there?!!")?;
    stream.read_exact(&mut back)
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Connects, asks once and closes, `rate` times a second or as often as it can.
fn short(to: SocketAddr, what: &str, rate: u64, tally: &Tally) {
    let (start, mut done) = (Instant::now(), 0);
    while tally.goes_on() {
        match connect(to).and_then(|stream| exchange(&stream)) {
            Ok(()) => tally.short.fetch_add(1, Ordering::Relaxed),
            Err(error) => {
                tally.failed(&format!("short, {what}"), &error);
                0
            }
        };
        done += 1;
        let due = start + Duration::from_micros(done * 1_000_000 / rate);
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

/// One connection after another, each in use for [`LONG`].
fn long(to: SocketAddr, what: &str, tally: &Tally) {
    while tally.goes_on() {
        let end = Instant::now() + LONG;
        let lived = connect(to).and_then(|stream| {
            while Instant::now() < end && tally.goes_on() {
                exchange(&stream)?;
                thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        });
        match lived {
            Ok(()) => {
                tally.long.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => tally.failed(&format!("long, {what}"), &error),
        }
    }
}

/// Starts everything; the threads end when the tally says so.
fn load(lab: &TestLab, tally: &Arc<Tally>) -> Vec<JoinHandle<()>> {
    const THREADS: u64 = 4;
    let mut threads = Vec::new();
    let mut start = |client: &'static str, run: Box<dyn FnOnce() + Send>| {
        let netns = lab.lab.netns(client).unwrap();
        threads.push(thread::spawn(move || {
            let namespace = std::fs::File::open(netns).unwrap();
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            run();
        }));
    };
    for (client, server) in FLOWS {
        let (to, what) = (at(server, PORT), format!("{client} -> {server}"));
        for _ in 0..THREADS {
            let (tally, what) = (Arc::clone(tally), what.clone());
            let rate = RATE / FLOWS.len() as u64 / THREADS;
            start(client, Box::new(move || short(to, &what, rate, &tally)));
        }
        for _ in 0..2 {
            let (tally, what) = (Arc::clone(tally), what.clone());
            start(client, Box::new(move || long(to, &what, &tally)));
        }
    }
    threads
}

fn hand_over_under_load(test: &str, redirect: Redirect) {
    if !can_run(test) {
        return;
    }
    let _turn = turn();
    let times: u32 = std::env::var("LAB_HANDOVERS").map_or(2, |times| times.parse().unwrap());
    let mut lab = TestLab::up(&format!("ho-{}", redirect.name()), redirect);
    for server in ["server-a", "server-b"] {
        serve(lab.listen(server, PORT));
    }
    let tally = Arc::<Tally>::default();
    let threads = load(&lab, &tally);
    let start = Instant::now();
    thread::sleep(Duration::from_secs(1));
    let mut pids = vec![lab.lab.ztunnel_pids()];
    for _ in 0..times {
        for ztunnel in ["ztunnel-a", "ztunnel-b"] {
            lab.lab.hand_over(ztunnel).unwrap();
        }
        pids.push(lab.lab.ztunnel_pids());
        // The endpoints are the younger one's: it has the elder's ports, and counts from nothing.
        assert!(
            lab.metrics("ztunnel-a")
                .sum("istio_tcp_connections_opened_total", &[])
                > 0
        );
    }
    let took = start.elapsed();
    tally.stop.store(true, Ordering::Relaxed);
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
    let (short, long) = (
        tally.short.load(Ordering::Relaxed),
        tally.long.load(Ordering::Relaxed),
    );
    eprintln!(
        "{test}: {times} hand-overs of each ztunnel in {took:.1?} under {short} short connections \
         ({} a second) and {long} long ones",
        u128::from(short) * 1000 / took.as_millis()
    );
    let failures = tally.failures.lock().unwrap();
    assert!(
        failures.is_empty(),
        "{} of {} connections failed:\n{}",
        failures.len(),
        short + long,
        failures[..failures.len().min(20)].join("\n")
    );
    assert!(long > 0 && short > u64::from(times) * 100, "{short} {long}");
    let distinct: std::collections::HashSet<_> = pids.iter().flatten().collect();
    assert_eq!(distinct.len(), 2 * (times as usize + 1), "{pids:?}");
}

#[test]
fn no_connection_fails_when_one_ztunnel_follows_another_on_ebpf() {
    hand_over_under_load("handover_ebpf", Redirect::Ebpf);
}

#[test]
fn no_connection_fails_when_one_ztunnel_follows_another_on_tunnel() {
    hand_over_under_load("handover_tunnel", Redirect::Tunnel);
}
