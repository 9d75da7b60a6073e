//! What is installed, for people and for scripts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::Serialize;

use crate::settings::{Pod, Variant};

/// `ebpf`: packets (connections for `ztunnel_ingress`) by program and reason, all CPUs.
/// `tunnel`: packets by namespace and rule.
pub type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// State of a redirection. Its JSON form is what `node-agent status --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Back end: `ebpf` or `tunnel`.
    pub redirect: &'static str,
    /// Whether a redirection is installed (wholly or, after a crash, partly).
    pub installed: bool,
    /// `tunnel` only.
    pub variant: Option<Variant>,
    /// `tunnel` only: `geneve` or `vxlan`.
    pub tunnel_driver: Option<String>,
    /// `ebpf` only: `tcx` or `clsact`.
    pub attach: Option<String>,
    /// Captured pods.
    pub pods: Vec<PodStatus>,
    /// Whether DNS queries of pods are captured.
    pub dns: bool,
    /// Every object on the system that belongs to the redirection, one line each.
    pub owned: BTreeSet<String>,
    /// `ebpf` only: connections left alone because they are older than their pod's capture.
    pub older_connections: usize,
    /// What [`crate::Redirection::counters`] says.
    pub counters: Counters,
}

/// One captured pod.
#[derive(Clone, Debug, Serialize)]
pub struct PodStatus {
    /// Its UID.
    pub uid: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its interface on the node.
    pub host_interface: String,
    /// Whether that interface exists now.
    pub present: bool,
}

impl PodStatus {
    pub(crate) fn of(pod: &Pod) -> Self {
        Self {
            uid: pod.uid.clone(),
            addresses: pod.addresses.clone(),
            host_interface: pod.host_interface.clone(),
            present: nix::net::if_::if_nametoindex(pod.host_interface.as_str()).is_ok(),
        }
    }
}
