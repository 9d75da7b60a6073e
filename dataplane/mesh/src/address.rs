//! The ways configuration names an endpoint: `network/ip`, `network/cidr`, `namespace/hostname`.
//!
//! All are parsed strictly when read; what has parsed is canonical (IPv4-mapped IPv6 addresses
//! become IPv4), so lookups compare without converting.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::ports;

/// Longest DNS name in text form, in bytes (RFC 1035).
pub(crate) const HOSTNAME_LEN_MAX: usize = 253;

/// Why an address in the configuration was not understood.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AddressError {
    /// Not `network/ip`.
    #[error(
        "`{0}` is not network/ip, such as `network-1/10.0.0.1` (`/10.0.0.1` on the unnamed network)"
    )]
    NetworkAddress(Box<str>),
    /// Not `namespace/hostname`.
    #[error("`{0}` is not namespace/hostname, such as `default/example.com`")]
    Hostname(Box<str>),
    /// Neither of the two forms of a gateway's destination.
    #[error(
        "`{0}` is neither network/ip (`/10.0.0.1` on the unnamed network) nor namespace/hostname"
    )]
    Destination(Box<str>),
    /// Not an address range.
    #[error("`{0}` is not an address or CIDR, such as `10.0.0.0/8`, prefix 0-32 or 0-128 for IPv6")]
    Cidr(Box<str>),
}

/// An address and the network it is meaningful on.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NetworkAddress {
    /// Network id; empty is the unnamed network.
    pub network: Arc<str>,
    /// Address, canonical.
    pub ip: IpAddr,
}

/// A service's primary key: its hostname within a namespace.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NamespacedHostname {
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// DNS name, may begin with `*.`.
    pub hostname: Arc<str>,
}

/// Where a waypoint or network gateway is found.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Destination {
    /// By address: a service's VIP or a workload's own address.
    Address(NetworkAddress),
    /// By name: a service, or else the workload with this hostname.
    Hostname(NamespacedHostname),
}

/// A waypoint or network gateway.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GatewayAddress {
    /// Where it is.
    pub destination: Destination,
    /// Port it accepts HBONE on; mapped through the service's ports if it is a service.
    #[serde(default = "default_hbone_port")]
    pub hbone_mtls_port: u16,
}

/// A range of addresses on a network, as service entries list them.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkCidr {
    /// Network id; empty is the unnamed network.
    #[serde(default = "unnamed")]
    pub network: Arc<str>,
    /// The range.
    pub cidr: Cidr,
}

/// An address range, written as CIDR or as a single address.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Cidr(pub IpNet);

pub(crate) fn default_hbone_port() -> u16 {
    ports::INBOUND_HBONE
}

fn unnamed() -> Arc<str> {
    Arc::from("")
}

/// Shortens and escapes hostile or mistaken text for a one-line message.
pub(crate) fn shown(text: &str) -> Box<str> {
    text.escape_debug().take(128).collect::<String>().into()
}

/// What a waypoint's destination turned out to be, by position in a snapshot.
#[derive(Clone, Debug)]
pub(crate) enum WaypointTarget {
    /// A service, reached on this of its ports.
    Service { index: u32, port: u16 },
    /// A workload, at the address named or else any of its own.
    Workload {
        index: u32,
        ip: Option<IpAddr>,
        port: u16,
    },
    /// Nothing known.
    Unknown { destination: Arc<str> },
}

impl Destination {
    fn from_parts(text: &str) -> Option<Self> {
        let (left, right) = text.split_once('/')?;
        if let Ok(ip) = right.parse::<IpAddr>() {
            let address = NetworkAddress {
                network: left.into(),
                ip: ip.to_canonical(),
            };
            return Some(Self::Address(address));
        }
        NamespacedHostname::from_parts(left, right).map(Self::Hostname)
    }
}

impl NamespacedHostname {
    fn from_parts(namespace: &str, hostname: &str) -> Option<Self> {
        // Digits and dots only are an address with a mistake in it, not a name.
        let address_like = hostname.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        (!namespace.is_empty() && is_hostname(hostname) && !address_like).then(|| Self {
            namespace: namespace.into(),
            hostname: hostname.into(),
        })
    }
}

