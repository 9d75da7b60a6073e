//! TLS records three ways: our session in place, rustls' buffered interface, the bare AEAD.
//!
//! All use AES-256-GCM by aws-lc-rs. A record holds 16 KiB of plaintext. rustls gets what an
//! application over a socket gives it: plaintext through its writer, records out by `write_tls`;
//! records in by `read_tls`, plaintext out through its reader.

use std::io::{Read as _, Write as _};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use mesh::Identity;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use rustls::client::Resumption;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use rustls_pki_types::{PrivatePkcs8KeyDer, ServerName};
use tls::{Authority, ClientSettings, Handshake, Opened, ServerSettings, Session};

/// Bytes of plaintext in a record.
pub const PLAINTEXT: usize = Session::MAX_PLAINTEXT;
const RECORD: usize = Session::RECORD_HEADER + PLAINTEXT + Session::RECORD_TRAILER;

/// What two workloads of one mesh shake hands with, made once.
#[derive(Debug)]
pub struct Workloads {
    client: ClientSettings,
    server: ServerSettings,
    expected: Identity,
}

impl Workloads {
    /// Issues both certificates.
    ///
    /// # Errors
    /// A certificate failed.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?.pem();
        let key_pem = key.serialize_pem();
        let authority = Authority::from_pem(certificate.as_bytes(), key_pem.as_bytes())?;
        let issue = |identity: &Identity| authority.issue(identity, Duration::from_secs(3600));
        let (client, server) = (identity("client")?, identity("server")?);
        Ok(Self {
            client: ClientSettings::new(&issue(&client)?)?,
            server: ServerSettings::new(&issue(&server)?)?,
            expected: server,
        })
    }

    /// Two sessions, the client's first.
    ///
    /// # Errors
    /// The handshake failed.
    pub fn shake_hands(&self) -> Result<(Session, Session)> {
        let mut near = Handshake::client(&self.client, &self.expected)?;
        let mut far = Handshake::server(&self.server)?;
        let (mut up, mut down) = (Vec::new(), Vec::new());
        let (mut first, mut second) = (None, None);
        near.advance(&[], &mut up)?;
        // Client hello; server flight; client flight.
        for _ in 0..3 {
            if second.is_none() {
                second = far
                    .advance(&std::mem::take(&mut up), &mut down)?
                    .established;
            }
            if first.is_none() {
                first = near
                    .advance(&std::mem::take(&mut down), &mut up)?
                    .established;
            }
        }
        let missing = "the handshake does not end";
        Ok((first.context(missing)?, second.context(missing)?))
    }
}

/// Two established sessions of ours, the client's first.
///
/// # Errors
/// A certificate or the handshake failed.
pub fn sessions() -> Result<(Session, Session)> {
    Workloads::new()?.shake_hands()
}

fn identity(account: &str) -> Result<Identity> {
    Ok(Identity::new("cluster.local", "shop", account)?)
}

/// A record of our kind with room around its plaintext.
#[must_use]
pub fn record() -> Vec<u8> {
    vec![7; RECORD]
}

/// Opens a record of our kind; all of its plaintext must be there.
///
/// # Errors
/// It does not open.
pub fn open(session: &mut Session, record: &mut [u8]) -> Result<()> {
    match session.open(record)? {
        Opened::Data(range) if range.len() == PLAINTEXT => Ok(()),
        other => anyhow::bail!("not a full record of data: {other:?}"),
    }
}

/// What two plain rustls connections shake hands with, made once.
#[derive(Debug)]
pub struct RustlsConfigs {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl RustlsConfigs {
    /// Issues both certificates.
    ///
    /// # Errors
    /// A certificate failed.
    pub fn new() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let mut roots = RootCertStore::empty();
        roots.add(issuer.der().clone())?;
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let credentials = || -> Result<_> {
            let key = KeyPair::generate()?;
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![SanType::DnsName("server".try_into()?)];
            let leaf = params.signed_by(&key, &issuer)?;
            let key = PrivatePkcs8KeyDer::from(key.serialize_der());
            Ok((vec![leaf.der().clone()], key.into()))
        };
        let versions = &[&rustls::version::TLS13];
        let (chain, key) = credentials()?;
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain, key)?;
        // As in the mesh: every handshake is a full one.
        client.resumption = Resumption::disabled();
        let (chain, key) = credentials()?;
        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build()?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)?;
        server.send_tls13_tickets = 0;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }
}

/// A pair of plain rustls connections that have shaken hands.
#[derive(Debug)]
pub struct Rustls {
    /// The end that seals.
    pub client: ClientConnection,
    /// The end that opens.
    pub server: ServerConnection,
}

