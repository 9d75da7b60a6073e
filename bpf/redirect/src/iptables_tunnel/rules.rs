//! The rule sets, as text for iptables-restore, and the numbers they share with routing.
//!
//! Marks on the node are tested bit by bit: 0x210 and 0x220 both contain 0x200.
//!
//! | mark | meaning |
//! |---|---|
//! | 0x100 | outbound: to ztunnel through the outbound tunnel |
//! | 0x200 | skip: routed by the main table |
//! | 0x220 | skip, and remember it for the connection |
//! | 0x210 | from ztunnel with another's address; remembered for the connection |
//! | 0x040 | reply to such a connection: straight to ztunnel |
//! | 0x010 | hardened: as 0x210, of a connection that ztunnel opened |
//!
//! A connection's mark is 0x210 if ztunnel accepted it and, in the hardened variant, 0x010 if
//! ztunnel opened it: with conntrack's direction that says for every packet, and for every ICMP
//! error and reset that a host in between answers one with, whether ztunnel is to have it. And what
//! ztunnel opens to an address that is no pod's may be translated to one of this node's pods (a
//! service the mesh does not know): without 0x200 the route is found after that, and leads through
//! the policy. 0x008 is of a connection whose client the node masquerades, with the inbound
//! tunnel's address: it takes the tunnel both ways, as conntrack ends what is masqueraded and
//! changes its interface.
//!
//! In ztunnel's namespace 0x400 is a TPROXYed packet and 0x4d3 one for a connection it has.

use std::net::Ipv4Addr;

use mesh::ports;

use super::Settings;
use crate::settings::Variant;
use crate::system::iptables::Table;

/// Name of the set of captured pods' addresses, in both namespaces.
pub(crate) const POD_SET: &str = "ztunnel-pods-ips";
/// Tunnel interfaces on the node and in ztunnel's namespace.
pub(crate) const IN: &str = "istioin";
pub(crate) const OUT: &str = "istioout";
pub(crate) const PEER_IN: &str = "pistioin";
pub(crate) const PEER_OUT: &str = "pistioout";

/// Rules of the node's namespace. `port` is the tunnels' UDP port.
pub(crate) fn node(settings: &Settings, port: u16) -> Vec<Table> {
    let mut mangle = Vec::new();
    mangle.extend(prerouting(settings, port));
    for chain in ["FORWARD", "INPUT"] {
        let remembered = remembered(settings.back_end.variant);
        mangle.extend(remembered.map(|rule| format!("-A ztunnel-{chain} {rule}")));
    }
    mangle.extend(output(settings));
    mangle.extend(own_tunnels(settings, port));
    let accept = |chain| format!("-A ztunnel-{chain} -m mark --mark 0x100/0x100 -j ACCEPT");
    let keep = |chain| match settings.back_end.variant {
        Variant::Faithful => accept(chain),
        Variant::Hardened => {
            format!("-A ztunnel-{chain} -m mark --mark 0x100/0x100 -j NETMAP --to 0.0.0.0/0")
        }
    };
    // Nor is a later packet to ztunnel others' to refuse: their rules are about the server.
    let to_ztunnel = (settings.back_end.variant == Variant::Hardened)
        .then(|| "-A ztunnel-FORWARD -m mark --mark 0x040/0x040 -j ACCEPT".to_owned());
    vec![
        Table {
            name: "mangle",
            hooks: vec!["PREROUTING", "POSTROUTING", "INPUT", "OUTPUT", "FORWARD"],
            rules: mangle,
        },
        // kube-proxy neither translates nor masquerades what is captured: ztunnel sees the VIP.
        // Hardened by a translation of every address to itself, after which no other table's rules
        // are asked: kube-proxy's are in a table of its own when it uses nftables.
        Table {
            name: "nat",
            hooks: vec!["PREROUTING", "POSTROUTING"],
            rules: dns_protocols(settings)
                .iter()
                .map(|protocol| {
                    format!(
                        "-A ztunnel-PREROUTING -p {protocol} -m set --match-set {POD_SET} src \
                         -m {protocol} --dport 53 -j DNAT --to-destination {}:{}",
                        settings.ztunnel.address,
                        ports::DNS
                    )
                })
                .chain(["PREROUTING", "POSTROUTING"].map(keep))
                .collect(),
        },
        // A service without endpoints is ztunnel's to refuse.
        Table {
            name: "filter",
            hooks: vec!["FORWARD"],
            rules: [accept("FORWARD")].into_iter().chain(to_ztunnel).collect(),
        },
    ]
}

