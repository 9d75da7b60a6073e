//! An authority, workloads, and a pair of our own peers.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
#![allow(dead_code, reason = "each test file uses its own part")]

use std::time::Duration;

use mesh::Identity;
use rcgen::CertificateParams;
use testkit::certificates::Ca;
use tls::{
    Authority, ClientSettings, ExpectedPeers, Handshake, HandshakeError, Opened, RecordPath,
    ServerSettings, Session, WorkloadCertificate,
};

/// A self-signed CA as PEM: certificate and key.
pub(crate) fn ca_pem(name: &str) -> (String, String) {
    ca_pem_with(name, |_| {})
}

pub(crate) fn ca_pem_with(
    name: &str,
    change: impl FnOnce(&mut CertificateParams),
) -> (String, String) {
    let ca = Ca::with(|params| {
        params
            .distinguished_name
            .push(rcgen::DnType::OrganizationName, name);
        change(params);
    });
    (ca.pem(), ca.key_pem())
}

pub(crate) fn authority(name: &str) -> Authority {
    let (certificate, key) = ca_pem(name);
    Authority::from_pem(certificate.as_bytes(), key.as_bytes()).unwrap()
}

pub(crate) fn identity(trust_domain: &str, account: &str) -> Identity {
    Identity::new(trust_domain, "default", account).unwrap()
}

pub(crate) fn workload(authority: &Authority, identity: &Identity) -> WorkloadCertificate {
    authority
        .issue(identity, Duration::from_secs(3600))
        .unwrap()
}

/// Both peers' view of a handshake. The bytes behind each side's handshake are in `*_rest`.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) client: Result<Session, HandshakeError>,
    pub(crate) server: Result<Session, HandshakeError>,
    pub(crate) to_client: Vec<u8>,
}

/// Runs a handshake of two peers of ours until nothing moves any more, delivering `portion` bytes
/// at a time.
pub(crate) fn handshake(
    client: &ClientSettings,
    server: &ServerSettings,
    expected: impl Into<ExpectedPeers>,
    portion: usize,
) -> Outcome {
    let mut client = Side::new(Handshake::client(client, expected).unwrap());
    let mut server = Side::new(Handshake::server(server).unwrap());
    client.advance(&[]);
    loop {
        let to_server = std::mem::take(&mut client.output);
        let to_client = std::mem::take(&mut server.output);
        if to_server.is_empty() && to_client.is_empty() {
            break;
        }
        for part in to_server.chunks(portion) {
            server.advance(part);
        }
        for part in to_client.chunks(portion) {
            client.advance(part);
        }
    }
    Outcome {
        client: client.outcome.expect("client done"),
        server: server
            .outcome
            .unwrap_or_else(|| panic!("{:?} {}", server.handshake, portion)),
        to_client: client.rest,
    }
}

struct Side {
    handshake: Handshake,
    output: Vec<u8>,
    outcome: Option<Result<Session, HandshakeError>>,
    /// What arrived after the end.
    rest: Vec<u8>,
}

impl Side {
    fn new(handshake: Handshake) -> Self {
        Self {
            handshake,
            output: Vec::new(),
            outcome: None,
            rest: Vec::new(),
        }
    }

    fn advance(&mut self, input: &[u8]) {
        if self.outcome.is_some() {
            self.rest.extend_from_slice(input);
            return;
        }
        match self.handshake.advance(input, &mut self.output) {
            Ok(progress) => {
                if let Some(session) = progress.established {
                    self.rest.extend_from_slice(&input[progress.consumed..]);
                    self.outcome = Some(Ok(session));
                } else {
                    assert_eq!(progress.consumed, input.len());
                }
            }
            Err(error) => self.outcome = Some(Err(error)),
        }
    }
}

/// Two established sessions of one mesh: client and server.
pub(crate) fn sessions() -> (Session, Session) {
    sessions_by(RecordPath::Own, RecordPath::Own)
}

/// As [`sessions`], with the client's and the server's records done by these.
pub(crate) fn sessions_by(near: RecordPath, far: RecordPath) -> (Session, Session) {
    let authority = authority("mesh");
    let (a, b) = (identity("td", "client"), identity("td", "server"));
    let mut client = ClientSettings::new(&workload(&authority, &a)).unwrap();
    let mut server = ServerSettings::new(&workload(&authority, &b)).unwrap();
    client.set_records(near);
    server.set_records(far);
    let outcome = handshake(&client, &server, &b, usize::MAX);
    (outcome.client.unwrap(), outcome.server.unwrap())
}

/// A sealed record of `plaintext`.
pub(crate) fn seal(session: &mut Session, plaintext: &[u8]) -> Vec<u8> {
    let mut record = vec![0; Session::RECORD_HEADER];
    record.extend_from_slice(plaintext);
    record.resize(record.len() + Session::RECORD_TRAILER, 0);
    session.seal(&mut record).unwrap();
    record
}

/// What the application gets from one record; `None` when it was none of its business.
pub(crate) fn open(session: &mut Session, record: &mut [u8]) -> Option<Vec<u8>> {
    match session.open(record).unwrap() {
        Opened::Data(range) => Some(record[range].to_vec()),
        Opened::Handled => None,
        Opened::Closed => panic!("closed"),
    }
}

/// Control output of `session`.
pub(crate) fn control(session: &mut Session) -> Vec<u8> {
    let mut output = Vec::new();
    session.take_control_output(&mut output);
    output
}
