//! Envoy at the other end of our tunnels, as client and as server: an implementation of HTTP/2 and
//! TLS (nghttp2's and BoringSSL's) that shares nothing with ours.
//!
//! Needs the `envoy` program: `ENVOY_BIN`, or `peers/**/envoy` below the target directory, or in
//! `PATH`. Skipped by name without it.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::end_to_end::{CLIENT, ONLY_CLIENT, echo, exchange, worker_via};
use super::store::Store;
use super::{Ca, HANG, identity, pattern};

/// Where the program is, or why the test is skipped.
fn program(test: &str) -> Option<PathBuf> {
    let found = std::env::var_os("ENVOY_BIN")
        .map(PathBuf::from)
        .or_else(|| {
            let own = std::env::current_exe().ok()?;
            let mut places = own.ancestors().map(|directory| directory.join("peers"));
            let path = std::env::var_os("PATH")?;
            places.find_map(|place| search(&place, 4)).or_else(|| {
                std::env::split_paths(&path)
                    .map(|p| p.join("envoy"))
                    .find(|p| p.is_file())
            })
        });
    if found.is_none() {
        eprintln!("skipped: {test}: no envoy (make setup PEERS=1, or set ENVOY_BIN)");
    }
    found
}

fn search(directory: &Path, depth: u32) -> Option<PathBuf> {
    let entries: Vec<PathBuf> = fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    let named = |path: &&PathBuf| path.is_file() && path.file_name() == Some("envoy".as_ref());
    entries.iter().find(named).cloned().or_else(|| {
        let below = |path: &PathBuf| search(path, depth - 1);
        entries.iter().filter(|_| depth > 0).find_map(below)
    })
}