/// What a connection is remembered for.
fn remembered(variant: Variant) -> impl Iterator<Item = &'static str> {
    let skipped = "-m mark --mark 0x220/0x220 \
                   -j CONNMARK --save-mark --nfmask 0x220 --ctmask 0x220";
    let others: &[&str] = match variant {
        Variant::Faithful => {
            &["-m mark --mark 0x210/0x210 -j CONNMARK --save-mark --nfmask 0x210 --ctmask 0x210"]
        }
        Variant::Hardened => &[
            "-m mark --mark 0x010/0x010 -m conntrack --ctdir ORIGINAL \
             -j CONNMARK --set-xmark 0x010/0x210",
            "-m mark --mark 0x210/0x210 -m conntrack --ctdir REPLY \
             -j CONNMARK --set-xmark 0x210/0x210",
            "-i istioin -m conntrack --ctdir REPLY -j CONNMARK --set-xmark 0x008/0x008",
        ],
    };
    [skipped].into_iter().chain(others.iter().copied())
}

/// Protocols over which DNS is captured: Istio had UDP only.
fn dns_protocols(settings: &Settings) -> &'static [&'static str] {
    match (settings.dns, settings.back_end.variant) {
        (false, _) => &[],
        (true, Variant::Faithful) => &["udp"],
        (true, Variant::Hardened) => &["udp", "tcp"],
    }
}

fn prerouting(settings: &Settings, port: u16) -> Vec<String> {
    let (zv, zip) = (&settings.ztunnel.host_interface, settings.ztunnel.address);
    // Translated to ztunnel's own address, so that it takes the main table.
    let dns = format!(
        "-p tcp -m set --match-set {POD_SET} src -m tcp --dport 53 -j MARK --set-mark 0x220/0x220"
    );
    let dns = dns_protocols(settings).contains(&"tcp").then_some(dns);
    let hardened = settings.back_end.variant == Variant::Hardened;
    // In the hardened variant only.
    let only = |rule: &str| hardened.then(|| rule.to_owned());
    let before_dns = [
        // Replies to what ztunnel opened, also its own, and errors about it.
        only(&format!("{OPENED} -j MARK --set-mark 0x040/0x040")),
        // Errors about what it accepted through the tunnel.
        only(&format!(
            "-p icmp {TUNNELLED} --ctstate RELATED -j MARK --set-mark 0x040/0x040"
        )),
        only("-m mark --mark 0x040/0x040 -j RETURN"),
        // Out of a tunnel: routed as usual.
        Some(format!("-i {IN} -j MARK --set-mark 0x200/0x200")),
        Some(format!("-i {IN} -j RETURN")),
        Some(format!("-i {OUT} -j MARK --set-mark 0x200/0x200")),
        Some(format!("-i {OUT} -j RETURN")),
        // The tunnels' own packets: a mark would stay on what they carry.
        Some(format!("-p udp -m udp --dport {port} -j RETURN")),
        // Replies of connections that were let go.
        Some("-m connmark --mark 0x220/0x220 -j MARK --set-mark 0x200/0x200".to_owned()),
        Some("-m mark --mark 0x200/0x200 -j RETURN".to_owned()),
        // Replies to what ztunnel sent with another's address.
        Some(format!(
            "! -i {zv} -m connmark --mark 0x210/0x210 -j MARK --set-mark 0x040/0x040"
        )),
        Some("-m mark --mark 0x040/0x040 -j RETURN".to_owned()),
        // Replies to what pods sent past ztunnel.
        only(&format!(
            "! -i {zv} -m conntrack --ctdir REPLY -j MARK --set-mark 0x200/0x200"
        )),
        // ztunnel with another's address, to none of the pods here; and to them.
        only(&format!(
            "-i {zv} ! -s {zip} -m conntrack --ctdir ORIGINAL -m set ! --match-set {POD_SET} dst \
             -j MARK --set-mark 0x010/0x210"
        )),
        only(&format!("-i {zv} -m mark --mark 0x010/0x210 -j RETURN")),
        Some(format!("-i {zv} ! -s {zip} -j MARK --set-mark 0x210/0x210")),
        Some("-m mark --mark 0x200/0x200 -j RETURN".to_owned()),
        // ztunnel as itself.
        Some(format!("-i {zv} -j MARK --set-mark 0x220/0x220")),
        // UDP is not the mesh's, nor anything but TCP.
        Some("-p udp -j MARK --set-mark 0x220/0x220".to_owned()),
        only("! -p tcp -j MARK --set-mark 0x200/0x200"),
    ];
    let after_dns = [
        Some("-m mark --mark 0x200/0x200 -j RETURN".to_owned()),
        // The node's own addresses are not the mesh's; a node port's endpoint on this node is.
        only("-p tcp -m addrtype --dst-type LOCAL -j RETURN"),
        // Whatever else a mesh pod sends.
        Some(format!(
            "-p tcp -m set --match-set {POD_SET} src -j MARK --set-mark 0x100/0x100"
        )),
    ];
    before_dns
        .into_iter()
        .chain([dns])
        .chain(after_dns)
        .flatten()
        .map(|rule| format!("-A ztunnel-PREROUTING {rule}"))
        .collect()
}

