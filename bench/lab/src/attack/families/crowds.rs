//! Many at once: connections to a cold destination, idle connections to the endpoints and of a pod.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::own_lab::with_small_ztunnels;
use super::{Attack, Failure, got, small};
use crate::attack::arena::{
    ATTACKER, Arena, PATIENCE, VICTIM, address, echoes, eventually, log_since,
};
use crate::attack::catalog::{Bounds, Finding, took};
use crate::topology::Node;
use crate::ztunnel;

const FAMILY: &str = "crowds";

pub(super) fn attacks() -> Vec<Attack> {
    let mut attacks = vec![Attack {
        bounds: Bounds {
            // A client's and a server's for each connection, over both ztunnels.
            descriptors: 40_000,
            memory: 1 << 30,
            // A line and more for each connection on both nodes.
            log: 96 << 20,
            // A crowd shares the CPUs with its neighbours, who wait tens of milliseconds for them
            // (the test `crowds` measures that beside a twin). This bound is for a worker that
            // stalls: with work for each who waits when one is served it was seconds.
            slower: Some(500),
            honest_may_fail: false,
        },
        ..alone(
            "cold-destination",
            "the time of others: a worker that is busy with it alone",
            Box::new(cold_destination),
        )
    }];
    let endpoints: [(&str, u16, &str); 2] = [
        ("idle-on-readiness", 15_021, "/healthz/ready"),
        ("idle-on-metrics", 15_020, "/metrics"),
    ];
    for (name, port, path) in endpoints {
        for (suffix, bytes) in [("", &b""[..]), ("-half-a-request", b"GET /heal")] {
            let run = move |arena: &Arena| idle_on(arena, port, path, bytes);
            attacks.push(alone(
                &format!("{name}{suffix}"),
                "the endpoint for itself",
                Box::new(run),
            ));
        }
    }
    attacks.push(alone(
        "admin-from-a-pod",
        "the admin page",
        Box::new(admin_page),
    ));
    attacks.push(Attack {
        bounds: Bounds {
            log: 4 << 20,
            ..Bounds::SMALL
        },
        ..alone(
            "descriptors-of-a-node",
            "readiness, metrics, or connections that are there: the reserve",
            Box::new(all_descriptors),
        )
    });
    attacks
}

fn alone(name: &str, must_not: &str, run: super::Run) -> Attack {
    Attack {
        alone: true,
        ..small(name, FAMILY, must_not, run)
    }
}

/// How long crowds come one after the other at least, so that the honest and their twin are asked
/// often enough meanwhile.
const CROWDED: Duration = Duration::from_secs(2);
/// A fast machine has no more of them, for their log's sake.
const CROWDS_MAX: u32 = 8;

/// One pod connects to one place to which there is no tunnel, thousands of times at once. First an
/// eighth of that, to see what a connection costs: all must not cost much more CPU time than eight
/// times as much, which does not depend on who else is busy. What is done for each who waits when
/// one is served costs hundreds of times as much. Then such crowds come again for a while.
fn cold_destination(arena: &Arena) -> Finding {
    let many = arena.count(8_000, 6_400);
    let some = many / 8;
    let begun = Instant::now();
    let of = |way, count| {
        let before = arena.sample().cpu_ms;
        let took = crowd(arena, way, count)?;
        Ok::<_, Failure>((took, arena.sample().cpu_ms - before))
    };
    // Two ports of a pod are one destination: the first crowd must not warm the way of the second.
    let (first, first_cpu) = of((VICTIM, "server-a"), some)?;
    let (all, all_cpu) = of(("client-a", VICTIM), many)?;
    let mut crowds = 2;
    while begun.elapsed() < CROWDED && crowds < CROWDS_MAX {
        crowd(arena, ("client-a", VICTIM), many)?;
        crowds += 1;
    }
    let told = format!(
        "{some} through in {:.2} s with {first_cpu} ms of CPU, {many} in {:.2} s with {all_cpu} \
         ms, {crowds} crowds in all",
        first.as_secs_f64(),
        all.as_secs_f64()
    );
    // A clock tick is 10 ms. The ways are warm from now on: another try would tell nothing.
    if all_cpu > first_cpu.max(50) * 8 * 3 {
        return got(format!("more work than its share: {told}"));
    }
    Ok(told)
}

/// Connects `count` times at once and asks on each; how long until all were answered.
fn crowd(arena: &Arena, (from, to): (&str, &str), count: usize) -> Result<Duration, Failure> {
    let target = address(to, 8080)?;
    let begun = Instant::now();
    let opened = arena.lab.on(from, || {
        // All to the worker of one CPU. Unpinned they are half as many there.
        let mut one = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
        let first = (0..CpuSet::count()).find(|&cpu| one.is_set(cpu).unwrap_or(false));
        one = CpuSet::new();
        if first.is_some_and(|cpu| one.set(cpu).is_ok()) {
            let _ = sched_setaffinity(Pid::from_raw(0), &one);
        }
        (0..count)
            .map(|_| {
                let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
                stream.write_all(b"!")?;
                Ok(stream)
            })
            .collect::<std::io::Result<Vec<_>>>()
    })?;
    // All together, not each: what is stuck is not waited for thousands of times.
    let deadline = begun + PATIENCE * 5;
    let mut opened = opened?;
    for (answered, stream) in opened.iter_mut().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        if let Err(error) = stream.read_exact(&mut [0]) {
            let took = begun.elapsed().as_secs();
            return got(format!(
                "only {answered} of {count} honest connections were answered in {took} s: {error}"
            ));
        }
    }
    Ok(begun.elapsed())
}

