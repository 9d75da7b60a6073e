//! The rules as kube-proxy's iptables mode writes them, as text for iptables-restore.

use std::fmt::Write as _;

use super::{Family, Service, all};
use crate::topology::Node;

/// Protocols that every service has.
const PROTOCOLS: [&str; 2] = ["tcp", "udp"];

/// Rules of `node`.
pub(super) fn rules(node: Node, family: Family) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        "*nat\n{}{}COMMIT\n*filter\n{}COMMIT\n",
        NAT_HEAD,
        nat(node, family),
        filter(node, family)
    );
    text
}

const NAT_HEAD: &str = "\
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
:CNI-POSTROUTING - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A POSTROUTING -j CNI-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
";

fn nat(node: Node, family: Family) -> String {
    let mut text = String::new();
    let mut line = |rule: String| {
        text.push_str(&rule);
        text.push('\n');
    };
    let own = family.pod_cidr(node);
    for each in Node::ALL {
        line(format!(
            "-A CNI-POSTROUTING -d {} -j RETURN",
            family.pod_cidr(each)
        ));
    }
    line(format!("-A CNI-POSTROUTING -s {own} -j MASQUERADE"));
    for (number, service) in all().iter().enumerate() {
        let Some((host, port)) = service.endpoint else {
            continue;
        };
        let (vip, address) = (family.vip(service), family.address(host));
        let to = family.socket(host, port);
        line(format!(":KUBE-SVC-{number} - [0:0]"));
        line(format!(":KUBE-SEP-{number} - [0:0]"));
        // Whoever comes for the virtual address and is no pod of this node gets the node's.
        line(format!(
            "-A KUBE-SVC-{number} ! -s {own} -d {vip} -j KUBE-MARK-MASQ"
        ));
        line(format!("-A KUBE-SVC-{number} -j KUBE-SEP-{number}"));
        line(format!(
            "-A KUBE-SEP-{number} -s {address} -j KUBE-MARK-MASQ"
        ));
        for protocol in PROTOCOLS {
            line(format!(
                "-A KUBE-SEP-{number} -p {protocol} -m {protocol} -j DNAT --to-destination {to}"
            ));
            line(format!(
                "-A KUBE-SERVICES -d {vip} -p {protocol} -m {protocol} --dport {} \
                 -j KUBE-SVC-{number}",
                service.port
            ));
        }
        node_port(node, family, number, service).for_each(&mut line);
    }
    // Last, as there.
    line("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS".to_owned());
    text
}

/// Rules of a service's node port.
fn node_port(
    node: Node,
    family: Family,
    number: usize,
    service: &Service,
) -> impl Iterator<Item = String> {
    let mut rules = Vec::new();
    if let (Some(node_port), Some((host, _))) = (service.node_port, service.endpoint) {
        let ext = format!("-A KUBE-EXT-{number}");
        rules.push(format!(":KUBE-EXT-{number} - [0:0]"));
        if node_port.local {
            let own = family.pod_cidr(node);
            // Pods of the node, and the node itself, may use all endpoints.
            rules.push(format!("{ext} -s {own} -j KUBE-SVC-{number}"));
            let itself = format!("{ext} -m addrtype --src-type LOCAL");
            rules.push(format!("{itself} -j KUBE-MARK-MASQ"));
            rules.push(format!("{itself} -j KUBE-SVC-{number}"));
            if host.node() == node {
                rules.push(format!("{ext} -j KUBE-SEP-{number}"));
            }
        } else {
            rules.push(format!("{ext} -j KUBE-MARK-MASQ"));
            rules.push(format!("{ext} -j KUBE-SVC-{number}"));
        }
        for protocol in PROTOCOLS {
            rules.push(format!(
                "-A KUBE-NODEPORTS -p {protocol} -m {protocol} --dport {} -j KUBE-EXT-{number}",
                node_port.port
            ));
        }
    }
    rules.into_iter()
}

fn filter(node: Node, family: Family) -> String {
    let mut text = String::from(
        "\
:KUBE-FORWARD - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A FORWARD -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
",
    );
    for service in all() {
        for protocol in PROTOCOLS {
            if service.endpoint.is_none() {
                let _ = writeln!(
                    text,
                    "-A KUBE-SERVICES -d {} -p {protocol} -m {protocol} --dport {} -j REJECT",
                    family.vip(&service),
                    service.port
                );
            }
            if let (Some(node_port), Some((host, _))) = (service.node_port, service.endpoint)
                && node_port.local
                && host.node() != node
            {
                let _ = writeln!(
                    text,
                    "-A KUBE-EXTERNAL-SERVICES -m addrtype --dst-type LOCAL -p {protocol} \
                     -m {protocol} --dport {} -j DROP",
                    node_port.port
                );
            }
        }
    }
    text
}