impl Rustls {
    /// Shakes hands with configurations of its own.
    ///
    /// # Errors
    /// A certificate or the handshake failed.
    pub fn new() -> Result<Self> {
        Self::with(&RustlsConfigs::new()?)
    }

    /// Shakes hands.
    ///
    /// # Errors
    /// The handshake failed.
    pub fn with(configs: &RustlsConfigs) -> Result<Self> {
        let name = ServerName::try_from("server")?;
        let mut pair = Self {
            client: ClientConnection::new(Arc::clone(&configs.client), name)?,
            server: ServerConnection::new(Arc::clone(&configs.server))?,
        };
        pair.shake_hands()?;
        Ok(pair)
    }

    fn shake_hands(&mut self) -> Result<()> {
        let mut wire = Vec::new();
        for _ in 0..4 {
            self.client.write_tls(&mut wire)?;
            let mut rest = &wire[..];
            while !rest.is_empty() {
                self.server.read_tls(&mut rest)?;
                self.server.process_new_packets()?;
            }
            wire.clear();
            while self.server.wants_write() {
                self.server.write_tls(&mut wire)?;
            }
            let mut rest = &wire[..];
            while !rest.is_empty() {
                self.client.read_tls(&mut rest)?;
                self.client.process_new_packets()?;
            }
            wire.clear();
        }
        let done = !self.client.is_handshaking() && !self.server.is_handshaking();
        ensure!(done, "the handshake of rustls does not end");
        let suite = self.client.negotiated_cipher_suite().map(|s| s.suite());
        let wanted = rustls::CipherSuite::TLS13_AES_256_GCM_SHA384;
        ensure!(suite == Some(wanted), "negotiated {suite:?}");
        Ok(())
    }

    /// Seals a record's worth of plaintext into `wire`, which is emptied first.
    ///
    /// # Errors
    /// rustls refused it.
    pub fn seal(&mut self, plaintext: &[u8], wire: &mut Vec<u8>) -> Result<()> {
        wire.clear();
        self.client.writer().write_all(plaintext)?;
        while self.client.wants_write() {
            self.client.write_tls(wire)?;
        }
        Ok(())
    }

    /// Opens the record in `wire` into `plaintext`, which it must fill.
    ///
    /// # Errors
    /// rustls refused it.
    pub fn open(&mut self, mut wire: &[u8], plaintext: &mut [u8]) -> Result<()> {
        while !wire.is_empty() {
            self.server.read_tls(&mut wire)?;
            self.server.process_new_packets()?;
        }
        Ok(self.server.reader().read_exact(plaintext)?)
    }
}

/// The AEAD alone, with a fresh nonce and the record's header as associated data.
#[derive(Debug)]
pub struct Aead {
    key: LessSafeKey,
    sealed: u64,
    opened: u64,
}

impl Aead {
    /// With a fixed key.
    ///
    /// # Errors
    /// The key is not accepted.
    pub fn new() -> Result<Self> {
        let key = UnboundKey::new(&AES_256_GCM, &[9; 32]).context("AES-256-GCM key")?;
        Ok(Self {
            key: LessSafeKey::new(key),
            sealed: 0,
            opened: 0,
        })
    }

    fn nonce(counter: &mut u64) -> Nonce {
        *counter += 1;
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&counter.to_be_bytes());
        Nonce::assume_unique_for_key(nonce)
    }

    /// Encrypts plaintext and type byte of a record where they are and writes the tag.
    ///
    /// # Errors
    /// The AEAD refused it.
    pub fn seal(&mut self, record: &mut [u8]) -> Result<()> {
        let nonce = Self::nonce(&mut self.sealed);
        let (header, rest) = record.split_at_mut(Session::RECORD_HEADER);
        let (body, tag) = rest.split_at_mut(PLAINTEXT + 1);
        let computed = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(&*header), body)?;
        tag.copy_from_slice(computed.as_ref());
        Ok(())
    }

    /// Decrypts and checks a record in the order in which they were sealed.
    ///
    /// # Errors
    /// The tag is wrong.
    pub fn open(&mut self, record: &mut [u8]) -> Result<()> {
        let nonce = Self::nonce(&mut self.opened);
        let (header, rest) = record.split_at_mut(Session::RECORD_HEADER);
        let plain = self.key.open_in_place(nonce, Aad::from(&*header), rest)?;
        ensure!(plain.len() == PLAINTEXT + 1, "short plaintext");
        Ok(())
    }
}
