//! Certificate verification inside the handshake, one verifier per connection.
//!
//! The expensive part (roots, algorithms) is shared by all connections of a certificate; what a
//! connection adds is whom it accepts, and a place for the outcome. A handshake takes the peer
//! from that place, so a session cannot come to be without this verifier having run.

use std::fmt;
use std::sync::{Arc, OnceLock};

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

/// Verifies the one peer of one connection.
pub(crate) struct PeerVerifier {
    trust: Arc<Trust>,
    acceptance: Acceptance,
    outcome: OnceLock<Result<Peer, PeerRefused>>,
}

impl PeerVerifier {
    pub(crate) const fn new(trust: Arc<Trust>, acceptance: Acceptance) -> Self {
        Self {
            trust,
            acceptance,
            outcome: OnceLock::new(),
        }
    }

    /// What came of the peer's certificate; `None` while none was verified.
    pub(crate) fn outcome(&self) -> Option<&Result<Peer, PeerRefused>> {
        self.outcome.get()
    }

    /// Checks the names after the chain, and keeps the outcome for the handshake.
    fn conclude(
        &self,
        end_entity: &CertificateDer<'_>,
        chain: Result<(), Error>,
    ) -> Result<(), Error> {
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
        // A peer presents one certificate per connection; a second outcome must not replace
        // the first.
        match self.outcome.set(outcome) {
            Ok(()) => answer,
            Err(_) => Err(Error::General("the peer was verified twice".to_owned())),
        }
    }
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

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain = self.trust.verify_server(end_entity, intermediates, now);
        self.conclude(end_entity, chain)
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.trust.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.trust.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for PeerVerifier {
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
            .trust
            .clients
            .verify_client_cert(end_entity, intermediates, now)
            .map(|_| ());
        self.conclude(end_entity, chain)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.trust.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.trust.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms.supported_schemes()
    }
}

impl fmt::Debug for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trust")
            .field("roots", &self.roots.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for PeerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerVerifier")
            .field("acceptance", &self.acceptance)
            .field("outcome", &self.outcome)
            .finish_non_exhaustive()
    }
}
