//! Services as a cluster's nodes have them: what kube-proxy's rules do to a connection, without
//! kube-proxy.
//!
//! The rules are its essential ones, under its names: virtual addresses and node ports translated
//! to an endpoint, masquerading of what came for a node port or from outside the pods' network, and
//! of a pod that reaches itself (hairpin); `externalTrafficPolicy: Local`; refusal of a service
//! without endpoints; and KUBE-FORWARD's first rule, which drops what conntrack calls INVALID.
//! Beside them what a node's CNI adds: what pods send to addresses that are not pods' leaves as
//! the node's. Each service has one endpoint, so that whoever asks knows who answers.

mod iptables;
mod nftables;

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use crate::error::{Error, Result};
pub use crate::kinds::Services;
use crate::mesh_file::PORTS;
use crate::network::namespace::HostCommand;
use crate::network::{has_ipv6, netns_path};
use crate::state::directory;
use crate::topology::{Host, Node, OUTSIDE_INTERFACE, service_v6};

/// One port of a service.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Service {
    /// Name, for rules and messages.
    pub name: &'static str,
    /// Last byte of its virtual addresses, which are `10.96.0.N` and `fd00:96::N`.
    last: u8,
    /// Its port.
    pub port: u16,
    /// The host and the port behind it, if there is one.
    pub endpoint: Option<(Host, u16)>,
    /// The nodes' port for it, if it has one.
    pub node_port: Option<NodePort>,
}

/// A port of every node that leads to a service.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NodePort {
    /// The port.
    pub port: u16,
    /// `externalTrafficPolicy: Local`: only to endpoints of the node, which see the client's own
    /// address; dropped where there are none.
    pub local: bool,
}

impl Service {
    /// Its virtual address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        Ipv4Addr::new(10, 96, 0, self.last).into()
    }

    /// Its virtual IPv6 address.
    #[must_use]
    pub fn address_v6(&self) -> IpAddr {
        service_v6(self.last).into()
    }

    const fn new(name: &'static str, last: u8, port: u16, endpoint: Option<(Host, u16)>) -> Self {
        Self {
            name,
            last,
            port,
            endpoint,
            node_port: None,
        }
    }

    const fn with_node_port(self, port: u16, local: bool) -> Self {
        let node_port = Some(NodePort { port, local });
        Self { node_port, ..self }
    }
}

/// Services that no mesh file knows, and node ports.
const OTHERS: [Service; 11] = [
    // Only the node knows these: pods of the mesh and others, a process of a node (as the API
    // server's is), and nobody.
    Service::new("pod-a", 30, 80, Some((Host::ServerA, 8080))),
    Service::new("pod-b", 31, 80, Some((Host::ServerB, 8080))),
    Service::new("node", 32, 443, Some((Host::NodeB, 7080))),
    Service::new("plain", 33, 80, Some((Host::PlainB, 8080))),
    Service::new("strict-of-a", 34, 80, Some((Host::ServerA, 9000))),
    Service::new("strict-of-b", 35, 80, Some((Host::ServerB, 9000))),
    Service::new("nobody", 39, 80, None),
    Service::new("local-a", 21, 80, Some((Host::ServerA, 8080))).with_node_port(30_021, true),
    Service::new("local-b", 22, 80, Some((Host::ServerB, 8080))).with_node_port(30_022, true),
    Service::new("strict-a", 23, 80, Some((Host::ServerA, 9000))).with_node_port(30_031, false),
    Service::new("strict-b", 24, 80, Some((Host::ServerB, 9000))).with_node_port(30_032, false),
];

/// Every service of a lab that has any; first those in front of the servers, which the lab's own
/// mesh file knows, too.
#[must_use]
pub fn all() -> Vec<Service> {
    let mut all = Vec::new();
    let known = [
        ("server-a", Host::ServerA, 11, 30_011),
        ("server-b", Host::ServerB, 12, 30_012),
    ];
    for (name, host, last, node_port) in known {
        for &(port, target) in PORTS {
            let service = Service::new(name, last, port, Some((host, target)));
            all.push(match port {
                80 => service.with_node_port(node_port, false),
                _ => service,
            });
        }
    }
    all.extend(OTHERS);
    all
}

