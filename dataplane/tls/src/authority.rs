//! A local certificate authority: issues workload certificates in process.
//!
//! For meshes without an Istio CA (`LOCAL_CA_CERT`, `LOCAL_CA_KEY`). Loading one proves that it
//! works by issuing and verifying a certificate, so that a wrong file is found at start-up.

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use mesh::Identity;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroize;

use crate::certificate::{
    CertificateError, CertificateInfo, Key, WorkloadCertificate, certificates_from_file,
    certificates_from_pem, certified, key_from_file, key_from_pem,
};
use crate::verify::Trust;

/// How far certificates start in the past, for peers whose clock is behind.
const BACKDATE: Duration = Duration::from_secs(120);
/// Names in messages.
const CERTIFICATE: &str = "CA certificate";
const KEY_FILE: &str = "CA key";

/// Why an authority cannot be used, or cannot issue. One line, naming the files.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Certificate or key cannot be loaded, or do not fit.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// More than one certificate where the issuing one is expected.
    #[error("{origin} holds {count} certificates, expected exactly the issuing CA's")]
    Several {
        /// File or other place.
        origin: String,
        /// Certificates found.
        count: usize,
    },
    /// Not allowed to issue certificates.
    #[error("the certificate in {origin} cannot issue certificates: {reason}")]
    NotAuthority {
        /// File or other place.
        origin: String,
        /// Which extension forbids it.
        reason: &'static str,
    },
    /// Outside its own validity.
    #[error("the CA certificate in {origin} is {state}; valid from {from} to {to}")]
    NotValid {
        /// File or other place.
        origin: String,
        /// Expired or not yet valid.
        state: &'static str,
        /// Start of validity.
        from: OffsetDateTime,
        /// End of validity.
        to: OffsetDateTime,
    },
    /// What it issues does not verify.
    #[error("the CA in {origin} issues certificates that do not verify: {reason}")]
    Unusable {
        /// File or other place.
        origin: String,
        /// What verification says.
        reason: String,
    },
    /// Issuing failed.
    #[error("cannot issue a certificate for {identity}: {reason}")]
    Issue {
        /// For whom.
        identity: Identity,
        /// Why not.
        reason: String,
    },
}

/// A certificate authority whose key is in this process.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    info: CertificateInfo,
    origin: String,
}

impl Authority {
    /// Loads the CA from PEM files, and proves that it can issue.
    ///
    /// # Errors
    /// A file is missing or malformed, the key is not the certificate's, or the certificate is
    /// not a valid CA's.
    pub fn from_pem_files(certificate: &Path, key: &Path) -> Result<Self, AuthorityError> {
        Self::load(
            certificates_from_file(CERTIFICATE, certificate)?,
            &certificate.display().to_string(),
            &key_from_file(KEY_FILE, key)?,
            &key.display().to_string(),
        )
    }

    /// Loads the CA from PEM text, and proves that it can issue.
    ///
    /// # Errors
    /// As of [`from_pem_files`](Self::from_pem_files).
    pub fn from_pem(certificate: &[u8], key: &[u8]) -> Result<Self, AuthorityError> {
        let certificates = certificates_from_pem(CERTIFICATE, certificate, "memory")?;
        Self::load(
            certificates,
            "memory",
            &key_from_pem(KEY_FILE, key, "memory")?,
            "memory",
        )
    }

    /// Issues a certificate for `identity`, valid for `ttl` from now or until the CA expires.
    ///
    /// ECDSA P-256, no subject, the identity as critical URI name, for clients and servers.
    ///
    /// # Errors
    /// The CA has expired since it was loaded, or the cryptography failed.
    pub fn issue(
        &self,
        identity: &Identity,
        ttl: Duration,
    ) -> Result<WorkloadCertificate, AuthorityError> {
        self.issue_at(identity, SystemTime::now(), ttl)
    }

    /// As [`Authority::issue`], at this time of day.
    ///
    /// # Errors
    /// As of [`issue`](Self::issue).
    pub fn issue_at(
        &self,
        identity: &Identity,
        now: SystemTime,
        ttl: Duration,
    ) -> Result<WorkloadCertificate, AuthorityError> {
        self.check_validity(now)?;
        self.try_issue(identity, now, ttl)
            .map_err(|reason| AuthorityError::Issue {
                identity: identity.clone(),
                reason,
            })
    }

