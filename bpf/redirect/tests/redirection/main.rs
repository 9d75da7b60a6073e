//! Both redirections on real packets, in network namespaces. Needs root; skips by name without.

#![allow(
    clippy::unwrap_used,
    reason = "a helper that fails is a test that fails"
)]

mod defects;
mod dns;
mod ebpf;
mod enrolment;
mod errors;
mod frames;
mod ipv6;
mod live;
mod older;
mod shared;
#[allow(dead_code, reason = "the tests of node-agent use the rest")]
mod topology;
mod ways;