/// One IP version of a lab.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn address(self, host: Host) -> IpAddr {
        match self {
            Self::V4 => host.address(),
            Self::V6 => host.address_v6().into(),
        }
    }

    fn vip(self, service: &Service) -> IpAddr {
        match self {
            Self::V4 => service.address(),
            Self::V6 => service.address_v6(),
        }
    }

    fn pod_cidr(self, node: Node) -> String {
        match self {
            Self::V4 => node.pod_cidr(),
            Self::V6 => node.pod_cidr_v6(),
        }
    }

    /// An address and a port as `--to-destination` and `dnat to` take them.
    fn socket(self, host: Host, port: u16) -> String {
        std::net::SocketAddr::new(self.address(host), port).to_string()
    }

    /// All that is there on this machine.
    fn all() -> impl Iterator<Item = Self> {
        let v6 = has_ipv6().then_some(Self::V6);
        [Self::V4].into_iter().chain(v6)
    }
}

/// Installs the rules on both nodes of the lab `lab`, and the default route that nodes of a cluster
/// have. They go with the nodes' namespaces.
///
/// # Errors
/// [`Error::Command`] with what the tool said.
pub(crate) fn install(lab: &str, services: Services) -> Result<()> {
    if services == Services::None {
        return Ok(());
    }
    for node in Node::ALL {
        for family in Family::all() {
            let (program, text) = match (services, family) {
                (Services::Nftables, _) => ("nft", nftables::rules(node, family)),
                (_, Family::V4) => ("iptables-restore", iptables::rules(node, family)),
                (_, Family::V6) => ("ip6tables-restore", iptables::rules(node, family)),
            };
            let path = directory(lab).join(format!("{}-{program}-{family:?}", node.name()));
            fs::write(&path, text).map_err(Error::io("writing", &path))?;
            let arguments: &[&str] = if program == "nft" { &["-f"] } else { &[] };
            run(lab, node, program, arguments, Some(&path))?;
            let gateway = family.address(Host::Outside).to_string();
            let default = ["route", "add", "default", "via", &gateway, "dev"];
            let link = [OUTSIDE_INTERFACE, "onlink"];
            run(lab, node, "ip", &[&default[..], &link[..]].concat(), None)?;
        }
    }
    Ok(())
}

fn run(
    lab: &str,
    node: Node,
    program: &str,
    arguments: &[&str],
    file: Option<&Path>,
) -> Result<()> {
    let host = node.host();
    let failed = |detail: String| Error::Command {
        what: format!("installing the rules for services on {host}"),
        detail,
    };
    let mut command = HostCommand::new(netns_path(lab, host), program);
    command.args(arguments).args(file);
    let output = command
        .output()
        .map_err(|error| failed(format!("{program}: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    Err(failed(format!("{program}: {}", lines.join("; "))))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_parse_back_and_others_are_refused() {
        for services in Services::ALL {
            assert_eq!(services.name().parse::<Services>().unwrap(), services);
        }
        let error = "ipvs".parse::<Services>().unwrap_err().to_string();
        assert!(error.contains("ipvs") && error.contains("nftables"));
    }

    #[test]
    fn no_two_services_share_an_address_and_port_or_a_node_port() {
        let all = all();
        let unique: HashSet<_> = all.iter().map(|s| (s.address(), s.port)).collect();
        assert_eq!(unique.len(), all.len());
        let ports = all.iter().filter_map(|service| service.node_port);
        let ports: Vec<_> = ports.map(|node_port| node_port.port).collect();
        let unique: HashSet<_> = ports.iter().collect();
        assert_eq!(unique.len(), ports.len());
        assert_eq!(all[0].address_v6().to_string(), "fd00:96::11");
        assert_eq!(Some(all[0].address()), Host::ServerA.service_address());
    }

    #[test]
    fn every_service_is_in_the_rules_of_both_kinds() {
        for family in [Family::V4, Family::V6] {
            for rules in [iptables::rules, nftables::rules] {
                let text = rules(Node::A, family);
                for service in all() {
                    let vip = family.vip(&service).to_string();
                    assert!(text.contains(&vip), "{vip} of {} in\n{text}", service.name);
                    if let Some(NodePort { port, .. }) = service.node_port {
                        assert!(text.contains(&port.to_string()), "{port} in\n{text}");
                    }
                }
                assert!(text.to_lowercase().contains("invalid"), "{text}");
            }
        }
    }
}
