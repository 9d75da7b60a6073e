//! How a mesh shows where it works: what is as good as the outcome without one.

use lab::Redirect;

use crate::cells::Cell;

/// Whether the same server answers and sees the client by another address, by design.
///
/// A pod that reaches itself through a service is seen by its own address where ztunnel made the
/// connection, and by its node's where kube-proxy did (hairpin). On path `tunnel` whom the pod's
/// own node masquerades has the inbound tunnel's address.
pub(crate) fn seen_otherwise(redirect: Redirect, cell: &Cell, got: &str, without: &str) -> bool {
    let (Some((who, seen)), Some((same, usually))) =
        (got.split_once(" sees "), without.split_once(" sees "))
    else {
        return false;
    };
    let itself = cell.from == who && cell.target.name.starts_with("vip ");
    let own_node = cell
        .target
        .endpoint
        .map(|host| host.node().gateway().to_string());
    let by_tunnel = redirect == Redirect::Tunnel
        && seen == "192.168.126.1"
        && own_node.is_some_and(|node| node == usually);
    who == same && (itself || by_tunnel)
}

/// Whether both are refusals and there is a ztunnel in between, which accepts before it is refused.
pub(crate) fn refused_later(cell: &Cell, got: &str, without: &str) -> bool {
    got == "reset" && ["refused", "unreachable"].contains(&without) && cell.has_a_ztunnel()
}
