//! What a redirection needs to know, checked before anything is touched.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::back_end::BackEnd;
use crate::error::{Error, Result};
use crate::system::iptables::Iptables;

/// Most underlay interfaces; `MAX_UNDERLAYS` of `bpf/src/layout.h`.
pub(crate) const UNDERLAYS_MAX: usize = 8;
/// Most pod CIDRs; `MAX_POD_CIDRS` of `bpf/src/layout.h`.
pub(crate) const POD_CIDRS_MAX: usize = 64;
/// Most addresses of one pod.
const POD_ADDRESSES_MAX: usize = 16;
/// Longest interface name (IFNAMSIZ less its NUL).
const INTERFACE_CHARS_MAX: usize = 15;
/// Longest pod UID; what an ipset comment takes.
const UID_CHARS_MAX: usize = 255;
/// Longest name of a Kubernetes namespace (RFC 1123 label).
const NAMESPACE_CHARS_MAX: usize = 63;
/// Longest name of a pod or service account (RFC 1123 subdomain).
const NAME_CHARS_MAX: usize = 253;

/// Everything but the pods. `B` is what belongs to one back end alone.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings<B = BackEnd<EbpfSettings, TunnelSettings>> {
    /// The node.
    pub node: Node,
    /// Its ztunnel.
    pub ztunnel: Ztunnel,
    /// Directory for the journal; made if missing. Must survive the agent, need not survive a boot.
    pub state_dir: PathBuf,
    /// Whether DNS queries of pods (UDP and TCP, port 53) go to ztunnel's port 15053. Only for a
    /// ztunnel that answers there: without one, pods have no DNS.
    pub dns: bool,
    /// Which back end, and what it alone needs to know.
    pub back_end: B,
}

/// What `ebpf` alone needs to know.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EbpfSettings {
    /// Directory inside a mounted bpffs for pins; made if missing.
    pub bpffs: PathBuf,
    /// How programs are attached to interfaces.
    pub attach: Attach,
}

/// What `tunnel` alone needs to know.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TunnelSettings {
    /// Which rule set.
    pub variant: Variant,
    /// Which iptables.
    pub iptables: Iptables,
}

/// The node's side.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Path of its network namespace. The agent must run in there; this is to notice if it does
    /// not. Not checked if absent.
    #[serde(default)]
    pub netns: Option<PathBuf>,
    /// Underlay interfaces: where pods of other nodes come from (1 to 8).
    pub interfaces: Vec<String>,
    /// The address pods see the node as.
    pub address: Ipv4Addr,
    /// Further addresses the node speaks to pods with, beside `address` and all that
    /// its interfaces have, which are found and followed. Hardly ever needed.
    #[serde(default)]
    pub other_addresses: Vec<IpAddr>,
    /// Addresses of the cluster's pods, of all nodes (at most 64).
    pub pod_cidrs: Vec<IpNet>,
}

/// The node's ztunnel.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Ztunnel {
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// Its interface in there.
    pub interface: String,
    /// The other end of that, on the node.
    pub host_interface: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its IPv6 address, if it has one; `tunnel` does not use it.
    #[serde(default)]
    pub address_v6: Option<Ipv6Addr>,
}

/// A mesh pod of this node.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Pod {
    /// Unique and stable name.
    pub uid: String,
    /// Its Kubernetes namespace. This and the next two tell ztunnel whose address it is
    /// ([`crate::PodTable`]); journals of earlier versions have none of them.
    #[serde(default)]
    pub namespace: String,
    /// Its name in that namespace.
    #[serde(default)]
    pub name: String,
    /// Its Kubernetes service account.
    #[serde(default)]
    pub service_account: String,
    /// Its addresses of either family (1 to 16). `ebpf` captures all of them and drops what has
    /// another; `tunnel` needs an IPv4 one and leaves IPv6 alone, as Istio did.
    pub addresses: Vec<IpAddr>,
    /// Path of its network namespace.
    pub netns: PathBuf,
    /// Its interface on the node.
    pub host_interface: String,
}

/// Which rule set the tunnel path uses.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// Istio 1.20's, with its defects: resets of node-local connections, leaked TIME_WAIT
    /// answers, SYN cookies refused, and errors of hosts on the way that never reach ztunnel (so
    /// that a path's MTU is not found, and what is refused times out). Node ports of captured
    /// pods, services that the mesh does not know and ICMP echo do not work or go around
    /// policies, and IPv6 goes around the mesh.
    Faithful,
    /// The same path with these defects fixed; TCP by IPv6 of captured pods is dropped.
    #[default]
    Hardened,
}

impl Variant {
    /// Its name in the configuration and on command lines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Faithful => "faithful",
            Self::Hardened => "hardened",
        }
    }
}

