//! How connections end: what each side does is what the other one sees, on every way through the
//! proxy, as without one. Nothing stays behind.

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rt::Backend;

use super::HANG;
use super::end_to_end::{CLIENT, Worker, mesh, worker_on};
use crate::config::{ProxyConfig, RedirectMode};

/// Ways from a client to a server.
const WAYS: [&str; 5] = [
    "no proxy",
    "plain",
    "one hop",
    "tunnel of one node",
    "tunnel",
];

/// How long an end that is not to come is waited for.
const NO_END: Duration = Duration::from_secs(3);

/// A connection's two sides: the one that does something, the one that sees it.
struct Sides {
    actor: TcpStream,
    witness: TcpStream,
}

/// What one of them sees.
type Case = (&'static str, fn(Sides) -> String);

fn reset(stream: TcpStream) {
    let socket = socket2::Socket::from(stream);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

/// Sends until nothing has fitted for a while, and `other` has got some of it.
fn fill(mut to: &TcpStream, other: &TcpStream) {
    let patience = Some(Duration::from_millis(300));
    to.set_write_timeout(patience).unwrap();
    while to.write(&[1; 65_536]).is_ok() {}
    to.set_write_timeout(Some(HANG)).unwrap();
    other.peek(&mut [0]).unwrap();
}

/// What a socket that nobody reads or writes is told, if it is.
fn error(of: &TcpStream, patience: Duration) -> &'static str {
    let started = Instant::now();
    while started.elapsed() < patience {
        if of.take_error().unwrap().is_some() {
            return "reset";
        }
        thread::sleep(Duration::from_millis(5));
    }
    "nothing"
}

/// Reads to the end, and looks for what comes after it.
fn read(mut from: &TcpStream, to_the_last_byte: bool) -> String {
    let mut got = Vec::new();
    let end = match from.read_to_end(&mut got) {
        Ok(_) => format!("end, then {}", error(from, NO_END)),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => "reset".to_owned(),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => "reset".to_owned(),
        Err(error) => format!("{error}"),
    };
    match to_the_last_byte {
        true => format!("{} bytes, {end}", got.len()),
        false => end,
    }
}

const CASES: [Case; 16] = [
    ("idle, closes", |Sides { actor, witness }| {
        drop(actor);
        read(&witness, true)
    }),
    ("idle, resets", |Sides { actor, witness }| {
        reset(actor);
        read(&witness, true)
    }),
    ("idle, resets, nobody reads", |Sides { actor, witness }| {
        reset(actor);
        error(&witness, HANG).into()
    }),
    ("ends, gets the rest", |Sides { actor, witness }| {
        actor.shutdown(Shutdown::Write).unwrap();
        let seen = read(&witness, true);
        (&witness).write_all(&[1; 300_000]).unwrap();
        drop(witness);
        format!("{seen}; {}", read(&actor, true))
    }),
    ("ends, then resets", |Sides { actor, witness }| {
        actor.shutdown(Shutdown::Write).unwrap();
        thread::sleep(Duration::from_millis(500));
        reset(actor);
        thread::sleep(Duration::from_millis(500));
        error(&witness, HANG).into()
    }),
    (
        "resets after the other's end",
        |Sides { actor, witness }| {
            witness.shutdown(Shutdown::Write).unwrap();
            assert_eq!((&actor).read(&mut [0; 1]).unwrap(), 0);
            thread::sleep(Duration::from_millis(300));
            reset(actor);
            read(&witness, true)
        },
    ),
    (
        "closes after the other's end",
        |Sides { actor, witness }| {
            witness.shutdown(Shutdown::Write).unwrap();
            assert_eq!((&actor).read(&mut [0; 1]).unwrap(), 0);
            drop(actor);
            read(&witness, true)
        },
    ),
    ("says something, resets", |Sides { actor, witness }| {
        (&actor).write_all(&[1; 60_000]).unwrap();
        thread::sleep(Duration::from_millis(500));
        reset(actor);
        read(&witness, true)
    }),
    ("sends much, closes", |Sides { actor, witness }| {
        let sender = thread::spawn(move || {
            (&actor).write_all(&vec![1; 20_000_000]).unwrap();
        });
        let seen = read(&witness, true);
        sender.join().unwrap();
        seen
    }),
    ("sends much, resets", |Sides { actor, witness }| {
        fill(&actor, &witness);
        reset(actor);
        read(&witness, false)
    }),
    (
        "sends much, resets, nobody reads",
        |Sides { actor, witness }| {
            fill(&actor, &witness);
            reset(actor);
            error(&witness, HANG).into()
        },
    ),
    ("does not read, resets", |Sides { actor, witness }| {
        fill(&witness, &actor);
        reset(actor);
        read(&witness, false)
    }),
    ("does not read, closes", |Sides { actor, witness }| {
        fill(&witness, &actor);
        drop(actor);
        read(&witness, false)
    }),
    ("neither reads, resets", |Sides { actor, witness }| {
        fill(&witness, &actor);
        fill(&actor, &witness);
        reset(actor);
        error(&witness, HANG).into()
    }),
    (
        "ends while nobody reads, resets",
        |Sides { actor, witness }| {
            fill(&actor, &witness);
            actor.shutdown(Shutdown::Write).unwrap();
            reset(actor);
            error(&witness, HANG).into()
        },
    ),
    ("answers early and goes", |Sides { actor, witness }| {
        // What is sent to it is not read, and goes on after it has gone.
        let mut uploader = witness.try_clone().unwrap();
        let upload = thread::spawn(move || while uploader.write_all(&[1; 65_536]).is_ok() {});
        thread::sleep(Duration::from_millis(300));
        (&actor).write_all(&[2; 50_000]).unwrap();
        thread::sleep(Duration::from_millis(300));
        drop(actor);
        let mut answer = vec![0; 50_000];
        (&witness).read_exact(&mut answer).unwrap();
        upload.join().unwrap();
        format!("{} bytes, cannot send", answer.len())
    }),
];

/// A server that hands its connections over by the number they begin with.
struct Server {
    port: u16,
    waiting: Arc<Mutex<HashMap<u8, mpsc::Sender<TcpStream>>>>,
}

impl Server {
    fn new() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let waiting: Arc<Mutex<HashMap<u8, mpsc::Sender<TcpStream>>>> = Arc::default();
        let known = Arc::clone(&waiting);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, mut number) = (stream.unwrap(), [0]);
                stream.read_exact(&mut number).unwrap();
                stream.write_all(&number).unwrap();
                let waiting = known.lock().unwrap().remove(&number[0]).unwrap();
                waiting.send(stream).unwrap();
            }
        });
        Self { port, waiting }
    }

    /// The server's end of `client`.
    fn accept(&self, client: &mut TcpStream, number: u8) -> TcpStream {
        let (sender, accepted) = mpsc::channel();
        self.waiting.lock().unwrap().insert(number, sender);
        client.write_all(&[number]).unwrap();
        client.read_exact(&mut [0]).unwrap();
        accepted.recv().unwrap()
    }
}

