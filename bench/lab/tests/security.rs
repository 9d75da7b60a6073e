//! Who may speak to whom: peers that are not ztunnels dial a ztunnel's HBONE port, and pretend to
//! be one, with good and bad certificates. The peers are independent: rustls and the h2 crate.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::io::{Cursor, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response};
use lab::{CertificateAuthority, Redirect};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use support::{
    Case, PATIENCE, Pattern, TestLab, accept, at, check_echo, echo_server, run_cases, try_accept,
};
use testkit::certificates::AnyServer;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

const CASES: &[Case] = &[
    (
        "a_valid_certificate_gets_through",
        a_valid_certificate_gets_through,
    ),
    (
        "a_certificate_of_another_ca_is_refused",
        another_ca_is_refused,
    ),
    (
        "a_certificate_of_another_trust_domain_is_refused",
        another_trust_domain_is_refused,
    ),
    (
        "a_certificate_without_identity_is_refused",
        no_identity_is_refused,
    ),
    ("no_certificate_is_refused", no_certificate_is_refused),
    ("tls_1_2_is_refused", tls_1_2_is_refused),
    ("authorities_are_checked", authorities_are_checked),
    (
        "other_methods_are_bad_requests",
        other_methods_are_bad_requests,
    ),
    ("garbage_does_no_harm", garbage_does_no_harm),
    (
        "the_server_must_be_who_it_should_be",
        the_server_must_be_who_it_should_be,
    ),
];

#[test]
fn tunnel() {
    run_cases("tunnel", Redirect::Tunnel, CASES);
}

#[test]
fn ebpf() {
    run_cases("ebpf", Redirect::Ebpf, CASES);
}

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client-a";
const SERVER: &str = "10.244.2.11:8080";

/// A certificate chain and its key.
type Identity = (CertificateDer<'static>, PrivateKeyDer<'static>);

fn identity(authority: &CertificateAuthority, uri: &str) -> Identity {
    let (certificate, key) = authority.issue(uri).unwrap();
    let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    (
        certificate,
        PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
    )
}