/// IP protocols that carry packets, without a key: IP in IP, IPv6 in IP, GRE, mobile IP, EtherIP,
/// encapsulation, compression, L2TP, MPLS. A node with such a device would open them.
const CARRIERS: [u8; 9] = [4, 41, 47, 55, 97, 98, 108, 115, 137];

/// UDP ports of tunnels that a node with such a device opens, whoever sent the datagram: VXLAN,
/// VXLAN-GPE, GENEVE, MPLS, VXLAN as Linux had it first.
const CARRIER_PORTS: [u16; 5] = [4789, 4790, 6081, 6635, 8472];

/// Nobody but ztunnel and the node speaks in their tunnels: whoever got a packet in there would
/// have it taken for any pod's, or for one that has been let through. Their port is no other
/// tunnel's (`links.rs`), so that nothing else is meant. Nor do pods get packets opened by other
/// tunnels that end here.
fn own_tunnels(settings: &Settings, port: u16) -> Vec<String> {
    if settings.back_end.variant == Variant::Faithful {
        return Vec::new();
    }
    let (zv, zip) = (&settings.ztunnel.host_interface, settings.ztunnel.address);
    let datagrams = format!("-p udp -m udp --dport {port}");
    let pods = format!("-m set --match-set {POD_SET} src -j DROP");
    let ports = CARRIER_PORTS.into_iter().filter(|other| *other != port);
    let ports = ports.map(|port| format!("INPUT -p udp -m udp --dport {port} {pods}"));
    // What there is most of does not look at all of them.
    let usual = ["udp", "tcp", "icmp"].map(|usual| format!("INPUT -p {usual} -j RETURN"));
    let carriers = CARRIERS.map(|carrier| format!("INPUT -p {carrier} {pods}"));
    [
        format!("INPUT ! -i {zv} {datagrams} -j DROP"),
        format!("INPUT ! -s {zip} {datagrams} -j DROP"),
        format!("FORWARD -o {zv} {datagrams} -j DROP"),
    ]
    .into_iter()
    .chain(ports)
    .chain(usual)
    .chain(carriers)
    .map(|rule| format!("-A ztunnel-{rule}"))
    .collect()
}

/// Matches answers to what ztunnel opened with another's address.
const OPENED: &str = "-m connmark --mark 0x010/0x210 -m conntrack --ctdir REPLY";

/// Matches what belongs to ztunnel of a connection whose replies take the inbound tunnel.
const TUNNELLED: &str = "-m connmark --mark 0x008/0x008 -m conntrack --ctdir ORIGINAL";

/// Rules of the node's namespace for IPv6, which this path does not carry: TCP of captured pods,
/// whose interfaces these are, is dropped, or it would go around the mesh. What the node's own
/// sockets and pods say to each other passes, as with IPv4.
pub(crate) fn node_ipv6<'a>(interfaces: impl Iterator<Item = &'a str>) -> Vec<Table> {
    let drop = |side, name| format!("-A ztunnel-FORWARD {side} {name} -p tcp -j DROP");
    vec![Table {
        name: "filter",
        hooks: vec!["FORWARD"],
        rules: interfaces
            .flat_map(|name| ["-i", "-o"].map(|side| drop(side, name)))
            .collect(),
    }]
}

