//! Where a connection's certificate comes from, and what happens until it is there.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use identity::{Issuer, Issuing, LocalIssuer};
use mesh::Identity;
use rt::Backend;
use tls::Handshake;

use super::end_to_end::{CLIENT, STRANGER, Worker, echo, exchange, mesh, worker_on, worker_with};
use super::peer::Peer;
use super::store::Store;
use super::{Ca, HANG, identity};

/// A CA that notes on which threads it signs, and keeps some waiting.
#[derive(Clone, Debug)]
struct Watched {
    local: Arc<LocalIssuer>,
    signed: Arc<Mutex<Vec<(Identity, ThreadId)>>>,
    /// Accounts that get no answer.
    held: Arc<Mutex<HashSet<&'static str>>>,
}

impl Watched {
    fn new(held: &[&'static str]) -> Self {
        Self {
            local: Arc::new(Ca::new().issuer()),
            signed: Arc::default(),
            held: Arc::new(Mutex::new(held.iter().copied().collect())),
        }
    }

    fn answer(&self) {
        self.held.lock().unwrap().clear();
    }

    fn is_held(&self, identity: &Identity) -> bool {
        let held = self.held.lock().unwrap();
        held.contains(identity.service_account())
    }
}

impl Issuer for Watched {
    fn issue<'a>(&'a self, identity: &'a Identity) -> Issuing<'a> {
        Box::pin(async move {
            while self.is_held(identity) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let here = thread::current().id();
            self.signed.lock().unwrap().push((identity.clone(), here));
            self.local.issue(identity).await
        })
    }
}

/// A tunnel to the pod at 127.0.0.`last`, whose account is `account`.
fn tunnel(worker: &Worker, last: u8, account: &str) -> Peer {
    let client = worker.certificates.get(&identity("client")).unwrap();
    let handshake = Handshake::client(&client.client, &identity(account)).unwrap();
    Peer::over(connect(worker, last), handshake)
}

fn connect(worker: &Worker, last: u8) -> TcpStream {
    let addr = SocketAddr::from((Ipv4Addr::new(127, 0, 0, last), worker.hbone));
    TcpStream::connect(addr).unwrap()
}

/// Neither for the tunnels that it opens nor for those that it accepts.
#[test]
fn a_worker_signs_nothing() {
    let (port, _) = echo();
    let ca = Watched::new(&[]);
    let worker = worker_with(port, "", &Store::new(ca.clone()), |_| {});
    for source in [CLIENT, STRANGER] {
        assert_eq!(exchange(&worker.connect(source), b"x"), b"x");
    }
    let signed = ca.signed.lock().unwrap().clone();
    let mut accounts: Vec<_> = signed.iter().map(|(id, _)| id.service_account()).collect();
    accounts.sort_unstable();
    assert_eq!(accounts, ["client", "server", "stranger"]);
    let of_worker = worker.thread_id();
    assert!(signed.iter().all(|(_, thread)| *thread != of_worker));
    worker.drain();
}

/// A CA that takes its time keeps those waiting who need it, and nobody else.
#[test]
fn a_connection_waits_for_its_certificate_and_its_neighbours_do_not() {
    let (port, _) = echo();
    let ca = Watched::new(&["stranger"]);
    let worker = worker_with(port, "", &Store::new(ca.clone()), |_| {});
    let mut waiting: Vec<_> = (0..20).map(|_| worker.connect(STRANGER)).collect();
    for stream in &mut waiting {
        stream.write_all(b"early").unwrap();
    }
    let mut neighbour = worker.connect(CLIENT);
    for byte in 0..100 {
        neighbour.write_all(&[byte]).unwrap();
        let mut back = [0];
        neighbour.read_exact(&mut back).unwrap();
        assert_eq!(back, [byte]);
    }
    for stream in &waiting {
        stream.set_nonblocking(true).unwrap();
        let mut stream = stream;
        assert!(stream.read(&mut [0]).is_err(), "nobody answers yet");
        stream.set_nonblocking(false).unwrap();
    }
    ca.answer();
    for mut stream in waiting {
        let mut back = [0; 5];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"early");
    }
    let signed = ca.signed.lock().unwrap();
    let strangers = signed
        .iter()
        .filter(|(id, _)| id.service_account() == "stranger");
    assert_eq!(strangers.count(), 1, "once for all of them");
    drop(neighbour);
    worker.drain();
}

/// What waits for a certificate has no place among the handshakes that others need.
#[test]
fn who_waits_for_a_certificate_keeps_no_tunnel_out() {
    let (port, _) = echo();
    let ca = Watched::new(&["server"]);
    let worker = worker_with(port, "", &Store::new(ca.clone()), |config| {
        config.handshakes_max = 1;
        config.handshake_timeout = HANG;
    });
    let (client, hello) = {
        let client = worker.certificates.get(&identity("client")).unwrap();
        let mut handshake = Handshake::client(&client.client, &identity("server")).unwrap();
        let mut hello = Vec::new();
        handshake.advance(&[], &mut hello).unwrap();
        (handshake, hello)
    };
    drop(client);
    let waiting: Vec<_> = (0..8)
        .map(|_| {
            let mut stream = connect(&worker, 3);
            stream.write_all(&hello).unwrap();
            stream
        })
        .collect();
    tunnel(&worker, 4, "stranger");
    ca.answer();
    for mut stream in waiting {
        stream.set_read_timeout(Some(HANG)).unwrap();
        let _ = stream.read(&mut [0; 100]); // served or sent away, but not for ever waiting
    }
    tunnel(&worker, 3, "server");
    worker.drain();
}

