//! What a lab can be made of: the choices of `lab up`, by their names on the command line, in
//! reports and in the lab's state.

use std::fmt;
use std::str::FromStr;

pub use redirect::Variant;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Which path captured traffic takes to ztunnel.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Redirect {
    /// No ztunnel and no redirection: plain forwarding.
    None,
    /// iptables marks, policy routes and a tunnel, as Istio 1.17 to 1.20.
    Tunnel,
    /// tc programs and sk_lookup.
    #[default]
    Ebpf,
}

impl Redirect {
    /// The name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Tunnel => redirect::Redirect::Tunnel.name(),
            Self::Ebpf => redirect::Redirect::Ebpf.name(),
        }
    }
}

impl fmt::Display for Redirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Redirect {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        [Self::None, Self::Tunnel, Self::Ebpf]
            .into_iter()
            .find(|redirect| redirect.name() == text)
            .ok_or_else(|| {
                Error::Options(format!("redirect `{text}` is none of none, tunnel, ebpf"))
            })
    }
}

/// What stands in ztunnel's place, and so how it is run.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProxyKind {
    /// A ztunnel that takes this project's environment: all pods of the node, registering its
    /// listeners where redirection asks for it.
    #[default]
    Shared,
    /// Nothing of a proxy: a server that answers by itself what is redirected to it.
    Listener,
    /// Any ztunnel, in upstream's `dedicated` mode for the node's main pod.
    Dedicated,
    /// Envoy: TCP proxies, each connection with a TLS session of its own to the other node.
    EnvoyTcp,
    /// Envoy: HBONE, streams of shared HTTP/2 connections.
    EnvoyHbone,
    /// HAProxy: TCP proxies, each connection with a TLS session of its own to the other node.
    Haproxy,
}

impl ProxyKind {
    /// Every kind.
    pub const ALL: [Self; 6] = [
        Self::Shared,
        Self::Listener,
        Self::Dedicated,
        Self::EnvoyTcp,
        Self::EnvoyHbone,
        Self::Haproxy,
    ];

    /// The name in reports and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Listener => "listener",
            Self::Dedicated => "dedicated",
            Self::EnvoyTcp => "envoy-tcp",
            Self::EnvoyHbone => "envoy-hbone",
            Self::Haproxy => "haproxy",
        }
    }

    /// Whether it registers its listeners with the eBPF redirection.
    #[must_use]
    pub fn registers_listeners(self) -> bool {
        matches!(self, Self::Shared | Self::Listener)
    }
}

impl fmt::Display for ProxyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ProxyKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == text)
            .ok_or_else(|| {
                let names = Self::ALL.map(Self::name).join(", ");
                Error::Options(format!("proxy `{text}` is none of {names}"))
            })
    }
}

/// Whose rules for services a lab's nodes have.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Services {
    /// None: nodes only forward, without conntrack.
    #[default]
    None,
    /// kube-proxy's in iptables mode.
    Iptables,
    /// kube-proxy's in nftables mode.
    Nftables,
}

impl Services {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::None, Self::Iptables, Self::Nftables];

    /// The name on the command line and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }

    /// The programs that install them, and the Debian packages that hold those.
    pub(crate) fn programs(self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let program = match self {
            Self::None => None,
            Self::Iptables => Some(("iptables-restore", "iptables")),
            Self::Nftables => Some(("nft", "nftables")),
        };
        program.into_iter()
    }
}

impl fmt::Display for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Services {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|services| services.name() == text)
            .ok_or_else(|| {
                Error::Options(format!(
                    "services `{text}` is none of none, iptables, nftables"
                ))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirect_and_variant_names_parse_back() {
        for redirect in [Redirect::None, Redirect::Tunnel, Redirect::Ebpf] {
            assert_eq!(redirect.name().parse::<Redirect>().unwrap(), redirect);
        }
        assert!(
            "geneve"
                .parse::<Redirect>()
                .unwrap_err()
                .to_string()
                .contains("tunnel")
        );
        assert_eq!("faithful".parse::<Variant>().unwrap(), Variant::Faithful);
        assert!("fast".parse::<Variant>().is_err());
    }
}
