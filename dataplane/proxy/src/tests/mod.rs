//! The data path against itself, over loopback sockets: certificates from an authority made for
//! the test, both ends in one process.
#![allow(clippy::unwrap_used, reason = "a failed set-up step is a failed test")]

mod authorization;
mod certificates;
mod credit;
mod end_to_end;
mod ends;
mod envoy;
mod floods;
mod handshakes;
mod hostile;
mod keepalive;
mod peer;
mod pinning;
mod pods;
mod pooling;
mod queueing;
mod readers;
mod records;
mod relays;
mod sockmap;
mod store;
mod streams;
mod violations;
mod whole_tunnels;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hbone::{Config, ConnectRequest, RequestHead, Role};
use identity::{LocalIssuer, WorkloadTls};
use mesh::{Identity, NodeContext, Snapshot};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose, SanType};
use rt::buf::Buf;
use rt::net::{ConnectOptions, Listener, TcpStream};
use rt::sync::Signal;
use rt::{Runtime, RuntimeConfig};
use telemetry::{AccessLevel, AccessLog, LogFormat, LogSink, Registry, WorkerTelemetry};
use tls::{Authority, Handshake};

use crate::config::{ProxyConfig, RedirectMode};
use crate::context::Context;
use crate::gate::Cpu;
use crate::memory::{TunnelMemory, WorkerMemory};

use store::Store;

use crate::tunnel::{self, ClientSide, Setup, Tunnel, TunnelOwner, TunnelStream};

/// A test that takes longer than this hangs.
const HANG: Duration = Duration::from_secs(120);

/// Runs `main` on a runtime of its own, for [`HANG`] at most.
pub(crate) fn run<T>(main: impl Future<Output = T>) -> T {
    let mut runtime = Runtime::new(RuntimeConfig::default()).unwrap();
    runtime
        .run(async { rt::time::timeout(HANG, main).await })
        .unwrap()
        .expect("the test hangs")
}

fn store() -> Arc<Store> {
    Store::new(Ca::new().issuer())
}

/// A certificate authority whose certificates other programs can use as well.
struct Ca {
    certificate: rcgen::Certificate,
    params: CertificateParams,
    key: KeyPair,
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self {
            certificate,
            params,
            key,
        }
    }

    fn pem(&self) -> String {
        self.certificate.pem()
    }

    fn authority(&self) -> Authority {
        let key = self.key.serialize_pem();
        Authority::from_pem(self.pem().as_bytes(), key.as_bytes()).unwrap()
    }

    fn issuer(&self) -> LocalIssuer {
        LocalIssuer::new(self.authority(), Duration::from_secs(3600))
    }

    /// Certificate and key of a workload, as PEM.
    fn workload(&self, account: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        let uri = identity(account).uri().try_into().unwrap();
        params.subject_alt_names = vec![SanType::URI(uri)];
        let issuer = rcgen::Issuer::from_params(&self.params, &self.key);
        let certificate = params.signed_by(&key, &issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "default", account).unwrap()
}

fn certificate(store: &Store) -> Arc<WorkloadTls> {
    store.get(&identity("app")).unwrap()
}

pub(crate) fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

/// Hands a server tunnel's streams to the test.
#[derive(Debug, Default)]
struct Requests {
    queue: RefCell<VecDeque<(TunnelStream, RequestHead)>>,
    arrived: Signal,
}

impl Requests {
    async fn next(&self) -> (TunnelStream, RequestHead) {
        loop {
            if let Some(request) = self.queue.borrow_mut().pop_front() {
                return request;
            }
            self.arrived.wait().await;
        }
    }

    /// Drops the streams that nobody has taken: they hold their tunnel.
    fn clear(&self) {
        let all = std::mem::take(&mut *self.queue.borrow_mut());
        drop(all); // which may let others in
    }

    /// The next stream, answered with 200.
    async fn accept(&self) -> TunnelStream {
        let (stream, _) = self.next().await;
        stream.respond(200, None, false).unwrap();
        stream
    }
}

#[derive(Debug)]
struct Owner(Rc<Requests>);

impl TunnelOwner for Owner {
    fn request(&self, _: &Rc<Tunnel>, stream: TunnelStream, head: RequestHead) {
        self.0.queue.borrow_mut().push_back((stream, head));
        self.0.arrived.set();
    }
}

/// Two ends of one tunnel.
struct Pair {
    client: Rc<Tunnel>,
    server: Rc<Tunnel>,
    requests: Rc<Requests>,
}

impl fmt::Debug for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pair").finish_non_exhaustive()
    }
}

/// The server's end of a tunnel over `stream`.
async fn serve(
    stream: TcpStream,
    tls: &WorkloadTls,
    config: &Config,
) -> (Rc<Tunnel>, Rc<Requests>) {
    serve_with(stream, tls, config, &registry()).await
}

/// As [`serve`], counted by `telemetry`.
async fn serve_with(
    stream: TcpStream,
    tls: &WorkloadTls,
    config: &Config,
    telemetry: &WorkerTelemetry,
) -> (Rc<Tunnel>, Rc<Requests>) {
    let surroundings = Surroundings::default();
    let setup = surroundings.setup(Role::Server, config, telemetry);
    serve_by(stream, tls, &setup).await
}

/// As [`serve`], by a worker with `setup`.
async fn serve_by(
    stream: TcpStream,
    tls: &WorkloadTls,
    setup: &Setup<'_>,
) -> (Rc<Tunnel>, Rc<Requests>) {
    let requests = Rc::new(Requests::default());
    let owner = Box::new(Owner(Rc::clone(&requests)));
    let peer = stream.peer_addr().unwrap();
    let handshake = Handshake::server(&tls.server).unwrap();
    let server = tunnel::run(stream, peer, handshake, setup, owner);
    (server.await.unwrap(), requests)
}

