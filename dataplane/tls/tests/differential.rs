//! Our sessions against plain rustls connections, which do their own record layer.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::sync::Arc;

use common::{identity, workload};
use proptest::prelude::*;
use rustls::crypto::aws_lc_rs::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    AlertDescription, CipherSuite, ClientConfig, ClientConnection, Connection, RootCertStore,
    ServerConfig, ServerConnection,
};
use rustls_pki_types::ServerName;
use testkit::certificates::{AnyServer, Ca};
use tls::{
    Authority, ClientSettings, Handshake, HandshakeError, OpenError, Opened, RecordPath,
    ServerSettings, Session,
};

/// How the rustls side is set up.
#[derive(Clone, Debug)]
struct Reference {
    suite128: bool,
    /// Largest record it makes, which also cuts handshake messages into pieces.
    fragment: Option<usize>,
    tickets: usize,
    is_server: bool,
    /// What it offers as the client.
    protocols: Vec<Vec<u8>>,
    /// Who does the records on our side.
    records: RecordPath,
}

impl Default for Reference {
    fn default() -> Self {
        Self {
            suite128: false,
            fragment: None,
            tickets: 2,
            is_server: true,
            protocols: vec![b"h2".to_vec()],
            records: RecordPath::Own,
        }
    }
}

fn mesh_ca() -> (Authority, Ca) {
    let ca = Ca::new();
    let authority = Authority::from_pem(ca.pem().as_bytes(), ca.key_pem().as_bytes()).unwrap();
    (authority, ca)
}

fn provider(suite128: bool) -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    if suite128 {
        provider.cipher_suites = vec![TLS13_AES_128_GCM_SHA256];
    }
    Arc::new(provider)
}

/// Our side and rustls', joined in memory.
struct Pair {
    ours: Session,
    theirs: Connection,
    /// Bytes for our side that are no complete record yet.
    to_us: Vec<u8>,
    to_them: Vec<u8>,
    received_here: Vec<u8>,
    received_there: Vec<u8>,
    sent_here: Vec<u8>,
    sent_there: Vec<u8>,
    closed: bool,
    portion: usize,
}

fn reference(setup: &Reference, issuer: &Ca, with_certificate: bool) -> Connection {
    let theirs = issuer.issue(identity("td", "theirs").uri());
    let (chain, key) = (vec![theirs.der()], theirs.key_der());
    if setup.is_server {
        let mut roots = RootCertStore::empty();
        roots.add(issuer.der()).unwrap();
        let provider = provider(setup.suite128);
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
                .build()
                .unwrap();
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"http/1.1".to_vec(), b"h2".to_vec()];
        config.send_tls13_tickets = setup.tickets;
        config.max_fragment_size = setup.fragment;
        Connection::Server(ServerConnection::new(Arc::new(config)).unwrap())
    } else {
        let builder = ClientConfig::builder_with_provider(provider(setup.suite128))
            .with_safe_default_protocol_versions()
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyServer::new(
                &aws_lc_rs::default_provider(),
            )));
        let mut config = if with_certificate {
            builder.with_client_auth_cert(chain, key).unwrap()
        } else {
            builder.with_no_client_auth()
        };
        config.alpn_protocols.clone_from(&setup.protocols);
        config.max_fragment_size = setup.fragment;
        let name = ServerName::try_from("ignored.example").unwrap();
        Connection::Client(ClientConnection::new(Arc::new(config), name).unwrap())
    }
}

fn start(setup: &Reference, authority: &Authority) -> Handshake {
    let certificate = workload(authority, &identity("td", "ours"));
    if setup.is_server {
        let mut settings = ClientSettings::new(&certificate).unwrap();
        settings.set_records(setup.records);
        Handshake::client(&settings, &identity("td", "theirs")).unwrap()
    } else {
        let mut settings = ServerSettings::new(&certificate).unwrap();
        settings.set_records(setup.records);
        Handshake::server(&settings).unwrap()
    }
}

