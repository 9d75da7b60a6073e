//! Which peers are accepted, and who the peer turned out to be.

use std::fmt;
use std::sync::Arc;

use mesh::Identity;
use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Names of a certificate shown in messages at most.
const SHOWN_NAMES: usize = 4;
/// Bytes of each such name shown at most: the names are chosen by whoever made the certificate.
const SHOWN_NAME_BYTES: usize = 256;

/// The peer of an established session.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Peer {
    identity: Option<Identity>,
    uri: Arc<str>,
}

impl Peer {
    /// The peer's SPIFFE identity. Always there when we are the server; for a server that was
    /// accepted by a subject alternative name of another form, `None`.
    pub const fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    /// The URI in the peer's certificate by which it was accepted.
    pub fn uri(&self) -> &str {
        &self.uri
    }
}

/// The servers a client accepts: any of these identities or names, compared as whole URIs.
#[derive(Clone, Debug)]
pub struct ExpectedPeers {
    identities: Arc<[Identity]>,
    names: Arc<[Arc<str>]>,
}

impl ExpectedPeers {
    /// Accepts `identities`, and `names` (URIs a service lists beside its workloads' identities).
    /// With both empty no server is accepted.
    pub fn new(identities: impl Into<Arc<[Identity]>>, names: impl Into<Arc<[Arc<str>]>>) -> Self {
        Self {
            identities: identities.into(),
            names: names.into(),
        }
    }

    fn accepts(&self, uri: &str) -> bool {
        self.identities.iter().any(|identity| identity.uri() == uri)
            || self.names.iter().any(|name| &**name == uri)
    }
}

impl From<Arc<[Identity]>> for ExpectedPeers {
    fn from(identities: Arc<[Identity]>) -> Self {
        Self::new(identities, [])
    }
}

impl From<&[Identity]> for ExpectedPeers {
    fn from(identities: &[Identity]) -> Self {
        Self::new(identities, [])
    }
}

impl From<&Identity> for ExpectedPeers {
    fn from(identity: &Identity) -> Self {
        Self::new([identity.clone()], [])
    }
}

impl fmt::Display for ExpectedPeers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let identities = self.identities.iter().map(Identity::uri);
        let names = identities.chain(self.names.iter().map(|name| &**name));
        write!(f, "one of {}", Shown(&names.collect::<Vec<_>>()))
    }
}

/// Whom this connection accepts.
#[derive(Clone, Debug)]
pub(crate) enum Acceptance {
    /// We are the client: these servers.
    Servers(ExpectedPeers),
    /// We are the server: SPIFFE identities of this trust domain.
    TrustDomain(Arc<str>),
}

impl Acceptance {
    /// The peer that `certificate`, whose chain is verified elsewhere, names.
    pub(crate) fn check(&self, certificate: &CertificateDer<'_>) -> Result<Peer, Mismatch> {
        with_uris(certificate, |uris| {
            if uris.is_empty() {
                return Err(Mismatch::NoUri);
            }
            match self {
                Self::Servers(expected) => uris
                    .iter()
                    .find(|uri| expected.accepts(uri))
                    .map(|uri| Peer {
                        identity: uri.parse().ok(),
                        uri: Arc::from(*uri),
                    })
                    .ok_or(Mismatch::NotExpected),
                Self::TrustDomain(own) => uris
                    .iter()
                    .filter_map(|uri| uri.parse::<Identity>().ok())
                    .find(|identity| identity.trust_domain() == &**own)
                    .map(|identity| Peer {
                        uri: Arc::from(identity.uri()),
                        identity: Some(identity),
                    })
                    .ok_or(Mismatch::OtherTrustDomain),
            }
        })
        .ok_or(Mismatch::Unparsable)?
    }

    /// The refusal of `certificate`, for people.
    pub(crate) fn refusal(
        &self,
        certificate: &CertificateDer<'_>,
        reason: impl Into<String>,
    ) -> PeerRefused {
        let presented = with_uris(certificate, |uris| Shown(uris).to_string());
        PeerRefused {
            role: match self {
                Self::Servers(_) => "server",
                Self::TrustDomain(_) => "client",
            },
            presented: presented.unwrap_or_else(|| "an unreadable certificate".to_owned()),
            expected: match self {
                Self::Servers(expected) => expected.to_string(),
                Self::TrustDomain(own) => format!("a SPIFFE identity of trust domain {own}"),
            },
            reason: reason.into(),
        }
    }
}

/// Why a certificate's names are not accepted.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Mismatch {
    #[error("the certificate cannot be parsed")]
    Unparsable,
    #[error("the certificate has no URI subject alternative name")]
    NoUri,
    #[error("the identity is not one of those expected; the endpoint may have been replaced")]
    NotExpected,
    #[error("no identity of this trust domain; trust domain aliases are not supported")]
    OtherTrustDomain,
}

/// A peer whose certificate was not accepted.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{role} refused: presented {presented}, expected {expected}: {reason}")]
pub struct PeerRefused {
    role: &'static str,
    presented: String,
    expected: String,
    reason: String,
}

impl PeerRefused {
    /// The URIs the peer's certificate holds, shortened and escaped, as shown in the message.
    pub fn presented(&self) -> &str {
        &self.presented
    }

    /// Why it was refused: the chain's fault or the name's.
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

/// Calls `f` with the URI subject alternative names of `certificate`; `None` when it is not a
/// well-formed certificate.
fn with_uris<T>(certificate: &CertificateDer<'_>, f: impl FnOnce(&[&str]) -> T) -> Option<T> {
    let (rest, parsed) = X509Certificate::from_der(certificate).ok()?;
    if !rest.is_empty() {
        return None;
    }
    let names = parsed.subject_alternative_name().ok()?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    Some(f(&uris))
}

/// The first of the URIs in `certificate`, in full.
pub(crate) fn first_uri(certificate: &CertificateDer<'_>) -> Option<String> {
    with_uris(certificate, |uris| {
        uris.first().map(|uri| (*uri).to_owned())
    })
    .flatten()
}

/// Names in a message: a few, shortened, without control characters.
struct Shown<'a>(&'a [&'a str]);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (index, name) in self.0.iter().take(SHOWN_NAMES).enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            let end = name.floor_char_boundary(SHOWN_NAME_BYTES);
            write!(f, "{}", name[..end].escape_debug())?;
            if end < name.len() {
                f.write_str("..")?;
            }
        }
        if self.0.len() > SHOWN_NAMES {
            write!(f, ", {} more", self.0.len() - SHOWN_NAMES)?;
        }
        f.write_str("]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_stay_short_and_on_one_line() {
        let long = "x".repeat(1000);
        let names = ["a\nb", long.as_str(), "c", "d", "e", "f"];
        let shown = Shown(&names).to_string();
        assert!(shown.starts_with("[a\\nb, xxx"), "{shown}");
        assert!(shown.ends_with(", c, d, 2 more]"), "{shown}");
        assert!(shown.len() < 320, "{}", shown.len());
    }

    #[test]
    fn garbage_is_not_a_certificate() {
        let acceptance = Acceptance::TrustDomain("td".into());
        let garbage = CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]);
        assert_eq!(acceptance.check(&garbage), Err(Mismatch::Unparsable));
    }
}
