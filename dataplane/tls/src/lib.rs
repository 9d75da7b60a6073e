//! TLS 1.3 with mutual authentication between workloads.
//!
//! rustls does the handshake and nothing after it: [`Handshake`] feeds its unbuffered API one
//! record at a time, so that no byte behind the handshake is swallowed, then takes the traffic
//! secrets. From there a [`Session`] seals and opens records in place, in the caller's buffers. Or
//! rustls keeps its secrets and does that as well, if so chosen ([`RecordPath`]).
//!
//! * [`certificate`]: a workload's certificate, key and roots, and loading them.
//! * [`authority`]: a local certificate authority, issuing in process.
//! * [`settings`]: what a handshake needs, built once per certificate.
//! * [`peer`]: which peers are accepted, and who the peer turned out to be.
//! * [`handshake`]: sans-io handshake, yields a session.
//! * [`session`]: sealing, opening, key updates, alerts.
//! * [`record`]: framing and protection of records, where other record layers belong.
//!
//! Invariants: only TLS 1.3 with AES-GCM; a [`Session`] exists only after rustls has verified the
//! peer's chain and possession of its key, and the connection's own case has accepted its
//! identity; nothing is sent to a server, not even our certificate, before its identity is
//! accepted. Input is hostile: every length is bounded, and nothing a peer sends makes this crate
//! panic.
//!
//! Limits: no resumption, no early data, no TLS 1.2, no revocation lists yet.
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_types))]

pub mod authority;
pub mod certificate;
pub mod handshake;
mod hello;
pub mod peer;
mod provider;
pub mod record;
pub mod session;
pub mod settings;
pub mod validity;
mod verify;

pub use authority::{Authority, AuthorityError};
pub use certificate::{CertificateError, CertificateInfo, WorkloadCertificate};
pub use handshake::{Handshake, HandshakeError, Progress};
pub use hello::ClientHelloWatch;
pub use peer::{ExpectedPeers, Peer, PeerRefused};
pub use record::RecordPath;
pub use session::{OpenError, Opened, SealError, Session};
pub use settings::{ClientSettings, ServerSettings, SettingsError};
pub use validity::Validity;

// The integration tests' helpers serve the unit tests as well.
#[cfg(test)]
extern crate self as tls;

#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;
