//! Bytes through tunnels between two proxies of this crate, and between one of them and ours, in
//! one process on loopback addresses. The service's address stands for redirection: connections
//! to it arrive at the client's proxy with their original destination as local address.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use control::SnapshotPublisher;
use conventional::{Certificates, Config, Proxy};
use mesh::{NodeContext, Snapshot};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};
use socket2::{Domain, Socket, Type};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Conventional,
    Ours,
}

#[test]
fn half_close_between_two_of_this_crate() {
    half_close(Kind::Conventional, Kind::Conventional, [1, 11]);
}

#[test]
fn half_close_from_this_crate_to_ours() {
    half_close(Kind::Conventional, Kind::Ours, [1, 12]);
}

#[test]
fn half_close_from_ours_to_this_crate() {
    half_close(Kind::Ours, Kind::Conventional, [1, 13]);
}

/// Each connection sends, ends its direction, and only then gets its answer; more connections at
/// once than one tunnel has streams for. The server sees the client's address.
fn half_close(client_side: Kind, server_side: Kind, tag: [u8; 2]) {
    if !nix::unistd::geteuid().is_root() {
        let test = format!("half_close from {client_side:?} to {server_side:?}");
        let _ = writeln!(io::stderr(), "skipped: {test}: needs root (IP_TRANSPARENT)");
        return;
    }
    const CONNECTIONS: usize = 120;
    let [client, server, service] = [1, 2, 3].map(|host| Ipv4Addr::new(127, tag[0], tag[1], host));
    let to = mesh_of_two(client_side, server_side, client, server, service);
    let app = TcpListener::bind((server, to.app_port)).unwrap();
    thread::spawn(move || {
        for stream in app.incoming() {
            thread::spawn(|| collect_and_answer(stream.unwrap()));
        }
    });
    let open: Vec<TcpStream> = (0..CONNECTIONS)
        .map(|_| connect_from(client, to.service))
        .collect();
    thread::scope(|scope| {
        for (number, stream) in open.iter().enumerate() {
            // A few large ones: beyond windows and buffers.
            let size = if number % 40 == 0 { 9 << 20 } else { 3000 };
            scope.spawn(move || exchange(stream, size, client));
        }
    });
}

fn exchange(mut stream: &TcpStream, size: usize, client: Ipv4Addr) {
    let sent: Vec<u8> = (0..size).map(|index| (index % 251) as u8).collect();
    stream.write_all(&sent).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    let (peer, echoed) = received.split_at(4);
    assert_eq!(peer, client.octets());
    assert!(echoed == sent, "{} of {size} bytes", echoed.len());
}

/// Reads everything, then answers with the peer's address and what it read.
fn collect_and_answer(mut stream: TcpStream) {
    let mut data = Vec::new();
    stream.read_to_end(&mut data).unwrap();
    let SocketAddr::V4(peer) = stream.peer_addr().unwrap() else {
        panic!("not IPv4");
    };
    stream.write_all(&peer.ip().octets()).unwrap();
    stream.write_all(&data).unwrap();
}

fn connect_from(from: Ipv4Addr, to: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    let stream = TcpStream::from(socket);
    let limit = Some(Duration::from_secs(60));
    stream.set_read_timeout(limit).unwrap();
    stream.set_write_timeout(limit).unwrap();
    stream
}

struct Target {
    service: SocketAddr,
    app_port: u16,
}

/// A node for each address, each with a proxy.
fn mesh_of_two(
    client_side: Kind,
    server_side: Kind,
    client: Ipv4Addr,
    server: Ipv4Addr,
    service: Ipv4Addr,
) -> Target {
    let listen = |ip| TcpListener::bind((ip, 0)).unwrap();
    let (captured, hbone) = (listen(service), listen(server));
    let service = captured.local_addr().unwrap();
    let hbone_port = hbone.local_addr().unwrap().port();
    // Free now, and nobody else uses this address.
    let app_port = listen(server).local_addr().unwrap().port();
    let ports = format!("{{{}: {app_port}}}", service.port());
    let workload = |name: &str, ip: Ipv4Addr, services: &str| {
        format!(
            "- {{uid: {name}, name: {name}, namespace: default, serviceAccount: {name}, \
             workloadIps: [\"{ip}\"], protocol: HBONE, node: {name}, services: {services}}}\n"
        )
    };
    let yaml = format!(
        "workloads:\n{}{}services:\n- {{name: s, namespace: default, hostname: s.example, \
         vips: [\"/{}\"], ports: {ports}}}\n",
        workload("client", client, "{}"),
        workload("server", server, &format!("{{default/s.example: {ports}}}")),
        service.ip(),
    );
    let ca = Ca::generate();
    let idle = || listen(Ipv4Addr::LOCALHOST);
    for (kind, node, outbound, hbone) in [
        (client_side, "client", captured, idle()),
        (server_side, "server", idle(), hbone),
    ] {
        let mut context = NodeContext::new("", node);
        context.hbone_port = hbone_port;
        let snapshot = control::local::parse("test", &yaml).unwrap();
        let sockets = (outbound, idle(), hbone);
        match kind {
            Kind::Conventional => start_conventional(context, snapshot, &ca, sockets),
            Kind::Ours => ours::start(context, snapshot, &ca, sockets),
        }
    }
    Target { service, app_port }
}