fn lab_identity(lab: &TestLab, uri: &str) -> Identity {
    identity(&lab.lab.certificate_authority().unwrap(), uri)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn client_config(
    identity: Option<Identity>,
    version: &'static rustls::SupportedProtocolVersion,
) -> ClientConfig {
    let provider = provider();
    let verifier = AnyServer::new(&provider);
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match identity {
        Some((certificate, key)) => builder
            .with_client_auth_cert(vec![certificate], key)
            .unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    config
}

/// How an attempt to get through a ztunnel ended.
#[derive(Debug, Eq, PartialEq)]
enum Outcome {
    /// TLS or HTTP/2 failed before there was a response.
    Refused(String),
    /// The ztunnel answered with this status. With 200, and what was sent came back.
    Status(u16),
}

/// Dials server-b's HBONE port from plain-b as `config` says, asks for `authority`, and on
/// success sends a few bytes through.
fn dial(lab: &TestLab, config: ClientConfig, method: Method, authority: &str) -> Outcome {
    let gateway = at("server-b", 15008);
    let attempt = async move {
        let tcp = TcpStream::connect(gateway)
            .await
            .map_err(|e| format!("connect: {e}"))?;
        let name = ServerName::IpAddress(gateway.ip().into());
        let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp);
        let tls = tls.await.map_err(|e| format!("tls: {e}"))?;
        let (mut client, connection) = h2::client::handshake(tls)
            .await
            .map_err(|e| format!("h2: {e}"))?;
        let driver = tokio::spawn(connection);
        let uri = if method == Method::CONNECT {
            authority.to_owned()
        } else {
            format!("https://{authority}/")
        };
        let request = Request::builder().method(method).uri(uri).body(()).unwrap();
        let (response, mut send) = client
            .send_request(request, false)
            .map_err(|e| format!("request: {e}"))?;
        let response = response.await.map_err(|e| format!("response: {e}"))?;
        let status = response.status().as_u16();
        if status == 200 {
            send.send_data(Bytes::from_static(b"ping"), true)
                .map_err(|e| format!("data: {e}"))?;
            let mut body = response.into_body();
            let mut echoed = Vec::new();
            while let Some(chunk) = body.data().await {
                echoed.extend_from_slice(&chunk.map_err(|e| format!("body: {e}"))?);
            }
            assert_eq!(echoed, b"ping");
        }
        driver.abort();
        Ok(status)
    };
    let limited = async { tokio::time::timeout(PATIENCE, attempt).await };
    match lab
        .lab
        .on("plain-b", || runtime().block_on(limited))
        .unwrap()
    {
        Ok(Ok(status)) => Outcome::Status(status),
        Ok(Err(reason)) => Outcome::Refused(reason),
        Err(_) => panic!("neither refused nor answered within {PATIENCE:?}"),
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Asserts that `identity` does not get through, and that the server saw no connection.
fn assert_refused(lab: &TestLab, identity: Option<Identity>) {
    let listener = lab.listen("server-b", 8080);
    let config = client_config(identity, &rustls::version::TLS13);
    let outcome = dial(lab, config, Method::CONNECT, SERVER);
    assert!(matches!(outcome, Outcome::Refused(_)), "{outcome:?}");
    let reached = try_accept(&listener, Duration::from_millis(200));
    assert!(reached.is_none(), "the server was reached");
}

fn a_valid_certificate_gets_through(lab: &mut TestLab) {
    let echo = echo_server(lab.listen("server-b", 8080), 1);
    let config = client_config(Some(lab_identity(lab, CLIENT)), &rustls::version::TLS13);
    assert_eq!(
        dial(lab, config, Method::CONNECT, SERVER),
        Outcome::Status(200)
    );
    assert_eq!(echo.join().unwrap()[0].ip(), lab.address("plain-b"));
}

fn another_ca_is_refused(lab: &mut TestLab) {
    let other = CertificateAuthority::generate("cluster.local").unwrap();
    assert_refused(lab, Some(identity(&other, CLIENT)));
}

fn another_trust_domain_is_refused(lab: &mut TestLab) {
    for domain in [
        "cluster.locale",
        "cluster.loca",
        "evil.example",
        "CLUSTER.LOCAL",
    ] {
        let uri = format!("spiffe://{domain}/ns/default/sa/client-a");
        assert_refused(lab, Some(lab_identity(lab, &uri)));
    }
}

fn no_identity_is_refused(lab: &mut TestLab) {
    for uri in [
        "https://cluster.local/ns/default/sa/client-a",
        "spiffe://cluster.local/client-a",
    ] {
        assert_refused(lab, Some(lab_identity(lab, uri)));
    }
}

fn no_certificate_is_refused(lab: &mut TestLab) {
    assert_refused(lab, None);
}

fn tls_1_2_is_refused(lab: &mut TestLab) {
    let config = client_config(Some(lab_identity(lab, CLIENT)), &rustls::version::TLS12);
    let outcome = dial(lab, config, Method::CONNECT, SERVER);
    assert!(
        matches!(&outcome, Outcome::Refused(why) if why.starts_with("tls")),
        "{outcome:?}"
    );
}

fn authorities_are_checked(lab: &mut TestLab) {
    let cases = [
        ("10.244.2.11:8080", 200),
        ("server-b.default.svc.cluster.local:80", 200),
        // Another pod of the node, another node's pod, and something outside.
        ("10.244.2.12:8080", 400),
        ("10.244.1.12:8080", 400),
        ("192.0.2.1:8080", 400),
        ("[::1]:8080", 400),
        // ztunnel's own ports, a port where nothing listens, a service nobody knows.
        ("10.244.2.11:15008", 503),
        ("10.244.2.11:15006", 503),
        ("10.244.2.11:15001", 503),
        ("10.244.2.11:7998", 503),
        ("unknown.default.svc.cluster.local:80", 503),
    ];
    let expected_connections = cases.iter().filter(|(_, status)| *status == 200).count();
    let echo = echo_server(lab.listen("server-b", 8080), expected_connections);
    for (authority, status) in cases {
        let config = client_config(Some(lab_identity(lab, CLIENT)), &rustls::version::TLS13);
        let outcome = dial(lab, config, Method::CONNECT, authority);
        assert_eq!(outcome, Outcome::Status(status), "{authority}");
    }
    echo.join().unwrap();
}

fn other_methods_are_bad_requests(lab: &mut TestLab) {
    for method in [Method::GET, Method::POST] {
        let config = client_config(Some(lab_identity(lab, CLIENT)), &rustls::version::TLS13);
        assert_eq!(dial(lab, config, method, SERVER), Outcome::Status(400));
    }
}

fn garbage_does_no_harm(lab: &mut TestLab) {
    let pids = lab.lab.ztunnel_pids();
    let garbage: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        // A record that claims 64 KiB, a hello that claims 16 MiB, and one that never comes.
        &[22, 3, 3, 255, 255, 1, 2, 3],
        &[22, 3, 1, 0, 5, 1, 255, 255, 255, 0],
        &[22, 3, 1, 0],
    ];
    for bytes in garbage {
        let mut stream = lab.connect("plain-b", at("server-b", 15008));
        stream
            .set_read_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        // The ztunnel may hang up meanwhile: any end is fine.
        let _ = stream.write_all(bytes);
        let _ = stream.read(&mut [0; 64]);
    }
    let held: Vec<_> = (0..100)
        .map(|_| lab.connect("plain-b", at("server-b", 15008)))
        .collect();
    let echo = echo_server(lab.listen("server-b", 8080), 1);
    check_echo(
        &lab.connect("client-a", at("server-b", 8080)),
        &Pattern::new(1),
        100_000,
        1,
    );
    echo.join().unwrap();
    drop(held);
    assert_eq!(lab.lab.ztunnel_pids(), pids);
    assert!(lab.lab.status().ready);
}

/// Serves one HBONE connection on waypoint-b with `identity`, echoing every tunnel. Returns
/// whether a tunnel was asked for.
fn serve_hbone(lab: &TestLab, identity: Identity, roots: &str) -> thread::JoinHandle<bool> {
    let roots: Result<Vec<_>, _> = CertificateDer::pem_reader_iter(Cursor::new(roots)).collect();
    let mut store = RootCertStore::empty();
    for root in roots.unwrap() {
        store.add(root).unwrap();
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider());
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![identity.0], identity.1)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let listener = lab.listen("waypoint-b", 15008);
    thread::spawn(move || {
        let (stream, _) = accept(&listener);
        stream.set_nonblocking(true).unwrap();
        let serve = async move {
            let tcp = TcpStream::from_std(stream).unwrap();
            let Ok(tls) = TlsAcceptor::from(Arc::new(config)).accept(tcp).await else {
                return false;
            };
            let Ok(mut connection) = h2::server::handshake(tls).await else {
                return false;
            };
            let mut asked = false;
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                asked = true;
                tokio::spawn(async move {
                    let mut send = respond.send_response(Response::new(()), false).unwrap();
                    let mut body = request.into_body();
                    while let Some(Ok(chunk)) = body.data().await {
                        let _ = body.flow_control().release_capacity(chunk.len());
                        send.send_data(chunk, false).unwrap();
                    }
                    let _ = send.send_data(Bytes::new(), true);
                });
            }
            asked
        };
        // A ztunnel keeps its tunnel: the connection does not end by itself.
        runtime()
            .block_on(async { tokio::time::timeout(Duration::from_secs(4), serve).await })
            .unwrap_or(true)
    })
}

