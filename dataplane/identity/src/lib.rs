//! Certificates of this node's workloads: who gets one, when, and how workers come by them.
//!
//! The [`Manager`] runs on the control thread. It asks an [`Issuer`] for certificates, renews them
//! by timer, fetches those of this node's workloads ahead, forgets those nobody uses any more, and
//! gives each worker the newest of all in a cell. A worker's [`Certificates`] finds what is there
//! in a map of its own; where there is none yet, a connection asks for it and waits.
//!
//! * [`issuer`]: what issues certificates: an interface, and the CA in this process.
//! * `schedule`: which identity is next, and when. Pure, told the time.
//! * [`manager`]: the schedule at work, on the control thread.
//! * [`worker`]: what a worker has.
//! * [`published`]: what passes from one to the other.
//!
//! Invariants: nothing is signed on a worker, and a worker waits for nobody to find a certificate
//! that is there. One request per identity is under way, [`UNDER_WAY_MAX`] in all; identities that
//! connections wait for come before those fetched ahead, and those before renewals. A certificate
//! is used from the start of its validity to its end by this machine's time of day, and shown to
//! nobody outside of that; how long something is put off is measured by the monotonic clock.
#![forbid(unsafe_code)]

mod clock;
pub mod issuer;
pub mod manager;
pub mod published;
mod schedule;
#[cfg_attr(not(test), deny(clippy::disallowed_types))]
pub mod worker;

pub use clock::{Clock, SystemClock};
pub use issuer::{IssueError, Issuer, Issuing, LocalIssuer};
pub use manager::{Handle, Manager};
pub use published::{CertificateStatus, NoCertificate, WorkloadTls};
pub use schedule::{UNDER_WAY_MAX, Wanted};
pub use worker::{CertificateFeed, Certificates};
