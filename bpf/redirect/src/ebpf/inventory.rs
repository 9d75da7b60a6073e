//! What is there, in the kernel, of what the programs need; and getting back pins that were lost.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use aya::programs::{ProgramInfo, SchedClassifier, TcAttachType};

use super::{RULE_PREF, Settings, TABLE, attach, layout, maps};
use crate::back_end::AttachedBy;
use crate::error::Result;
use crate::journal::Journal;
use crate::system::netns::Netns;
use crate::system::pins::program_of;
use crate::system::{command, programs, tc};

pub(crate) fn take(
    settings: &Settings,
    journal: &Journal,
    node: &Netns,
) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for pin in attach::own_pins(&settings.back_end.bpffs) {
        all.insert(format!("pin {}", pin.display()));
    }
    let interfaces = interfaces(settings, journal);
    if journal.attached_by() == Some(AttachedBy::Clsact) {
        all.extend(node.run(|| filters(&interfaces))?);
    } else {
        all.extend(node.run(|| Ok(links(&interfaces)))?);
    }
    map_entries(&settings.back_end.bpffs, &mut all);
    if let Ok(ztunnel) = Netns::at(&settings.ztunnel.netns) {
        all.extend(ztunnel.run(ztunnel_routing)?);
    }
    all.extend(crate::cut_off::inventory(journal, node));
    all.extend(journal.describe_sysctls());
    all.extend(journal.describe_table());
    Ok(all)
}

/// The node's interfaces that have programs of ours.
pub(super) fn interfaces<'a>(settings: &'a Settings, journal: &'a Journal) -> Vec<&'a str> {
    [&settings.ztunnel.host_interface]
        .into_iter()
        .chain(&settings.node.interfaces)
        .chain(journal.pods().iter().map(|pod| &pod.host_interface))
        .map(String::as_str)
        .chain(journal.cut_off())
        .collect()
}

/// Whether programs of ours stand in both directions of a pod's interface.
pub(super) fn is_guarded(interface: &str, by_filter: bool) -> bool {
    let found = if by_filter {
        filters(&[interface]).unwrap_or_default()
    } else {
        links(&[interface])
    };
    let has = |direction: &str| found.iter().any(|line| line.contains(direction));
    has(" ingress ") && has(" egress ")
}

/// Our programs attached by tcx.
pub(super) fn links(interfaces: &[&str]) -> BTreeSet<String> {
    let programs = tcx_programs(interfaces);
    programs
        .into_iter()
        .filter_map(|(interface, direction, program)| {
            let name = programs::own(program.name_as_str()?)?;
            Some(format!("tcx {interface} {direction} {name}"))
        })
        .collect()
}

/// Programs attached by tcx that have names of ours: interface, direction, program.
fn tcx_programs<'a>(interfaces: &[&'a str]) -> Vec<(&'a str, &'static str, ProgramInfo)> {
    let mut all = Vec::new();
    let directions = [
        (TcAttachType::Ingress, "ingress"),
        (TcAttachType::Egress, "egress"),
    ];
    for &interface in interfaces {
        for (attach_type, direction) in directions {
            let Ok((_, programs)) = SchedClassifier::query_tcx(interface, attach_type) else {
                continue;
            };
            let own = programs.into_iter();
            let own = own.filter(|program| program.name_as_str().and_then(programs::own).is_some());
            all.extend(own.map(|program| (interface, direction, program)));
        }
    }
    all
}

/// Our filters under clsact qdiscs.
fn filters(interfaces: &[&str]) -> Result<BTreeSet<String>> {
    let present = tc::clsact_interfaces()?;
    let with_clsact = interfaces.iter().filter(|name| present.contains(**name));
    let with_clsact: Vec<&str> = with_clsact.copied().collect();
    let qdiscs = with_clsact.iter();
    let mut all: BTreeSet<_> = qdiscs.map(|name| format!("qdisc clsact {name}")).collect();
    for shown in tc::list(&with_clsact)? {
        let (interface, direction) = (shown.interface, shown.direction);
        let own = shown.own.map(|own| own.program);
        let own = own.filter(|program| layout::PROGRAMS.contains(&program.as_str()));
        all.extend(own.map(|program| format!("filter {interface} {direction} {program}")));
    }
    Ok(all)
}

fn map_entries(pins: &Path, all: &mut BTreeSet<String>) {
    if let Ok(bytes) = maps::config(pins) {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        all.insert(format!("map config {}", hex.trim_end_matches('0')));
    }
    let pods = maps::Pods::open(pins).and_then(|map| map.all());
    for (address, index) in pods.unwrap_or_default() {
        all.insert(format!("map pods {address} interface {index}"));
    }
    for network in maps::pod_cidrs(pins).unwrap_or_default() {
        all.insert(format!("map pod_cidrs {network}"));
    }
}

fn ztunnel_routing() -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for family in ["-4", "-6"] {
        let rules = command::ip(&format!("{family} rule show pref {RULE_PREF}"))?;
        // A table that does not exist is an error.
        let routes = command::ip(&format!("{family} route show table {TABLE}"));
        for (kind, shown) in [("rule", rules), ("route", routes.unwrap_or_default())] {
            let lines = shown.lines().map(str::split_whitespace);
            let lines = lines.map(|words| words.collect::<Vec<_>>().join(" "));
            all.extend(lines.map(|line| format!("ztunnel ip {family} {kind} {line}")));
        }
    }
    Ok(all)
}

/// Programs of ours that are attached, by what is pinned and by what the interfaces say.
pub(super) fn attached_programs(pins: &Path, interfaces: &[&str]) -> HashSet<u32> {
    let links = attach::own_pins(pins);
    let mut all: HashSet<u32> = links.iter().filter_map(|pin| program_of(pin)).collect();
    for (_, _, program) in tcx_programs(interfaces) {
        all.insert(program.id());
    }
    let filters = tc::clsact_interfaces().and_then(|present| {
        let with_clsact = interfaces.iter().filter(|name| present.contains(**name));
        let with_clsact: Vec<&str> = with_clsact.copied().collect();
        let shown = tc::list(&with_clsact)?;
        Ok(shown.into_iter().filter_map(|shown| shown.own).collect())
    });
    let filters: Vec<tc::Own> = filters.unwrap_or_default();
    all.extend(filters.into_iter().map(|own| own.id));
    all
}

/// How long the kernel may take to detach programs whose links are gone.
const DETACH_PATIENCE: Duration = Duration::from_secs(5);

/// The kernel detaches programs a little after their links are gone.
pub(crate) fn wait_until_detached(interfaces: &[String]) {
    let deadline = Instant::now() + DETACH_PATIENCE;
    let mut left: Vec<&str> = interfaces.iter().map(String::as_str).collect();
    loop {
        left.retain(|interface| !links(&[interface]).is_empty());
        if left.is_empty() {
            return;
        }
        if Instant::now() >= deadline {
            tracing::warn!(interfaces = left.len(), "programs are still attached");
            return;
        }
        thread::sleep(Duration::from_millis(2));
    }
}
