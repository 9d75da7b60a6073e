//! Where certificates come from.

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use mesh::Identity;
use tls::{Authority, WorkloadCertificate};

/// An answer that is on its way.
pub type Issuing<'a> =
    Pin<Box<dyn Future<Output = Result<WorkloadCertificate, IssueError>> + Send + 'a>>;

/// Why an issuer has no certificate, in one line.
pub type IssueError = Box<dyn std::error::Error + Send + Sync>;

/// Issues certificates. Called on the control thread's runtime, never on a worker.
pub trait Issuer: fmt::Debug + Send + Sync {
    /// Asks for a certificate of `identity`. The answer may take as long as a network needs; it is
    /// given up after [`crate::manager::ANSWER_MAX`], and then asked for again.
    fn issue<'a>(&'a self, identity: &'a Identity) -> Issuing<'a>;
}

/// Issues from an [`Authority`] in this process.
///
/// Making a key and signing for it takes some 0.1 ms (an ECDSA key as CA) to some milliseconds
/// (RSA). That is done on the control thread, one after the other: on threads of their own several
/// would compete with the workers for their CPUs.
#[derive(Debug)]
pub struct LocalIssuer {
    authority: Authority,
    ttl: Duration,
}

impl LocalIssuer {
    /// Issues certificates valid for `ttl`.
    pub const fn new(authority: Authority, ttl: Duration) -> Self {
        Self { authority, ttl }
    }
}

impl Issuer for LocalIssuer {
    fn issue<'a>(&'a self, identity: &'a Identity) -> Issuing<'a> {
        Box::pin(async { Ok(self.authority.issue(identity, self.ttl)?) })
    }
}
