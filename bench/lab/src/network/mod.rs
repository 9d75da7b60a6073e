//! Building the network: namespaces, links, addresses and routes, by `ip` from iproute2.
//!
//! Pod wiring is point to point, as cloud CNIs do it: the pod has a /32 on `eth0` and a default
//! route through its end of a veth pair; the node has a /32 route per pod and carries the gateway
//! address on every pod link. Pairs are created inside the namespaces they end in. IPv6 is wired
//! alike, with fe80::1 as every pod's gateway, unless the machine has none. A host outside the
//! cluster has a link to each node and reaches pods through their node, as in networks that route
//! pods' addresses.

pub mod namespace;
pub mod sysctl;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, Result};
use crate::lock::Lock;
use crate::topology::{Host, Node, OUTSIDE_INTERFACE, UNDERLAY_INTERFACE};

/// MTU of every link, in bytes.
pub const MTU: u32 = 1500;

/// The pods' IPv6 gateway, on every pod link; also the nodes' address on the link that leads out.
const GATEWAY_V6: &str = "fe80::1";

/// The outside host's interface to a node.
fn outside_link(node: Node) -> &'static str {
    match node {
        Node::A => "eth0",
        Node::B => "eth1",
    }
}

/// Whether this kernel has IPv6.
#[must_use]
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// Name of `host`'s namespace in the lab `lab`.
#[must_use]
pub fn netns_name(lab: &str, host: Host) -> String {
    format!("{lab}-{host}")
}

/// File of `host`'s namespace in the lab `lab`.
#[must_use]
pub fn netns_path(lab: &str, host: Host) -> PathBuf {
    namespace::path(&netns_name(lab, host))
}

/// Creates all namespaces, links, addresses and routes of the lab `lab`.
///
/// # Errors
/// [`Error::Command`] with the line `ip` refused, or a sysctl or namespace failure. What was made
/// until then stays; the caller removes it.
pub(crate) fn build(lab: &str, lock: &Lock) -> Result<()> {
    let names = Host::ALL.map(|host| netns_name(lab, host));
    let mut batch = String::new();
    for name in &names {
        line(&mut batch, format_args!("netns add {name}"));
    }
    ip(lock, "creating network namespaces", None, &batch)?;
    for host in Host::ALL {
        let path = netns_path(lab, host);
        namespace::in_namespace(&path, || sysctl::apply(host.role()))??;
    }
    for node in Node::ALL {
        let netns = netns_name(lab, node.host());
        ip(
            lock,
            &format!("wiring {netns}"),
            Some(&netns),
            &[node_batch(lab, node), if_ipv6(|| node_batch_v6(node))].concat(),
        )?;
    }
    for host in Host::ALL.into_iter().filter(|host| host.role().is_pod()) {
        let netns = netns_name(lab, host);
        ip(
            lock,
            &format!("wiring {netns}"),
            Some(&netns),
            &[pod_batch(host), if_ipv6(|| pod_batch_v6(host))].concat(),
        )?;
    }
    let outside = netns_name(lab, Host::Outside);
    ip(
        lock,
        &format!("wiring {outside}"),
        Some(&outside),
        &[outside_batch(), if_ipv6(outside_batch_v6)].concat(),
    )?;
    for node in Node::ALL {
        let netns = netns_name(lab, node.host());
        ip(
            lock,
            &format!("routing on {netns}"),
            Some(&netns),
            &[route_batch(node), if_ipv6(|| route_batch_v6(node))].concat(),
        )?;
    }
    Ok(())
}

fn if_ipv6(batch: impl FnOnce() -> String) -> String {
    if has_ipv6() { batch() } else { String::new() }
}

/// Removes the namespaces of the lab `lab` that exist, and every link with them. Returns whether
/// there were any.
///
/// # Errors
/// [`Error::Command`] if a namespace could not be removed.
pub(crate) fn remove(lab: &str, lock: &Lock) -> Result<bool> {
    let mut batch = String::new();
    for host in Host::ALL {
        // A plain file without a namespace behind it is removed by the same command.
        if netns_path(lab, host).exists() {
            line(
                &mut batch,
                format_args!("netns del {}", netns_name(lab, host)),
            );
        }
    }
    if batch.is_empty() {
        return Ok(false);
    }
    ip(lock, "removing network namespaces", None, &batch)?;
    Ok(true)
}

