//! What is there, in the kernel, of what the programs need; and getting back pins that were lost.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::Path;

use aya::maps::{MapData, MapInfo};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{SchedClassifier, TcAttachType, loaded_programs};

use super::attach::{self, CLSACT};
use super::{RULE_PREF, TABLE, layout, maps};
use crate::command;
use crate::error::Result;
use crate::journal::Journal;
use crate::netns::Netns;
use crate::settings::Settings;
use crate::sysctl;

/// Names in the kernel are cut.
const NAME_BYTES_MAX: usize = 15;

pub(crate) fn take(
    settings: &Settings,
    journal: &Journal,
    node: &Netns,
) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for pin in attach::own_pins(&settings.bpffs) {
        all.insert(format!("pin {}", pin.display()));
    }
    let interfaces: Vec<&str> = [&settings.ztunnel.host_interface]
        .into_iter()
        .chain(&settings.node.interfaces)
        .chain(journal.pods().iter().map(|pod| &pod.host_interface))
        .map(String::as_str)
        .collect();
    if journal.detail() == Some(CLSACT) {
        all.extend(node.run(|| filters(&interfaces))?);
    } else {
        all.extend(node.run(|| Ok(links(&interfaces)))?);
    }
    map_entries(&settings.bpffs, &mut all);
    if let Ok(ztunnel) = Netns::at(&settings.ztunnel.netns) {
        all.extend(ztunnel.run(ztunnel_routing)?);
    }
    all.extend(sysctl::describe(journal));
    Ok(all)
}

/// Our programs attached by tcx.
fn links(interfaces: &[&str]) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    let directions = [
        (TcAttachType::Ingress, "ingress"),
        (TcAttachType::Egress, "egress"),
    ];
    for interface in interfaces {
        for (attach_type, direction) in directions {
            let Ok((_, programs)) = SchedClassifier::query_tcx(interface, attach_type) else {
                continue;
            };
            for program in programs {
                let name = own_name(program.name());
                all.extend(name.map(|name| format!("tcx {interface} {direction} {name}")));
            }
        }
    }
    all
}

/// The program of ours that the kernel calls so.
fn own_name(name: &[u8]) -> Option<&'static str> {
    let known = |full: &&str| full.as_bytes()[..full.len().min(NAME_BYTES_MAX)] == *name;
    layout::PROGRAMS.into_iter().find(known)
}

/// Our filters under clsact qdiscs. One call of tc for all interfaces.
fn filters(interfaces: &[&str]) -> Result<BTreeSet<String>> {
    let present = attach::clsact_interfaces()?;
    let mut all = BTreeSet::new();
    let mut wanted = Vec::new();
    for interface in interfaces.iter().filter(|name| present.contains(**name)) {
        all.insert(format!("qdisc clsact {interface}"));
        wanted.push((*interface, "ingress"));
        wanted.push((*interface, "egress"));
    }
    for (interface, direction) in wanted {
        let shown = command::run("tc", &["filter", "show", "dev", interface, direction])?;
        let names = shown.lines().filter_map(|line| {
            let words: HashSet<_> = line.split_whitespace().collect();
            let is_ours = words.contains("0x5a54");
            layout::PROGRAMS
                .into_iter()
                .find(|name| is_ours && words.contains(name))
        });
        all.extend(names.map(|name| format!("filter {interface} {direction} {name}")));
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

/// Pins again those maps that lost their pin but are still used by programs that have theirs, so
/// that listeners and pods in them are kept. What cannot be rescued is made anew.
pub(crate) fn rescue_maps(pins: &Path) {
    let missing: Vec<_> = layout::MAPS
        .iter()
        .filter(|map| !pins.join(map.name).exists())
        .collect();
    if missing.is_empty() || missing.len() == layout::MAPS.len() {
        return;
    }
    let found = maps_in_use(pins);
    for map in missing {
        let Some(&id) = found.get(map.name) else {
            continue;
        };
        let pinned = MapData::from_id(id)
            .map_err(|error| error.to_string())
            .and_then(|data| data.pin(pins.join(map.name)).map_err(|e| e.to_string()));
        match pinned {
            Ok(()) => tracing::warn!(map = map.name, "its pin was gone, pinned again"),
            Err(error) => tracing::warn!(map = map.name, error, "its pin is gone"),
        }
    }
}

/// Identifiers of the maps that our pinned links' programs use, by name.
fn maps_in_use(pins: &Path) -> HashMap<String, u32> {
    let links = attach::own_pins(pins)
        .into_iter()
        .filter_map(|pin| FdLink::from(PinnedLink::from_pin(pin).ok()?).info().ok());
    let programs: HashSet<u32> = links.map(|link| link.program_id()).collect();
    loaded_programs()
        .flatten()
        .filter(|program| programs.contains(&program.id()))
        .filter_map(|program| program.map_ids().ok()?)
        .flatten()
        .filter_map(|id| Some((MapInfo::from_id(id).ok()?.name_as_str()?.to_owned(), id)))
        .collect()
}
