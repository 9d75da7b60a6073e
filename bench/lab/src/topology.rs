//! Who is in the lab: hosts, addresses, interface names. Pure data.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::error::Error;

/// Name of the underlay interface inside each node's namespace.
pub const UNDERLAY_INTERFACE: &str = "und";

/// Name of the interface inside each node's namespace that leads out of the cluster.
pub const OUTSIDE_INTERFACE: &str = "ext";

/// One of the two nodes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Node {
    /// Node A: holds the client and the server of the same-node scope.
    A,
    /// Node B: holds the server of the cross-node scope.
    B,
}

impl Node {
    /// Both nodes.
    pub const ALL: [Self; 2] = [Self::A, Self::B];

    /// The node's name, which is its host name in the lab and its Kubernetes node name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "node-a",
            Self::B => "node-b",
        }
    }

    /// The other node.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Address of every pod's default gateway on this node; also what pods see the node as.
    #[must_use]
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.number(), 1)
    }

    /// Address of the node on the underlay.
    #[must_use]
    pub fn underlay(self) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, 9, self.number())
    }

    /// The node's pod range, as `ip route` takes it.
    #[must_use]
    pub fn pod_cidr(self) -> String {
        format!("10.244.{}.0/24", self.number())
    }

    /// The node's IPv6 address on the underlay.
    #[must_use]
    pub fn underlay_v6(self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x31, 9, 0, 0, 0, 0, self.number().into())
    }

    /// The node's range of pods' IPv6 addresses, as `ip route` takes it.
    #[must_use]
    pub fn pod_cidr_v6(self) -> String {
        format!("fd00:244:{}::/64", self.number())
    }

    /// The node's ztunnel pod.
    #[must_use]
    pub fn ztunnel(self) -> Host {
        match self {
            Self::A => Host::ZtunnelA,
            Self::B => Host::ZtunnelB,
        }
    }

    /// The node itself as a host.
    #[must_use]
    pub fn host(self) -> Host {
        match self {
            Self::A => Host::NodeA,
            Self::B => Host::NodeB,
        }
    }

    /// All pods of the node, ztunnel first.
    pub fn pods(self) -> impl Iterator<Item = Host> {
        Host::ALL
            .into_iter()
            .filter(move |host| host.node() == self && host.role().is_pod())
    }

    fn number(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }
}

/// What a host is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// A node: forwards, runs the node agent.
    Node,
    /// A ztunnel pod.
    Ztunnel,
    /// A pod in the mesh: its traffic is captured.
    MeshPod,
    /// A pod outside the mesh.
    PlainPod,
    /// A waypoint: has a mesh identity and speaks HBONE itself, so it is not captured.
    Waypoint,
    /// A machine outside the cluster.
    Outside,
}

impl Role {
    /// Whether a host of this role is a pod of a node.
    #[must_use]
    pub fn is_pod(self) -> bool {
        !matches!(self, Self::Node | Self::Outside)
    }
}

/// A host of the lab; each has a network namespace of its own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Host {
    /// Node A.
    NodeA,
    /// Node B.
    NodeB,
    /// ztunnel of node A.
    ZtunnelA,
    /// ztunnel of node B.
    ZtunnelB,
    /// Client pod on node A.
    ClientA,
    /// Server pod on the client's node.
    ServerA,
    /// Server pod on the other node.
    ServerB,
    /// Pod outside the mesh on node B.
    PlainB,
    /// Waypoint on node B.
    WaypointB,
    /// A machine outside the cluster, with a link of its own to each node.
    Outside,
}

impl Host {
    /// Every host: nodes first, then pods, then what is outside.
    pub const ALL: [Self; 10] = [
        Self::NodeA,
        Self::NodeB,
        Self::ZtunnelA,
        Self::ZtunnelB,
        Self::ClientA,
        Self::ServerA,
        Self::ServerB,
        Self::PlainB,
        Self::WaypointB,
        Self::Outside,
    ];