/// The first namespace of the lab `lab` that exists.
pub(crate) fn existing(lab: &str) -> Option<String> {
    Host::ALL
        .into_iter()
        .find(|host| netns_path(lab, *host).exists())
        .map(|host| netns_name(lab, host))
}

/// Commands in a node's namespace that create its links and give them their addresses.
fn node_batch(lab: &str, node: Node) -> String {
    let mut batch = String::new();
    line(&mut batch, format_args!("link set lo up"));
    if node == Node::A {
        let peer = netns_name(lab, Node::B.host());
        line(
            &mut batch,
            format_args!(
                "link add {UNDERLAY_INTERFACE} mtu {MTU} type veth \
                 peer name {UNDERLAY_INTERFACE} mtu {MTU} netns {peer}"
            ),
        );
    }
    let underlay = node.underlay();
    line(
        &mut batch,
        format_args!("addr add {underlay}/24 dev {UNDERLAY_INTERFACE}"),
    );
    line(&mut batch, format_args!("link set {UNDERLAY_INTERFACE} up"));
    let (outside, peer) = (Host::Outside.address(), netns_name(lab, Host::Outside));
    let link = outside_link(node);
    line(
        &mut batch,
        format_args!(
            "link add {OUTSIDE_INTERFACE} mtu {MTU} type veth \
             peer name {link} mtu {MTU} netns {peer}"
        ),
    );
    line(
        &mut batch,
        format_args!("addr add {underlay}/32 dev {OUTSIDE_INTERFACE}"),
    );
    line(&mut batch, format_args!("link set {OUTSIDE_INTERFACE} up"));
    line(
        &mut batch,
        format_args!("route add {outside}/32 dev {OUTSIDE_INTERFACE} src {underlay}"),
    );
    for pod in node.pods() {
        let (interface, peer) = (pod.host_interface(), netns_name(lab, pod));
        line(
            &mut batch,
            format_args!(
                "link add {interface} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {peer}"
            ),
        );
        line(
            &mut batch,
            format_args!("addr add {}/32 dev {interface}", node.gateway()),
        );
        line(&mut batch, format_args!("link set {interface} up"));
        line(
            &mut batch,
            format_args!(
                "route add {}/32 dev {interface} scope link src {}",
                pod.address(),
                node.gateway()
            ),
        );
    }
    batch
}

/// The same for IPv6. Without looking for duplicates, which would take seconds.
fn node_batch_v6(node: Node) -> String {
    let mut batch = String::new();
    let underlay = node.underlay_v6();
    line(
        &mut batch,
        format_args!("addr add {underlay}/64 dev {UNDERLAY_INTERFACE} nodad"),
    );
    line(
        &mut batch,
        format_args!("addr add {GATEWAY_V6}/64 dev {OUTSIDE_INTERFACE} nodad"),
    );
    line(
        &mut batch,
        format_args!(
            "route add {}/128 dev {OUTSIDE_INTERFACE} src {underlay}",
            Host::Outside.address_v6()
        ),
    );
    for pod in node.pods() {
        let (interface, address) = (pod.host_interface(), pod.address_v6());
        line(
            &mut batch,
            format_args!("addr add {GATEWAY_V6}/64 dev {interface} nodad"),
        );
        line(
            &mut batch,
            format_args!("route add {address}/128 dev {interface}"),
        );
    }
    batch
}

/// The same for IPv6.
fn pod_batch_v6(pod: Host) -> String {
    let address = pod.address_v6();
    format!(
        "addr add {address}/128 dev eth0 nodad\n\
         route add default via {GATEWAY_V6} dev eth0\n"
    )
}

/// The same for IPv6.
fn route_batch_v6(node: Node) -> String {
    let other = node.other();
    format!(
        "route add {} via {}\n",
        other.pod_cidr_v6(),
        other.underlay_v6()
    )
}

/// Commands in a pod's namespace.
fn pod_batch(pod: Host) -> String {
    let gateway = pod.node().gateway();
    let mut batch = String::new();
    line(&mut batch, format_args!("link set lo up"));
    line(
        &mut batch,
        format_args!("addr add {}/32 dev eth0", pod.address()),
    );
    line(&mut batch, format_args!("link set eth0 up"));
    line(
        &mut batch,
        format_args!("route add {gateway} dev eth0 scope link"),
    );
    line(
        &mut batch,
        format_args!("route add default via {gateway} dev eth0 onlink"),
    );
    batch
}

