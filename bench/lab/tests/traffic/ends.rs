//! How connections end when hosts refuse, reset, vanish, or interrupt: what an application sees is
//! what it would see without a mesh, on every way through it. Nothing stays behind.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use lab::{LabOptions, Redirect};
use socket2::{SockRef, TcpKeepalive};

use crate::closing::is_timeout;
use crate::support::{
    Case, PATIENCE, Pattern, TestLab, accept, at, eventually, program_with, run_cases_on, unique,
};

/// Ways from client-a: through a tunnel, to a pod of its node, and to a pod outside the mesh.
const SERVERS: [&str; 3] = ["server-b", "server-a", "plain-b"];
/// Longer than any loss takes to be noticed on a busy machine.
const LONG: Duration = Duration::from_secs(90);

const CASES: &[Case] = &[
    ("refused_by_the_network", refused_by_the_network),
    ("urgent_data_stay_in_place", urgent_data_stay_in_place),
    ("resets_are_resets", resets_are_resets),
    ("lost_servers_are_noticed", |lab| lose(lab, Lost::Server)),
    ("lost_clients_are_noticed", |lab| lose(lab, Lost::Client)),
];
/// Without those whose clients read: of a socket in a sockmap the kernel tells a blocking reader
/// `EAGAIN` first when it is reset (`tcp_bpf_recvmsg`), and the error then.
const CASES_OF_THE_SHORT_CUT: &[Case] = &[CASES[1], CASES[2]];

/// Hosts that do not answer are noticed within seconds, and ICMP errors find the ztunnel that has
/// dialled, by its own address.
const KEEPALIVE: [(&str, &str); 4] = [
    ("ENABLE_ORIG_SRC", "false"),
    ("KEEPALIVE_TIME", "1s"),
    ("KEEPALIVE_INTERVAL", "1s"),
    ("KEEPALIVE_RETRIES", "3"),
];

/// Runs the cases on a lab whose ztunnels have `variables` as well.
pub(super) fn run(test: &str, redirect: Redirect, sockmap: bool, variables: &[(&str, &str)]) {
    let directory = tempfile::tempdir().unwrap();
    let variables = [&KEEPALIVE, variables].concat();
    let ztunnel = program_with(directory.path(), "ztunnel", &variables);
    let options = LabOptions {
        name: unique("ends"),
        redirect,
        sockmap,
        ztunnel: (redirect != Redirect::None).then_some(ztunnel),
        ..LabOptions::default()
    };
    let cases = match sockmap {
        true => CASES_OF_THE_SHORT_CUT,
        false => CASES,
    };
    run_cases_on(test, &options, cases);
}

fn has_mesh(lab: &TestLab) -> bool {
    !lab.lab.ztunnel_pids().is_empty()
}

/// Descriptors of both ztunnels.
fn descriptors(lab: &TestLab) -> Vec<usize> {
    let count = |pid| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    lab.lab.ztunnel_pids().into_iter().map(count).collect()
}

/// A connection to `server`'s port and the server's end of it.
fn pair(lab: &TestLab, listener: &TcpListener, to: SocketAddr) -> (TcpStream, TcpStream) {
    let client = lab.connect("client-a", to);
    let (served, _) = accept(listener);
    for stream in [&client, &served] {
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
    }
    (client, served)
}

/// Adds (`-I`) or removes (`-D`) a rule on `host`.
fn rule(lab: &TestLab, host: &str, what: &str, rule: &str) {
    let arguments: Vec<&str> = [what].into_iter().chain(rule.split(' ')).collect();
    let output = lab.run(host, "iptables", &arguments);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{host}: iptables {rule}: {told}");
}

/// What a service without endpoints is answered by kube-proxy, and what a network without a route.
fn refused_by_the_network(lab: &mut TestLab) {
    for how in [
        "icmp-port-unreachable",
        "icmp-host-unreachable",
        "icmp-admin-prohibited",
        "tcp-reset",
    ] {
        let hosts: &[&str] = match has_mesh(lab) {
            true => &["ztunnel-a", "ztunnel-b"],
            false => &["client-a"],
        };
        let reject = format!("OUTPUT -p tcp --dport 7998 -j REJECT --reject-with {how}");
        hosts.iter().for_each(|host| rule(lab, host, "-I", &reject));
        for server in SERVERS {
            let mark = has_mesh(lab).then(|| lab.log_length("ztunnel-a"));
            // Every refusal is an error, of the write if it is that early: an end is none.
            let asked = lab
                .try_connect("client-a", at(server, 7998), PATIENCE)
                .and_then(|mut stream| {
                    stream.write_all(b"hello?")?;
                    stream.read(&mut [0; 64])
                });
            let Err(error) = asked else {
                panic!("{how}, {server}: a refused destination looks like an end: {asked:?}");
            };
            assert!(
                !is_timeout(&error),
                "{how}, {server}: the client hangs: {error}"
            );
            if let Some(mark) = mark {
                eventually("an access log line with the error", || {
                    let lines = lab.log_since("ztunnel-a", mark);
                    let told = |line: &&String| line.contains(":7998") && line.contains("error=");
                    lines.iter().find(told).cloned()
                });
            }
        }
        hosts.iter().for_each(|host| rule(lab, host, "-D", &reject));
    }
}