fn the_server_must_be_who_it_should_be(lab: &mut TestLab) {
    let ours = lab.lab.certificate_authority().unwrap();
    let other = CertificateAuthority::generate("cluster.local").unwrap();
    let right = "spiffe://cluster.local/ns/default/sa/waypoint-b";
    let wrong = "spiffe://cluster.local/ns/default/sa/server-b";
    let to: SocketAddr = at("waypoint-b", 8080);
    for (authority, uri) in [(&ours, wrong), (&other, right)] {
        let server = serve_hbone(lab, identity(authority, uri), ours.certificate_pem());
        let mut client = lab.connect("client-a", to);
        // Either end of the connection may already be there.
        let _ = client.write_all(b"secret");
        assert!(
            !matches!(client.read(&mut [0; 16]), Ok(1..)),
            "an impostor answered as {uri}"
        );
        drop(client);
        assert!(
            !server.join().unwrap(),
            "an impostor ({uri}) was asked for a tunnel"
        );
    }
    let server = serve_hbone(lab, identity(&ours, right), ours.certificate_pem());
    let mut client = lab.connect("client-a", to);
    client.write_all(b"hello").unwrap();
    let mut echoed = [0; 5];
    client.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"hello");
    drop(client);
    assert!(server.join().unwrap());
}
