//! Reading certificates and keys from PEM files.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use zeroize::Zeroizing;

use super::{CertificateError, Key};

/// Most bytes read from a file: far above any chain, far below what would hurt.
const MAX_FILE: usize = 1 << 20;

/// All certificates in the PEM file at `path`; at least one.
pub(crate) fn certificates_from_file(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    certificates_from_pem(what, &read(what, path)?, &path.display().to_string())
}

/// All certificates in `pem`, which came from `origin`; at least one.
pub(crate) fn certificates_from_pem(
    what: &'static str,
    pem: &[u8],
    origin: &str,
) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| pem_error(what, origin, error.to_string()))?;
    if certificates.is_empty() {
        let reason = "there is no section BEGIN CERTIFICATE".to_owned();
        return Err(pem_error(what, origin, reason));
    }
    Ok(certificates)
}

/// The first private key in the PEM file at `path`.
pub(crate) fn key_from_file(what: &'static str, path: &Path) -> Result<Key, CertificateError> {
    key_from_pem(what, &read(what, path)?, &path.display().to_string())
}

/// The first private key in `pem`, which came from `origin`.
pub(crate) fn key_from_pem(
    what: &'static str,
    pem: &[u8],
    origin: &str,
) -> Result<Key, CertificateError> {
    PrivateKeyDer::from_pem_slice(pem)
        .map(Key)
        .map_err(|error| {
            let reason = match error {
                rustls_pki_types::pem::Error::NoItemsFound => {
                    "there is no section BEGIN PRIVATE KEY, EC PRIVATE KEY or RSA PRIVATE KEY \
                 (encrypted keys are not supported)"
                        .to_owned()
                }
                other => other.to_string(),
            };
            pem_error(what, origin, reason)
        })
}

fn read(what: &'static str, path: &Path) -> Result<Zeroizing<Vec<u8>>, CertificateError> {
    let failed = |source| CertificateError::Read {
        what,
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let mut content = Zeroizing::new(Vec::new());
    file.take(MAX_FILE as u64 + 1)
        .read_to_end(&mut content)
        .map_err(failed)?;
    if content.len() > MAX_FILE {
        return Err(CertificateError::TooLarge {
            what,
            origin: path.display().to_string(),
            limit: MAX_FILE,
        });
    }
    Ok(content)
}

fn pem_error(what: &'static str, origin: &str, reason: String) -> CertificateError {
    CertificateError::Pem {
        what,
        origin: origin.to_owned(),
        reason,
    }
}