/// A running Envoy with one listener.
struct Envoy {
    process: Child,
    directory: TempDir,
    port: u16,
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Envoy {
    /// `resources`: the static ones, in which PORT stands for the listener's port, and CERT, KEY
    /// and CA for files of `account`'s.
    fn start(program: &Path, ca: &Ca, account: &str, resources: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (certificate, key) = ca.workload(account);
        let write = |name: &str, text: &str| {
            let path = directory.path().join(name);
            fs::write(&path, text).unwrap();
            path.display().to_string()
        };
        let port = {
            let any = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
            any.local_addr().unwrap().port()
        };
        let resources = resources
            .replace("PORT", &port.to_string())
            .replace("CERT", &write("cert.pem", &certificate))
            .replace("KEY", &write("key.pem", &key))
            .replace("CA", &write("ca.pem", &ca.pem()));
        let config = write("envoy.yaml", &format!("static_resources:\n{resources}"));
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let process = Command::new(program)
            .args(["-c", &config, "--concurrency", "1", "--use-dynamic-base-id"])
            .args(["--disable-hot-restart", "--log-level", "info"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut envoy = Self {
            process,
            directory,
            port,
        };
        envoy.ready();
        envoy
    }

    fn ready(&mut self) {
        let started = Instant::now();
        loop {
            let log = fs::read_to_string(self.directory.path().join("log")).unwrap();
            if log.contains("starting main dispatch loop") {
                break;
            }
            let ended = self.process.try_wait().unwrap();
            assert!(ended.is_none() && started.elapsed() < HANG, "envoy: {log}");
            thread::sleep(Duration::from_millis(20));
        }
        thread::sleep(Duration::from_millis(200)); // its worker takes the listener
    }
}

const TLS: &str = "common_tls_context: {alpn_protocols: [h2], \
    tls_params: {tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}, \
    tls_certificates: [{certificate_chain: {filename: CERT}, private_key: {filename: KEY}}], \
    validation_context: {trusted_ca: {filename: CA}";
const TYPE: &str = "'@type': type.googleapis.com/envoy.extensions";

fn endpoint(name: &str, address: &str, port: u16) -> String {
    format!(
        "  - name: {name}\n    type: STATIC\n    load_assignment: {{cluster_name: {name}, \
         endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: \
         {{address: {address}, port_value: {port}}}}}}}}}]}}]}}\n"
    )
}

const LISTENER: &str = "  listeners:\n  - name: only\n    address: {socket_address: \
    {address: 0.0.0.0, port_value: PORT}}\n    filter_chains:\n";

/// Terminates HBONE and connects to `app`, as a waypoint or gateway would.
fn server(app: u16) -> String {
    format!(
        "{LISTENER}    - transport_socket:\n        name: tls\n        typed_config: \
         {{{TYPE}.transport_sockets.tls.v3.DownstreamTlsContext, \
         require_client_certificate: true, {TLS}}}}}}}\n      filters:\n      - name: http\n        \
         typed_config:\n          {TYPE}.filters.network.http_connection_manager.v3.\
         HttpConnectionManager\n          stat_prefix: hbone\n          codec_type: HTTP2\n          \
         http2_protocol_options: {{allow_connect: true}}\n          route_config: \
         {{virtual_hosts: [{{name: all, domains: ['*'], routes: [{{match: {{connect_matcher: {{}}}}, \
         route: {{cluster: app, upgrade_configs: [{{upgrade_type: CONNECT, connect_config: {{}}}}]}}\
         }}]}}]}}\n          http_filters: [{{name: router, typed_config: \
         {{{TYPE}.filters.http.router.v3.Router}}}}]\n  clusters:\n{}",
        endpoint("app", "127.0.0.3", app)
    )
}

/// Sends each connection through a tunnel to our HBONE port.
fn client(hbone: u16, app: u16) -> String {
    let uri = identity("server");
    format!(
        "{LISTENER}    - filters:\n      - name: tcp\n        typed_config: \
         {{{TYPE}.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: tcp, cluster: hbone, \
         tunneling_config: {{hostname: '127.0.0.3:{app}'}}}}\n  clusters:\n{}    \
         typed_extension_protocol_options: {{envoy.extensions.upstreams.http.v3.\
         HttpProtocolOptions: {{{TYPE}.upstreams.http.v3.HttpProtocolOptions, \
         explicit_http_config: {{http2_protocol_options: {{connection_keepalive: \
         {{interval: 0.2s, timeout: 2s}}}}}}}}}}\n    transport_socket: {{name: tls, typed_config: \
         {{{TYPE}.transport_sockets.tls.v3.UpstreamTlsContext, {TLS}, \
         match_typed_subject_alt_names: [{{san_type: URI, matcher: {{exact: '{}'}}}}]}}}}}}}}\n",
        endpoint("hbone", "127.0.0.3", hbone),
        uri.uri()
    )
}

fn mesh() -> (Ca, Arc<Store>) {
    let ca = Ca::new();
    let store = Store::new(ca.issuer());
    (ca, store)
}

/// Exact bytes of every size through `connect`, many connections at once, both kinds of half-close.
fn check(connect: impl Fn() -> TcpStream + Sync) {
    let connect = &connect;
    thread::scope(|scope| {
        for (seed, len) in (1..).zip([0, 1, 1000, 16_384, 100_000, 5_000_000, 9_000_000]) {
            scope.spawn(move || {
                let data = pattern(seed, len);
                assert!(exchange(&connect(), &data) == data, "{len} bytes");
            });
        }
        for seed in 0..120 {
            scope.spawn(move || {
                let data = pattern(seed, 3_000);
                assert!(exchange(&connect(), &data) == data);
            });
        }
    });
}

#[test]
fn envoy_is_a_server_of_our_tunnels() {
    let Some(program) = program("envoy_is_a_server_of_our_tunnels") else {
        return;
    };
    let (port, _) = echo();
    let (ca, store) = mesh();
    let envoy = Envoy::start(&program, &ca, "server", &server(port));
    let worker = worker_via(port, "", Some(envoy.port), &store);
    check(|| worker.connect(CLIENT));
    // Idle, and used again.
    thread::sleep(Duration::from_millis(300));
    assert_eq!(exchange(&worker.connect(CLIENT), b"again"), b"again");
    for reason in [
        "protocol",
        "stream",
        "frame_size",
        "compression",
        "truncated",
    ] {
        let name = format!("ztunnel_hbone_errors_total{{reason=\"{reason}\"}}");
        assert_eq!(worker.metric(&name), 0, "{reason}");
    }
    drop(envoy);
    let mut stream = worker.connect(CLIENT);
    let error = stream.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    worker.drain();
}

#[test]
fn envoy_is_a_client_of_our_tunnels() {
    let Some(program) = program("envoy_is_a_client_of_our_tunnels") else {
        return;
    };
    let (port, told) = echo();
    let (ca, store) = mesh();
    let worker = worker_via(port, ONLY_CLIENT, None, &store);
    let envoy = Envoy::start(&program, &ca, "client", &client(worker.hbone, port));
    let connect = |envoy: &Envoy| {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, envoy.port)).unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream
    };
    check(|| connect(&envoy));
    thread::sleep(Duration::from_millis(700)); // a few of its PINGs
    assert_eq!(exchange(&connect(&envoy), b"again"), b"again");
    for _ in told.try_iter() {}
    // Another identity: the policy says no, with status 401, and the server sees nobody.
    let stranger = Envoy::start(&program, &ca, "stranger", &client(worker.hbone, port));
    let mut stream = connect(&stranger);
    stream.write_all(b"hello").unwrap();
    assert!(!matches!(stream.read(&mut [0; 1]), Ok(1)));
    assert!(told.try_recv().is_err());
    drop((envoy, stranger));
    worker.drain();
}