impl FromStr for Variant {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut all = [Self::Faithful, Self::Hardened].into_iter();
        let found = all.find(|variant| variant.name() == text);
        found.map_or_else(
            || setting("variant", &text, "is neither faithful nor hardened"),
            Ok,
        )
    }
}

/// How programs are attached to interfaces.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Attach {
    /// tcx where the kernel has it (6.6), else clsact.
    #[default]
    Auto,
    /// tcx or nothing.
    Tcx,
    /// A clsact qdisc, as before 6.6.
    Clsact,
}

fn setting<T>(field: &'static str, value: &dyn ToString, reason: &str) -> Result<T> {
    Err(Error::Setting {
        field,
        value: value.to_string(),
        reason: reason.to_owned(),
    })
}

fn check_interface(field: &'static str, name: &str) -> Result<()> {
    let sound = (1..=INTERFACE_CHARS_MAX).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"/:\"'%\\".contains(&b))
        && name != "."
        && name != "..";
    if sound {
        Ok(())
    } else {
        setting(field, &name, "must be an interface name of 1 to 15 bytes")
    }
}

/// As Kubernetes does, but for where dots and hyphens stand.
fn check_name(field: &'static str, name: &str, chars_max: usize, uid: &str) -> Result<()> {
    let sound = (1..=chars_max).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b));
    if sound {
        return Ok(());
    }
    let reason = format!(
        "pod {uid} needs the name Kubernetes knows it by: 1 to {chars_max} lower-case letters, \
         digits, - or ."
    );
    setting(field, &name, &reason)
}

impl<B> Settings<B> {
    /// The same for one back end.
    pub(crate) fn with<C>(self, back_end: C) -> Settings<C> {
        let Self {
            node,
            ztunnel,
            state_dir,
            dns,
            back_end: _,
        } = self;
        Settings {
            node,
            ztunnel,
            state_dir,
            dns,
            back_end,
        }
    }

    /// Checks ranges and contradictions; does not look at the system.
    ///
    /// # Errors
    /// [`Error::Setting`] with the first field that is wrong.
    pub fn validate(&self) -> Result<()> {
        let Self { node, ztunnel, .. } = self;
        for name in &node.interfaces {
            check_interface("node.interfaces", name)?;
        }
        let distinct: HashSet<_> = node.interfaces.iter().collect();
        if distinct.len() != node.interfaces.len() || !(1..=UNDERLAYS_MAX).contains(&distinct.len())
        {
            let listed = node.interfaces.join(",");
            return setting(
                "node.interfaces",
                &listed,
                "must be 1 to 8 different interfaces",
            );
        }
        if node.pod_cidrs.len() > POD_CIDRS_MAX {
            return setting(
                "node.pod_cidrs",
                &node.pod_cidrs.len(),
                "must be at most 64 networks",
            );
        }
        for (field, address) in [
            ("node.address", node.address),
            ("ztunnel.address", ztunnel.address),
        ] {
            if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
                return setting(field, &address, "must be an address of an interface");
            }
        }
        if node.address == ztunnel.address {
            return setting(
                "ztunnel.address",
                &ztunnel.address,
                "must differ from node.address",
            );
        }
        check_interface("ztunnel.interface", &ztunnel.interface)?;
        check_interface("ztunnel.host_interface", &ztunnel.host_interface)?;
        if node.interfaces.contains(&ztunnel.host_interface) {
            let reason = "must not be one of node.interfaces";
            return setting("ztunnel.host_interface", &ztunnel.host_interface, reason);
        }
        let v6 = ztunnel.address_v6;
        if v6.is_some_and(|v6| v6.to_ipv4_mapped().is_some() || v6.is_unspecified()) {
            let reason = "must be an IPv6 address of an interface";
            return setting("ztunnel.address_v6", &format!("{v6:?}"), reason);
        }
        Ok(())
    }

    /// Addresses no pod may have.
    fn reserved(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let Self { node, ztunnel, .. } = self;
        [node.address.into(), ztunnel.address.into()]
            .into_iter()
            .chain(ztunnel.address_v6.map(IpAddr::from))
            .chain(node.other_addresses.iter().copied())
    }

    /// Checks one pod against these settings.
    ///
    /// # Errors
    /// [`Error::Setting`] with the first field that is wrong.
    pub fn validate_pod(&self, pod: &Pod) -> Result<()> {
        let uid_sound = (1..=UID_CHARS_MAX).contains(&pod.uid.len())
            && pod
                .uid
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_./:".contains(&b));
        if !uid_sound {
            let reason = "must be 1 to 255 letters, digits or any of -_./:";
            return setting("pods.uid", &pod.uid, reason);
        }
        for (field, name, chars_max) in [
            ("pods.namespace", &pod.namespace, NAMESPACE_CHARS_MAX),
            ("pods.name", &pod.name, NAME_CHARS_MAX),
            ("pods.service_account", &pod.service_account, NAME_CHARS_MAX),
        ] {
            check_name(field, name, chars_max, &pod.uid)?;
        }
        check_interface("pods.host_interface", &pod.host_interface)?;
        if pod.host_interface == self.ztunnel.host_interface
            || self.node.interfaces.contains(&pod.host_interface)
        {
            let reason = "must be neither ztunnel's nor an underlay interface";
            return setting("pods.host_interface", &pod.host_interface, reason);
        }
        if !(1..=POD_ADDRESSES_MAX).contains(&pod.addresses.len()) {
            return setting(
                "pods.addresses",
                &pod.uid,
                "the pod needs 1 to 16 addresses",
            );
        }
        for address in &pod.addresses {
            let usable = !address.is_unspecified()
                && !address.is_loopback()
                && !address.is_multicast()
                && *address == address.to_canonical();
            if !usable {
                let reason = "must be an address of an interface, not ::ffff: and IPv4";
                return setting("pods.addresses", &address, reason);
            }
            if self.reserved().any(|reserved| reserved == *address) {
                let reason = "must differ from ztunnel's and the node's";
                return setting("pods.addresses", &address, reason);
            }
        }
        Ok(())
    }
}