    fn load(
        mut certificates: Vec<CertificateDer<'static>>,
        origin: &str,
        key: &Key,
        key_origin: &str,
    ) -> Result<Self, AuthorityError> {
        let malformed = |reason| CertificateError::Malformed {
            what: CERTIFICATE,
            origin: origin.to_owned(),
            reason,
        };
        let mismatch = |reason| CertificateError::KeyMismatch {
            key: key_origin.to_owned(),
            certificate: origin.to_owned(),
            reason,
        };
        let count = certificates.len();
        let (Some(certificate), true) = (certificates.pop(), count == 1) else {
            let origin = origin.to_owned();
            return Err(AuthorityError::Several { origin, count });
        };
        let info = CertificateInfo::read(&certificate).map_err(malformed)?;
        check_purpose(&certificate).map_err(|reason| AuthorityError::NotAuthority {
            origin: origin.to_owned(),
            reason,
        })?;
        certified(std::slice::from_ref(&certificate), key.der())
            .map_err(|error| mismatch(error.to_string()))?;
        let key = KeyPair::try_from(key.der()).map_err(|error| mismatch(error.to_string()))?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|error| malformed(error.to_string()))?;
        let authority = Self {
            issuer,
            certificate,
            info,
            origin: origin.to_owned(),
        };
        authority.check_validity(SystemTime::now())?;
        authority.prove()?;
        Ok(authority)
    }

    /// Issues a certificate for nobody and verifies it as a peer would.
    fn prove(&self) -> Result<(), AuthorityError> {
        let unusable = |reason| AuthorityError::Unusable {
            origin: self.origin.clone(),
            reason,
        };
        let nobody = Identity::new("self-test", "none", "none")
            .map_err(|error| unusable(error.to_string()))?;
        let probe = self.issue(&nobody, Duration::from_secs(60))?;
        let trust = Trust::new(probe.roots()).map_err(unusable)?;
        trust
            .verify_server(&probe.chain()[0], &probe.chain()[1..], UnixTime::now())
            .map_err(|error| unusable(error.to_string()))
    }

    fn check_validity(&self, now: SystemTime) -> Result<(), AuthorityError> {
        let state = if now < self.info.not_before {
            "not valid yet"
        } else if now > self.info.not_after {
            "expired"
        } else {
            return Ok(());
        };
        Err(AuthorityError::NotValid {
            origin: self.origin.clone(),
            state,
            from: self.info.not_before.into(),
            to: self.info.not_after.into(),
        })
    }

    fn try_issue(
        &self,
        identity: &Identity,
        now: SystemTime,
        ttl: Duration,
    ) -> Result<WorkloadCertificate, String> {
        let uri = identity
            .uri()
            .try_into()
            .map_err(|error: rcgen::Error| error.to_string())?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let end = now.checked_add(ttl).unwrap_or(self.info.not_after);
        params.not_before = (now - BACKDATE).into();
        params.not_after = end.min(self.info.not_after).into();
        let mut key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
            .map_err(|error| format!("cannot generate a key: {error}"))?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(|error| error.to_string())?;
        let der = PrivatePkcs8KeyDer::from(key.serialize_der());
        key.zeroize();
        WorkloadCertificate::from_der(
            vec![certificate.der().clone(), self.certificate.clone()],
            der.into(),
            vec![self.certificate.clone()],
        )
        .map_err(|error| error.to_string())
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("origin", &self.origin)
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

/// Whether a certificate may sign others; `Err` says what forbids it.
fn check_purpose(certificate: &CertificateDer<'_>) -> Result<(), &'static str> {
    const MALFORMED: &str = "malformed extensions";
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| MALFORMED)?;
    let constraints = parsed.basic_constraints().map_err(|_| MALFORMED)?;
    if !constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err("its basic constraints do not say CA:TRUE; is it a workload's certificate?");
    }
    let usage = parsed.key_usage().map_err(|_| MALFORMED)?;
    if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
        return Err("its key usage does not include certificate signing");
    }
    Ok(())
}