/// Commands in the outside host's namespace.
fn outside_batch() -> String {
    let mut batch = String::from("link set lo up\n");
    let address = Host::Outside.address();
    for node in Node::ALL {
        let (link, underlay) = (outside_link(node), node.underlay());
        let pods = node.pod_cidr();
        for command in [
            format!("addr add {address}/32 dev {link}"),
            format!("link set {link} up"),
            format!("route add {underlay}/32 dev {link} src {address}"),
            format!("route add {pods} via {underlay} dev {link} src {address}"),
        ] {
            line(&mut batch, format_args!("{command}"));
        }
    }
    batch
}

/// The same for IPv6.
fn outside_batch_v6() -> String {
    let mut batch = String::new();
    let address = Host::Outside.address_v6();
    for node in Node::ALL {
        let (link, underlay) = (outside_link(node), node.underlay_v6());
        let pods = node.pod_cidr_v6();
        for command in [
            format!("addr add {address}/128 dev {link} nodad"),
            format!("route add {underlay}/128 via {GATEWAY_V6} dev {link} src {address}"),
            format!("route add {pods} via {GATEWAY_V6} dev {link} src {address}"),
        ] {
            line(&mut batch, format_args!("{command}"));
        }
    }
    batch
}

/// Commands in a node's namespace that make the other node's pods reachable.
fn route_batch(node: Node) -> String {
    let other = node.other();
    format!("route add {} via {}\n", other.pod_cidr(), other.underlay())
}

fn line(batch: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(batch, "{arguments}");
}

/// Runs `ip -batch` with `batch`, in `netns` if given. It holds the lab's lock while it runs (these
/// commands write nothing to standard output).
fn ip(lock: &Lock, what: &str, netns: Option<&str>, batch: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns]);
    }
    let failed = |detail: String| Error::Command {
        what: what.to_owned(),
        detail,
    };
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(lock.held_by_child()?)
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| failed(format!("starting ip: {source}")))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A write error means that ip has given up; its own message says why.
        let _ = stdin.write_all(batch.as_bytes());
    }
    let output = child
        .wait_with_output()
        .map_err(|source| failed(format!("ip: {source}")))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(failed(explain(&text, batch)))
}

/// Turns ip's complaint ("Command failed -:3") into one line that quotes the command.
fn explain(stderr: &str, batch: &str) -> String {
    let mut reasons = Vec::new();
    let mut refused = None;
    for text in stderr.lines() {
        match text.strip_prefix("Command failed -:") {
            Some(number) => {
                let number: usize = number.trim().parse().unwrap_or(0);
                refused = number
                    .checked_sub(1)
                    .and_then(|index| batch.lines().nth(index));
            }
            None => reasons.push(text.trim()),
        }
    }
    let reason = reasons.join("; ");
    let hint = if reason.contains("Operation not permitted") {
        " (needs CAP_NET_ADMIN and CAP_SYS_ADMIN: start it outside of an unprivileged container)"
    } else if reason.contains("Unknown device type") || reason.contains("not supported") {
        " (this kernel has no veth links: CONFIG_VETH)"
    } else {
        ""
    };
    format!("`ip {}`: {reason}{hint}", refused.unwrap_or("-batch"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_line_is_quoted_with_its_reason() {
        let batch = "link set lo up\nlink add und type veth\n";
        let text = explain("Error: Unknown device type.\nCommand failed -:2\n", batch);
        assert!(text.contains("`ip link add und type veth`"), "{text}");
        assert!(
            text.contains("Unknown device type") && text.contains("CONFIG_VETH"),
            "{text}"
        );
        assert!(!text.contains('\n'));
    }

    #[test]
    fn every_pod_gets_a_link_an_address_and_a_host_route() {
        let batch = node_batch("x", Node::B);
        for pod in Node::B.pods() {
            let route = format!(
                "route add {}/32 dev {}",
                pod.address(),
                pod.host_interface()
            );
            assert!(batch.contains(&route), "{route} missing in\n{batch}");
            assert!(batch.contains(&format!("netns x-{pod}")));
            let route = format!("route add {}/128 dev", pod.address_v6());
            assert!(node_batch_v6(Node::B).contains(&route), "{route}");
        }
        assert!(
            !batch.contains("link add und "),
            "the underlay pair is made once, by node A"
        );
        assert!(node_batch("x", Node::A).contains("peer name und mtu 1500 netns x-node-b"));
    }
}
