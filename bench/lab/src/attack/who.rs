//! Whom an attacker pretends to be: TLS settings with and without certificates, good and bad.

use std::sync::Arc;

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ServerConfig, SupportedProtocolVersion};
use testkit::certificates::AnyServer;
use time::{Duration, OffsetDateTime};

use crate::ca::CertificateAuthority;
use crate::error::{Error, Result};
use crate::mesh_file::TRUST_DOMAIN;

/// What is shown as a certificate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Who {
    /// A workload of the mesh, by its service account: a certificate as it should be.
    Workload(&'static str),
    /// No certificate.
    Nobody,
    /// The mesh's CA, but this URI.
    Uri(&'static str),
    /// No subject alternative name at all.
    Nameless,
    /// A certificate of another CA with the same trust domain.
    OtherCa,
    /// A certificate that signs itself.
    SelfSigned,
    /// Ran out an hour ago.
    Expired,
    /// Begins in an hour.
    NotYet,
}

/// How TLS is spoken besides.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Manner {
    /// TLS 1.2 rather than 1.3.
    pub(super) old: bool,
    /// Protocols offered by ALPN in place of `h2`.
    pub(super) alpn: Option<&'static [&'static [u8]]>,
}

/// Certificate and key.
type Pair = (CertificateDer<'static>, PrivateKeyDer<'static>);

/// TLS as a client who is `who`.
pub(super) fn client(ca: &CertificateAuthority, who: Who, manner: Manner) -> Result<ClientConfig> {
    let versions: &[&SupportedProtocolVersion] = if manner.old { &[&TLS12] } else { &[&TLS13] };
    let provider = provider();
    let verifier = AnyServer::new(&provider);
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .map_err(|error| options(&error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match pair(ca, who)? {
        Some((certificate, key)) => builder
            .with_client_auth_cert(vec![certificate], key)
            .map_err(|error| options(&error))?,
        None => builder.with_no_client_auth(),
    };
    let alpn = manner.alpn.unwrap_or(&[b"h2"]);
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.enable_sni = false;
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// TLS as a server who is `who` and asks nobody for a certificate: what an impostor wants to know
/// is what the client says, not who it is.
pub(super) fn server(ca: &CertificateAuthority, who: Who) -> Result<ServerConfig> {
    let Some((certificate, key)) = pair(ca, who)? else {
        return Err(Error::Options("a server needs a certificate".to_owned()));
    };
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| options(&error))?
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .map_err(|error| options(&error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn options(error: &rustls::Error) -> Error {
    Error::Options(format!("an attacker's TLS: {error}"))
}

fn pair(ca: &CertificateAuthority, who: Who) -> Result<Option<Pair>> {
    let name = |account: &str| format!("spiffe://{TRUST_DOMAIN}/ns/default/sa/{account}");
    let client = name("client-a");
    let hour = Duration::hours(1);
    let now = OffsetDateTime::now_utc();
    let (certificate, key) = match who {
        Who::Nobody => return Ok(None),
        Who::Workload(account) => ca.issue(&name(account))?,
        Who::Uri(uri) => ca.issue(uri)?,
        Who::Nameless => ca.issue_as(&client, |params| params.subject_alt_names.clear())?,
        Who::OtherCa => CertificateAuthority::generate(TRUST_DOMAIN)?.issue(&client)?,
        Who::SelfSigned => self_signed(&client).map_err(failed)?,
        Who::Expired => ca.issue_as(&client, |params| {
            (params.not_before, params.not_after) = (now - hour * 48, now - hour);
        })?,
        Who::NotYet => ca.issue_as(&client, |params| {
            (params.not_before, params.not_after) = (now + hour, now + hour * 48);
        })?,
    };
    let unreadable = |error| Error::Options(format!("an attacker's certificate: {error}"));
    let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(unreadable)?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(unreadable)?;
    Ok(Some((certificate, key)))
}

fn failed(source: rcgen::Error) -> Error {
    Error::Certificate {
        what: "an attacker's certificate".to_owned(),
        source,
    }
}

fn self_signed(uri: &str) -> std::result::Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(uri.try_into()?)];
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}