/// Feeds `bytes` to a rustls connection; returns the application data in them.
fn feed(connection: &mut Connection, mut bytes: &[u8]) -> Result<Vec<u8>, rustls::Error> {
    let mut plaintext = Vec::new();
    while !bytes.is_empty() {
        connection.read_tls(&mut bytes).unwrap();
        connection.process_new_packets()?;
        // Before the next read: it refuses to read on while much plaintext waits.
        match connection.reader().read_to_end(&mut plaintext) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    Ok(plaintext)
}

fn drain(connection: &mut Connection) -> Vec<u8> {
    let mut bytes = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut bytes).unwrap();
    }
    bytes
}

impl Pair {
    fn new(setup: &Reference, portion: usize) -> Self {
        let (authority, issuer) = mesh_ca();
        let mut theirs = reference(setup, &issuer, true);
        let mut handshake = start(setup, &authority);
        let mut established = None;
        let mut to_us = Vec::new();
        let mut to_them = Vec::new();
        handshake.advance(&[], &mut to_them).unwrap();
        for _ in 0..10 {
            feed(&mut theirs, &std::mem::take(&mut to_them)).unwrap();
            let bytes = drain(&mut theirs);
            for part in bytes.chunks(portion) {
                if established.is_some() {
                    to_us.extend_from_slice(part);
                    continue;
                }
                let progress = handshake.advance(part, &mut to_them).unwrap();
                to_us.extend_from_slice(&part[progress.consumed..]);
                established = progress.established;
            }
        }
        assert!(!theirs.is_handshaking());
        theirs.set_buffer_limit(None);
        let mut pair = Self {
            ours: established.unwrap(),
            theirs,
            to_us: Vec::new(),
            to_them,
            received_here: Vec::new(),
            received_there: Vec::new(),
            sent_here: Vec::new(),
            sent_there: Vec::new(),
            closed: false,
            portion,
        };
        pair.deliver_to_us(&to_us);
        pair
    }

    /// Opens what is complete, as the data path would.
    fn deliver_to_us(&mut self, bytes: &[u8]) {
        for part in bytes.chunks(self.portion) {
            self.to_us.extend_from_slice(part);
            let mut start = 0;
            while let Some(length) = Session::record_len(&self.to_us[start..]).unwrap() {
                let Some(record) = self.to_us.get_mut(start..start + length) else {
                    break;
                };
                match self.ours.open(record).unwrap() {
                    Opened::Data(range) => self.received_here.extend_from_slice(&record[range]),
                    Opened::Handled => self.ours.take_control_output(&mut self.to_them),
                    Opened::Closed => self.closed = true,
                }
                start += length;
            }
            self.to_us.drain(..start);
        }
    }

    /// Moves everything both ways until nothing moves.
    fn settle(&mut self) {
        loop {
            let bytes = std::mem::take(&mut self.to_them);
            for part in bytes.chunks(self.portion) {
                self.received_there
                    .extend(feed(&mut self.theirs, part).unwrap());
            }
            let back = drain(&mut self.theirs);
            if bytes.is_empty() && back.is_empty() {
                break;
            }
            self.deliver_to_us(&back);
        }
    }

    fn send(&mut self, plaintext: &[u8]) {
        self.ours.take_control_output(&mut self.to_them);
        self.sent_here.extend_from_slice(plaintext);
        let start = self.to_them.len();
        self.to_them.resize(start + Session::RECORD_HEADER, 0xee);
        self.to_them.extend_from_slice(plaintext);
        self.to_them
            .resize(self.to_them.len() + Session::RECORD_TRAILER, 0xee);
        self.ours.seal(&mut self.to_them[start..]).unwrap();
        self.ours.take_control_output(&mut self.to_them);
    }