/// Bytes that are sent as urgent are in the stream where they were put, both ways, alone and in
/// bulk.
fn urgent_data_stay_in_place(lab: &mut TestLab) {
    let pattern = Pattern::new(21);
    for server in SERVERS {
        let listener = lab.listen(server, 8080);
        for (total, piece) in [(1, 1), (900, 30), (16_000_000, 700_001)] {
            let (client, served) = pair(lab, &listener, at(server, 8080));
            for (from, to) in [(&client, &served), (&served, &client)] {
                SockRef::from(to).set_out_of_band_inline(true).unwrap();
                thread::scope(|scope| {
                    scope.spawn(|| send_urgent(from, &pattern, total, piece));
                    pattern.receive(to, total);
                });
            }
        }
    }
}

/// Sends the pattern in pieces whose last byte is urgent, and the end.
fn send_urgent(to: &TcpStream, pattern: &Pattern, total: u64, piece: usize) {
    let (mut at, socket) = (0, SockRef::from(to));
    while at < total {
        let left = usize::try_from(total - at).unwrap();
        let bytes = pattern.at(at, piece.min(left));
        let (last, before) = bytes.split_last().unwrap();
        let mut to = to;
        to.write_all(before).unwrap();
        assert_eq!(socket.send_out_of_band(&[*last]).unwrap(), 1);
        at += bytes.len() as u64;
        thread::sleep(Duration::from_millis(2));
    }
    to.shutdown(Shutdown::Write).unwrap();
}

/// A reset by either side reaches the other one as a reset, also if that only waits, or does not
/// read; and behind what was sent before it.
fn resets_are_resets(lab: &mut TestLab) {
    let before = descriptors(lab);
    for server in SERVERS {
        let listener = lab.listen(server, 8080);
        for by_client in [true, false] {
            for sent in [0, 40_000, 64 << 20] {
                let (client, served) = pair(lab, &listener, at(server, 8080));
                let (actor, witness) = match by_client {
                    true => (client, served),
                    false => (served, client),
                };
                // What does not fit is not waited for: the witness does not read yet.
                actor
                    .set_write_timeout(Some(Duration::from_millis(200)))
                    .unwrap();
                let _ = (&actor).write_all(&vec![1; sent]);
                if (1..1 << 20).contains(&sent) {
                    eventually("all has arrived", || {
                        let mut there = vec![0; sent];
                        (witness.peek(&mut there).unwrap() == sent).then_some(())
                    });
                }
                SockRef::from(&actor)
                    .set_linger(Some(Duration::ZERO))
                    .unwrap();
                drop(actor);
                let name = format!("{server}, by the client: {by_client}, behind {sent}");
                let told = eventually(&name, || witness.take_error().unwrap());
                let reset = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
                assert!(reset.contains(&told.kind()), "{name}: {told}");
                let mut got = Vec::new();
                // The error has been taken: what is there is followed by an end.
                (&witness).read_to_end(&mut got).unwrap();
                if sent < 1 << 20 {
                    assert_eq!(got.len(), sent, "{name}");
                }
            }
        }
    }
    nothing_stays(lab, &before);
}

fn nothing_stays(lab: &TestLab, before: &[usize]) {
    // Tunnels stay in the pool, one for each worker and destination at most, and its pair here.
    const POOLED: usize = 8;
    let started = Instant::now();
    loop {
        let now = descriptors(lab);
        if now
            .iter()
            .zip(before)
            .all(|(now, before)| *now <= before + POOLED)
        {
            return;
        }
        let late = started.elapsed() > PATIENCE;
        assert!(!late, "descriptors: {before:?} before, {now:?} now");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Which side's host is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lost {
    Client,
    Server,
}

/// What goes on when a host is lost.
const DOING: [&str; 4] = ["idle", "sends", "receives", "does not read"];
/// How a host is lost to connections with a port: without a word, or as routers tell.
const LOSSES: [(u16, &str); 2] = [
    (8080, "DROP"),
    (8081, "REJECT --reject-with icmp-host-unreachable"),
];

/// A host is lost: whatever its peer does, it is told of an error, and of no end.
fn lose(lab: &mut TestLab, lost: Lost) {
    let before = descriptors(lab);
    let _impatient = Impatient::new(lab);
    let (say, hear) = mpsc::channel();
    let (mut witnesses, mut lost_ends) = (Vec::new(), Vec::new());
    for (server, (port, how)) in SERVERS
        .iter()
        .flat_map(|server| LOSSES.map(|loss| (server, loss)))
    {
        let listener = lab.listen(server, port);
        for doing in DOING {
            let (client, served) = pair(lab, &listener, at(server, port));
            let (gone, witness) = match lost {
                Lost::Client => (client, served),
                Lost::Server => (served, client),
            };
            if !has_mesh(lab) {
                keep_alive(&witness);
            }
            let (end, say) = (gone.try_clone().unwrap(), say.clone());
            lost_ends.push(gone);
            let thread = thread::spawn(move || watch(doing, &witness, end, &say));
            witnesses.push((format!("{server}, {how}, {doing}"), thread));
        }
    }
    for _ in &witnesses {
        hear.recv_timeout(LONG).unwrap();
    }
    lose_hosts(lab, lost, "-I");
    let results: Vec<_> = witnesses
        .into_iter()
        .map(|(name, thread)| (name, thread.join().unwrap()))
        .collect();
    for stream in &lost_ends {
        SockRef::from(stream)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
    }
    drop(lost_ends);
    lose_hosts(lab, lost, "-D");
    let wrong: Vec<_> = results
        .into_iter()
        .filter(|(_, told)| told.is_none_or(|kind| kind == ErrorKind::WouldBlock))
        .collect();
    assert!(
        wrong.is_empty(),
        "{lost:?}: an end, or nothing, instead of an error: {wrong:#?}"
    );
    nothing_stays(lab, &before);
}

/// As the ztunnels do (see [`KEEPALIVE`]).
fn keep_alive(stream: &TcpStream) {
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(1))
        .with_interval(Duration::from_secs(1))
        .with_retries(3);
    SockRef::from(stream).set_tcp_keepalive(&keepalive).unwrap();
}

