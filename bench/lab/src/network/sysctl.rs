//! The sysctls of the lab's namespaces. Set explicitly even where they equal the usual default,
//! because a new namespace inherits the machine's settings and results must not depend on those.

use std::path::Path;
use std::{fs, io};

use super::has_ipv6;
use crate::error::{Error, Result};
use crate::topology::Role;

/// Set in every namespace.
const COMMON: &[(&str, &str)] = &[
    // Child namespaces may only choose non-restricted algorithms: reno is always one, cubic often
    // is not, and the machine's own default may be bbr, whose pacing caps bulk flows.
    ("net/ipv4/tcp_congestion_control", "reno"),
    // Replies of a proxy that keeps the client's address look asymmetric to a strict filter.
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
];

/// Set in every pod: enough source ports for the connection-rate workloads, from where Linux'
/// default begins (what lies below is ztunnel's, see redirection), and ports reused after a
/// second of TIME_WAIT, or less.
const POD: &[(&str, &str)] = &[
    ("net/ipv4/ip_forward", "0"),
    ("net/ipv4/ip_local_port_range", "32768 65535"),
    ("net/ipv4/tcp_tw_reuse", "1"),
];

/// Set in every pod where the kernel has it (Linux 6.14): connect(2) looks at half of the ports
/// first, and 16,384 of them, each kept for a second, would bound the rate of new connections.
const POD_IF_KNOWN: &[(&str, &str)] = &[("net/ipv4/tcp_tw_reuse_delay", "250")];

/// Set on the nodes.
const NODE: &[(&str, &str)] = &[("net/ipv4/ip_forward", "1")];

/// Set in every namespace if there is IPv6: interfaces that come have it, and do not look for
/// duplicates of their own addresses first, which takes seconds.
const COMMON_V6: &[(&str, &str)] = &[
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/dad_transmits", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
];

/// Set on the nodes if there is IPv6.
const NODE_V6: &[(&str, &str)] = &[("net/ipv6/conf/all/forwarding", "1")];

/// Writes the settings of a host with this role into the calling thread's namespace. Must run
/// before interfaces are created, so that they inherit `default`.
///
/// # Errors
/// [`Error::Io`] naming the sysctl that could not be written.
pub fn apply(role: Role) -> Result<()> {
    let (own, if_known) = match role {
        Role::Node => (NODE, &[][..]),
        _ => (POD, POD_IF_KNOWN),
    };
    let own_v6 = if role == Role::Node { NODE_V6 } else { &[] };
    if has_ipv6() {
        for (name, value) in COMMON_V6.iter().chain(own_v6) {
            write(name, value)?;
        }
    }
    for (name, value) in COMMON.iter().chain(own) {
        write(name, value)?;
    }
    for (name, value) in if_known {
        match write(name, value) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}

fn write(name: &str, value: &str) -> Result<()> {
    // /proc/sys/net shows the namespace of the thread that opens the file.
    let path = Path::new("/proc/sys").join(name);
    fs::write(&path, value).map_err(Error::io("setting sysctl", path))
}
