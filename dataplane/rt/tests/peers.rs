//! How peers may answer, or not: what a connection is told is the same on both back ends, and the
//! same that a program without a runtime is told.

#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::rc::Rc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rt::net::{ConnectOptions, connect};
use rt::{Backend, Runtime};

mod both;
use both::{is_available, with};

/// Longer than any of the attempts takes by itself.
const LIMIT: Duration = Duration::from_secs(60);
/// Names of `iptables --reject-with`, and of `ip6tables`.
const REJECTS: [&str; 8] = [
    "icmp-net-unreachable",
    "icmp-host-unreachable",
    "icmp-proto-unreachable",
    "icmp-port-unreachable",
    "icmp-net-prohibited",
    "icmp-host-prohibited",
    "icmp-admin-prohibited",
    "tcp-reset",
];
const REJECTS6: [&str; 5] = [
    "icmp6-no-route",
    "icmp6-adm-prohibited",
    "icmp6-addr-unreachable",
    "icmp6-port-unreachable",
    "tcp-reset",
];

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        told.trim()
    );
}

/// Runs `body` on a thread with a network of its own; skipped where that is not allowed.
fn in_a_network(name: &str, body: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(move || {
        // SAFETY: unshare has no memory-safety preconditions.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return false;
        }
        run("ip", &["link", "set", "lo", "up"]);
        let settings = ["tcp_syn_retries=1", "tcp_syn_linear_timeouts=0"];
        for (name, value) in settings.iter().filter_map(|one| one.split_once('=')) {
            // The second is of Linux 6.5.
            let _ = std::fs::write(format!("/proc/sys/net/ipv4/{name}"), value);
        }
        body();
        true
    });
    if !thread.join().unwrap() {
        eprintln!("skipped: {name}: needs a network namespace (root)");
    }
}

/// What became of an attempt, in words that can be compared.
fn told<T>(result: io::Result<T>) -> String {
    match result {
        Ok(_) => "connected".to_owned(),
        Err(error) => format!("{error}"),
    }
}

/// What `connect` says of every target, on a back end; all at once, because some take seconds.
fn by_runtime(backend: Backend, targets: &[(String, SocketAddr)]) -> Vec<String> {
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let seen = Rc::new(RefCell::new(vec![String::new(); targets.len()]));
    runtime
        .run({
            let (seen, targets) = (Rc::clone(&seen), targets.to_vec());
            async move {
                let open = Rc::new(std::cell::Cell::new(targets.len()));
                for (at, (_, target)) in targets.into_iter().enumerate() {
                    let (seen, open) = (Rc::clone(&seen), Rc::clone(&open));
                    rt::spawn(async move {
                        let options = ConnectOptions::default();
                        let attempt = connect(target, &options);
                        let outcome = match rt::time::timeout(LIMIT, attempt).await {
                            Ok(result) => told(result),
                            Err(_) => "nothing".to_owned(),
                        };
                        seen.borrow_mut()[at] = outcome;
                        open.set(open.get() - 1);
                    });
                }
                while open.get() > 0 {
                    rt::time::sleep(Duration::from_millis(20)).await;
                }
            }
        })
        .unwrap();
    Rc::try_unwrap(seen).unwrap().into_inner()
}

/// The same by a thread for each.
fn without_runtime(targets: &[(String, SocketAddr)]) -> Vec<String> {
    let threads = targets.iter().map(|(_, target)| {
        let target = *target;
        thread::spawn(move || told(TcpStream::connect(target)))
    });
    let threads: Vec<JoinHandle<String>> = threads.collect();
    threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect()
}

#[track_caller]
fn compare(targets: &[(String, SocketAddr)]) {
    let expected = without_runtime(targets);
    for backend in [Backend::IoUring, Backend::Epoll] {
        if !is_available("peers", backend) {
            continue;
        }
        let seen = by_runtime(backend, targets);
        let wrong: Vec<String> = (0..targets.len())
            .filter(|&at| seen[at] != expected[at])
            .map(|at| format!("{}: {:?}, not {:?}", targets[at].0, seen[at], expected[at]))
            .collect();
        assert!(wrong.is_empty(), "{backend:?}: {wrong:#?}");
    }
    for ((name, _), expected) in targets.iter().zip(expected) {
        let open = expected == "connected";
        assert_eq!(open, name.starts_with("accepted"), "{name}: {expected}");
    }
}

#[test]
fn an_attempt_ends_as_without_a_runtime() {
    in_a_network("an_attempt_ends_as_without_a_runtime", || {
        let mut targets = Vec::new();
        let families: [(&str, IpAddr, &[&str]); 2] = [
            ("iptables", Ipv4Addr::LOCALHOST.into(), &REJECTS),
            ("ip6tables", Ipv6Addr::LOCALHOST.into(), &REJECTS6),
        ];
        for (program, address, rejects) in families {
            let Ok(listener) = TcpListener::bind((address, 7000)) else {
                assert!(address.is_ipv6());
                continue; // a machine without IPv6
            };
            thread::spawn(move || listener.incoming().map(std::mem::forget).count());
            targets.push((format!("accepted {address}"), (address, 7000).into()));
            targets.push((format!("refused {address}"), (address, 7001).into()));
            for (chain, base) in [("OUTPUT", 7100), ("INPUT", 7200)] {
                for (port, how) in (base..).zip(rejects) {
                    let port_text = format!("{port}");
                    let mut rule = vec!["-A", chain, "-p", "tcp", "--dport", &port_text];
                    rule.extend(["-j", "REJECT", "--reject-with", how]);
                    run(program, &rule);
                    targets.push((
                        format!("{how} in {chain} of {program}"),
                        (address, port).into(),
                    ));
                }
            }
            run(
                program,
                &["-A", "INPUT", "-p", "tcp", "--dport", "7300", "-j", "DROP"],
            );
            targets.push((format!("vanished {address}"), (address, 7300).into()));
        }
        for (kind, net) in [
            ("unreachable", "10.91.0.0/16"),
            ("prohibit", "10.92.0.0/16"),
            ("blackhole", "10.93.0.0/16"),
        ] {
            run("ip", &["route", "add", kind, net]);
            let target = net.replace(".0.0/16", ".0.1:80").parse().unwrap();
            targets.push((format!("{kind} route"), target));
        }
        targets.push(("no route".into(), "10.94.0.1:80".parse().unwrap()));
        compare(&targets);
    });
}