/// Idle connections to an endpoint, from a pod.
fn idle_on(arena: &Arena, port: u16, path: &str, first: &[u8]) -> Finding {
    let count = 100;
    let target = address("ztunnel-b", port)?;
    let usual = answers(arena, port, path)?;
    // All at once: who is idle may be hung up on soon. Refused is fine, too.
    let idle: Vec<_> = arena.lab.on(ATTACKER, || {
        let connect = || {
            let mut stream =
                TcpStream::connect_timeout(&target, Duration::from_millis(300)).ok()?;
            let _ = stream.write_all(first);
            Some(stream)
        };
        (0..count).map_while(|_| connect()).collect()
    })?;
    let now = answers(arena, port, path)?;
    let told = format!(
        "answers in {} ms beside {} idle connections, {} ms before",
        now.as_millis(),
        idle.len(),
        usual.as_millis()
    );
    // kubelet waits for a second.
    if now > (usual * 20).max(Duration::from_millis(500)) {
        return took(format!("the time of who asks honestly: {told}"));
    }
    Ok(told)
}

/// The longest time that an answer takes in some tries.
fn answers(arena: &Arena, port: u16, path: &str) -> Result<Duration, Failure> {
    let mut took = Vec::new();
    for _ in 0..5 {
        let begun = Instant::now();
        match arena.page("ztunnel-b", port, path) {
            Ok((200, _)) => took.push(begun.elapsed()),
            Ok((status, _)) => return got(format!("status {status} for who asks honestly")),
            Err(error) => return got(format!("no answer for who asks honestly: {error}")),
        }
    }
    Ok(took.into_iter().max().unwrap_or_default())
}

/// The admin page is for the node alone.
fn admin_page(arena: &Arena) -> Finding {
    for host in [ATTACKER, "client-a", "node-b"] {
        let target = address("ztunnel-b", 15_000)?;
        let Ok(mut stream) = arena.dial(host, target) else {
            continue;
        };
        let _ = stream.write_all(b"GET /config_dump HTTP/1.0\r\n\r\n");
        if matches!(stream.read(&mut [0; 64]), Ok(1..)) {
            return got(format!("the admin page from {host}"));
        }
    }
    Ok("not from pods and not from the node's namespace".to_owned())
}

/// A lab whose ztunnels may have few descriptors, and a pod that takes them all.
fn all_descriptors(arena: &Arena) -> Finding {
    const LIMIT: usize = 1_000;
    let line = format!("ulimit -n {LIMIT}");
    with_small_ztunnels(arena, "fd", &line, |few| take_all(few, LIMIT * 3 / 2))
}

fn take_all(few: &Arena, count: usize) -> Finding {
    let mut kept = few.dial("client-a", address(VICTIM, 8080)?)?;
    if !echoes(&mut kept, b"before") {
        return Err(Failure::Driver("no honest connection".to_owned()));
    }
    let target: SocketAddr = address(VICTIM, 8080)?;
    let idle: Vec<_> = few.lab.on("server-a", || {
        let connect = || TcpStream::connect_timeout(&target, Duration::from_secs(2)).ok();
        (0..count).map_while(|_| connect()).collect()
    })?;
    let mut missing = Vec::new();
    for (port, path) in [
        (15_021, "/healthz/ready"),
        (15_020, "/metrics"),
        (15_000, "/config_dump"),
    ] {
        match few.page("ztunnel-a", port, path) {
            Ok((200, _)) => {}
            Ok((status, _)) => missing.push(format!("{path} {status}")),
            Err(error) => missing.push(format!("{path}: {error}")),
        }
    }
    if !echoes(&mut kept, b"during") {
        missing.push("a connection that was there".to_owned());
    }
    let log = ztunnel::log_path(few.lab.name(), Node::A);
    let told = log_since(&log, 0)?;
    // A line for each connection would be 500 of them.
    if told.len() > 128 << 10 {
        missing.push(format!("{} KiB of log", told.len() >> 10));
    }
    let count = idle.len();
    drop(idle);
    let back = eventually("new connections are taken again", || {
        few.dial("client-a", target)
            .is_ok_and(|mut stream| echoes(&mut stream, b"after"))
    });
    if back.is_err() {
        missing.push("new connections, for good".to_owned());
    }
    match missing.is_empty() {
        true => Ok(format!("{count} idle connections, all else went on")),
        false => got(missing.join("; ")),
    }
}
