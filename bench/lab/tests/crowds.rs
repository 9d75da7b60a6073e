//! Ten thousand connections: at once to a destination nobody has been to, idle, and gone again.
//!
//! `LAB_CROWD` says how many connections (10,000 by default), `LAB_WORKLOADS` how many workloads
//! (30,000).
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/mod.rs"]
mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lab::Redirect;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::{PATIENCE, TestLab, at, can_run, eventually, turn};

/// Where the echo server is.
const PORT: u16 = 8070;
const ZTUNNELS: [&str; 2] = ["ztunnel-a", "ztunnel-b"];

fn crowd() -> usize {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    std::env::var("LAB_CROWD").map_or(10_000, |crowd| crowd.parse().unwrap())
}

/// Ends a process that the test has started.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An echo server on `server-b` that takes as many as come.
fn server(lab: &TestLab) -> Ended {
    let directory = std::env::var("LAB_BIN_DIR").map(std::path::PathBuf::from);
    let beside = || {
        std::env::current_exe()
            .unwrap()
            .parent()
            .unwrap()
            .parent()
            .unwrap()
            .to_owned()
    };
    let program = directory.unwrap_or_else(|_| beside()).join("loadgen");
    let mut command = lab.lab.command("server-b", program).unwrap();
    command.args([
        "serve",
        "--listen",
        &format!("0.0.0.0:{PORT}"),
        "--mode",
        "echo",
    ]);
    let server = Ended(
        command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    eventually("the echo server", || {
        let netns = lab.lab.netns("server-b").unwrap();
        lab::http_get(&netns, at("server-b", PORT), "/", Duration::from_secs(1)).err()?;
        lab.lab
            .on("server-b", || TcpStream::connect(at("server-b", PORT)).ok())
            .unwrap()
    });
    server
}

fn ask(mut stream: &TcpStream) {
    stream.write_all(b"?").unwrap();
}

fn answer(mut stream: &TcpStream) {
    stream.read_exact(&mut [0]).unwrap();
}

/// `crowd` connections from `client-a`, each of which has asked once.
fn all_at_once(lab: &TestLab, crowd: usize) -> Vec<TcpStream> {
    let connect = || {
        let stream = TcpStream::connect(at("server-b", PORT)).unwrap();
        stream.set_read_timeout(Some(PATIENCE * 4)).unwrap();
        ask(&stream);
        stream
    };
    let connect_all = || (0..crowd).map(|_| connect()).collect();
    lab.lab.on("client-a", connect_all).unwrap()
}

/// The round trips of one connection until `stop`, sorted.
fn round_trips(stream: &TcpStream, stop: &AtomicBool) -> Vec<Duration> {
    let mut times = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let start = Instant::now();
        ask(stream);
        answer(stream);
        times.push(start.elapsed());
        thread::sleep(Duration::from_millis(1));
    }
    times.sort_unstable();
    times
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}

/// How long a neighbour's round trips took, sorted: before a crowd, and while it was there.
struct Neighbour {
    quiet: Vec<Duration>,
    loud: Vec<Duration>,
    /// How long the crowd was.
    took: Duration,
}

impl Neighbour {
    fn show(&self, what: &str) {
        let show = |times: &[Duration]| {
            let [p50, p90, p99] = [50, 90, 99].map(|percent| percentile(times, percent));
            format!("p50 {p50:.1?}, p90 {p90:.1?}, p99 {p99:.1?}")
        };
        let (quiet, loud) = (show(&self.quiet), show(&self.loud));
        let took = self.took;
        eprintln!(
            "{what}: all were through in {took:.1?}; a neighbour's round trips: quiet {quiet}; \
             meanwhile {loud}"
        );
    }
}

/// `crowd` connections of one pod at once, beside an established connection of another.
fn beside_a_crowd(lab: &TestLab, crowd: usize) -> (Neighbour, Vec<TcpStream>) {
    let neighbour = lab.connect("server-a", at("server-b", PORT));
    neighbour.set_nodelay(true).unwrap();
    neighbour.set_read_timeout(Some(PATIENCE * 4)).unwrap();
    let (quiet_over, crowd_over) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let measuring = scope.spawn(|| {
            let quiet = round_trips(&neighbour, &quiet_over);
            (quiet, round_trips(&neighbour, &crowd_over))
        });
        thread::sleep(Duration::from_secs(2));
        quiet_over.store(true, Ordering::Relaxed);
        let start = Instant::now();
        let streams = all_at_once(lab, crowd);
        streams.iter().for_each(answer);
        let took = start.elapsed();
        crowd_over.store(true, Ordering::Relaxed);
        let (quiet, loud) = measuring.join().unwrap();
        let neighbour = Neighbour { quiet, loud, took };
        (neighbour, streams)
    })
}