/// Adds (`-I`) or removes (`-D`) the rules by which hosts are lost.
fn lose_hosts(lab: &TestLab, lost: Lost, what: &str) {
    let (hosts, rules): (&[&str], _) = match lost {
        Lost::Client => (&["client-a"], [("OUTPUT", "--dport"), ("INPUT", "--sport")]),
        Lost::Server => (&SERVERS, [("INPUT", "--dport"), ("OUTPUT", "--sport")]),
    };
    for host in hosts {
        for (chain, side) in rules {
            for (port, how) in LOSSES {
                // What the lost host would send is lost without a word.
                let target = if chain == "INPUT" { how } else { "DROP" };
                rule(
                    lab,
                    host,
                    what,
                    &format!("{chain} -p tcp {side} {port} -j {target}"),
                );
            }
        }
    }
}

/// Does what `doing` says until it ends, and returns the error with which it does.
fn watch(
    doing: &str,
    witness: &TcpStream,
    gone: TcpStream,
    ready: &mpsc::Sender<()>,
) -> Option<ErrorKind> {
    let mut witness = witness;
    let told = |result: io::Result<usize>| match result {
        Ok(_) => None,
        Err(error) => Some(error.kind()),
    };
    match doing {
        "sends" => {
            thread::spawn(move || io::copy(&mut &gone, &mut io::sink()));
            witness.write_all(&[1; 100_000]).unwrap();
            ready.send(()).unwrap();
            loop {
                if let Err(error) = witness.write(&[1; 10_000]) {
                    return Some(error.kind());
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
        "receives" => {
            thread::spawn(move || while (&gone).write_all(&[1; 10_000]).is_ok() {});
            witness.read_exact(&mut [0; 100_000]).unwrap();
            ready.send(()).unwrap();
            let mut buffer = vec![0; 65_536];
            loop {
                match witness.read(&mut buffer) {
                    Ok(1..) => {}
                    end => return told(end),
                }
            }
        }
        "does not read" => {
            gone.set_write_timeout(Some(Duration::from_millis(300)))
                .unwrap();
            while (&gone).write(&[1; 65_536]).is_ok() {}
            ready.send(()).unwrap();
            let started = Instant::now();
            while started.elapsed() < LONG {
                if let Some(error) = witness.take_error().unwrap() {
                    return Some(error.kind());
                }
                thread::sleep(Duration::from_millis(20));
            }
            None
        }
        _ => {
            ready.send(()).unwrap();
            told(witness.read(&mut [0]))
        }
    }
}

/// While it lives, hosts give up sending again after seconds instead of a quarter of an hour.
struct Impatient {
    hosts: Vec<(std::path::PathBuf, String)>,
}

const RETRIES: &str = "/proc/sys/net/ipv4/tcp_retries2";

impl Impatient {
    fn new(lab: &TestLab) -> Self {
        let mut hosts = vec!["client-a", "server-a", "server-b", "plain-b"];
        if has_mesh(lab) {
            hosts.extend(["ztunnel-a", "ztunnel-b"]);
        }
        let set = |host: &str| {
            let change = || {
                let before = fs::read_to_string(RETRIES).unwrap();
                fs::write(RETRIES, "4").unwrap();
                before
            };
            (
                lab.lab.netns(host).unwrap(),
                lab.lab.on(host, change).unwrap(),
            )
        };
        Self {
            hosts: hosts.into_iter().map(set).collect(),
        }
    }
}

impl Drop for Impatient {
    fn drop(&mut self) {
        for (netns, before) in &self.hosts {
            // The lab goes away with it otherwise.
            let _ = lab::in_namespace(netns, || fs::write(RETRIES, before));
        }
    }
}