type Sockets = (TcpListener, TcpListener, TcpListener);

fn start_conventional(
    context: NodeContext,
    snapshot: Snapshot,
    ca: &Ca,
    (outbound, plaintext, hbone): Sockets,
) {
    let certificates = Certificates::from_pem(&ca.certificate, &ca.key).unwrap();
    let publisher = SnapshotPublisher::new(snapshot);
    let proxy = Proxy::new(Config::new(context), publisher, certificates);
    let listeners = conventional::Listeners {
        outbound,
        plaintext,
        hbone,
    };
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            proxy.serve(listeners).unwrap();
            std::future::pending::<()>().await;
        });
    });
}

struct Ca {
    certificate: String,
    key: String,
}

impl Ca {
    fn generate() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self {
            certificate: params.self_signed(&key).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }
}

/// The proxy this one is compared with.
mod ours {
    use super::{Arc, Ca, Duration, NodeContext, Snapshot, Sockets, io, thread};
    use identity::{LocalIssuer, Manager};
    use proxy::{Listeners, ProxyConfig, RedirectMode, TunnelMemory, WorkerSetup};
    use telemetry::{AccessLevel, AccessLog, LogFormat, LogSink, Registry};
    use tls::Authority;
    use tracing::level_filters::LevelFilter;

    pub(super) fn start(
        node: NodeContext,
        snapshot: Snapshot,
        ca: &Ca,
        (outbound, inbound_plain, inbound_hbone): Sockets,
    ) {
        let authority = Authority::from_pem(ca.certificate.as_bytes(), ca.key.as_bytes()).unwrap();
        let issuer = LocalIssuer::new(authority, Duration::from_secs(3600));
        let config = ProxyConfig {
            node,
            mode: RedirectMode::Node,
            original_source: true,
            same_node_tunnel: false,
            pods: None,
            sockmap: None,
            mark: None,
            keepalive: None,
            connect_timeout: Duration::from_secs(10),
            handshakes_max: 64,
            handshake_timeout: Duration::from_secs(10),
            workload_timeout: Duration::from_secs(5),
            client: hbone::Config::client(),
            server: hbone::Config::server(),
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            pool_unused: Duration::from_secs(300),
            response_baggage: true,
            tunnel_memory: TunnelMemory::new(64 << 20),
            descriptors_max: usize::MAX,
        };
        let sink = LogSink::new(LogFormat::Plain, 1 << 16, io::sink()).unwrap();
        let log = AccessLog::new(&sink, AccessLevel::new(LevelFilter::INFO));
        let mut manager = Manager::new(Arc::new(issuer));
        let certificates = manager.feed();
        thread::spawn(move || {
            let mut control = tokio::runtime::Builder::new_current_thread();
            let control = control.enable_all().build().unwrap();
            control.block_on(manager.run());
        });
        thread::spawn(move || {
            let (commands, receiver) = rt::mailbox::channel(1);
            let (later, snapshots) = rt::mailbox::latest();
            let setup = WorkerSetup {
                config: Arc::new(config),
                listeners: Listeners {
                    outbound,
                    inbound_plain,
                    inbound_hbone,
                },
                snapshot: Arc::new(snapshot),
                certificates,
                telemetry: Registry::new("test").worker(log),
                snapshots,
                commands: receiver,
                seed: 1,
            };
            let mut runtime = rt::Runtime::new(rt::RuntimeConfig::default()).unwrap();
            runtime.run(proxy::serve(setup)).unwrap();
            drop((commands, later));
        });
    }
}