/// Exemption of what the node's own sockets send to pods (probes).
fn output(settings: &Settings) -> Vec<String> {
    let to_pods = format!(
        "-m set --match-set {POD_SET} dst -s {}",
        settings.node.address
    );
    let mut rules = Vec::new();
    let hardened = settings.back_end.variant == Variant::Hardened;
    if hardened {
        // Errors and resets with which the node answers what ztunnel sent with another's address,
        // and what its own processes answer that.
        rules.push(format!("{OPENED} -j MARK --set-mark 0x040/0x040"));
        rules.push(
            "-m connmark --mark 0x210/0x210 -m conntrack --ctdir ORIGINAL \
             -j MARK --set-mark 0x040/0x040"
                .to_owned(),
        );
        rules.push(format!("{TUNNELLED} -j MARK --set-mark 0x040/0x040"));
        rules.push("-m mark --mark 0x040/0x040 -j RETURN".to_owned());
        // What pods dialled, whichever of its addresses the node answers with; it may be without
        // a struct socket: children not accepted yet, orphans, TIME_WAIT.
        rules.push(format!(
            "-m conntrack --ctdir REPLY -m set --match-set {POD_SET} dst -j MARK --set-mark 0x220"
        ));
        rules.push("-m connmark --mark 0x220/0x220 -j MARK --set-mark 0x220".to_owned());
    }
    rules.push(format!(
        "-m owner --socket-exists -p tcp {to_pods} -j MARK --set-mark 0x220"
    ));
    if hardened {
        rules.push(
            "-m mark --mark 0x220/0x220 -j CONNMARK --save-mark --nfmask 0x220 --ctmask 0x220"
                .to_owned(),
        );
    }
    rules
        .into_iter()
        .map(|rule| format!("-A ztunnel-OUTPUT {rule}"))
        .collect()
}

/// Rules of ztunnel's namespace.
pub(crate) fn ztunnel(settings: &Settings) -> Vec<Table> {
    let tproxy = |port: u16| {
        format!("-j TPROXY --tproxy-mark 0x400/0xfff --on-ip 127.0.0.1 --on-port {port}")
    };
    let hbone = ports::INBOUND_HBONE;
    let hbone = format!("-m tcp --dport {hbone} {}", tproxy(hbone));
    let mut rules = vec![
        format!("-i {PEER_IN} -p tcp {hbone}"),
        format!("-i {PEER_OUT} -p tcp {}", tproxy(ports::OUTBOUND)),
        format!("-i {PEER_IN} -p tcp {}", tproxy(ports::INBOUND_PLAIN)),
    ];
    let eth0 = &settings.ztunnel.interface;
    let foreign: (&str, Ipv4Addr) = (eth0, settings.ztunnel.address);
    let foreign = format!("-i {} -p tcp ! -d {}", foreign.0, foreign.1);
    if settings.back_end.variant == Variant::Hardened {
        // Connections ztunnel has; else by direction, so that the ACK that answers a SYN cookie
        // finds the listener its SYN went to. Without --nowildcard the match leaves out sockets
        // bound to all addresses: our own listeners, which whoever dials 15008 would hit.
        let has = "-m socket --transparent";
        rules.push(format!("{foreign} {has} -j MARK --set-mark 0x4d3/0xfff"));
        rules.push(format!("{foreign} -m mark --mark 0x4d3/0xfff -j ACCEPT"));
        rules.push(format!(
            "{foreign} -m set --match-set {POD_SET} src {}",
            tproxy(ports::OUTBOUND)
        ));
        rules.push(format!("{foreign} {hbone}"));
        rules.push(format!("{foreign} {}", tproxy(ports::INBOUND_PLAIN)));
        // Errors about connections that ztunnel has: unreachable, too large for the path.
        let errors = format!("-i {eth0} -p icmp ! -d {}", settings.ztunnel.address);
        rules.push(format!("{errors} {has} -j MARK --set-mark 0x4d3/0xfff"));
    } else {
        rules.push(format!("{foreign} -j MARK --set-mark 0x4d3/0xfff"));
    }
    let rules = rules
        .into_iter()
        .map(|rule| format!("-A ztunnel-PREROUTING {rule}"))
        .collect();
    vec![Table {
        name: "mangle",
        hooks: vec!["PREROUTING"],
        rules,
    }]
}
