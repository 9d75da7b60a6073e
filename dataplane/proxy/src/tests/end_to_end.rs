//! A whole worker between a client and a server: outbound, a tunnel to itself, inbound.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use hbone::ConnectRequest;
use mesh::Snapshot;
use rt::mailbox::{LatestSender, Sender};
use rt::{Backend, Runtime, RuntimeConfig};
use telemetry::{Exposition, Registry};

use super::store::Store;
use super::{HANG, access_log, config, context, identity, listen, pattern, request, run, snapshot};
use crate::config::{ProxyConfig, RedirectMode};
use crate::error::ProxyError;
use crate::pool::Key;
use crate::{Command, Listeners, WorkerSetup};

pub(super) const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
pub(super) const STRANGER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 4));
const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9));

/// A client, a stranger and a server; the service maps the port of the outbound listener to the
/// server's. `policies` as in the configuration file.
pub(super) fn mesh(outbound: u16, server: u16, policies: &str) -> String {
    let workload = |name: &str, ip: &str, services: String| {
        format!(
            "- {{uid: {name}, name: {name}, namespace: default, serviceAccount: {name}, \
             workloadIps: [{ip}], protocol: HBONE, node: node, network: '', {services}}}\n"
        )
    };
    format!(
        "workloads:\n{}{}{}services:\n- {{name: s, namespace: default, hostname: s.local, \
         vips: [/{VIP}], ports: {{{outbound}: {server}}}}}\n{policies}",
        workload("client", "127.0.0.2", "services: {}".to_owned()),
        workload("stranger", "127.0.0.4", "services: {}".to_owned()),
        workload(
            "server",
            "127.0.0.3",
            format!("services: {{default/s.local: {{{outbound}: {server}}}}}")
        ),
    )
}

pub(super) const ONLY_CLIENT: &str = "policies:\n- {name: only-client, namespace: default, scope: Namespace, \
     action: Allow, dryRun: false, rules: [[[{principals: \
     [{Exact: cluster.local/ns/default/sa/client}]}]]]}\n";

/// A worker on a thread of its own.
pub(super) struct Worker {
    pub(super) outbound: u16,
    pub(super) hbone: u16,
    pub(super) commands: Sender<Command>,
    pub(super) snapshots: LatestSender<Arc<Snapshot>>,
    pub(super) certificates: Arc<Store>,
    metrics: Registry,
    thread: thread::JoinHandle<()>,
}

pub(super) fn worker(server: u16, policies: &'static str) -> Worker {
    worker_via(server, policies, None, &super::store())
}

/// A worker whose tunnels go to the HBONE port `gateway`, or to its own.
pub(super) fn worker_via(
    server: u16,
    policies: &'static str,
    gateway: Option<u16>,
    store: &Arc<Store>,
) -> Worker {
    let change = move |config: &mut ProxyConfig| {
        if let Some(gateway) = gateway {
            config.node.hbone_port = gateway;
        }
    };
    worker_with(server, policies, store, change)
}

/// A worker with settings of its own.
pub(super) fn worker_with(
    server: u16,
    policies: &'static str,
    store: &Arc<Store>,
    change: impl FnOnce(&mut ProxyConfig) + Send + 'static,
) -> Worker {
    let mesh = move |outbound| mesh(outbound, server, policies);
    worker_on(Backend::Auto, mesh, store, change)
}

/// A worker on a back end, with the configuration that `mesh` makes of its outbound port.
pub(super) fn worker_on(
    backend: Backend,
    mesh: impl FnOnce(u16) -> String + Send + 'static,
    store: &Arc<Store>,
    change: impl FnOnce(&mut ProxyConfig) + Send + 'static,
) -> Worker {
    let certificates = Arc::clone(store);
    let any = || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let listeners = Listeners {
        outbound: any(),
        inbound_plain: any(),
        inbound_hbone: any(),
    };
    let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
    let outbound = port(&listeners.outbound);
    let hbone = port(&listeners.inbound_hbone);
    let (commands, receiver) = rt::mailbox::channel(4);
    let (snapshots, cell) = rt::mailbox::latest();
    let metrics = Registry::new("test");
    let thread = thread::spawn({
        let (certificates, metrics) = (store.feed(), metrics.clone());
        move || {
            let setup = WorkerSetup {
                config: config(|config: &mut ProxyConfig| {
                    config.node.hbone_port = hbone;
                    change(config);
                }),
                listeners,
                snapshot: snapshot(&mesh(outbound)),
                certificates,
                telemetry: metrics.worker(access_log()),
                snapshots: cell,
                commands: receiver,
                seed: 1,
            };
            let config = RuntimeConfig {
                backend,
                ..RuntimeConfig::default()
            };
            let mut runtime = Runtime::new(config).unwrap();
            runtime.run(crate::serve(setup)).unwrap();
        }
    });
    Worker {
        outbound,
        hbone,
        commands,
        snapshots,
        certificates,
        metrics,
        thread,
    }
}

