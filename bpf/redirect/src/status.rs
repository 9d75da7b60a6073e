//! What is installed, for people and for scripts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize, Serializer};

use crate::back_end::{AttachedBy, BackEnd, Driver, Redirect};
use crate::error::Error;
use crate::settings::{Pod, Variant};

/// `ebpf`: packets (connections for `ztunnel_ingress`) by program and reason, all CPUs.
/// `tunnel`: packets by namespace and rule.
pub type Counters = BTreeMap<String, BTreeMap<String, u64>>;

/// State of a redirection. Its JSON form is what `node-agent status --json` prints.
#[derive(Clone, Debug)]
pub struct Status {
    /// Whether a redirection is installed (wholly or, after a crash, partly).
    pub installed: bool,
    /// Captured pods.
    pub pods: Vec<PodStatus>,
    /// Listed pods that are not captured, as the caller noted them.
    pub not_captured: Vec<Uncaptured>,
    /// Whether DNS queries of pods are captured.
    pub dns: bool,
    /// Every object on the system that belongs to the redirection, one line each.
    pub owned: BTreeSet<String>,
    /// What [`crate::Redirection::counters`] says.
    pub counters: Counters,
    /// Which back end, and what it alone has.
    pub back_end: BackEnd<EbpfStatus, TunnelStatus>,
}

/// What `ebpf` alone has.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct EbpfStatus {
    /// How programs are attached, once one is.
    pub attached_by: Option<AttachedBy>,
    /// Connections left alone because they are older than their pod's capture.
    pub older_connections: usize,
    /// Connections older than their pod's capture that found no place and broke, since
    /// installation.
    pub older_connections_broken: u64,
}

/// What `tunnel` alone has.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TunnelStatus {
    /// Which rule set.
    pub variant: Variant,
    /// What makes the tunnels, once they are made.
    pub driver: Option<Driver>,
}

/// The JSON form, which is flat and the same for both: scripts read it.
#[derive(Serialize)]
struct Flat<'a> {
    redirect: Redirect,
    installed: bool,
    variant: Option<Variant>,
    tunnel_driver: Option<Driver>,
    attach: Option<AttachedBy>,
    pods: &'a [PodStatus],
    not_captured: &'a [Uncaptured],
    dns: bool,
    owned: &'a BTreeSet<String>,
    older_connections: usize,
    older_connections_broken: u64,
    counters: &'a Counters,
}

impl Serialize for Status {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let ebpf = self.back_end.ebpf().copied().unwrap_or_default();
        let tunnel = self.back_end.iptables_tunnel();
        let flat = Flat {
            redirect: self.back_end.redirect(),
            installed: self.installed,
            variant: tunnel.map(|tunnel| tunnel.variant),
            tunnel_driver: tunnel.and_then(|tunnel| tunnel.driver),
            attach: ebpf.attached_by,
            pods: &self.pods,
            not_captured: &self.not_captured,
            dns: self.dns,
            owned: &self.owned,
            older_connections: ebpf.older_connections,
            older_connections_broken: ebpf.older_connections_broken,
            counters: &self.counters,
        };
        flat.serialize(serializer)
    }
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn json(back_end: BackEnd<EbpfStatus, TunnelStatus>) -> Value {
        let status = Status {
            installed: true,
            pods: vec![],
            not_captured: vec![],
            dns: false,
            owned: BTreeSet::new(),
            counters: Counters::new(),
            back_end,
        };
        serde_json::to_value(status).unwrap()
    }

    /// Scripts read it: as releases before this enum was printed it.
    #[test]
    fn the_json_form_is_flat_and_has_the_same_keys_for_both_back_ends() {
        let tunnel = json(BackEnd::IptablesTunnel(TunnelStatus {
            variant: Variant::Hardened,
            driver: Some(Driver::Vxlan),
        }));
        let expected = json!({
            "redirect": "tunnel", "installed": true, "variant": "hardened",
            "tunnel_driver": "vxlan", "attach": null, "pods": [], "not_captured": [], "dns": false,
            "owned": [], "older_connections": 0, "older_connections_broken": 0, "counters": {},
        });
        assert_eq!(tunnel, expected);
        let ebpf = json(BackEnd::Ebpf(EbpfStatus {
            attached_by: Some(AttachedBy::Tcx),
            older_connections: 1,
            older_connections_broken: 2,
        }));
        let expected = json!({
            "redirect": "ebpf", "installed": true, "variant": null,
            "tunnel_driver": null, "attach": "tcx", "pods": [], "not_captured": [], "dns": false,
            "owned": [], "older_connections": 1, "older_connections_broken": 2, "counters": {},
        });
        assert_eq!(ebpf, expected);
    }
}
