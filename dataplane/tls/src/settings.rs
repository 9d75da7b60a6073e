//! What handshakes need, built once per workload certificate and shared by its connections.
//!
//! A connection adds whom it accepts, and nothing else: the verifier finds that in the connection's
//! own case.

use std::sync::Arc;

use mesh::Identity;
use rustls::client::Resumption;
use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};

use crate::certificate::WorkloadCertificate;
use crate::peer::{Acceptance, first_uri};
use crate::provider::provider;
use crate::record::RecordPath;
use crate::verify::Trust;

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
    config: Arc<ClientConfig>,
    records: RecordPath,
}

/// A workload's certificate as a TLS server: connections from clients of the mesh.
#[derive(Debug)]
pub struct ServerSettings {
    config: Arc<ServerConfig>,
    trust_domain: Arc<str>,
    records: RecordPath,
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

    /// Whom connections shall leave their records to from now on.
    pub const fn set_records(&mut self, records: RecordPath) {
        self.records = records;
    }

    /// Whom connections leave their records to.
    pub const fn records(&self) -> RecordPath {
        self.records
    }

    /// Has the secrets of connections told to `log`.
    #[cfg(test)]
    pub(crate) fn log_keys(&mut self, log: Arc<dyn rustls::KeyLog>) {
        let mut config = (*self.config).clone();
        config.key_log = log;
        self.config = Arc::new(config);
    }

    /// The configuration of all connections. The identity is checked before our certificate is
    /// shown to the server.
    pub(crate) fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.config)
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

    /// Whom connections shall leave their records to from now on.
    pub const fn set_records(&mut self, records: RecordPath) {
        self.records = records;
    }

    /// Whom connections leave their records to.
    pub const fn records(&self) -> RecordPath {
        self.records
    }

    /// The configuration of all connections.
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    /// Whom all connections accept.
    pub(crate) fn acceptance(&self) -> Acceptance {
        Acceptance::TrustDomain(Arc::clone(&self.trust_domain))
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
        let key: Arc<SingleCertAndKey> = Arc::clone(&self.key);
        let verifier: Arc<Trust> = Arc::clone(&self.trust);
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|source| self.refused(source))?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(key);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_secret_extraction = true;
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        Ok(ClientSettings {
            config: Arc::new(config),
            records: RecordPath::default(),
        })
    }

    fn server(&self) -> Result<ServerSettings, SettingsError> {
        let own: Option<Identity> = self.identity.as_deref().and_then(|uri| uri.parse().ok());
        let own = own.ok_or_else(|| SettingsError::NoIdentity {
            found: named(self.identity.as_deref()),
        })?;
        let key: Arc<SingleCertAndKey> = Arc::clone(&self.key);
        let verifier: Arc<Trust> = Arc::clone(&self.trust);
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|source| self.refused(source))?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(key);
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_secret_extraction = true;
        // A resumed connection would skip the verification of the client's certificate.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(ServerSettings {
            config: Arc::new(config),
            trust_domain: Arc::from(own.trust_domain()),
            records: RecordPath::default(),
        })
    }

    fn refused(&self, source: rustls::Error) -> SettingsError {
        SettingsError::Library {
            identity: named(self.identity.as_deref()),
            source,
        }
    }
}

/// A certificate's first URI for messages.
fn named(identity: Option<&str>) -> String {
    identity.map_or_else(
        || "no URI name".to_owned(),
        |uri| uri.escape_debug().take(256).collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::{authority, identity, workload};

    #[test]
    fn connections_share_one_configuration() {
        let certificate = workload(&authority("mesh"), &identity("td", "app"));
        let (client, server) = both(&certificate).unwrap();
        assert!(Arc::ptr_eq(&client.config(), &client.config()));
        assert!(Arc::ptr_eq(&server.config(), &server.config()));
    }
}
