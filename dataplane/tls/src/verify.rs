//! Certificate verification inside the handshake.
//!
//! One verifier serves all connections of a certificate, for the TLS library's configuration is
//! built once per certificate and holds it. So it stores nothing: whom a connection accepts, and
//! what came of its peer, are in the connection's [`Case`], which lies before the verifier, on this
//! thread, exactly while the library works on that connection's records ([`Case::during`]). Without
//! a case nobody is accepted, and a session cannot come to be without its case having been judged.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::peer::{Acceptance, Peer, PeerRefused};
use crate::provider::provider;

/// The mesh's roots of trust, ready to verify both clients and servers.
pub(crate) struct Trust {
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Trust {
    /// Trusts certificates that lead to one of `roots`.
    pub(crate) fn new(roots: &[CertificateDer<'static>]) -> Result<Self, String> {
        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(root.clone()).map_err(|error| error.to_string())?;
        }
        let roots = Arc::new(store);
        let provider = provider();
        // Hints would only make a client with several certificates choose; ours have one, and
        // while roots rotate a hint can make a peer withhold a certificate we would accept.
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .clear_root_hint_subjects()
                .build()
                .map_err(|error| error.to_string())?;
        Ok(Self {
            roots,
            clients,
            algorithms: provider.signature_verification_algorithms,
        })
    }

    pub(crate) fn verify_server(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )
    }
}

thread_local! {
    /// The connection whose records the TLS library is working on.
    static PENDING: Cell<Option<Case>> = const { Cell::new(None) };
}

/// One connection's judgement of its one peer.
#[derive(Debug)]
pub(crate) struct Case {
    acceptance: Acceptance,
    outcome: Option<Result<Peer, PeerRefused>>,
}

impl Case {
    pub(crate) const fn new(acceptance: Acceptance) -> Self {
        Self {
            acceptance,
            outcome: None,
        }
    }

    /// What came of the peer's certificate; `None` while none was verified.
    pub(crate) const fn outcome(&self) -> Option<&Result<Peer, PeerRefused>> {
        self.outcome.as_ref()
    }

    /// Runs `work`, in which the verifier judges this case and no other.
    pub(crate) fn during<T>(case: &mut Option<Self>, work: impl FnOnce() -> T) -> T {
        let _session = InSession::open(case);
        work()
    }

    /// Checks the names after the chain, and keeps the outcome for the handshake.
    fn conclude(
        &mut self,
        end_entity: &CertificateDer<'_>,
        chain: Result<(), Error>,
    ) -> Result<(), Error> {
        // A peer presents one certificate per connection; a second outcome must not replace
        // the first.
        if self.outcome.is_some() {
            return Err(Error::General("the peer was verified twice".to_owned()));
        }
        let (outcome, answer) = match chain {
            Err(error) => {
                let refusal = self.acceptance.refusal(end_entity, chain_fault(&error));
                (Err(refusal), Err(error))
            }
            Ok(()) => match self.acceptance.check(end_entity) {
                Ok(peer) => (Ok(peer), Ok(())),
                Err(mismatch) => {
                    let refusal = self.acceptance.refusal(end_entity, mismatch.to_string());
                    // The error that rustls turns into a bad_certificate alert.
                    let error = Error::InvalidCertificate(CertificateError::NotValidForName);
                    (Err(refusal), Err(error))
                }
            },
        };
        self.outcome = Some(outcome);
        answer
    }
}

/// Lays a case before the verifier and takes it back, also from a panic: it must not be there for
/// whoever uses the verifier next.
struct InSession<'a> {
    home: &'a mut Option<Case>,
    before: Option<Case>,
}

impl<'a> InSession<'a> {
    fn open(home: &'a mut Option<Case>) -> Self {
        let before = PENDING.replace(home.take());
        Self { home, before }
    }
}

impl Drop for InSession<'_> {
    fn drop(&mut self) {
        *self.home = PENDING.replace(self.before.take());
    }
}