/// A crowd of one pod must not stop an established connection of another.
fn a_crowd_delays_nobody_for_long(lab: &TestLab, crowd: usize) -> Vec<TcpStream> {
    let twin = TestLab::up("crowd-none", Redirect::None);
    let _server = server(&twin);
    beside_a_crowd(&twin, crowd).0.show("without a mesh");
    drop(twin);
    let (neighbour, streams) = beside_a_crowd(lab, crowd);
    neighbour.show("with a mesh");
    // A stall is as long as what makes it: a tenth of that is no stall, on any machine.
    let longest = *neighbour.loud.last().unwrap();
    let took = neighbour.took;
    assert!(
        longest < took / 2,
        "{longest:?} of {took:?} without an answer"
    );
    let answers = neighbour.loud.len();
    assert!(answers > 20, "{answers} answers in {took:?}");
    streams
}

/// Resident memory of each ztunnel, bytes.
fn memory(lab: &TestLab) -> [u64; 2] {
    let pids = lab.lab.ztunnel_pids();
    [0, 1].map(|at| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", pids[at])).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        let kib: u64 = line
            .split_ascii_whitespace()
            .nth(1)
            .unwrap()
            .parse()
            .unwrap();
        kib * 1024
    })
}

#[test]
fn a_crowd_comes_through_costs_little_and_leaves_nothing() {
    let test = "crowd";
    if !can_run(test) {
        return;
    }
    let _turn = turn();
    let lab = TestLab::up(test, Redirect::Ebpf);
    let crowd = crowd();
    let _server = server(&lab);
    // What is there once is not the crowd's: threads, tables, certificates.
    drop(lab.connect("server-a", at("server-b", PORT)));
    thread::sleep(Duration::from_secs(2));
    let before = memory(&lab);
    let streams = a_crowd_delays_nobody_for_long(&lab, crowd);
    thread::sleep(Duration::from_secs(5));
    let held = memory(&lab);
    for (at, ztunnel) in ZTUNNELS.iter().enumerate() {
        let each = held[at].saturating_sub(before[at]) / crowd as u64;
        eprintln!("{ztunnel}: {each} bytes of memory for each idle connection");
        assert!(
            each < 8 << 10,
            "{ztunnel}: {each} bytes for each connection"
        );
    }
    drop(streams);
    let gone = Instant::now();
    let kept = |now: u64, at: usize| now.saturating_sub(before[at]);
    let limit = |at: usize| (held[at] - before[at]) * 3 / 4;
    let mut last = memory(&lab);
    while (0..2).any(|at| kept(last[at], at) > limit(at)) {
        assert!(
            gone.elapsed() < Duration::from_secs(30),
            "before {before:?}, with {crowd} connections {held:?}, 30 s after them {last:?}"
        );
        thread::sleep(Duration::from_millis(500));
        last = memory(&lab);
    }
    thread::sleep(Duration::from_secs(10).saturating_sub(gone.elapsed()));
    let last = memory(&lab);
    eprintln!(
        "memory before, with them, and {:.0?} after they had gone: {before:?} {held:?} {last:?}",
        gone.elapsed()
    );
}

/// A configuration that was large and is not any more, the first one included, leaves nothing.
#[test]
fn memory_of_a_configuration_comes_back() {
    // Less than what a workload of the model takes, more than what parsing it does for a moment.
    const EACH: u64 = 1_250;
    let workloads: u32 =
        std::env::var("LAB_WORKLOADS").map_or(30_000, |count| count.parse().unwrap());
    let test = "large";
    if !can_run(test) {
        return;
    }
    let _turn = turn();
    let small = lab::default_mesh();
    let more: String = (0..workloads)
        .map(|n| {
            let [_, a, b, c] = n.to_be_bytes();
            format!(
                "- {{uid: other//Pod/ns/w{n}, name: w{n}, namespace: ns{}, serviceAccount: sa{}, \
                 trustDomain: cluster.local, workloadIps: [11.{a}.{b}.{c}], protocol: HBONE, \
                 node: elsewhere, network: '', services: {{}}}}\n",
                n % 100,
                n % 1000
            )
        })
        .collect();
    let large = small.replacen("workloads:\n", &format!("workloads:\n{more}"), 1);
    assert!(large.len() > small.len() + 1_000_000);
    let file = std::env::temp_dir().join(format!("{}.yaml", support::unique("large")));
    std::fs::write(&file, large).unwrap();
    let lab = TestLab::with(&lab::LabOptions {
        name: support::unique(test),
        redirect: Redirect::Ebpf,
        mesh: Some(file.clone()),
        ..lab::LabOptions::default()
    });
    std::fs::remove_file(file).unwrap();
    let held = memory(&lab);
    std::fs::write(lab.lab.directory().join("mesh.yaml"), small).unwrap();
    let gone = Instant::now();
    while (0..2).any(|at| memory(&lab)[at] > held[at] - u64::from(workloads) * EACH) {
        assert!(
            gone.elapsed() < Duration::from_secs(30),
            "with {workloads} workloads {held:?}, 30 s after them {:?}",
            memory(&lab)
        );
        thread::sleep(Duration::from_millis(500));
    }
    eprintln!(
        "memory with {workloads} workloads more, and {:.0?} after they had gone: {held:?} {:?}",
        gone.elapsed(),
        memory(&lab)
    );
}