/// A refusal that is taken back: the first SYN is answered by an ICMP error, a later one by the
/// server. Connected, no error is left behind, and the connection carries what it should without
/// its worker turning in a loop.
#[test]
fn a_later_answer_counts() {
    in_a_network("a_later_answer_counts", || {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 7000)).unwrap();
        thread::spawn(move || {
            for stream in server.incoming() {
                thread::sleep(Duration::from_millis(300));
                stream.unwrap().write_all(b"late").unwrap();
            }
        });
        for backend in [Backend::IoUring, Backend::Epoll] {
            if is_available("a_later_answer_counts", backend) {
                // On a busy machine the second SYN may be earlier than the change of the rule.
                let turns = (0..5).find_map(|_| turns_for_a_late_answer(backend));
                assert!(
                    turns.unwrap() < 50,
                    "{backend:?}: {turns:?} turns for one message"
                );
            }
        }
    });
}

/// Turns of a worker that waits for one message; none if the attempt failed.
fn turns_for_a_late_answer(backend: Backend) -> Option<u64> {
    let rule = |what| {
        let rule = "OUTPUT -p tcp --dport 7000 -j REJECT --reject-with icmp-port-unreachable";
        let mut arguments = vec![what];
        arguments.extend(rule.split(' '));
        run("iptables", &arguments);
    };
    rule("-A");
    let remover = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        rule("-D");
    });
    let mut runtime = Runtime::new(with(backend)).unwrap();
    let counters = runtime.counters();
    let turns = runtime.run(async move {
        let target = (Ipv4Addr::LOCALHOST, 7000).into();
        let stream = connect(target, &ConnectOptions::default()).await.ok()?;
        let before = counters.ring().enters;
        let (mut read, _write) = stream.split();
        let mut bufs = VecDeque::new();
        assert_eq!(read.recv(&mut bufs).await.unwrap(), 4);
        Some(counters.ring().enters - before)
    });
    remover.join().unwrap();
    turns.unwrap()
}

type Deed = (&'static str, fn(TcpStream));
/// What servers do with a connection on which they have received the client's greeting.
const DEEDS: [Deed; 6] = [
    ("ends", |stream| stream.shutdown(Shutdown::Write).unwrap()),
    ("resets", |stream| {
        thread::sleep(Duration::from_millis(100));
        reset(&stream);
    }),
    ("says something and ends", |mut stream| {
        stream.write_all(b"bye").unwrap();
    }),
    ("says something and resets", |mut stream| {
        stream.write_all(b"bye").unwrap();
        thread::sleep(Duration::from_millis(100));
        reset(&stream);
    }),
    ("says much and resets", |mut stream| {
        stream.write_all(&[7; 60_000]).unwrap();
        thread::sleep(Duration::from_millis(100));
        reset(&stream);
    }),
    ("leaves what it was told unread", |stream| {
        stream.peek(&mut [0]).unwrap();
        thread::sleep(Duration::from_millis(100));
        drop(stream);
    }),
];

fn reset(stream: &TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    let size = size_of::<libc::linger>() as libc::socklen_t;
    let fd = stream.as_raw_fd();
    // SAFETY: the value lives across the call, and its size is passed.
    let rc = unsafe {
        let value = (&raw const linger).cast();
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, value, size)
    };
    assert_eq!(rc, 0);
}

fn serve(deed: fn(TcpStream)) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || {
                let mut stream = stream.unwrap();
                stream.read_exact(&mut [0; 4]).unwrap();
                deed(stream);
            });
        }
    });
    addr
}

/// Reads to the end, and asks twice for it: an error must not turn into an end.
#[test]
fn a_connection_ends_as_without_a_runtime() {
    for (name, deed) in DEEDS {
        let addr = serve(deed);
        let mut plain = TcpStream::connect(addr).unwrap();
        let greeting: &[u8] = match name.contains("unread") {
            true => b"hello",
            false => b"hell",
        };
        plain.write_all(greeting).unwrap();
        let mut got = Vec::new();
        let end = told(plain.read_to_end(&mut got).map(|_| ()));
        let expected = format!("{} bytes, {end}, {end}", got.len());
        for backend in [Backend::IoUring, Backend::Epoll] {
            if !is_available(name, backend) {
                continue;
            }
            let mut runtime = Runtime::new(with(backend)).unwrap();
            let seen = runtime.run(async move {
                let stream = connect(addr, &ConnectOptions::default()).await.unwrap();
                let (mut read, mut write) = stream.split();
                write.push_copy(greeting);
                write.flush().await.unwrap();
                let (mut got, mut bufs) = (0, VecDeque::new());
                let end = loop {
                    match read.recv(&mut bufs).await {
                        Ok(0) => break told(Ok(())),
                        Ok(n) => got += n,
                        Err(error) => break told::<()>(Err(error)),
                    }
                };
                let again = told(read.recv(&mut bufs).await.map(|n| assert_eq!(n, 0)));
                format!("{got} bytes, {end}, {again}")
            });
            assert_eq!(seen.unwrap(), expected, "{name}, {backend:?}");
        }
    }
}
