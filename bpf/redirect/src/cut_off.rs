//! Cutting pods off that cannot be captured: their interfaces drop everything, so that nothing
//! reaches or leaves them past the mesh.
//!
//! `ebpf` has a program for it, which takes the place of the capturing ones in their links or
//! filters: no packet gets through while one replaces the other, either way. `tunnel`, and `ebpf`
//! where that fails, uses a tc filter of its own in each direction, which needs no BPF object and
//! sees every protocol, where iptables sees IP alone.

use std::collections::BTreeSet;

use crate::error::{Error, Result};
use crate::journal::Journal;
use crate::journal::undo::Undo;
use crate::settings::Settings;
use crate::system::links::Links;
use crate::system::netns::Netns;
use crate::system::tc;

/// Whom, in the journal, the programs on a cut-off interface are there for: no pod, whose UIDs have
/// no brackets.
pub(crate) fn owner(interface: &str) -> String {
    format!("({interface})")
}

/// As [`owner`], of the filters.
fn filter_owner(interface: &str) -> String {
    format!("(({interface}))")
}

/// Index of an interface that may be cut off, because only its pod loses by it.
pub(crate) fn check<B>(settings: &Settings<B>, links: &Links, interface: &str) -> Result<u32> {
    let of_node = settings.node.interfaces.iter();
    let mut needed = of_node.chain([&settings.ztunnel.host_interface]);
    if needed.any(|name| name == interface) {
        return Err(Error::Setting {
            field: "pods.host_interface",
            value: interface.to_owned(),
            reason: "is not cut off: the node or ztunnel needs it".to_owned(),
        });
    }
    links.of_one_pod(interface)
}

/// Adds the filters.
pub(crate) fn by_filters(journal: &mut Journal, node: &Netns, interface: &str) -> Result<()> {
    let owner = filter_owner(interface);
    if !node.run(tc::clsact_interfaces)?.contains(interface) {
        let undo = Undo::Clsact {
            netns: node.clone(),
            interface: interface.to_owned(),
        };
        journal.record(Some(&owner), undo)?;
        node.run(|| tc::add_clsact(interface))?;
    }
    for egress in [false, true] {
        let undo = Undo::DropFilter {
            netns: node.clone(),
            interface: interface.to_owned(),
            egress,
        };
        journal.record(Some(&owner), undo)?;
        node.run(|| tc::add_drop_filter(interface, egress))?;
    }
    journal.set_cut_off(interface, true)
}

/// Removes the filters of interfaces whose pods are captured now.
pub(crate) fn end_filters(journal: &mut Journal, interfaces: &[&str]) -> Result<()> {
    let owners: Vec<_> = interfaces.iter().map(|name| filter_owner(name)).collect();
    if owners.iter().any(|owner| journal.has_owner(owner)) {
        journal.undo_owners(&owners)?;
    }
    Ok(())
}

/// Ends all of it.
pub(crate) fn end(journal: &mut Journal, interfaces: &[&str]) -> Result<()> {
    let owners: Vec<_> = interfaces
        .iter()
        .flat_map(|name| [owner(name), filter_owner(name)])
        .collect();
    let undone = journal.undo_owners(&owners);
    for interface in interfaces {
        journal.set_cut_off(interface, false)?;
    }
    undone
}

/// The filters that are there, one line each.
pub(crate) fn inventory(journal: &Journal, node: &Netns) -> BTreeSet<String> {
    let with_filters = journal
        .cut_off()
        .filter(|name| journal.has_owner(&filter_owner(name)));
    let mut all = BTreeSet::new();
    for interface in with_filters {
        for egress in [false, true] {
            if node
                .run(|| tc::has_drop_filter(interface, egress))
                .is_ok_and(|there| there)
            {
                let direction = tc::direction(egress);
                all.insert(format!("filter {interface} {direction} cut_off"));
            }
        }
    }
    all
}
