//! The mesh as data, and the decisions taken on it.
//!
//! A [`Snapshot`] is built from workloads, services and policies and never changes. It answers
//! these questions: where an outbound connection goes ([`Snapshot::route`]) and whether it meets a
//! pod of this node there ([`Route::delivery`]), what a tunnel that arrived asks for
//! ([`Snapshot::resolve_inbound`]), and whether a connection may reach a workload
//! ([`Snapshot::authorize`]).
//!
//! Nothing here performs I/O, reads a clock, starts a thread or keeps state: equal inputs give
//! equal answers. Decisions cost a few hash lookups and reference counts; none allocates unless
//! it fails. Text from peers (authorities, identities) is parsed strictly and never panics.
#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_types))]

pub mod address;
pub mod authorize;
mod balance;
mod builder;
pub mod delivery;
mod endpoint;
mod error;
pub mod identity;
pub mod inbound;
mod node;
pub mod policy;
pub mod ports;
pub mod route;
pub mod service;
pub mod snapshot;
mod validate;
mod waypoint;
pub mod workload;

pub use authorize::{Decision, DenyReason, DryRun, Verdict};
pub use delivery::Delivery;
pub use error::{ItemKind, ItemRef, ModelError};
pub use identity::{Identity, IdentityError};
pub use inbound::InboundError;
pub use node::{NodeContext, WorkloadName};
pub use policy::{ConnectionFacts, Policy};
pub use route::{Authority, Route, RouteError};
pub use service::{Service, ServiceConfig};
pub use snapshot::Snapshot;
pub use workload::{HealthStatus, Locality, Protocol, Workload, WorkloadConfig};