/// Both kinds of connection: one of a pod, one to a pod.
#[test]
fn a_certificate_that_does_not_come_ends_the_wait_in_time() {
    let (port, _) = echo();
    let ca = Watched::new(&["stranger", "server"]);
    let worker = worker_with(port, "", &Store::new(ca), |config| {
        config.handshake_timeout = Duration::from_millis(300);
    });
    let mut outbound = worker.connect(STRANGER);
    let error = outbound.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let started = Instant::now();
    let of_identity = |line: &String| line.contains("IDENTITY_ERROR");
    while !failures(&worker).iter().any(of_identity) {
        assert!(started.elapsed() < HANG, "{:?}", failures(&worker));
        thread::sleep(Duration::from_millis(5));
    }

    let client = worker.certificates.get(&identity("client")).unwrap();
    let mut handshake = Handshake::client(&client.client, &identity("server")).unwrap();
    let mut hello = Vec::new();
    handshake.advance(&[], &mut hello).unwrap();
    let mut inbound = connect(&worker, 3);
    inbound.write_all(&hello).unwrap();
    let error = inbound.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    // Not a handshake that took too long: that is somebody else's fault.
    let faults = worker.samples("ztunnel_hbone_errors_total{");
    assert!(faults.iter().all(|line| line.ends_with(" 0")), "{faults:?}");
    worker.drain();
}

fn failures(worker: &Worker) -> Vec<String> {
    worker.samples("istio_tcp_connections_failed_total")
}

/// Identities that come together.
const CROWD: u8 = 200;

/// The mesh of the other tests, and a crowd of pods at 127.0.2.0/24, each with an account of its
/// own.
fn crowded(outbound: u16, server: u16) -> String {
    let pods = (0..CROWD).map(|n| {
        format!(
            "- {{uid: w{n}, name: w{n}, namespace: default, serviceAccount: w{n}, \
             workloadIps: [127.0.2.{n}], protocol: HBONE, node: node, network: ''}}\n"
        )
    });
    let pods: String = pods.collect();
    let mesh = mesh(outbound, server, "");
    mesh.replacen("workloads:\n", &format!("workloads:\n{pods}"), 1)
}

/// Round trips of one connection until `enough`: half and 99 of 100 were not longer than, and the
/// longest.
fn round_trips(stream: &mut TcpStream, mut enough: impl FnMut(usize) -> bool) -> [Duration; 3] {
    let mut times = Vec::new();
    while !enough(times.len()) {
        let started = Instant::now();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        times.push(started.elapsed());
    }
    times.sort();
    [times.len() / 2, times.len() * 99 / 100, times.len() - 1].map(|index| times[index])
}

/// Two hundred pods whose identities nobody has asked for connect at once. All are served, by one
/// signature each and none on the worker. What a neighbour sees of it is printed, beside what it
/// sees when nothing happens: `cargo test -p proxy two_hundred -- --nocapture`.
#[test]
fn two_hundred_new_identities_at_once_are_served_beside_a_neighbour() {
    let (port, _) = echo();
    let ca = Watched::new(&[]);
    let mesh = move |outbound| crowded(outbound, port);
    let worker = worker_on(Backend::Auto, mesh, &Store::new(ca.clone()), |config| {
        config.handshakes_max = 1024; // what it is by default
        config.handshake_timeout = HANG;
    });
    let mut neighbour = worker.connect(CLIENT);
    let quiet = round_trips(&mut neighbour, |count| count == 1000);
    let served = AtomicUsize::new(0);
    let crowd = thread::scope(|scope| {
        let neighbour = scope.spawn(|| {
            let started = Instant::now();
            let all = usize::from(CROWD);
            round_trips(&mut neighbour, |count| {
                let all = served.load(Ordering::Relaxed) == all;
                count >= 100 && (all || started.elapsed() > HANG)
            })
        });
        let connect = |n| worker.connect(Ipv4Addr::new(127, 0, 2, n).into());
        let crowd: Vec<_> = (0..CROWD).map(connect).collect();
        for mut stream in crowd {
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0]).unwrap();
            served.fetch_add(1, Ordering::Relaxed);
        }
        neighbour.join().unwrap()
    });
    println!("round trips of a neighbour, p50, p99 and longest:");
    println!("  alone {quiet:.1?}");
    println!("  beside {CROWD} new identities {crowd:.1?}");
    let signed = ca.signed.lock().unwrap();
    assert_eq!(signed.len(), usize::from(CROWD) + 2);
    let of_worker = worker.thread_id();
    assert!(signed.iter().all(|(_, thread)| *thread != of_worker));
    drop(neighbour);
    worker.drain();
}
