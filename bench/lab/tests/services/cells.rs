//! The matrix: who asks whom, how, and what must come of it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use lab::network::has_ipv6;
use lab::{Host, Redirect, services};

/// Port of the servers of pods; the strict port refuses plain text (see [`MESH_POLICY`]).
pub(crate) const APP_PORT: u16 = 8080;
pub(crate) const STRICT_PORT: u16 = 9000;
/// Port of the servers that are not in pods.
pub(crate) const HOST_PORT: u16 = 7080;

/// What STRICT is to a ztunnel, for one port.
pub(crate) const MESH_POLICY: &str = "policies:\n\
    - name: strict-9000\n  namespace: default\n  scope: Namespace\n  action: Deny\n  \
    rules:\n  - - - destinationPorts: [9000]\n        notPrincipals:\n        - Presence: []\n";

/// Where nodes refuse: the node, the host that is asked, the port, and how by IPv4 and by IPv6.
pub(crate) const REJECTS: [(&str, &str, u16, &str, &str); 3] = [
    ("node-a", "plain-b", 7001, "tcp-reset", "tcp-reset"),
    (
        "node-b",
        "plain-b",
        7002,
        "icmp-host-unreachable",
        "icmp6-addr-unreachable",
    ),
    ("node-b", "server-b", 7003, "tcp-reset", "tcp-reset"),
];

/// Who asks. `hostnet-a` is a process of node A with the node's own address, as a pod with
/// `hostNetwork` is, where `node-a` has the address that the way gives it, as the kubelet.
pub(crate) const SOURCES: [&str; 8] = [
    "client-a",
    "server-a",
    "server-b",
    "plain-b",
    "node-a",
    "hostnet-a",
    "node-b",
    "outside",
];

/// How it is asked.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(crate) enum Way {
    /// A TCP connection, a question and an answer.
    Tcp,
    /// More than fits the path's packets, there and back: the path's MTU must be found.
    Bulk,
    /// A datagram and its answer.
    Udp,
    /// A datagram too large for the path.
    Large,
    /// ICMP echo.
    Echo,
}

impl Way {
    pub(crate) const PORTED: [Self; 4] = [Self::Tcp, Self::Bulk, Self::Udp, Self::Large];

    pub(crate) fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp | Self::Bulk)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Bulk => "bulk",
            Self::Udp => "udp",
            Self::Large => "large",
            Self::Echo => "echo",
        }
    }
}

/// What is asked: `pod server-a`, `vip server-b`, `nodeport node-a local-b`, `node node-b` ...
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) name: String,
    pub(crate) v4: SocketAddr,
    pub(crate) v6: SocketAddr,
    /// Who answers in the end, if anybody does.
    pub(crate) endpoint: Option<Host>,
    /// Whether plain text is to be refused there.
    pub(crate) strict: bool,
}

/// One question.
#[derive(Clone, Debug)]
pub(crate) struct Cell {
    pub(crate) from: &'static str,
    pub(crate) target: Target,
    pub(crate) way: Way,
    pub(crate) v6: bool,
}

impl Cell {
    pub(crate) fn to(&self) -> SocketAddr {
        if self.v6 {
            self.target.v6
        } else {
            self.target.v4
        }
    }

    /// The host whose namespace the question comes from.
    pub(crate) fn host(&self) -> &'static str {
        match self.from {
            "hostnet-a" => "node-a",
            host => host,
        }
    }

    /// The address to ask from, where it is not the way's choice.
    pub(crate) fn bind(&self) -> Option<IpAddr> {
        let node = Host::NodeA;
        (self.from == "hostnet-a").then(|| match self.v6 {
            true => node.address_v6().into(),
            false => node.address(),
        })
    }

    pub(crate) fn family(&self) -> &'static str {
        if self.v6 { "v6" } else { "v4" }
    }

    fn asking_host(&self) -> Host {
        self.host().parse().unwrap()
    }

    /// Whether a ztunnel accepts it before its end does.
    pub(crate) fn has_a_ztunnel(&self) -> bool {
        let meshed_end = self.target.endpoint.is_some_and(is_meshed);
        self.way.is_tcp() && (is_meshed(self.asking_host()) || meshed_end)
    }

    /// Whether both ends are of the mesh and ztunnel knows the address that is asked.
    fn is_mesh_to_mesh(&self) -> bool {
        let known = ["pod ", "vip "]
            .iter()
            .any(|kind| self.target.name.starts_with(kind));
        is_meshed(self.asking_host()) && known
    }

    /// Whether the node of the endpoint itself asks: the kubelet's probes, never refused.
    fn is_own_node(&self) -> bool {
        let own = |end: Host| end.node().host() == self.asking_host();
        let elsewhere = self
            .target
            .name
            .strip_prefix("nodeport ")
            .is_some_and(|name| !name.starts_with(self.host()));
        self.target.endpoint.is_some_and(own) && !elsewhere
    }

    /// What is to come of it on `redirect`, if that is not what comes of it without a mesh.
    pub(crate) fn by_design(&self, redirect: Redirect) -> Option<Expected> {
        if redirect == Redirect::None {
            return None;
        }
        if redirect == Redirect::Tunnel && self.v6 && self.way.is_tcp() {
            // The path is IPv4's: IPv6 must not get around it.
            let itself = self.target.name == format!("pod {}", self.from)
                || self.target.name == format!("pod {} strict", self.from);
            let to_its_node = self.target.endpoint == Some(self.asking_host().node().host());
            let from_pod = is_meshed(self.asking_host()) && !itself && !to_its_node;
            let to_pod = self.target.endpoint.is_some_and(is_meshed) && !self.is_own_node();
            if from_pod || (to_pod && !itself) {
                return Some(Expected::NoAnswer);
            }
        }
        if self.target.strict && self.way.is_tcp() && !self.is_mesh_to_mesh() && !self.is_own_node()
        {
            return Some(Expected::Refused);
        }
        None
    }
}