/// Sockets that belong to a process and to a connection with one of `ports`.
fn sockets(ports: &[u16]) -> usize {
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let port =
        |address: &str| u16::from_str_radix(address.rsplit(':').next().unwrap(), 16).unwrap();
    let ours = |line: &&str| {
        let columns: Vec<&str> = line.split_ascii_whitespace().collect();
        let open = columns[3] != "0A" && columns[9] != "0";
        open && [columns[1], columns[2]]
            .iter()
            .any(|address| ports.contains(&port(address)))
    };
    table.lines().skip(1).filter(ours).count()
}

fn start(way: &'static str, server: u16, backend: Backend) -> Worker {
    let mesh = move |outbound| {
        let mesh = mesh(outbound, server, "");
        match way {
            "plain" => mesh.replacen(
                "name: server, namespace: default, serviceAccount: server, \
                 workloadIps: [127.0.0.3], protocol: HBONE, node: node",
                "name: server, namespace: default, serviceAccount: server, \
                 workloadIps: [127.0.0.3], protocol: TCP, node: other",
                1,
            ),
            _ => mesh,
        }
    };
    worker_on(
        backend,
        mesh,
        &super::store(),
        move |config: &mut ProxyConfig| {
            if way.contains("one") || way == "plain" {
                config.mode = RedirectMode::Node;
            }
            if way == "one hop" || way == "plain" {
                config.node.hbone_port = 1; // a tunnel would fail
            }
            config.same_node_tunnel = way == "tunnel of one node";
        },
    )
}

