//! Ten thousand connections: at once to a destination nobody has been to, idle, and gone again.
//!
//! `LAB_CROWD` says how many connections (10,000 by default), `LAB_WORKLOADS` how many workloads
//! (30,000).
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "support/mod.rs"]
mod support;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lab::Redirect;
use nix::sched::{CloneFlags, CpuSet, sched_getaffinity, sched_setaffinity, setns};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;
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

/// An echo server on `host` that takes as many as come.
fn server(lab: &TestLab, host: &str) -> Ended {
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
    let mut command = lab.lab.command(host, program).unwrap();
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
    // Asked on the host itself: nothing is captured there.
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    eventually("the echo server", || {
        let connect = || TcpStream::connect(local).ok();
        lab.lab.on(host, connect).unwrap()
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

/// Percentiles of round trips, and how many there were.
struct Trips {
    p50: Duration,
    p90: Duration,
    p99: Duration,
    count: usize,
}

impl Trips {
    fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let percentile = |percent| times[(times.len() - 1) * percent / 100];
        Self {
            p50: percentile(50),
            p90: percentile(90),
            p99: percentile(99),
            count: times.len(),
        }
    }
}

impl std::fmt::Display for Trips {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            p50,
            p90,
            p99,
            count,
        } = self;
        write!(
            f,
            "{count} round trips, p50 {p50:.1?}, p90 {p90:.1?}, p99 {p99:.1?}"
        )
    }
}

/// Which part of the time it is.
const QUIET: u8 = 0;
const LOUD: u8 = 1;
const OVER: u8 = 2;

/// Established connections of a pod, one by each CPU and so to each worker, on which it asks all
/// the time.
struct Asking {
    part: Arc<AtomicU8>,
    threads: Vec<thread::JoinHandle<[Vec<Duration>; 2]>>,
}

impl Asking {
    fn start(lab: &TestLab, from: &str, to: &str, part: &Arc<AtomicU8>) -> Self {
        let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let cpus = (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap());
        let threads = cpus.take(4).map(|cpu| {
            let (netns, to) = (lab.lab.netns(from).unwrap(), at(to, PORT));
            let part = Arc::clone(part);
            thread::spawn(move || {
                let mut set = CpuSet::new();
                set.set(cpu).unwrap();
                sched_setaffinity(Pid::from_raw(0), &set).unwrap();
                let namespace = std::fs::File::open(netns).unwrap();
                setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
                let stream = TcpStream::connect(to).unwrap();
                stream.set_nodelay(true).unwrap();
                stream.set_read_timeout(Some(PATIENCE * 4)).unwrap();
                ask_until_over(&stream, &part)
            })
        });
        Self {
            part: Arc::clone(part),
            threads: threads.collect(),
        }
    }

    /// The round trips in quiet and while it was loud.
    fn end(self) -> [Trips; 2] {
        self.part.store(OVER, Ordering::Relaxed);
        let mut all = [Vec::new(), Vec::new()];
        for thread in self.threads {
            let times = thread.join().unwrap();
            all.iter_mut()
                .zip(times)
                .for_each(|(all, times)| all.extend(times));
        }
        all.map(Trips::of)
    }
}

/// Round trips by the part in which each began.
fn ask_until_over(stream: &TcpStream, part: &AtomicU8) -> [Vec<Duration>; 2] {
    let mut times = [Vec::new(), Vec::new()];
    loop {
        let now = part.load(Ordering::Relaxed);
        if now == OVER {
            return times;
        }
        let start = Instant::now();
        ask(stream);
        answer(stream);
        times[usize::from(now)].push(start.elapsed());
        thread::sleep(Duration::from_millis(1));
    }
}

/// What a crowd did to others.
struct Beside {
    took: Duration,
    neighbour: [Trips; 2],
    /// Pods outside the mesh, at the same time on the same CPUs.
    twin: [Trips; 2],
}

impl Beside {
    fn show(&self, what: &str) {
        let took = self.took;
        eprintln!("{what}: all were through in {took:.1?}");
        for (who, trips) in [("a neighbour", &self.neighbour), ("its twin", &self.twin)] {
            eprintln!("  {who}: quiet: {}; meanwhile: {}", trips[0], trips[1]);
        }
    }
}

/// `crowd` connections of one pod at once, beside established connections of another and of one
/// outside the mesh.
fn beside_a_crowd(lab: &TestLab, crowd: usize) -> (Beside, Vec<TcpStream>) {
    let part = Arc::new(AtomicU8::new(QUIET));
    let neighbour = Asking::start(lab, "server-a", "server-b", &part);
    let twin = Asking::start(lab, "waypoint-b", "plain-b", &part);
    thread::sleep(Duration::from_secs(2));
    part.store(LOUD, Ordering::Relaxed);
    let start = Instant::now();
    let streams = all_at_once(lab, crowd);
    streams.iter().for_each(answer);
    let took = start.elapsed();
    let beside = Beside {
        took,
        neighbour: neighbour.end(),
        twin: twin.end(),
    };
    (beside, streams)
}

/// A crowd of one pod must not stop established connections of another. The first crowd meets a
/// destination nobody has been to, a later one tunnels that are there.
fn a_crowd_delays_nobody_for_long(lab: &TestLab, crowd: usize) -> Vec<TcpStream> {
    let mut tries = Vec::new();
    loop {
        let (beside, streams) = beside_a_crowd(lab, crowd);
        beside.show("with a mesh");
        // A stall is as long as what makes it: a tenth of that is no stall, on any machine, unless
        // the machine itself stalled.
        let (longest, took) = (beside.neighbour[1].p99, beside.took);
        if longest < (took / 10).max(beside.twin[1].p99 * 2) {
            return streams;
        }
        tries.push(format!("p99 {longest:?} of {took:?}"));
        assert!(tries.len() < 3, "each time: {tries:?}");
        drop(streams);
        thread::sleep(Duration::from_secs(5));
    }
}

/// For measuring: several crowds one after the other, `LAB_CROWD_MESH=none` without a mesh.
#[test]
#[ignore = "measures and judges nothing"]
fn crowds_one_after_the_other() {
    if !can_run("crowds_one_after_the_other") {
        return;
    }
    let _turn = turn();
    let mesh = std::env::var("LAB_CROWD_MESH").is_ok_and(|mesh| mesh == "none");
    let redirect = if mesh { Redirect::None } else { Redirect::Ebpf };
    let lab = TestLab::up("crowds", redirect);
    let _servers = ["server-b", "plain-b"].map(|host| server(&lab, host));
    for number in 1..=3 {
        let (beside, streams) = beside_a_crowd(&lab, crowd());
        beside.show(&format!("crowd {number}"));
        drop(streams);
        thread::sleep(Duration::from_secs(3));
    }
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
    let _servers = ["server-b", "plain-b"].map(|host| server(&lab, host));
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
            gone.elapsed() < Duration::from_secs(90),
            "before {before:?}, with {crowd} connections {held:?}, 90 s after them {last:?}"
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
            gone.elapsed() < Duration::from_secs(90),
            "with {workloads} workloads {held:?}, 90 s after them {:?}",
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
