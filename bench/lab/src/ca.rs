//! The lab's certificate authority: a root that ztunnels issue workload certificates from, and
//! leaf certificates for tests that speak HBONE themselves.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};

use crate::error::{Error, Result};

/// A self-signed ECDSA P-256 root with its key.
#[derive(Debug)]
pub struct CertificateAuthority {
    certificate: String,
    key: KeyPair,
}

impl CertificateAuthority {
    /// Makes a new root for `trust_domain`, valid from 1975 to 4096 (rcgen's defaults).
    ///
    /// # Errors
    /// [`Error::Certificate`] if the crypto library refuses.
    pub fn generate(trust_domain: &str) -> Result<Self> {
        let failed = |source| Error::Certificate {
            what: "the lab's root".to_owned(),
            source,
        };
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let mut params = CertificateParams::default();
        let mut name = DistinguishedName::new();
        name.push(DnType::OrganizationName, trust_domain);
        params.distinguished_name = name;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(failed)?.pem();
        Ok(Self { certificate, key })
    }

    /// Reads a root written by [`Self::write`].
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Certificate`].
    pub fn load(certificate: &Path, key: &Path) -> Result<Self> {
        let read = |path: &Path| fs::read_to_string(path).map_err(Error::io("reading", path));
        let (certificate, key) = (read(certificate)?, read(key)?);
        let key = KeyPair::from_pem(&key).map_err(|source| Error::Certificate {
            what: "a key from PEM".to_owned(),
            source,
        })?;
        Ok(Self { certificate, key })
    }

    /// Writes certificate and key as PEM, the key readable by its owner only.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn write(&self, certificate: &Path, key: &Path) -> Result<()> {
        fs::write(certificate, &self.certificate).map_err(Error::io("writing", certificate))?;
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(key)
            .map_err(Error::io("creating", key))?;
        file.write_all(self.key.serialize_pem().as_bytes())
            .map_err(Error::io("writing", key))
    }

    /// The root certificate as PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate
    }

    /// Issues a workload certificate for the SPIFFE URI `uri`: (certificate, key), both PEM.
    ///
    /// # Errors
    /// [`Error::Certificate`] if `uri` is no URI or the crypto library refuses.
    pub fn issue(&self, uri: &str) -> Result<(String, String)> {
        self.issue_as(uri, |_| {})
    }

    /// As [`Self::issue`], with `change` to what is asked for: another time, other names.
    pub(crate) fn issue_as(
        &self,
        uri: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Result<(String, String)> {
        let failed = |source| Error::Certificate {
            what: format!("a leaf for {uri}"),
            source,
        };
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, &self.key).map_err(failed)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(failed)?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ClientAuth,
            ExtendedKeyUsagePurpose::ServerAuth,
        ];
        change(&mut params);
        let certificate = params.signed_by(&key, &issuer).map_err(failed)?.pem();
        Ok((certificate, key.serialize_pem()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_root_survives_writing_and_still_issues() {
        let directory = tempfile::tempdir().unwrap();
        let (cert, key) = (
            directory.path().join("ca.pem"),
            directory.path().join("ca-key.pem"),
        );
        let root = CertificateAuthority::generate("cluster.local").unwrap();
        root.write(&cert, &key).unwrap();
        assert_eq!(
            fs::metadata(&key).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let loaded = CertificateAuthority::load(&cert, &key).unwrap();
        let (leaf, _) = loaded
            .issue("spiffe://cluster.local/ns/default/sa/x")
            .unwrap();
        assert!(leaf.starts_with("-----BEGIN CERTIFICATE-----"));
        assert!(CertificateAuthority::load(&key, &cert).is_err());
    }
}
