//! A workload's certificate with its key, and the roots it is to be judged by.

mod files;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mesh::Identity;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{ASN1Time, FromDer, X509Certificate};
use zeroize::Zeroize;

use crate::peer::first_uri;
use crate::validity::Validity;

pub(crate) use self::files::{certificates_from_file, certificates_from_pem};
pub(crate) use self::files::{key_from_file, key_from_pem};

/// Why certificates or keys cannot be used. One line, naming the file.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The file cannot be read.
    #[error("cannot read {what} {}: {source}", path.display())]
    Read {
        /// What the file should hold.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is no certificate or key by its size.
    #[error("{what} in {origin} has more than {limit} bytes; is it the right file?")]
    TooLarge {
        /// What should be there.
        what: &'static str,
        /// File or other place.
        origin: String,
        /// Most bytes read.
        limit: usize,
    },
    /// No PEM section of the wanted kind, or a broken one.
    #[error("no usable {what} in {origin}: {reason}")]
    Pem {
        /// What should be there.
        what: &'static str,
        /// File or other place.
        origin: String,
        /// Why not.
        reason: String,
    },
    /// Well-formed PEM around something that is no certificate.
    #[error("{what} in {origin} is not an X.509 certificate: {reason}")]
    Malformed {
        /// What should be there.
        what: &'static str,
        /// File or other place.
        origin: String,
        /// Why not.
        reason: String,
    },
    /// Key and certificate are not of each other.
    #[error("the private key in {key} does not fit the certificate in {certificate}: {reason}")]
    KeyMismatch {
        /// Where the key came from.
        key: String,
        /// Where the certificate came from.
        certificate: String,
        /// What the TLS library says.
        reason: String,
    },
}

/// Serial number and validity of one certificate.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CertificateInfo {
    /// Serial number, decimal.
    pub serial: String,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
}

impl CertificateInfo {
    /// Whether the certificate is valid at this time of day.
    #[must_use]
    pub fn validity(&self, now: SystemTime) -> Validity {
        Validity::at(now, (self.not_before, self.not_after))
    }

    /// Reads the DER of one certificate; `Err` says what is wrong with it.
    pub(crate) fn read(der: &CertificateDer<'_>) -> Result<Self, String> {
        let (rest, parsed) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
        if !rest.is_empty() {
            return Err(format!("{} bytes behind the certificate", rest.len()));
        }
        let validity = parsed.validity();
        Ok(Self {
            serial: parsed.serial.to_string(),
            not_before: system_time(validity.not_before),
            not_after: system_time(validity.not_after),
        })
    }
}

/// A certificate chain, its private key, and the roots of the mesh. Checked to fit together.
pub struct WorkloadCertificate {
    chain: Vec<CertificateDer<'static>>,
    key: Key,
    roots: Vec<CertificateDer<'static>>,
    info: CertificateInfo,
}

/// A private key that is cleared when it is dropped.
pub(crate) struct Key(PrivateKeyDer<'static>);

impl Key {
    pub(crate) const fn der(&self) -> &PrivateKeyDer<'static> {
        &self.0
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl WorkloadCertificate {
    /// `chain` from the workload's own certificate upwards, `key` of the first, `roots` to judge
    /// peers by.
    ///
    /// # Errors
    /// The chain or the roots are empty or no certificates, or the key is not the first
    /// certificate's.
    pub fn from_der(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Self, CertificateError> {
        Self::assemble((chain, "memory"), (Key(key), "memory"), (roots, "memory"))
    }

    /// As [`from_der`](Self::from_der), from PEM text.
    ///
    /// # Errors
    /// As of [`from_der`](Self::from_der); or the PEM is malformed.
    pub fn from_pem(chain: &[u8], key: &[u8], roots: &[u8]) -> Result<Self, CertificateError> {
        Self::assemble(
            (
                certificates_from_pem("certificate", chain, "memory")?,
                "memory",
            ),
            (key_from_pem("private key", key, "memory")?, "memory"),
            (
                certificates_from_pem("root certificate", roots, "memory")?,
                "memory",
            ),
        )
    }

    /// As [`from_der`](Self::from_der), from PEM files.
    ///
    /// # Errors
    /// As of [`from_pem`](Self::from_pem); or a file is missing, unreadable or too large.
    pub fn from_pem_files(
        chain: &Path,
        key: &Path,
        roots: &Path,
    ) -> Result<Self, CertificateError> {
        let origins = [chain, key, roots].map(|path| path.display().to_string());
        Self::assemble(
            (certificates_from_file("certificate", chain)?, &origins[0]),
            (key_from_file("private key", key)?, &origins[1]),
            (
                certificates_from_file("root certificate", roots)?,
                &origins[2],
            ),
        )
    }

    /// The same certificate, judging peers by other `roots`: when the mesh's roots change.
    ///
    /// # Errors
    /// There are no roots, or one is no certificate.
    pub fn with_roots(
        mut self,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Self, CertificateError> {
        first_info("root certificate", &roots, "memory")?;
        self.roots = roots;
        Ok(self)
    }

    fn assemble(
        (chain, chain_origin): (Vec<CertificateDer<'static>>, &str),
        (key, key_origin): (Key, &str),
        (roots, roots_origin): (Vec<CertificateDer<'static>>, &str),
    ) -> Result<Self, CertificateError> {
        let info = first_info("certificate", &chain, chain_origin)?;
        first_info("root certificate", &roots, roots_origin)?;
        match certified(&chain, &key.0) {
            Ok(_) => Ok(Self {
                chain,
                key,
                roots,
                info,
            }),
            Err(error) => Err(CertificateError::KeyMismatch {
                key: key_origin.to_owned(),
                certificate: chain_origin.to_owned(),
                reason: error.to_string(),
            }),
        }
    }

    /// The chain, the workload's own certificate first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The roots peers are judged by.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Whose it is: the first URI of the workload's own certificate, if that is an identity.
    pub fn identity(&self) -> Option<Identity> {
        first_uri(self.chain.first()?)?.parse().ok()
    }

    /// Serial number and validity of the workload's own certificate.
    pub const fn info(&self) -> &CertificateInfo {
        &self.info
    }

    /// Chain and key, ready to sign with.
    pub(crate) fn certified_key(&self) -> Result<CertifiedKey, rustls::Error> {
        certified(&self.chain, &self.key.0)
    }
}

impl fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("chain", &self.chain.len())
            .field("roots", &self.roots.len())
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

/// Chain and key, checked to belong together.
pub(crate) fn certified(
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
) -> Result<CertifiedKey, rustls::Error> {
    let certified = CertifiedKey::new(chain.to_vec(), any_supported_type(key)?);
    certified.keys_match()?;
    Ok(certified)
}

/// Reads all of `certificates` to find faults, and returns what the first one says.
fn first_info(
    what: &'static str,
    certificates: &[CertificateDer<'static>],
    origin: &str,
) -> Result<CertificateInfo, CertificateError> {
    let mut infos = certificates.iter().map(|der| {
        CertificateInfo::read(der).map_err(|reason| CertificateError::Malformed {
            what,
            origin: origin.to_owned(),
            reason,
        })
    });
    let first = infos.next().unwrap_or_else(|| {
        Err(CertificateError::Pem {
            what,
            origin: origin.to_owned(),
            reason: "there is none".to_owned(),
        })
    })?;
    for other in infos {
        other?;
    }
    Ok(first)
}

/// Times before 1970 are 1970: long past either way.
fn system_time(time: ASN1Time) -> SystemTime {
    let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}