/// Concludes the case that is pending on this thread.
fn conclude(end_entity: &CertificateDer<'_>, chain: Result<(), Error>) -> Result<(), Error> {
    let Some(mut case) = PENDING.take() else {
        let reason = "a certificate is to be verified outside a handshake of this crate";
        return Err(Error::General(reason.to_owned()));
    };
    let answer = case.conclude(end_entity, chain);
    PENDING.set(Some(case));
    answer
}

/// Why the chain is not accepted, with what usually causes it.
fn chain_fault(error: &Error) -> String {
    let hint = match error {
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "; it was issued by a CA outside this mesh's roots, or roots are being rotated"
        }
        Error::InvalidCertificate(CertificateError::BadSignature) => {
            "; it was issued by another CA of the same name as one of this mesh's roots"
        }
        Error::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        ) => "; the peer did not renew it, or a clock is wrong",
        _ => "",
    };
    format!("its chain does not verify ({error}){hint}")
}

impl ServerCertVerifier for Trust {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain = self.verify_server(end_entity, intermediates, now);
        conclude(end_entity, chain).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Trust {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let chain = self
            .clients
            .verify_client_cert(end_entity, intermediates, now)
            .map(|_| ());
        conclude(end_entity, chain).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust")
            .field("roots", &self.roots.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::common::{authority, identity, workload};

    /// What the library asks when a server has shown `shown`.
    fn ask(trust: &Trust, shown: &[CertificateDer<'_>]) -> Result<(), Error> {
        let name = ServerName::try_from("ignored.example").expect("a name");
        let now = UnixTime::now();
        trust
            .verify_server_cert(&shown[0], &shown[1..], &name, &[], now)
            .map(drop)
    }

    #[test]
    fn nobody_is_accepted_outside_a_handshake() {
        let server = identity("td", "server");
        let certificate = workload(&authority("mesh"), &server);
        let trust = Trust::new(certificate.roots()).unwrap();
        let refused = ask(&trust, certificate.chain());
        assert!(matches!(refused, Err(Error::General(_))), "{refused:?}");
        let refused = trust.verify_client_cert(
            &certificate.chain()[0],
            &certificate.chain()[1..],
            UnixTime::now(),
        );
        assert!(matches!(refused, Err(Error::General(_))), "{refused:?}");
    }

    #[test]
    fn a_case_is_judged_once_and_only_in_its_own_time() {
        let server = identity("td", "server");
        let certificate = workload(&authority("mesh"), &server);
        let trust = Trust::new(certificate.roots()).unwrap();
        let case = |account| {
            Some(Case::new(Acceptance::Servers(
                (&identity("td", account)).into(),
            )))
        };
        let (mut ours, mut other) = (case("server"), case("other"));
        let judged = Case::during(&mut ours, || {
            // As if the library came back here while it works on another connection.
            let refused = Case::during(&mut other, || ask(&trust, certificate.chain()));
            assert!(refused.is_err());
            let accepted = ask(&trust, certificate.chain());
            (accepted, ask(&trust, certificate.chain()))
        });
        assert!(judged.0.is_ok());
        assert!(matches!(judged.1, Err(Error::General(_))), "{judged:?}");
        let peer = ours.as_ref().and_then(Case::outcome).unwrap();
        assert_eq!(peer.as_ref().unwrap().identity(), Some(&server));
        assert!(other.as_ref().and_then(Case::outcome).unwrap().is_err());
        assert!(
            ask(&trust, certificate.chain()).is_err(),
            "no case is pending"
        );
    }

    #[test]
    fn a_case_does_not_outlive_a_panic() {
        let certificate = workload(&authority("mesh"), &identity("td", "server"));
        let trust = Trust::new(certificate.roots()).unwrap();
        let mut case = Some(Case::new(Acceptance::TrustDomain("td".into())));
        let work = AssertUnwindSafe(|| Case::during(&mut case, || panic!("as a defect would")));
        catch_unwind(work).unwrap_err();
        assert!(case.is_some());
        assert!(ask(&trust, certificate.chain()).is_err());
    }
}
