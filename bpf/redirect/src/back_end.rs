//! What belongs to one back end and not to the other.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Of one back end or of the other: settings, what it found out when it was installed, status.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BackEnd<E, T> {
    /// Of `ebpf`.
    Ebpf(E),
    /// Of `tunnel`.
    IptablesTunnel(T),
}

impl<E, T> BackEnd<E, T> {
    /// Which one it is.
    pub const fn redirect(&self) -> Redirect {
        match self {
            Self::Ebpf(_) => Redirect::Ebpf,
            Self::IptablesTunnel(_) => Redirect::Tunnel,
        }
    }

    /// If it is `ebpf`'s.
    pub const fn ebpf(&self) -> Option<&E> {
        match self {
            Self::Ebpf(own) => Some(own),
            Self::IptablesTunnel(_) => None,
        }
    }

    /// If it is `tunnel`'s.
    pub const fn iptables_tunnel(&self) -> Option<&T> {
        match self {
            Self::Ebpf(_) => None,
            Self::IptablesTunnel(own) => Some(own),
        }
    }
}

/// The back ends, by the names that they have in the configuration, in the journal and in what
/// `node-agent status` prints.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Redirect {
    /// iptables, policy routes and tunnels.
    Tunnel,
    /// BPF programs.
    Ebpf,
}

impl Redirect {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Ebpf => "ebpf",
        }
    }
}

impl fmt::Display for Redirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How the programs are attached to interfaces. What is installed in one way is not mixed with the
/// other.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AttachedBy {
    /// By links, from Linux 6.6.
    Tcx,
    /// By filters of a clsact qdisc.
    Clsact,
}

impl AttachedBy {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

impl FromStr for AttachedBy {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut all = [Self::Tcx, Self::Clsact].into_iter();
        all.find(|by| by.name() == text).ok_or(())
    }
}

/// What makes the tunnels between node and ztunnel.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// As Istio's.
    Geneve,
    /// Where the kernel has no GENEVE.
    Vxlan,
}

impl Driver {
    /// In the order in which they are tried.
    pub(crate) const ALL: [Self; 2] = [Self::Geneve, Self::Vxlan];

    /// Its name, which is also the kernel's.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Geneve => "geneve",
            Self::Vxlan => "vxlan",
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The tunnels as they were made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Tunnels {
    pub(crate) driver: Driver,
    /// UDP port.
    pub(crate) port: u16,
}

impl fmt::Display for Tunnels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.driver, self.port)
    }
}

impl FromStr for Tunnels {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (driver, port) = text.split_once(':').ok_or(())?;
        let mut drivers = Driver::ALL.into_iter();
        Ok(Self {
            driver: drivers.find(|known| known.name() == driver).ok_or(())?,
            port: port.parse().map_err(drop)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnels_are_read_as_they_are_written() {
        let tunnels = Tunnels {
            driver: Driver::Vxlan,
            port: 6082,
        };
        assert_eq!(tunnels.to_string().parse(), Ok(tunnels));
        assert_eq!("gre:1".parse::<Tunnels>(), Err(()));
        assert_eq!("vxlan:x".parse::<Tunnels>(), Err(()));
    }
}
