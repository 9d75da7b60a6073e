//! The rules as kube-proxy's nftables mode writes them, as text for nft.

use std::fmt::Write as _;

use super::{Family, Service, all};
use crate::topology::Node;

/// Rules of `node`.
pub(super) fn rules(node: Node, family: Family) -> String {
    let ip = match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    };
    let own = family.pod_cidr(node);
    let pods: Vec<_> = Node::ALL.map(|each| family.pod_cidr(each)).into();
    let pods = pods.join(", ");
    let locals = locals(node, family);
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write!(
        text,
        "table {ip} kube-proxy {{\n\
         {}\
         chain mark-for-masquerade {{ meta mark set meta mark or 0x4000; }}\n\
         chain reject-chain {{ reject; }}\n\
         chain drop-chain {{ drop; }}\n\
         {}\
         chain services {{\n\
         {ip} daddr . meta l4proto . th dport vmap @service-ips\n\
         {ip} daddr {{ {locals} }} meta l4proto . th dport vmap @service-nodeports\n}}\n\
         chain service-endpoints-check {{\n\
         {ip} daddr . meta l4proto . th dport vmap @no-endpoint-services\n\
         {ip} daddr {{ {locals} }} meta l4proto . th dport vmap @no-endpoint-nodeports\n}}\n\
         {BASE_CHAINS}\
         chain cni-masquerade {{ type nat hook postrouting priority 101;\n\
         {ip} daddr {{ {pods} }} return\n\
         {ip} saddr {own} masquerade\n}}\n\
         }}\n",
        maps(node, family, ip),
        chains(node, family, ip),
    );
    text
}

const BASE_CHAINS: &str = "\
chain filter-input { type filter hook input priority -110;
ct state new jump service-endpoints-check
}
chain filter-forward { type filter hook forward priority -110;
ct state invalid drop
ct state new jump service-endpoints-check
}
chain filter-output { type filter hook output priority -110;
ct state new jump service-endpoints-check
}
chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
chain nat-output { type nat hook output priority -100; jump services; }
chain nat-postrouting { type nat hook postrouting priority 100;
meta mark & 0x4000 == 0 return
meta mark set meta mark ^ 0x4000
masquerade fully-random
}
";

/// Addresses of the node that node ports are served at.
fn locals(node: Node, family: Family) -> String {
    family.address(node.host()).to_string()
}

/// The maps that lead from a packet to a service's chain.
fn maps(node: Node, family: Family, ip: &str) -> String {
    let mut services = Vec::new();
    let mut node_ports = Vec::new();
    let mut nobody = Vec::new();
    let mut nobody_here = Vec::new();
    for (number, service) in all().iter().enumerate() {
        let vip = family.vip(service);
        for protocol in ["tcp", "udp"] {
            let key = format!("{vip} . {protocol} . {}", service.port);
            match service.endpoint {
                Some(_) => services.push(format!("{key} : goto service-{number}")),
                None => nobody.push(format!("{key} : goto reject-chain")),
            }
            if let (Some(node_port), Some((host, _))) = (service.node_port, service.endpoint) {
                let key = format!("{protocol} . {}", node_port.port);
                node_ports.push(format!("{key} : goto external-{number}"));
                if node_port.local && host.node() != node {
                    nobody_here.push(format!("{key} : goto drop-chain"));
                }
            }
        }
    }
    let address = match ip {
        "ip" => "ipv4_addr",
        _ => "ipv6_addr",
    };
    let map = |name: &str, kind: &str, elements: &[String]| {
        let elements = elements.join(",\n");
        format!("map {name} {{ type {kind} : verdict; elements = {{ {elements} }}; }}\n")
    };
    let by_address = format!("{address} . inet_proto . inet_service");
    let by_port = "inet_proto . inet_service";
    [
        map("service-ips", &by_address, &services),
        map("service-nodeports", by_port, &node_ports),
        map("no-endpoint-services", &by_address, &nobody),
        map("no-endpoint-nodeports", by_port, &nobody_here),
    ]
    .concat()
}

/// The chains of every service with an endpoint.
fn chains(node: Node, family: Family, ip: &str) -> String {
    let mut text = String::new();
    let own = family.pod_cidr(node);
    for (number, service) in all().iter().enumerate() {
        let Some((host, port)) = service.endpoint else {
            continue;
        };
        let (vip, address) = (family.vip(service), family.address(host));
        let to = family.socket(host, port);
        let _ = write!(
            text,
            "chain endpoint-{number} {{\n\
             {ip} saddr {address} jump mark-for-masquerade\n\
             meta l4proto tcp dnat to {to}\n\
             meta l4proto udp dnat to {to}\n}}\n\
             chain service-{number} {{\n\
             {ip} daddr {vip} {ip} saddr != {own} jump mark-for-masquerade\n\
             goto endpoint-{number}\n}}\n\
             {}",
            external(node, family, ip, (number, service))
        );
    }
    text
}

/// The chain of a service's node port.
fn external(node: Node, family: Family, ip: &str, (number, service): (usize, &Service)) -> String {
    let (Some(node_port), Some((host, _))) = (service.node_port, service.endpoint) else {
        return String::new();
    };
    let rules = if node_port.local {
        let own = family.pod_cidr(node);
        let here = if host.node() == node {
            format!("goto endpoint-{number}\n")
        } else {
            String::new()
        };
        // Pods of the node, and the node itself, may use all endpoints.
        format!(
            "{ip} saddr {own} goto service-{number}\n\
             fib saddr type local jump mark-for-masquerade\n\
             fib saddr type local goto service-{number}\n\
             {here}"
        )
    } else {
        format!("jump mark-for-masquerade\ngoto service-{number}\n")
    };
    format!("chain external-{number} {{\n{rules}}}\n")
}
