//! What is installed, for people and for scripts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::error::Error;
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
    /// Listed pods that are not captured, as the caller noted them.
    pub not_captured: Vec<Uncaptured>,
    /// Whether DNS queries of pods are captured.
    pub dns: bool,
    /// Every object on the system that belongs to the redirection, one line each.
    pub owned: BTreeSet<String>,
    /// `ebpf` only: connections left alone because they are older than their pod's capture.
    pub older_connections: usize,
    /// `ebpf` only: connections older than their pod's capture that found no place and broke, since
    /// installation.
    pub older_connections_broken: u64,
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

/// Why a listed pod is not captured.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Why {
    /// It has ended.
    Ended,
    /// Its network namespace or its interface is not there, not yet or no more.
    Absent,
    /// What is said of it cannot be.
    Invalid,
    /// Another listed pod has its uid, interface or an address.
    Conflict,
    /// Capturing it failed; it is tried again.
    Failed,
}

impl Why {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Ended,
        Self::Absent,
        Self::Invalid,
        Self::Conflict,
        Self::Failed,
    ];

    /// In one word.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ended => "ended",
            Self::Absent => "absent",
            Self::Invalid => "invalid",
            Self::Conflict => "conflict",
            Self::Failed => "failed",
        }
    }
}

/// A listed pod that is not captured.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Uncaptured {
    /// Its UID, or which entry of the list it is if it has none.
    pub uid: String,
    /// Its interface on the node, if one is named.
    pub host_interface: Option<String>,
    /// Kind of the reason.
    pub why: Why,
    /// The reason: names field, value and what is allowed.
    pub reason: String,
    /// Whether its interface drops everything. If not, there is none, another pod has it, or
    /// `reason` says why not.
    pub cut_off: bool,
}

/// A pod that [`crate::Redirection::try_pods`] could not capture.
#[derive(Debug)]
pub struct Failure {
    /// Its UID.
    pub uid: String,
    /// What went wrong.
    pub error: Error,
    /// Whether its interface drops everything now.
    pub cut_off: bool,
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