/// Letters, digits, `-`, `_` and dots, with `*` allowed for wildcard hosts.
pub(crate) fn is_hostname(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'*');
    !text.is_empty() && text.len() <= HOSTNAME_LEN_MAX && text.bytes().all(allowed)
}

impl FromStr for NetworkAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match Destination::from_parts(text) {
            Some(Destination::Address(address)) => Ok(address),
            _ => Err(AddressError::NetworkAddress(shown(text))),
        }
    }
}

impl FromStr for NamespacedHostname {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        text.split_once('/')
            .and_then(|(namespace, hostname)| Self::from_parts(namespace, hostname))
            .ok_or_else(|| AddressError::Hostname(shown(text)))
    }
}

impl FromStr for Destination {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        Self::from_parts(text).ok_or_else(|| AddressError::Destination(shown(text)))
    }
}

impl FromStr for Cidr {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let net = match text.parse::<IpNet>() {
            Ok(net) => net,
            Err(_) => text
                .parse::<IpAddr>()
                .map(|ip| IpNet::from(ip.to_canonical()))
                .map_err(|_| AddressError::Cidr(shown(text)))?,
        };
        Ok(Self(net.trunc()))
    }
}

impl Cidr {
    /// Whether `ip` lies in the range. `ip` must be canonical.
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.0.contains(&ip)
    }
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Hostname(name) => name.fmt(f),
        }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

macro_rules! serde_as_text {
    ($($type:ty),*) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    )*};
}

serde_as_text!(NetworkAddress, NamespacedHostname, Destination, Cidr);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn destinations() {
        let address = |network: &str, ip: &str| {
            Some(Destination::Address(NetworkAddress {
                network: network.into(),
                ip: ip.parse().unwrap(),
            }))
        };
        let host = |namespace: &str, hostname: &str| {
            Some(Destination::Hostname(NamespacedHostname {
                namespace: namespace.into(),
                hostname: hostname.into(),
            }))
        };
        for (text, expected) in [
            ("/10.0.0.1", address("", "10.0.0.1")),
            ("remote/10.0.0.1", address("remote", "10.0.0.1")),
            ("remote/fd00::1", address("remote", "fd00::1")),
            ("/::ffff:10.0.0.1", address("", "10.0.0.1")),
            ("default/example.com", host("default", "example.com")),
            ("default/*.example.com", host("default", "*.example.com")),
            ("10.0.0.1", None),
            ("", None),
            ("/", None),
            ("/example.com", None),
            ("default/", None),
            ("default/10.0.0.300", None),
            ("default/10.0.0.1:80", None),
            ("a/b/c", None),
            ("default/exa mple", None),
        ] {
            assert_eq!(text.parse::<Destination>().ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn cidrs() {
        for (text, contains, lacks) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
            ("10.1.2.3/8", "10.255.0.1", "11.0.0.0"),
            ("10.0.0.1", "10.0.0.1", "10.0.0.2"),
            ("0.0.0.0/0", "1.2.3.4", "::1"),
            ("fd00::/8", "fdff::1", "fc00::1"),
        ] {
            let cidr: Cidr = text.parse().unwrap();
            assert!(cidr.contains(contains.parse().unwrap()), "{text}");
            assert!(!cidr.contains(lacks.parse().unwrap()), "{text}");
        }
        for text in [
            "",
            "10.0.0.0/33",
            "10.0.0/8",
            "10.0.0.0/",
            "fd00::/129",
            "x",
            "10.0.0.0/-1",
        ] {
            assert!(text.parse::<Cidr>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn text_form_round_trips(network in "[a-z0-9-]{0,8}", ip: IpAddr) {
            let address = NetworkAddress { network: network.into(), ip: ip.to_canonical() };
            prop_assert_eq!(address.to_string().parse::<NetworkAddress>().unwrap(), address);
        }

        #[test]
        fn hostile_text_never_panics(text in "\\PC{0,40}") {
            let _ = text.parse::<Destination>();
            let _ = text.parse::<NetworkAddress>();
            let _ = text.parse::<NamespacedHostname>();
            let _ = text.parse::<Cidr>();
        }
    }
}
