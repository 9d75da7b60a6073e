//! What a lab looks like right now.

use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use crate::kinds::{Redirect, Services};
use crate::network::{has_ipv6, namespace, netns_path};
use crate::process;
use crate::state::State;
use crate::topology::{Host, Node, Role};
use crate::ztunnel;

/// State of a lab; serialises to what `lab status --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// Name of the lab.
    pub name: String,
    /// Every host.
    pub hosts: Vec<HostStatus>,
    /// Redirection in use.
    pub redirect: Redirect,
    /// Whether ztunnel was asked to use sockmap short-cuts.
    pub sockmap: bool,
    /// Whose rules for services the nodes have.
    pub services: Services,
    /// `geneve` or `vxlan` on the `tunnel` path.
    pub tunnel_driver: Option<String>,
    /// Whether all namespaces exist and, with a redirection, every agent runs and every ztunnel
    /// is ready.
    pub ready: bool,
    /// What is missing for `ready`, empty if it is true.
    pub missing: Vec<String>,
}

/// State of one host.
#[derive(Clone, Debug, Serialize)]
pub struct HostStatus {
    /// Name of the host.
    pub name: &'static str,
    /// The node it is, or runs on; `-` outside the cluster.
    pub node: &'static str,
    /// Its addresses; a node's underlay address first, then what its pods see it as; IPv6 last.
    pub addresses: Vec<IpAddr>,
    /// Name of its network namespace.
    pub netns: String,
    /// Processes in its namespace.
    pub pids: Vec<u32>,
}

/// Looks at the lab described by `state`.
pub(crate) fn observe(state: &State) -> Status {
    let lab = &state.name;
    let processes = process::inside(lab);
    let hosts = Host::ALL.map(|host| HostStatus {
        name: host.name(),
        node: match host.role() {
            Role::Outside => "-",
            _ => host.node().name(),
        },
        addresses: addresses(host),
        netns: crate::network::netns_name(lab, host),
        pids: processes
            .iter()
            .filter(|p| p.host == host.name())
            .map(|p| p.pid)
            .collect(),
    });
    let missing = missing(state);
    Status {
        name: lab.clone(),
        hosts: hosts.into(),
        redirect: state.redirect,
        sockmap: state.sockmap,
        services: state.services,
        tunnel_driver: state.tunnel_driver.clone(),
        ready: missing.is_empty(),
        missing,
    }
}

fn addresses(host: Host) -> Vec<IpAddr> {
    let gateway = IpAddr::from(host.node().gateway());
    let is_node = host == host.node().host();
    let v6 = has_ipv6().then(|| IpAddr::from(host.address_v6()));
    [host.address()]
        .into_iter()
        .chain(is_node.then_some(gateway))
        .chain(v6)
        .collect()
}

fn missing(state: &State) -> Vec<String> {
    let lab = &state.name;
    let mut missing = Vec::new();
    for host in Host::ALL {
        if namespace::inode(&netns_path(lab, host)).is_none() {
            missing.push(format!("namespace of {host}"));
        }
    }
    if state.redirect == Redirect::None {
        return missing;
    }
    for process in state.processes.iter().filter(|process| !process.alive()) {
        missing.push(format!(
            "{} on {} (pid {})",
            process.program, process.host, process.pid
        ));
    }
    for host in Node::ALL.map(Node::ztunnel) {
        if !ztunnel::is_ready(lab, host) {
            missing.push(format!("readiness of {host}"));
        }
    }
    missing
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sockmap = if self.sockmap { "on" } else { "off" };
        write!(
            f,
            "lab {}: redirect {}, sockmap {sockmap}, services {}",
            self.name, self.redirect, self.services
        )?;
        if let Some(driver) = &self.tunnel_driver {
            write!(f, ", tunnel driver {driver}")?;
        }
        if self.ready {
            writeln!(f, ", ready")?;
        } else {
            writeln!(f, ", NOT ready: missing {}", self.missing.join(", "))?;
        }
        writeln!(
            f,
            "{:<11} {:<7} {:<36} {:<15} pids",
            "host", "node", "addresses", "namespace"
        )?;
        for host in &self.hosts {
            let addresses: Vec<_> = host.addresses.iter().map(IpAddr::to_string).collect();
            let pids: Vec<_> = host.pids.iter().map(u32::to_string).collect();
            let (addresses, pids) = (addresses.join(" "), pids.join(" "));
            let pids = if pids.is_empty() { "-" } else { &pids };
            writeln!(
                f,
                "{:<11} {:<7} {addresses:<36} {:<15} {pids}",
                host.name, host.node, host.netns
            )?;
        }
        Ok(())
    }
}
