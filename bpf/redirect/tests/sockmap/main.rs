//! The sockmap on real sockets in network namespaces: each trap of the mechanism has a
//! test, and a torture test checks every byte. Needs root; skips by name without.

#![allow(
    clippy::unwrap_used,
    reason = "a helper that fails is a test that fails"
)]

mod basics;
mod bounds;
mod plain;
mod support;
mod torture;
mod traps;