/// What must come of a cell whatever the twin says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Expected {
    /// Silence.
    NoAnswer,
    /// An end without an answer, of any kind.
    Refused,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (way, family) = (self.way.name(), self.family());
        write!(f, "{} -> {} {way} {family}", self.from, self.target.name)
    }
}

pub(crate) fn is_meshed(host: Host) -> bool {
    host.role() == lab::Role::MeshPod
}

fn target(name: String, v4: IpAddr, v6: IpAddr, port: u16, endpoint: Option<Host>) -> Target {
    let strict = name.contains("strict");
    Target {
        name,
        v4: SocketAddr::new(v4, port),
        v6: SocketAddr::new(v6, port),
        endpoint,
        strict,
    }
}

fn at_host(name: String, host: Host, port: u16) -> Target {
    target(
        name,
        host.address(),
        host.address_v6().into(),
        port,
        Some(host),
    )
}

/// Everything that can be asked.
fn targets() -> Vec<Target> {
    let mut all = Vec::new();
    for host in [Host::ServerA, Host::ServerB, Host::PlainB] {
        all.push(at_host(format!("pod {host}"), host, APP_PORT));
        if is_meshed(host) {
            all.push(at_host(format!("pod {host} strict"), host, STRICT_PORT));
        }
    }
    for host in [Host::NodeA, Host::NodeB, Host::Outside] {
        all.push(at_host(format!("host {host}"), host, HOST_PORT));
    }
    for (node, host, port, how, _) in REJECTS {
        let name = format!("{host} rejected by {node} with {how}");
        all.push(at_host(name, host.parse().unwrap(), port));
    }
    for service in services::all() {
        let endpoint = service.endpoint.map(|(host, _)| host);
        let name = service.name;
        // Of the ports in front of the servers the usual one and the strict one.
        let known = Host::ServerA.service_address() == Some(service.address())
            || Host::ServerB.service_address() == Some(service.address());
        let name = match (known, service.port) {
            (true, 80) => format!("vip {name}"),
            (true, STRICT_PORT) => format!("vip {name} strict"),
            (true, _) => continue,
            (false, _) => format!("unknown {name}"),
        };
        let by_node_port_only = service.node_port.is_some() && !known;
        if !by_node_port_only {
            let (v4, v6) = (service.address(), service.address_v6());
            all.push(target(name, v4, v6, service.port, endpoint));
        }
        if let Some(node_port) = service.node_port {
            for node in [Host::NodeA, Host::NodeB] {
                let name = format!("nodeport {node} {}", service.name);
                let (v4, v6) = (node.address(), node.address_v6().into());
                all.push(target(name, v4, v6, node_port.port, endpoint));
            }
        }
    }
    all
}

/// Every question.
pub(crate) fn all() -> Vec<Cell> {
    let families: &[bool] = if has_ipv6() { &[false, true] } else { &[false] };
    let mut cells = Vec::new();
    for &v6 in families {
        for from in SOURCES {
            for target in targets() {
                let plain = target.name.starts_with("pod ") || target.name.starts_with("host ");
                let echo = (plain && !target.strict).then_some(Way::Echo);
                let nobody = target.endpoint.is_none();
                let rejected = target.name.contains("rejected");
                for way in Way::PORTED.into_iter().chain(echo) {
                    let said_by_tcp = (target.strict || nobody) && way == Way::Bulk;
                    let said_by_udp = (target.strict || nobody) && way == Way::Large;
                    if !said_by_tcp && !said_by_udp && (!rejected || way == Way::Tcp) {
                        let target = target.clone();
                        cells.push(Cell {
                            from,
                            target,
                            way,
                            v6,
                        });
                    }
                }
            }
        }
    }
    cells
}
