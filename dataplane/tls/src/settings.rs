//! What handshakes need, built once per workload certificate and shared by its connections.

use std::sync::Arc;

use mesh::Identity;
use rustls::client::Resumption;
use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};

use crate::certificate::WorkloadCertificate;
use crate::peer::{Acceptance, ExpectedPeers, first_uri};
use crate::provider::provider;
use crate::verify::{PeerVerifier, Trust};

/// HTTP/2 carries HBONE, so it is the only protocol offered and accepted.
const ALPN: &[u8] = b"h2";

/// Why a certificate cannot be used for connections.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// Key and certificate do not belong together, or the key is of a kind that cannot sign.
    #[error("certificate of {identity}: private key unusable or of another certificate: {source}")]
    Key {
        /// The certificate's first URI.
        identity: String,
        /// What the TLS library says.
        source: rustls::Error,
    },
    /// The roots are not certificates, or there are none.
    #[error("certificate of {identity}: the mesh's root certificates are unusable: {reason}")]
    Roots {
        /// The certificate's first URI.
        identity: String,
        /// What the TLS library says.
        reason: String,
    },
    /// Our own certificate names no SPIFFE identity, so there is no trust domain to accept.
    #[error(
        "own certificate holds {found}, expected a URI of the form spiffe://<trust domain>/ns/\
         <namespace>/sa/<service account>"
    )]
    NoIdentity {
        /// The first URI found, or that there is none.
        found: String,
    },
    /// The TLS library refuses the combination of options.
    #[error("certificate of {identity}: TLS settings refused: {source}")]
    Library {
        /// The certificate's first URI.
        identity: String,
        /// What the TLS library says.
        source: rustls::Error,
    },
}

/// A workload's certificate as a TLS client: connections to servers of the mesh.
#[derive(Debug)]
pub struct ClientSettings {
    base: ClientConfig,
    trust: Arc<Trust>,
}

/// A workload's certificate as a TLS server: connections from clients of the mesh.
#[derive(Debug)]
pub struct ServerSettings {
    key: Arc<SingleCertAndKey>,
    trust: Arc<Trust>,
    trust_domain: Arc<str>,
}

/// Both sides' settings of one certificate; cheaper than building each by itself.
///
/// # Errors
/// As of [`ClientSettings::new`] and [`ServerSettings::new`].
pub fn both(
    certificate: &WorkloadCertificate,
) -> Result<(ClientSettings, ServerSettings), SettingsError> {
    let credentials = Credentials::new(certificate)?;
    Ok((credentials.client()?, credentials.server()?))
}

impl ClientSettings {
    /// Settings to connect with `certificate`.
    ///
    /// # Errors
    /// Key and certificate do not belong together, or the roots are unusable.
    pub fn new(certificate: &WorkloadCertificate) -> Result<Self, SettingsError> {
        Credentials::new(certificate)?.client()
    }

    /// The configuration of one connection, which accepts `expected` only.
    ///
    /// A copy of the shared one: a few reference counts beside some hundred microseconds of
    /// handshake, and the identity is checked before our certificate is shown to the server.
    pub(crate) fn for_connection(
        &self,
        expected: ExpectedPeers,
    ) -> (Arc<ClientConfig>, Arc<PeerVerifier>) {
        let acceptance = Acceptance::Servers(expected);
        let verifier = Arc::new(PeerVerifier::new(Arc::clone(&self.trust), acceptance));
        let mut config = self.base.clone();
        let shared: Arc<PeerVerifier> = Arc::clone(&verifier);
        config.dangerous().set_certificate_verifier(shared);
        (Arc::new(config), verifier)
    }
}

impl ServerSettings {
    /// Settings to accept connections with `certificate`.
    ///
    /// # Errors
    /// Key and certificate do not belong together, the roots are unusable, or the certificate
    /// names no SPIFFE identity.
    pub fn new(certificate: &WorkloadCertificate) -> Result<Self, SettingsError> {
        Credentials::new(certificate)?.server()
    }

    /// The trust domain clients must be of: our own.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The configuration of one connection, with a verifier of its own to keep the outcome.
    pub(crate) fn for_connection(
        &self,
    ) -> Result<(Arc<ServerConfig>, Arc<PeerVerifier>), rustls::Error> {
        let acceptance = Acceptance::TrustDomain(Arc::clone(&self.trust_domain));
        let verifier = Arc::new(PeerVerifier::new(Arc::clone(&self.trust), acceptance));
        let shared: Arc<PeerVerifier> = Arc::clone(&verifier);
        let key: Arc<SingleCertAndKey> = Arc::clone(&self.key);
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(shared)
            .with_cert_resolver(key);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_secret_extraction = true;
        // A resumed connection would skip the verification of the client's certificate.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok((Arc::new(config), verifier))
    }
}

/// What both sides are made of.
struct Credentials {
    identity: Option<String>,
    key: Arc<SingleCertAndKey>,
    trust: Arc<Trust>,
}

impl Credentials {
    fn new(certificate: &WorkloadCertificate) -> Result<Self, SettingsError> {
        let identity = certificate.chain().first().and_then(first_uri);
        let named = || named(identity.as_deref());
        let trust = Trust::new(certificate.roots()).map_err(|reason| SettingsError::Roots {
            identity: named(),
            reason,
        })?;
        let key = certificate
            .certified_key()
            .map_err(|source| SettingsError::Key {
                identity: named(),
                source,
            })?;
        Ok(Self {
            key: Arc::new(SingleCertAndKey::from(key)),
            trust: Arc::new(trust),
            identity,
        })
    }

    fn client(&self) -> Result<ClientSettings, SettingsError> {
        // Accepts nobody: a connection that forgot to bring its own verifier fails.
        let nobody = Acceptance::Servers(ExpectedPeers::new([], []));
        let verifier = PeerVerifier::new(Arc::clone(&self.trust), nobody);
        let key: Arc<SingleCertAndKey> = Arc::clone(&self.key);
        let mut base = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|source| SettingsError::Library {
                identity: named(self.identity.as_deref()),
                source,
            })?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(key);
        base.alpn_protocols = vec![ALPN.to_vec()];
        base.enable_secret_extraction = true;
        base.enable_sni = false;
        base.resumption = Resumption::disabled();
        Ok(ClientSettings {
            base,
            trust: Arc::clone(&self.trust),
        })
    }

    fn server(&self) -> Result<ServerSettings, SettingsError> {
        let own: Option<Identity> = self.identity.as_deref().and_then(|uri| uri.parse().ok());
        let own = own.ok_or_else(|| SettingsError::NoIdentity {
            found: named(self.identity.as_deref()),
        })?;
        Ok(ServerSettings {
            key: Arc::clone(&self.key),
            trust: Arc::clone(&self.trust),
            trust_domain: Arc::from(own.trust_domain()),
        })
    }
}

/// A certificate's first URI for messages.
fn named(identity: Option<&str>) -> String {
    identity.map_or_else(
        || "no URI name".to_owned(),
        |uri| uri.escape_debug().take(256).collect(),
    )
}