/// What a tunnel has from its worker.
#[derive(Clone, Debug)]
struct Surroundings {
    ping: (Duration, Duration),
    memory: Rc<WorkerMemory>,
    limit: Arc<TunnelMemory>,
}

impl Default for Surroundings {
    fn default() -> Self {
        let limit = TunnelMemory::new(64 << 20);
        Self {
            ping: (Duration::from_secs(10), Duration::from_secs(20)),
            memory: WorkerMemory::new(&limit),
            limit,
        }
    }
}

impl Surroundings {
    fn setup<'a>(
        &'a self,
        role: Role,
        config: &'a Config,
        telemetry: &'a WorkerTelemetry,
    ) -> Setup<'a> {
        thread_local! {
            static CPU: &'static Cpu = Box::leak(Box::default());
        }
        Setup {
            role,
            config,
            cpu: CPU.with(|cpu| *cpu),
            place: None,
            telemetry,
            memory: &self.memory,
            ping: self.ping,
        }
    }
}

async fn pair(client: Config, server: Config) -> Pair {
    pair_in(client, server, &Surroundings::default()).await
}

/// As [`pair`], with what both ends have from their worker.
async fn pair_in(client: Config, server: Config, surroundings: &Surroundings) -> Pair {
    let tls = certificate(&store());
    let (listener, addr) = listen();
    let mut listener = Listener::from_std(listener);
    let options = ConnectOptions::default();
    let stream = rt::net::connect(addr, &options).await.unwrap();
    let accepted = listener.accept().await.unwrap();
    let ready = Rc::new(Signal::default());
    let slot = Rc::new(RefCell::new(None));
    rt::spawn({
        let (ready, slot, tls) = (Rc::clone(&ready), Rc::clone(&slot), Arc::clone(&tls));
        let surroundings = surroundings.clone();
        async move {
            let telemetry = registry();
            let setup = surroundings.setup(Role::Server, &server, &telemetry);
            *slot.borrow_mut() = Some(serve_by(accepted, &tls, &setup).await);
            ready.set();
        }
    });
    let handshake = Handshake::client(&tls.client, &identity("app")).unwrap();
    let owner = Box::new(ClientSide);
    let telemetry = registry();
    let setup = surroundings.setup(Role::Client, &client, &telemetry);
    let client = tunnel::run(stream, addr, handshake, &setup, owner);
    let client = client.await.unwrap();
    ready.wait().await;
    let (server, requests) = slot.borrow_mut().take().unwrap();
    Pair {
        client,
        server,
        requests,
    }
}

fn request() -> ConnectRequest<'static> {
    ConnectRequest {
        authority: "10.0.0.1:80",
        forwarded: None,
        baggage: None,
        traceparent: None,
        x_forwarded_network: None,
    }
}

impl Pair {
    /// A stream that is open on both sides: client's, server's.
    async fn open(&self) -> (TunnelStream, TunnelStream) {
        let client = self.client.open(&request()).unwrap();
        let server = self.requests.accept().await;
        assert_eq!(client.response().await.unwrap(), 200);
        (client, server)
    }
}

/// Bytes that differ from place to place.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..len).map(|_| random.below(256) as u8).collect()
}

/// xorshift64: reproducible by its seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 |= 1 << 32;
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) % end
    }
}

/// `bytes` in pool memory.
fn bufs(pool: &rt::buf::Pool, bytes: &[u8]) -> VecDeque<Buf> {
    let mut queue = VecDeque::new();
    pool.copy_from(bytes, |buf| queue.push_back(buf));
    queue
}

/// A worker's context without listeners, with the configuration in `yaml`.
fn context(yaml: &str, change: impl FnOnce(&mut ProxyConfig)) -> Rc<Context> {
    let setup = (config(change), snapshot(yaml));
    let registry = registry();
    let certificates = store().certificates(&["app", "client", "server", "stranger"]);
    Rc::new(Context::new(setup.0, certificates, registry, setup.1, 1))
}

fn snapshot(yaml: &str) -> Arc<Snapshot> {
    Arc::new(control::local::parse("test", yaml).unwrap())
}

fn registry() -> WorkerTelemetry {
    // One sink a thread: each has a writer of its own, and a fuzzer makes worlds by the thousand.
    thread_local!(static LOG: AccessLog = access_log());
    Registry::new("test").worker(LOG.with(AccessLog::clone))
}

fn access_log() -> AccessLog {
    let sink = LogSink::new(LogFormat::Plain, 1 << 20, std::io::sink()).unwrap();
    let level = AccessLevel::new(tracing::level_filters::LevelFilter::INFO);
    AccessLog::new(&sink, level)
}

fn config(change: impl FnOnce(&mut ProxyConfig)) -> Arc<ProxyConfig> {
    let mut node = NodeContext::new("", "node");
    node.own_ports = Arc::from([]);
    let mut config = ProxyConfig {
        node,
        mode: RedirectMode::InPod,
        original_source: false,
        same_node_tunnel: false,
        pods: None,
        sockmap: None,
        mark: None,
        keepalive: None,
        connect_timeout: Duration::from_secs(5),
        handshake_timeout: Duration::from_secs(5),
        handshakes_max: 64,
        descriptors_max: usize::MAX,
        tunnel_memory: TunnelMemory::new(64 << 20),
        workload_timeout: Duration::from_millis(200),
        client: Config::client(),
        server: Config::server(),
        ping_interval: Duration::from_secs(10),
        ping_timeout: Duration::from_secs(20),
        pool_unused: Duration::from_secs(300),
        response_baggage: true,
    };
    change(&mut config);
    Arc::new(config)
}
