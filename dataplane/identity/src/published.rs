//! What the control thread tells workers: the newest certificate of each identity, or why there is
//! none; and what they ask it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use mesh::Identity;
use tls::settings::{self, ClientSettings, ServerSettings, SettingsError};
use tls::{CertificateInfo, RecordPath, Validity, WorkloadCertificate};

/// Why there is no certificate for an identity.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("no certificate for {identity}: {reason}")]
pub struct NoCertificate {
    /// For whom.
    pub identity: Identity,
    /// The last attempt's error, or what kept it from being made. One line.
    pub reason: Arc<str>,
}

/// What one workload needs for TLS, from one certificate.
#[derive(Debug)]
pub struct WorkloadTls {
    /// To connect to others.
    pub client: Arc<ClientSettings>,
    /// To accept connections.
    pub server: Arc<ServerSettings>,
    /// Whose certificate it is.
    pub identity: Identity,
    /// Counts the certificates of this identity, from 1.
    pub generation: u64,
    certificate: WorkloadCertificate,
}

impl WorkloadTls {
    pub(crate) fn new(
        identity: &Identity,
        generation: u64,
        certificate: WorkloadCertificate,
        records: RecordPath,
    ) -> Result<Self, SettingsError> {
        let (mut client, mut server) = settings::both(&certificate)?;
        client.set_records(records);
        server.set_records(records);
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            identity: identity.clone(),
            generation,
            certificate,
        })
    }

    /// Serial number and validity.
    pub const fn info(&self) -> &CertificateInfo {
        self.certificate.info()
    }

    /// The certificate itself.
    pub const fn certificate(&self) -> &WorkloadCertificate {
        &self.certificate
    }
}

/// One identity's state, for people.
#[derive(Clone, Debug)]
pub struct CertificateStatus {
    /// Whose.
    pub identity: Identity,
    /// The newest certificate, if there is one.
    pub current: Option<Arc<WorkloadTls>>,
    /// The error of the last attempt, if it failed.
    pub error: Option<Arc<str>>,
}

/// What is known of one identity.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    pub(crate) current: Option<Arc<WorkloadTls>>,
    pub(crate) error: Option<Arc<str>>,
    /// Nobody is to wait for another attempt: several have failed.
    pub(crate) hopeless: bool,
    /// Certificates issued so far.
    pub(crate) issued: u64,
}

/// All that is known. Immutable where it is shared.
pub(crate) type Published = HashMap<Identity, Known>;

/// Somebody waits for a certificate.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) identity: Identity,
    /// The number of the one that is of no use to them, or 0.
    pub(crate) useless: u64,
}

/// What a connection finds.
#[derive(Debug)]
pub(crate) enum Found {
    /// A certificate that is valid.
    Ready(Arc<WorkloadTls>),
    /// None, and none to be expected soon.
    Hopeless(NoCertificate),
    /// None yet, or one with this number that is of no use.
    Missing(u64),
}

/// Looks for a certificate of `identity` that is valid at `now`.
pub(crate) fn find(published: &Published, identity: &Identity, now: SystemTime) -> Found {
    let Some(known) = published.get(identity) else {
        return Found::Missing(0);
    };
    let validity = known.current.as_ref().map(|tls| tls.info().validity(now));
    match (&known.current, validity) {
        (Some(tls), Some(Validity::Valid)) => Found::Ready(Arc::clone(tls)),
        _ if known.hopeless => Found::Hopeless(NoCertificate {
            identity: identity.clone(),
            reason: known.error.clone().unwrap_or_default(),
        }),
        (Some(tls), _) => Found::Missing(tls.generation),
        (None, _) => Found::Missing(0),
    }
}

/// All identities, sorted.
pub(crate) fn statuses(published: &Published) -> Vec<CertificateStatus> {
    let mut all: Vec<_> = published
        .iter()
        .map(|(identity, known)| CertificateStatus {
            identity: identity.clone(),
            current: known.current.clone(),
            error: known.error.clone(),
        })
        .collect();
    all.sort_by(|a, b| a.identity.cmp(&b.identity));
    all
}
