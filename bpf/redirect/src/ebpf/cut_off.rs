//! Cutting pods off: the program that drops everything, in the links or filters of the capturing
//! ones.

use super::attach::Hook;
use super::{Ebpf, layout, pods};
use crate::cut_off::{self, owner};
use crate::error::{Error, Result};
use crate::system::links::Links;
use crate::system::netns::Netns;

/// Cuts off each of these; returns those that could not be.
pub(crate) fn all(
    redirection: &mut Ebpf,
    node: &Netns,
    interfaces: &[&str],
) -> Result<Vec<(String, Error)>> {
    if interfaces.is_empty() {
        return Ok(Vec::new());
    }
    let links = Links::read(node)?;
    let mut failures = Vec::new();
    for interface in interfaces {
        let done = cut_off::check(&redirection.settings, &links, interface)
            .and_then(|index| one(redirection, node, interface, index));
        failures.extend(done.err().map(|error| ((*interface).to_owned(), error)));
    }
    Ok(failures)
}

/// Cuts one off. The pod that was captured there no longer is.
pub(super) fn one(redirection: &mut Ebpf, node: &Netns, interface: &str, index: u32) -> Result<()> {
    let owner = owner(interface);
    let pod = redirection.journal.pod_at(interface);
    let uid = pod.map(|pod| pod.uid.clone());
    redirection.journal.batch(|journal| {
        if let Some(uid) = &uid {
            journal.hand_over(uid, &owner)?;
        }
        journal.set_cut_off(interface, true)
    })?;
    let by_program = by_program(redirection, node, interface, index, &owner);
    by_program.or_else(|error| {
        tracing::warn!(%error, interface, "cut off by filters instead");
        cut_off::by_filters(&mut redirection.journal, node, interface)
    })?;
    let Some(uid) = uid else {
        return Ok(());
    };
    let pins = &redirection.settings.bpffs;
    let forgotten = pods::forget(pins, redirection.journal.pods(), &[&uid]);
    redirection.journal.remove_pods(&[&uid]).and(forgotten)
}

fn by_program(
    redirection: &mut Ebpf,
    node: &Netns,
    interface: &str,
    index: u32,
    owner: &str,
) -> Result<()> {
    let mut attacher = redirection.attacher(node)?;
    for program in [layout::APP_OUTBOUND, layout::APP_INBOUND] {
        attacher.attach(Hook {
            program,
            interface,
            index,
            owner: Some(owner),
            cut_off: true,
        })?;
    }
    Ok(())
}

/// Ends it for these.
pub(crate) fn end(redirection: &mut Ebpf, interfaces: &[&str]) -> Result<()> {
    let journal = &mut redirection.journal;
    let known: Vec<String> = journal
        .cut_off()
        .filter(|name| interfaces.contains(name))
        .map(str::to_owned)
        .collect();
    let names: Vec<&str> = known.iter().map(String::as_str).collect();
    let ended = cut_off::end(journal, &names);
    if journal.detail() != Some(super::attach::CLSACT) {
        pods::wait_until_detached(&known);
    }
    ended
}