impl Worker {
    /// A client's connection to the service.
    pub(super) fn connect(&self, source: IpAddr) -> TcpStream {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        let socket = socket.unwrap();
        socket.bind(&SocketAddr::new(source, 0).into()).unwrap();
        let vip = SocketAddr::new(VIP, self.outbound);
        socket.connect(&vip.into()).unwrap();
        socket.set_read_timeout(Some(HANG)).unwrap();
        socket.into()
    }

    /// Value of a metric, as a scrape would see it.
    pub(super) fn metric(&self, name: &str) -> u64 {
        let page = self.metrics.encode(Exposition::Text);
        let line = page.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().parse().unwrap()
    }

    /// All lines of a metric.
    pub(super) fn samples(&self, name: &str) -> Vec<String> {
        let page = self.metrics.encode(Exposition::Text);
        let lines = page.lines().filter(|line| line.starts_with(name));
        lines.map(str::to_owned).collect()
    }

    /// Waits until that metric has `value`.
    pub(super) fn until(&self, name: &str, value: u64) {
        let started = Instant::now();
        while self.metric(name) != value {
            assert!(started.elapsed() < HANG, "{name} is {}", self.metric(name));
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub(super) fn thread_id(&self) -> thread::ThreadId {
        self.thread.thread().id()
    }

    /// Waits for its end, which it has been asked for.
    pub(super) fn join(self) {
        self.thread.join().unwrap();
    }

    pub(super) fn drain(self) -> Duration {
        let started = Instant::now();
        self.commands.send(Command::drain(HANG)).unwrap();
        self.thread.join().unwrap();
        started.elapsed()
    }
}

/// Echoes every connection until the process ends; tells when it accepts one.
pub(super) fn echo() -> (u16, mpsc::Receiver<()>) {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (accepted, told) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = accepted.send(()); // nobody may be listening
            thread::spawn(move || {
                let mut buf = vec![0; 70_000];
                while let Ok(n @ 1..) = stream.read(&mut buf) {
                    if stream.write_all(&buf[..n]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    (port, told)
}

pub(super) fn exchange(stream: &TcpStream, data: &[u8]) -> Vec<u8> {
    let mut back = Vec::new();
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            (&mut &*stream).write_all(data).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
        (&mut &*stream).read_to_end(&mut back).unwrap();
        sender.join().unwrap();
    });
    back
}

#[test]
fn bytes_are_exact_through_both_proxies() {
    let (port, _) = echo();
    let worker = worker(port, ONLY_CLIENT);
    thread::scope(|scope| {
        for (seed, len) in [
            (1, 1),
            (2, 700),
            (3, 40_000),
            (4, 3_000_000),
            (5, 1_000_000),
        ] {
            let stream = worker.connect(CLIENT);
            scope.spawn(move || {
                let data = pattern(seed, len);
                assert!(exchange(&stream, &data) == data, "{len} bytes");
            });
        }
    });
    worker.drain();
}

/// Both pods on this node, in node mode: in one hop, or by a tunnel of this process with itself.
#[test]
fn pods_of_one_node_take_one_hop_or_a_tunnel_of_our_own() {
    let (port, _) = echo();
    for (tunnel, security) in [(false, "unknown"), (true, "mutual_tls")] {
        let change = move |config: &mut ProxyConfig| {
            config.mode = RedirectMode::Node;
            config.same_node_tunnel = tunnel;
            // Nobody listens there: as on a node, where it would be the pod's own.
            config.node.hbone_port = 1;
        };
        let worker = worker_with(port, ONLY_CLIENT, &super::store(), change);
        for (seed, len) in [(1, 1), (2, 300_000)] {
            let data = pattern(seed, len);
            assert!(
                exchange(&worker.connect(CLIENT), &data) == data,
                "{len} bytes"
            );
        }
        let mut stream = worker.connect(STRANGER);
        let error = stream.read(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        let samples = worker.samples("istio_tcp_connections_opened_total{");
        // Either way it is known who they are, and what protects their bytes.
        let labels = |client: &str, reporter: &str| {
            let identity = |account| format!("\"spiffe://cluster.local/ns/default/sa/{account}\"");
            [
                format!("reporter=\"{reporter}\""),
                format!("source_principal={}", identity(client)),
                format!("destination_principal={}", identity("server")),
                format!("connection_security_policy=\"{security}\""),
            ]
        };
        for (client, count) in [("client", " 2"), ("stranger", " 1")] {
            for reporter in ["source", "destination"] {
                let labels = labels(client, reporter);
                let found = samples.iter().filter(|line| {
                    labels.iter().all(|label| line.contains(label)) && line.ends_with(count)
                });
                assert_eq!(found.count(), 1, "{labels:?} in {samples:#?}");
            }
        }
        worker.drain();
    }
}

#[test]
fn whom_no_policy_allows_sees_a_reset_and_the_server_nobody() {
    let (port, told) = echo();
    let worker = worker(port, ONLY_CLIENT);
    let mut stream = worker.connect(STRANGER);
    let error = stream.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(told.try_recv().is_err());
    worker.drain();
}

#[test]
fn a_server_that_is_not_there_is_a_reset() {
    let (listener, addr) = listen();
    drop(listener);
    let worker = worker(addr.port(), "");
    let mut stream = worker.connect(CLIENT);
    let error = stream.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    worker.drain();
}

/// Connections that exist when the drain begins finish, also those nobody has accepted yet.
#[test]
fn a_drain_lets_connections_finish() {
    let (port, told) = echo();
    let store = super::store();
    let far = worker_via(port, "", None, &store);
    let near = worker_via(port, "", Some(far.hbone), &store);
    let open = near.connect(CLIENT);
    told.recv().unwrap();
    let fresh: Vec<TcpStream> = (0..50).map(|_| near.connect(CLIENT)).collect();
    near.commands.send(Command::drain(HANG)).unwrap();
    let data = pattern(7, 300_000);
    for stream in &fresh {
        assert!(exchange(stream, &data) == data);
    }
    far.commands.send(Command::drain(HANG)).unwrap();
    thread::sleep(Duration::from_millis(50));
    assert!(exchange(&open, &data) == data);
    drop((fresh, open));
    near.thread.join().unwrap();
    far.thread.join().unwrap();
}

/// With nothing to wait for, and a tunnel that is idle, a drain is quick.
#[test]
fn an_idle_worker_drains_at_once() {
    let (port, _) = echo();
    let drained = || {
        let worker = worker(port, "");
        assert_eq!(exchange(&worker.connect(CLIENT), b"x"), b"x");
        worker.drain()
    };
    // Waiting for something would take a second each time; a busy machine is slow now and then.
    let mut took = Vec::new();
    while took
        .last()
        .is_none_or(|last| *last >= Duration::from_millis(900))
    {
        assert!(took.len() < 12, "{took:?}");
        took.push(drained());
    }
}

pub(super) fn key(gateway: SocketAddr) -> Key {
    Key {
        identity: identity("client"),
        gateway,
        expected: [identity("server")].into(),
        names: Arc::from([]),
        source: None,
        own: false,
    }
}

/// Many connections to a gateway that does not answer fail together, not one after the other.
#[test]
fn waiters_share_a_failure() {
    let (silent, addr) = listen(); // the kernel connects, nobody shakes hands
    silent.set_nonblocking(true).unwrap();
    let tries = move || std::iter::from_fn(|| silent.accept().ok()).count();
    let timeout = Duration::from_millis(300);
    run(async move {
        let context = context(&mesh(1, 1, ""), |config| config.handshake_timeout = timeout);
        let started = Instant::now();
        let (sender, mut results) = rt::mailbox::channel(64);
        for _ in 0..20 {
            let (context, sender) = (Rc::clone(&context), sender.clone());
            rt::spawn(async move {
                let request: ConnectRequest<'_> = request();
                let result = context.pool.open(&context, &key(addr), &request).await;
                sender
                    .send(result.map(drop).map_err(|error| error.to_string()))
                    .unwrap();
            });
        }
        for _ in 0..20 {
            let error = results.recv().await.unwrap_err();
            assert!(error.contains("handshake did not finish"), "{error}");
        }
        assert_eq!(tries(), 1, "one after the other, they would be twenty");
        // The failure is not remembered: the next one tries again.
        let again = context.pool.open(&context, &key(addr), &request()).await;
        assert!(matches!(again, Err(ProxyError::Shared(_))));
        assert_eq!(tries(), 1);
        assert!(started.elapsed() >= timeout * 2);
    });
}
