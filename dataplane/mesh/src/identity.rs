//! SPIFFE identities of workloads: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
//!
//! An [`Identity`] that exists is well formed, so code that holds one never checks it again.
//! Comparison is exact (no case folding, no percent decoding), as certificates are compared.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;

/// Longest SPIFFE ID accepted, in bytes (the SPIFFE ID specification, section 2.3).
pub const IDENTITY_LEN_MAX: usize = 2048;

const SCHEME: &str = "spiffe://";
const NAMESPACE: &str = "/ns/";
const SERVICE_ACCOUNT: &str = "/sa/";

/// A workload's SPIFFE identity. Cloning costs one reference count.
#[derive(Clone)]
pub struct Identity {
    uri: Arc<str>,
    /// End of the trust domain in `uri`.
    trust_domain_end: u16,
    /// End of the namespace in `uri`.
    namespace_end: u16,
}

/// Why text or parts are not a workload identity.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum IdentityError {
    /// The text lacks the shape of an Istio workload identity.
    #[error(
        "identity `{0}` is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>: \
         it was probably not issued by this mesh's authority"
    )]
    Shape(Box<str>),
    /// A part is empty or holds a character that SPIFFE does not allow there.
    #[error(
        "identity {part} `{value}` must be one or more of a-z A-Z 0-9 . - _ and neither `.` nor \
         `..`: it is probably missing from the workload or misspelt"
    )]
    Part {
        /// Which part: trust domain, namespace or service account.
        part: &'static str,
        /// What was found there.
        value: Box<str>,
    },
    /// The whole is longer than [`IDENTITY_LEN_MAX`] bytes.
    #[error("identity of {0} bytes is longer than {IDENTITY_LEN_MAX} bytes, SPIFFE's limit")]
    Length(usize),
}

impl Identity {
    /// Puts an identity together.
    ///
    /// # Errors
    /// A part is empty or holds a character SPIFFE does not allow, or the whole is too long.
    pub fn new(
        trust_domain: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, IdentityError> {
        check_part("trust domain", trust_domain)?;
        check_part("namespace", namespace)?;
        check_part("service account", service_account)?;
        let trust_domain_end = SCHEME.len() + trust_domain.len();
        let namespace_end = trust_domain_end + NAMESPACE.len() + namespace.len();
        let len = namespace_end + SERVICE_ACCOUNT.len() + service_account.len();
        if len > IDENTITY_LEN_MAX {
            return Err(IdentityError::Length(len));
        }
        let mut uri = String::with_capacity(len);
        for piece in [
            SCHEME,
            trust_domain,
            NAMESPACE,
            namespace,
            SERVICE_ACCOUNT,
            service_account,
        ] {
            uri.push_str(piece);
        }
        // Both ends are below IDENTITY_LEN_MAX, which fits u16.
        let end = |n: usize| u16::try_from(n).map_err(|_| IdentityError::Length(len));
        Ok(Self {
            trust_domain_end: end(trust_domain_end)?,
            namespace_end: end(namespace_end)?,
            uri: uri.into(),
        })
    }

    /// The trust domain, for example `cluster.local`.
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..usize::from(self.trust_domain_end)]
    }

    /// The Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        let start = usize::from(self.trust_domain_end) + NAMESPACE.len();
        &self.uri[start..usize::from(self.namespace_end)]
    }

    /// The Kubernetes service account.
    pub fn service_account(&self) -> &str {
        &self.uri[usize::from(self.namespace_end) + SERVICE_ACCOUNT.len()..]
    }

    /// The whole identity as a URI, as in a certificate's subject alternative name.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The URI without `spiffe://`, the form authorization policies name principals in.
    pub fn principal(&self) -> &str {
        &self.uri[SCHEME.len()..]
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        if text.len() > IDENTITY_LEN_MAX {
            return Err(IdentityError::Length(text.len()));
        }
        let mut parts = text.strip_prefix(SCHEME).unwrap_or_default().split('/');
        let five = (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        );
        match (five, parts.next()) {
            ((Some(td), Some("ns"), Some(ns), Some("sa"), Some(sa)), None) => Self::new(td, ns, sa),
            _ => Err(IdentityError::Shape(
                text.escape_default().to_string().into(),
            )),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.uri)
    }
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.uri, &other.uri) || self.uri == other.uri
    }
}

