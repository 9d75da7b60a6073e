//! A throw-away CA, certificates of it, and a client that takes any server.

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};

/// A CA with a key of its own.
#[derive(Debug)]
pub struct Ca {
    params: CertificateParams,
    key: KeyPair,
    certificate: Certificate,
}

/// A certificate and its key.
#[derive(Debug)]
pub struct Issued {
    certificate: Certificate,
    key: KeyPair,
}

impl Ca {
    /// A self-signed one that may sign certificates and revocation lists, without a name.
    ///
    /// # Panics
    /// No key can be made.
    #[must_use]
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// One that differs in what `change` changes.
    ///
    /// # Panics
    /// What it makes cannot be signed.
    #[must_use]
    pub fn with(change: impl FnOnce(&mut CertificateParams)) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        Self {
            params,
            key,
            certificate,
        }
    }

    /// Its certificate.
    #[must_use]
    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// Its certificate.
    #[must_use]
    pub fn der(&self) -> CertificateDer<'static> {
        self.certificate.der().clone()
    }

    /// Its private key.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// A certificate for `uri`, `spiffe://…` for a workload, with a key of its own.
    ///
    /// # Panics
    /// `uri` is none.
    #[must_use]
    pub fn issue(&self, uri: &str) -> Issued {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().expect("a URI"))];
        let issuer = Issuer::from_params(&self.params, &self.key);
        let certificate = params.signed_by(&key, &issuer).expect("a certificate");
        Issued { certificate, key }
    }
}

impl Default for Ca {
    fn default() -> Self {
        Self::new()
    }
}

impl Issued {
    /// The certificate.
    #[must_use]
    pub fn pem(&self) -> String {
        self.certificate.pem()
    }

    /// Its private key.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// The certificate.
    #[must_use]
    pub fn der(&self) -> CertificateDer<'static> {
        self.certificate.der().clone()
    }

    /// Its private key.
    #[must_use]
    pub fn key_der(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.serialize_der()).into()
    }
}

/// Takes any server whose signature fits its certificate: who it is, is not what is tested.
#[derive(Debug)]
pub struct AnyServer(WebPkiSupportedAlgorithms);

impl AnyServer {
    /// One that knows the algorithms of `provider`.
    #[must_use]
    pub fn new(provider: &CryptoProvider) -> Self {
        Self(provider.signature_verification_algorithms)
    }
}

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