    fn send_back(&mut self, plaintext: &[u8]) {
        self.sent_there.extend_from_slice(plaintext);
        self.theirs.writer().write_all(plaintext).unwrap();
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// We send records of these lengths.
    Send(Vec<usize>),
    /// They send this many bytes, cut as they like.
    SendBack(usize),
    /// We update our key, and ask for theirs or not.
    Update(bool),
    /// They update their key and ask for ours.
    UpdateBack,
    /// Everything sent arrives.
    Settle,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let length = prop_oneof![0..64_usize, 0..2000_usize, 16_300..=16_384_usize];
    let step = prop_oneof![
        3 => prop::collection::vec(length, 1..6).prop_map(Step::Send),
        3 => (1..40_000_usize).prop_map(Step::SendBack),
        1 => any::<bool>().prop_map(Step::Update),
        1 => Just(Step::UpdateBack),
        2 => Just(Step::Settle),
    ];
    prop::collection::vec(step, 1..16)
}

fn setups() -> impl Strategy<Value = Reference> {
    let fragment = prop::option::of(prop_oneof![32..300_usize, 300..16_389_usize]);
    let records = prop_oneof![2 => Just(RecordPath::Own), 1 => Just(RecordPath::Rustls)];
    (any::<bool>(), fragment, 0..4_usize, any::<bool>(), records).prop_map(
        |(suite128, fragment, tickets, is_server, records)| Reference {
            suite128,
            fragment,
            tickets,
            is_server,
            records,
            ..Reference::default()
        },
    )
}

/// Bytes that show where they belong.
fn pattern(offset: usize, length: usize) -> Vec<u8> {
    (offset..offset + length)
        .map(|index| (index % 251) as u8)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 96,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn same_bytes_as_rustls(
        setup in setups(),
        steps in steps(),
        portion in prop_oneof![1..50_usize, 50..70_000_usize],
        update_after in 1..20_u64,
    ) {
        let mut pair = Pair::new(&setup, portion);
        pair.ours.set_key_update_after(update_after);
        for step in steps {
            match step {
                Step::Send(lengths) => {
                    for length in lengths {
                        // rustls makes no empty records.
                        let length = length.max(usize::from(setup.records == RecordPath::Rustls));
                        let plaintext = pattern(pair.sent_here.len(), length);
                        pair.send(&plaintext);
                    }
                }
                Step::SendBack(length) => {
                    let plaintext = pattern(pair.sent_there.len(), length);
                    pair.send_back(&plaintext);
                }
                Step::Update(ask) => {
                    pair.ours.update_keys(ask);
                    pair.ours.take_control_output(&mut pair.to_them);
                }
                Step::UpdateBack => pair.theirs.refresh_traffic_keys().unwrap(),
                Step::Settle => pair.settle(),
            }
        }
        pair.settle();
        prop_assert!(pair.received_there == pair.sent_here);
        prop_assert!(pair.received_here == pair.sent_there);

        pair.theirs.send_close_notify();
        pair.settle();
        prop_assert!(pair.closed);
        pair.ours.close_notify(&mut pair.to_them);
        pair.settle();
        let mut rest = Vec::new();
        // Without close_notify this would be an error.
        prop_assert_eq!(pair.theirs.reader().read_to_end(&mut rest).unwrap(), 0);
    }
}

#[test]
fn the_strongest_common_suite_is_used() {
    for (suite128, is_server) in [(false, false), (false, true), (true, false), (true, true)] {
        let setup = Reference {
            suite128,
            is_server,
            ..Reference::default()
        };
        let mut pair = Pair::new(&setup, usize::MAX);
        let expected = if suite128 {
            TLS13_AES_128_GCM_SHA256
        } else {
            TLS13_AES_256_GCM_SHA384
        };
        assert_eq!(pair.theirs.negotiated_cipher_suite().unwrap(), expected);
        assert_eq!(pair.theirs.alpn_protocol(), Some(&b"h2"[..]));
        pair.send(b"hello");
        pair.send_back(b"world");
        pair.settle();
        assert_eq!(pair.received_there, b"hello");
        assert_eq!(pair.received_here, b"world");
    }
}

#[test]
fn no_server_name_is_sent() {
    let (authority, _) = mesh_ca();
    let mut hello = Vec::new();
    let setup = Reference::default();
    start(&setup, &authority).advance(&[], &mut hello).unwrap();
    let mut acceptor = rustls::server::Acceptor::default();
    acceptor.read_tls(&mut &hello[..]).unwrap();
    let accepted = acceptor.accept().unwrap().unwrap();
    let hello = accepted.client_hello();
    assert_eq!(hello.server_name(), None);
    assert_eq!(hello.alpn().unwrap().collect::<Vec<_>>(), [b"h2"]);
    let suites = [
        CipherSuite::TLS13_AES_256_GCM_SHA384,
        CipherSuite::TLS13_AES_128_GCM_SHA256,
    ];
    assert_eq!(hello.cipher_suites(), suites);
}

#[test]
fn clients_without_a_certificate_are_refused() {
    let (authority, issuer) = mesh_ca();
    let setup = Reference {
        is_server: false,
        ..Reference::default()
    };
    let mut theirs = reference(&setup, &issuer, false);
    let mut handshake = start(&setup, &authority);
    let mut output = Vec::new();
    handshake.advance(&drain(&mut theirs), &mut output).unwrap();
    feed(&mut theirs, &std::mem::take(&mut output)).unwrap();
    let error = handshake
        .advance(&drain(&mut theirs), &mut output)
        .unwrap_err();
    assert!(matches!(error, HandshakeError::Tls(_)), "{error}");
    assert!(error.to_string().contains("no certificates"), "{error}");
    let error = feed(&mut theirs, &output).unwrap_err();
    let expected = rustls::Error::AlertReceived(AlertDescription::CertificateRequired);
    assert_eq!(error, expected);
}

#[test]
fn clients_that_offer_only_other_protocols_are_refused() {
    let setup = Reference {
        is_server: false,
        protocols: Vec::new(),
        ..Reference::default()
    };
    Pair::new(&setup, usize::MAX);

    let (authority, issuer) = mesh_ca();
    let setup = Reference {
        protocols: vec![b"http/1.1".to_vec()],
        ..setup
    };
    let mut theirs = reference(&setup, &issuer, true);
    let mut output = Vec::new();
    start(&setup, &authority)
        .advance(&drain(&mut theirs), &mut output)
        .unwrap_err();
    let error = feed(&mut theirs, &output).unwrap_err();
    let expected = rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol);
    assert_eq!(error, expected);
}