/// What is seen in every one of `cases`, done by the client and by the server.
fn seen(way: &'static str, backend: Backend, cases: &'static [Case]) -> Vec<String> {
    let server = Server::new();
    let worker = (way != "no proxy").then(|| start(way, server.port, backend));
    let connect = || match &worker {
        Some(worker) => worker.connect(CLIENT),
        None => TcpStream::connect((Ipv4Addr::LOCALHOST, server.port)).unwrap(),
    };
    let (server, connect) = (&server, &connect);
    let seen = thread::scope(|scope| {
        let cases = cases.iter().enumerate().flat_map(|(at, case)| {
            ["client", "server"]
                .into_iter()
                .enumerate()
                .map(move |(who, name)| {
                    scope.spawn(move || {
                        let mut client = connect();
                        client.set_nodelay(true).unwrap();
                        let served = server.accept(&mut client, (2 * at + who) as u8);
                        for stream in [&client, &served] {
                            stream.set_read_timeout(Some(HANG)).unwrap();
                        }
                        let (actor, witness) = match who {
                            0 => (client, served),
                            _ => (served, client),
                        };
                        let sides = Sides { actor, witness };
                        format!("{name}: {}: {}", case.0, (case.1)(sides))
                    })
                })
        });
        let cases: Vec<_> = cases.collect();
        cases.into_iter().map(|case| case.join().unwrap()).collect()
    });
    if let Some(worker) = worker {
        let ports = [worker.outbound, server.port];
        let started = Instant::now();
        while sockets(&ports) > 0 {
            let left = sockets(&ports);
            assert!(
                started.elapsed() < HANG,
                "{way}, {backend:?}: {left} sockets stay"
            );
            thread::sleep(Duration::from_millis(20));
        }
        worker.drain();
    }
    seen
}

fn ends_are_as_without_a_proxy(backend: Backend, cases: &'static [Case]) {
    let [none, ways @ ..] = WAYS;
    let expected = seen(none, backend, cases);
    thread::scope(|scope| {
        let ways: Vec<_> = ways
            .into_iter()
            .map(|way| (way, scope.spawn(move || seen(way, backend, cases))))
            .collect();
        for (way, thread) in ways {
            let seen = thread.join().unwrap();
            let wrong: Vec<_> = seen.iter().zip(&expected).filter(|(a, b)| a != b).collect();
            assert!(
                wrong.is_empty(),
                "{way}, {backend:?}: (seen, expected): {wrong:#?}"
            );
        }
    });
}

#[test]
fn ends_are_as_without_a_proxy_on_io_uring() {
    if let Err(refusal) = rt::probe::check() {
        eprintln!("skipped: ends_are_as_without_a_proxy_on_io_uring: {refusal}");
        return;
    }
    ends_are_as_without_a_proxy(Backend::IoUring, &CASES);
}

#[test]
fn ends_are_as_without_a_proxy_on_epoll() {
    ends_are_as_without_a_proxy(Backend::Epoll, &CASES);
}

/// One that has ended its stream waits for the answer as long as that takes: longer than every time
/// after which something else is given up.
const PATIENT: [Case; 1] = [("ends, waits, gets the rest", |Sides { actor, witness }| {
    actor.set_read_timeout(None).unwrap();
    actor.shutdown(Shutdown::Write).unwrap();
    assert_eq!((&witness).read(&mut [0]).unwrap(), 0);
    thread::sleep(Duration::from_secs(70));
    (&witness).write_all(&[1; 300_000]).unwrap();
    drop(witness);
    read(&actor, true)
})];

#[test]
#[ignore = "takes more than a minute: make soak"]
fn a_half_closed_connection_waits_for_seventy_seconds() {
    for backend in [Backend::IoUring, Backend::Epoll] {
        if backend == Backend::Epoll || rt::probe::check().is_ok() {
            ends_are_as_without_a_proxy(backend, &PATIENT);
        }
    }
}
