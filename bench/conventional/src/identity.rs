//! Workload certificates, and TLS configurations made of them once per identity.
//!
//! Certificates are issued in process by a CA whose key we have, as upstream's `FAKE_CA` does.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use mesh::Identity;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName as Name,
    RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

const TTL: Duration = Duration::from_secs(24 * 3600);
/// Certificates start in the past, for peers whose clock is behind.
const BACKDATE: Duration = Duration::from_secs(120);

/// Why there is no certificate; one line.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Certificate or key of the CA are not PEM.
    #[error("CA certificate: {0}")]
    Pem(#[from] rustls_pki_types::pem::Error),
    /// Issuing failed, or the CA's files are not a CA's.
    #[error("CA: {0}")]
    Issue(#[from] rcgen::Error),
    /// TLS does not take what was issued.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// The root cannot judge clients.
    #[error("TLS: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// Issues certificates and keeps TLS configurations by identity.
pub struct Certificates {
    issuer: Issuer<'static, KeyPair>,
    root: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
    trust: Arc<Trust>,
    known: RwLock<HashMap<Identity, Arc<Credentials>>>,
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").finish_non_exhaustive()
    }
}

/// One identity's TLS configurations.
#[derive(Debug)]
pub(crate) struct Credentials {
    /// Accepts no server; see [`Credentials::client`].
    client: ClientConfig,
    pub(crate) server: Arc<ServerConfig>,
    trust: Arc<Trust>,
    renew_at: SystemTime,
}

impl Certificates {
    /// A CA from PEM text.
    ///
    /// # Errors
    /// The text is not a CA's certificate and key.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Self, IdentityError> {
        let issuer = Issuer::from_ca_cert_pem(certificate, KeyPair::from_pem(key)?)?;
        let root = CertificateDer::from_pem_slice(certificate.as_bytes())?;
        let provider = Arc::new(CryptoProvider {
            cipher_suites: vec![
                cipher_suite::TLS13_AES_256_GCM_SHA384,
                cipher_suite::TLS13_AES_128_GCM_SHA256,
            ],
            ..default_provider()
        });
        let trust = Arc::new(Trust::new(&root, &provider)?);
        Ok(Self {
            issuer,
            root,
            provider,
            trust,
            known: RwLock::default(),
        })
    }

    /// The configurations of `identity`, made on first use and renewed at half lifetime.
    pub(crate) fn get(&self, identity: &Identity) -> Result<Arc<Credentials>, IdentityError> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(credentials) = known.get(identity)
            && SystemTime::now() < credentials.renew_at
        {
            return Ok(Arc::clone(credentials));
        }
        drop(known);
        let credentials = Arc::new(self.issue(identity)?);
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.insert(identity.clone(), Arc::clone(&credentials));
        Ok(credentials)
    }

    fn issue(&self, identity: &Identity) -> Result<Credentials, IdentityError> {
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.uri().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + TTL).into();
        let key = KeyPair::generate()?; // ECDSA P-256
        let certificate = params.signed_by(&key, &self.issuer)?;
        let chain = vec![certificate.der().clone(), self.root.clone()];
        let key: PrivateKeyDer<'static> = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        self.configure(identity, chain, key, now + TTL / 2)
    }

    fn configure(
        &self,
        identity: &Identity,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        renew_at: SystemTime,
    ) -> Result<Credentials, IdentityError> {
        let verifier = |accepted| {
            Arc::new(Verifier {
                trust: Arc::clone(&self.trust),
                accepted,
            })
        };
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier(Accepted::Uris(Vec::new())))
            .with_client_auth_cert(chain.clone(), key.clone_key())?;
        client.alpn_protocols = vec![b"h2".to_vec()];
        client.enable_sni = false;
        client.resumption = Resumption::disabled();
        let own_domain = Accepted::TrustDomain(identity.trust_domain().to_owned());
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier(own_domain))
            .with_single_cert(chain, key)?;
        server.alpn_protocols = vec![b"h2".to_vec()];
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Credentials {
            client,
            server: Arc::new(server),
            trust: Arc::clone(&self.trust),
            renew_at,
        })
    }
}

impl Credentials {
    /// The configuration of a connection to a server that must show one of `uris`.
    pub(crate) fn client(&self, uris: Vec<String>) -> Arc<ClientConfig> {
        let mut config = self.client.clone();
        let verifier = Arc::new(Verifier {
            trust: Arc::clone(&self.trust),
            accepted: Accepted::Uris(uris),
        });
        config.dangerous().set_certificate_verifier(verifier);
        Arc::new(config)
    }
}

/// The identity in a peer's certificate that belongs to `trust_domain`. The TLS handshake has
/// verified the certificate.
pub(crate) fn peer_identity(
    certificates: Option<&[CertificateDer<'_>]>,
    trust_domain: &str,
) -> Option<Identity> {
    let uris = uris(certificates?.first()?)?;
    let mut identities = uris.iter().filter_map(|uri| uri.parse::<Identity>().ok());
    identities.find(|identity| identity.trust_domain() == trust_domain)
}

fn uris(certificate: &CertificateDer<'_>) -> Option<Vec<String>> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let names = parsed.subject_alternative_name().ok()??;
    let uris = names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        });
    Some(uris.collect())
}

/// The root of the mesh, ready to judge chains.
#[derive(Debug)]
struct Trust {
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    provider: Arc<CryptoProvider>,
}

impl Trust {
    fn new(
        root: &CertificateDer<'static>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, IdentityError> {
        let mut roots = RootCertStore::empty();
        roots.add(root.clone())?;
        let (roots, provider) = (Arc::new(roots), Arc::clone(provider));
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
        Ok(Self {
            clients: clients.clear_root_hint_subjects().build()?,
            roots,
            provider,
        })
    }
}

#[derive(Debug)]
enum Accepted {
    /// A server with one of these names.
    Uris(Vec<String>),
    /// A client with a SPIFFE identity of this trust domain.
    TrustDomain(String),
}

/// Chain first, then names.
#[derive(Debug)]
struct Verifier {
    trust: Arc<Trust>,
    accepted: Accepted,
}

impl Verifier {
    fn check_names(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let accepted = match &self.accepted {
            Accepted::Uris(accepted) => {
                uris(certificate).is_some_and(|uris| uris.iter().any(|uri| accepted.contains(uri)))
            }
            Accepted::TrustDomain(domain) => {
                peer_identity(Some(std::slice::from_ref(certificate)), domain).is_some()
            }
        };
        if accepted {
            Ok(())
        } else {
            Err(CertificateError::NotValidForName.into())
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.trust.roots,
            intermediates,
            now,
            self.trust.provider.signature_verification_algorithms.all,
        )?;
        self.check_names(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.trust.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.trust.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        let provider = &self.trust.provider;
        provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[Name] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let clients = &self.trust.clients;
        let verified = clients.verify_client_cert(end_entity, intermediates, now)?;
        self.check_names(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.trust
            .clients
            .verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.trust
            .clients
            .verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.clients.supported_verify_schemes()
    }
}