#[test]
fn tls_1_2_is_refused() {
    let (authority, _) = mesh_ca();
    let setup = Reference {
        is_server: false,
        ..Reference::default()
    };
    let config = ClientConfig::builder_with_provider(provider(false))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer::new(&aws_lc_rs::default_provider())))
        .with_no_client_auth();
    let name = ServerName::try_from("ignored.example").unwrap();
    let client = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut client = Connection::Client(client);
    let mut output = Vec::new();
    let error = start(&setup, &authority)
        .advance(&drain(&mut client), &mut output)
        .unwrap_err();
    assert!(matches!(error, HandshakeError::Tls(_)), "{error}");
    let error = feed(&mut client, &output).unwrap_err();
    let expected = rustls::Error::AlertReceived(AlertDescription::ProtocolVersion);
    assert_eq!(error, expected);
}

#[test]
fn rustls_understands_our_alerts() {
    let own = [false, true].map(|is_server| (is_server, RecordPath::Own));
    let rustls = [false, true].map(|is_server| (is_server, RecordPath::Rustls));
    for (is_server, records) in own.into_iter().chain(rustls) {
        let setup = Reference {
            is_server,
            records,
            ..Reference::default()
        };
        let mut pair = Pair::new(&setup, usize::MAX);
        pair.send_back(b"to be altered");
        let mut bytes = drain(&mut pair.theirs);
        *bytes.last_mut().unwrap() ^= 1;
        let error = pair.ours.open(&mut bytes).unwrap_err();
        assert!(matches!(error, OpenError::BadRecordMac { .. }), "{error}");
        let mut alert = Vec::new();
        pair.ours.take_control_output(&mut alert);
        let error = feed(&mut pair.theirs, &alert).unwrap_err();
        let expected = rustls::Error::AlertReceived(AlertDescription::BadRecordMac);
        assert_eq!(error, expected);
    }
}