    /// The host's name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::NodeA => "node-a",
            Self::NodeB => "node-b",
            Self::ZtunnelA => "ztunnel-a",
            Self::ZtunnelB => "ztunnel-b",
            Self::ClientA => "client-a",
            Self::ServerA => "server-a",
            Self::ServerB => "server-b",
            Self::PlainB => "plain-b",
            Self::WaypointB => "waypoint-b",
            Self::Outside => "outside",
        }
    }

    /// The node the host is, or runs on; for the host outside the one that is the first on its way.
    #[must_use]
    pub fn node(self) -> Node {
        match self {
            Self::NodeA | Self::ZtunnelA | Self::ClientA | Self::ServerA | Self::Outside => Node::A,
            Self::NodeB | Self::ZtunnelB | Self::ServerB | Self::PlainB | Self::WaypointB => {
                Node::B
            }
        }
    }

    /// What the host is for.
    #[must_use]
    pub fn role(self) -> Role {
        match self {
            Self::NodeA | Self::NodeB => Role::Node,
            Self::ZtunnelA | Self::ZtunnelB => Role::Ztunnel,
            Self::ClientA | Self::ServerA | Self::ServerB => Role::MeshPod,
            Self::PlainB => Role::PlainPod,
            Self::WaypointB => Role::Waypoint,
            Self::Outside => Role::Outside,
        }
    }

    /// The host's address: a pod's own, a node's on the underlay; outside one of TEST-NET-1
    /// (RFC 5737).
    #[must_use]
    pub fn address(self) -> IpAddr {
        let last = match self {
            Self::NodeA | Self::NodeB => return self.node().underlay().into(),
            Self::ZtunnelA | Self::ZtunnelB => 2,
            Self::ClientA | Self::ServerB => 11,
            Self::ServerA | Self::PlainB => 12,
            Self::WaypointB => 13,
            Self::Outside => return Ipv4Addr::new(192, 0, 2, 10).into(),
        };
        let [a, b, c, _] = self.node().gateway().octets();
        Ipv4Addr::new(a, b, c, last).into()
    }

    /// The host's IPv6 address: a pod's own, a node's on the underlay. A pod's ends as its IPv4
    /// address does.
    #[must_use]
    pub fn address_v6(self) -> Ipv6Addr {
        let node = self.node();
        if self == Self::Outside {
            return Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10);
        }
        match self.address() {
            IpAddr::V4(own) if self != node.host() => {
                // As it reads: 10.244.1.11 is fd00:244:1::11.
                let last = as_it_reads(own.octets()[3]);
                Ipv6Addr::new(0xfd00, 0x244, node.number().into(), 0, 0, 0, 0, last)
            }
            _ => node.underlay_v6(),
        }
    }

    /// Virtual address of the service in front of this host, for the hosts that have one.
    #[must_use]
    pub fn service_address(self) -> Option<IpAddr> {
        match self {
            Self::ServerA => Some(Ipv4Addr::new(10, 96, 0, 11).into()),
            Self::ServerB => Some(Ipv4Addr::new(10, 96, 0, 12).into()),
            _ => None,
        }
    }

    /// Virtual IPv6 address of that service. Ends as its IPv4 address does.
    #[must_use]
    pub fn service_address_v6(self) -> Option<Ipv6Addr> {
        match self.service_address()? {
            IpAddr::V4(v4) => Some(service_v6(v4.octets()[3])),
            IpAddr::V6(v6) => Some(v6),
        }
    }

    /// Name of the pod's interface on the node's side; the node's underlay interface for a node,
    /// and the one that leads out of the cluster for the host outside.
    #[must_use]
    pub fn host_interface(self) -> &'static str {
        match self {
            Self::NodeA | Self::NodeB => UNDERLAY_INTERFACE,
            Self::ZtunnelA | Self::ZtunnelB => "vz",
            Self::ClientA => "va1",
            Self::ServerA => "va2",
            Self::ServerB => "vb1",
            Self::PlainB => "vb2",
            Self::WaypointB => "vb3",
            Self::Outside => OUTSIDE_INTERFACE,
        }
    }
}

/// The virtual IPv6 address that ends as it reads: 12 is `fd00:96::12`.
pub(crate) fn service_v6(last: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, as_it_reads(last))
}

/// Hexadecimal digits that read as the decimal ones of a number below 100.
fn as_it_reads(last: u8) -> u16 {
    u16::from(last / 10) * 16 + u16::from(last % 10)
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Host {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|host| host.name() == name)
            .ok_or_else(|| Error::UnknownHost {
                host: name.to_owned(),
                known: Self::ALL.map(Self::name).join(", "),
            })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_parse_back_and_unknown_names_list_the_hosts() {
        for host in Host::ALL {
            assert_eq!(host.name().parse::<Host>().unwrap(), host);
        }
        let error = "server-c".parse::<Host>().unwrap_err().to_string();
        assert!(
            error.contains("server-c") && error.contains("outside"),
            "{error}"
        );
    }

    #[test]
    fn addresses_and_interfaces_are_unique_where_they_must_be() {
        let addresses: HashSet<_> = Host::ALL.iter().map(|host| host.address()).collect();
        assert_eq!(addresses.len(), Host::ALL.len());
        for node in Node::ALL {
            let names: Vec<_> = node.pods().map(Host::host_interface).collect();
            let unique: HashSet<_> = names.iter().collect();
            assert_eq!(unique.len(), names.len());
        }
        assert_eq!(Host::WaypointB.address().to_string(), "10.244.2.13");
        assert_eq!(Host::WaypointB.address_v6().to_string(), "fd00:244:2::13");
        let addresses: HashSet<_> = Host::ALL.iter().map(|host| host.address_v6()).collect();
        assert_eq!(addresses.len(), Host::ALL.len());
        assert_eq!(Node::B.pods().count(), 4);
    }
}