impl Eq for Identity {}

impl Hash for Identity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.uri.hash(state);
    }
}

impl PartialOrd for Identity {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Identity {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.uri.cmp(&other.uri)
    }
}

/// Upper case is accepted in trust domains although SPIFFE asks for lower case: Istio passes on
/// whatever the operator configured, and an exact comparison keeps that safe.
fn check_part(part: &'static str, value: &str) -> Result<(), IdentityError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if value.is_empty() || value == "." || value == ".." || !value.bytes().all(allowed) {
        let shown: String = value.escape_default().take(128).collect();
        return Err(IdentityError::Part {
            part,
            value: shown.into(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parts_of_a_parsed_identity() {
        let id: Identity = "spiffe://cluster.local/ns/default/sa/web-1"
            .parse()
            .unwrap();
        assert_eq!(id.trust_domain(), "cluster.local");
        assert_eq!(id.namespace(), "default");
        assert_eq!(id.service_account(), "web-1");
        assert_eq!(id.uri(), "spiffe://cluster.local/ns/default/sa/web-1");
        assert_eq!(id.principal(), "cluster.local/ns/default/sa/web-1");
        assert_eq!(id.to_string(), id.uri());
        assert_eq!(
            id,
            Identity::new("cluster.local", "default", "web-1").unwrap()
        );
    }

    #[test]
    fn what_is_not_an_identity() {
        for text in [
            "",
            "spiffe://",
            "cluster.local/ns/a/sa/b",
            "https://cluster.local/ns/a/sa/b",
            "SPIFFE://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local",
            "spiffe://cluster.local/ns/a",
            "spiffe://cluster.local/ns/a/sa",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://cluster.local/sa/a/ns/b",
            "spiffe://cluster.local/ns/a/sa/b/",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/ns/a/sa/b?x=y",
            "spiffe://cluster.local/ns/a/sa/b#f",
            "spiffe://cluster.local:80/ns/a/sa/b",
            "spiffe://user@cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/%61/sa/b",
            "spiffe://cluster.local/ns/../sa/b",
            "spiffe://cluster.local/ns/a/sa/.",
            "spiffe://cluster.local/ns/a/sa/b\0",
            "spiffe://cluster.local/ns/ä/sa/b",
            " spiffe://cluster.local/ns/a/sa/b",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn the_length_limit_is_exact() {
        let fixed = "spiffe://t/ns/n/sa/".len();
        let fits = "a".repeat(IDENTITY_LEN_MAX - fixed);
        assert_eq!(
            Identity::new("t", "n", &fits).unwrap().uri().len(),
            IDENTITY_LEN_MAX
        );
        let over = "a".repeat(IDENTITY_LEN_MAX - fixed + 1);
        assert!(matches!(
            Identity::new("t", "n", &over),
            Err(IdentityError::Length(2049))
        ));
        assert!(
            format!("spiffe://t/ns/n/sa/{over}")
                .parse::<Identity>()
                .is_err()
        );
    }

    proptest! {
        #[test]
        fn what_is_built_parses_back(
            td in "[a-z0-9_-]{1,20}(\\.[a-z0-9]{1,9})?",
            ns in "[a-z0-9-]{1,30}",
            sa in "[a-z0-9-]{1,30}",
        ) {
            let id = Identity::new(&td, &ns, &sa).unwrap();
            let back: Identity = id.uri().parse().unwrap();
            prop_assert_eq!(&back, &id);
            prop_assert_eq!(back.trust_domain(), td);
            prop_assert_eq!(back.namespace(), ns);
            prop_assert_eq!(back.service_account(), sa);
        }

        #[test]
        fn hostile_text_never_panics(text in "\\PC{0,60}", tail in "[/a-z]{0,40}") {
            let _ = text.parse::<Identity>();
            let built = format!("spiffe://{text}{tail}");
            if let Ok(id) = built.parse::<Identity>() {
                prop_assert_eq!(id.uri(), built);
            }
        }
    }
}
