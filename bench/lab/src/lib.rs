//! The two-node lab: an Istio ambient data plane on one machine, in network namespaces.
//!
//! Two node namespaces are joined by an underlay link; each holds a ztunnel pod and application
//! pods, wired as a cloud CNI wires them (a point-to-point link per pod, /32 addresses, the node
//! forwards). On top of that network the lab starts a node agent and a ztunnel per node, so that
//! one topology serves every redirection path and only the path differs between measurements.
//!
//! Invariants:
//! * Nothing ever appears in the machine's own network: links are created directly inside the
//!   lab's namespaces, and no address, route, rule or sysctl of the machine is changed.
//! * [`Lab::up`] either leaves a working lab or nothing; [`Lab::down`] leaves nothing, also after
//!   an `up` that was killed half way. Both hold a lock per lab name.
//! * A process is only ever signalled after its start time (or its network namespace) has been
//!   compared with what the lab knows, so a recycled pid is never hit.
//!
//! Limits: Linux, root, iproute2; IPv4, and IPv6 where the kernel has it (whose TCP the
//! `tunnel` redirection drops). Sysctls of the namespaces are fixed (see
//! [`network::sysctl`]) so that results of two machines can be compared: congestion control is
//! reno in every namespace, because child namespaces may only choose non-restricted algorithms
//! and a machine-wide default of bbr would pace bulk flows.
#![forbid(unsafe_code)]

mod agent;
pub mod attack;
mod ca;
mod daemon;
mod error;
mod http;
mod kinds;
mod lab;
pub mod listener;
mod lock;
mod mesh_file;
pub mod network;
pub mod peers;
mod process;
pub mod services;
mod state;
mod status;
mod steering;
mod teardown;
mod topology;
mod ztunnel;

pub use ca::CertificateAuthority;
pub use daemon::workspace_binary;
pub use error::{Error, Result};
pub use http::http_get;
pub use kinds::{ProxyKind, Redirect, Services, Variant};
pub use lab::{Lab, LabOptions};
pub use mesh_file::default_mesh;
pub use network::namespace::{HostCommand, in_namespace};
pub use status::{HostStatus, Status};
pub use topology::{Host, Node, OUTSIDE_INTERFACE, Role, UNDERLAY_INTERFACE};
