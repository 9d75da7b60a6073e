//! The ports of a ztunnel: part of how the mesh's parts find each other, so that they are named
//! once. In the BPF programs they are in `bpf/src/layout.h`.

/// Connections of local pods arrive here, whoever they are to.
pub const OUTBOUND: u16 = 15001;
/// Connections to local pods that are no tunnels arrive here.
pub const INBOUND_PLAIN: u16 = 15006;
/// Tunnels (HBONE) to workloads are dialled at this port of theirs, and arrive here.
pub const INBOUND_HBONE: u16 = 15008;
/// DNS queries of local pods, where they are captured.
pub const DNS: u16 = 15053;
/// Administration.
pub const ADMIN: u16 = 15000;
/// Metrics.
pub const METRICS: u16 = 15020;
/// Readiness.
pub const READINESS: u16 = 15021;

/// Those that captured connections come to, and that a connection may therefore not ask for.
pub const CAPTURED: [u16; 3] = [OUTBOUND, INBOUND_PLAIN, INBOUND_HBONE];
