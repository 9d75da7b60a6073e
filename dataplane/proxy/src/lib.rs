//! The data path of the node proxy: what happens to a connection between accept and close.
//!
//! A connection lives its whole life on the worker that accepted it. Each worker has its own
//! listeners ([`Listeners`]), HBONE tunnels, counters and copy of the configuration. Nothing here
//! takes a lock, signs, or waits for another core. What other threads have to say arrives in
//! mailboxes ([`rt::mailbox`], whose locks are held while a pointer moves): the newest
//! configuration, the newest certificates, orders. A connection that needs a certificate which
//! nobody has yet asks the control thread for it and waits as a task
//! ([`identity::Certificates`]); its neighbours do not.
//!
//! * outbound (15001): captured from a local pod; tunnelled, sent plain, or passed through;
//! * inbound HBONE (15008): tunnels from other nodes, authorized and connected to the local pod;
//! * inbound plaintext (15006): from outside the mesh, authorized without identity.
//!
//! In `node` mode ([`RedirectMode::Node`]) the proxy serves all pods of a node from its own network
//! namespace: a pod is known by its source address (which redirection guarantees), the original
//! destination is the accepted socket's own address, and connections go out with the pod's address.
//!
//! The last step to a pod of this node is one (`local.rs`), whichever way a connection takes to it:
//! who the pod is, whether it may be reached, and for how long.
//!
//! Failure behaviour: every refusal is logged with who, what and why, and counted; the client
//! sees a reset, never an empty success. Whatever is not allowed for certain is refused.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::disallowed_types))]

mod baggage;
mod config;
mod context;
mod error;
mod gate;
mod inbound;
mod local;
mod memory;
mod outbound;
mod plaintext;
mod pods;
mod pool;
mod relay;
#[cfg(test)]
mod tests;
mod tunnel;
mod watch;
mod worker;

pub use config::{
    CapturedPod, LocalPods, Lookup, PodReader, ProxyConfig, RedirectMode, SockmapBypass,
};
pub use memory::TunnelMemory;
pub use worker::{Command, Listeners, WorkerSetup, serve};