impl Pod {
    /// Whether `other` is captured by the same entries: whose they are may differ.
    pub(crate) fn is_captured_as(&self, other: &Self) -> bool {
        (&self.uid, &self.addresses) == (&other.uid, &other.addresses)
            && (&self.netns, &self.host_interface) == (&other.netns, &other.host_interface)
    }

    /// Its IPv4 addresses.
    pub fn ipv4(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        self.addresses.iter().filter_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            node: Node {
                netns: None,
                other_addresses: vec![],
                interfaces: vec!["und".into()],
                address: [10, 244, 1, 1].into(),
                pod_cidrs: vec!["10.244.0.0/16".parse().unwrap()],
            },
            ztunnel: Ztunnel {
                netns: "/run/netns/z".into(),
                interface: "eth0".into(),
                host_interface: "vz".into(),
                address: [10, 244, 1, 2].into(),
                address_v6: Some("fd00::2".parse().unwrap()),
            },
            state_dir: "/tmp/x".into(),
            dns: false,
            back_end: BackEnd::IptablesTunnel(TunnelSettings {
                variant: Variant::default(),
                iptables: Iptables::default(),
            }),
        }
    }

    fn pod(uid: &str, address: &str, interface: &str) -> Pod {
        Pod {
            uid: uid.into(),
            namespace: "default".into(),
            name: uid.into(),
            service_account: "default".into(),
            addresses: vec![address.parse().unwrap()],
            netns: "/run/netns/p".into(),
            host_interface: interface.into(),
        }
    }

    #[test]
    fn sound_settings_pass() {
        let s = settings();
        s.validate().unwrap();
        s.validate_pod(&pod("a", "10.244.1.11", "va")).unwrap();
        s.validate_pod(&pod("b", "fd00::12", "vb")).unwrap();
    }

    #[test]
    fn contradictions_name_the_field() {
        let mut s = settings();
        s.ztunnel.address = s.node.address;
        assert!(
            s.validate()
                .unwrap_err()
                .to_string()
                .starts_with("ztunnel.address")
        );
        s = settings();
        s.node.interfaces = vec!["und".into(), "und".into()];
        assert!(
            s.validate()
                .unwrap_err()
                .to_string()
                .starts_with("node.interfaces")
        );
        s = settings();
        s.ztunnel.host_interface = "a name".into();
        assert!(
            s.validate()
                .unwrap_err()
                .to_string()
                .starts_with("ztunnel.host_interface")
        );
    }

    #[test]
    fn what_a_pod_cannot_be_names_the_field() {
        let s = settings();
        let wrong = [
            (pod("a", "10.244.1.2", "va"), "pods.addresses"),
            (pod("a", "fd00::2", "va"), "pods.addresses"),
            (pod("a", "::ffff:10.244.1.12", "va"), "pods.addresses"),
            (pod("a", "10.244.1.12", "und"), "pods.host_interface"),
            (pod("a b", "10.244.1.12", "va"), "pods.uid"),
        ];
        for (pod, field) in wrong {
            let text = s.validate_pod(&pod).unwrap_err().to_string();
            assert!(text.starts_with(field), "{text}");
        }
    }
}
