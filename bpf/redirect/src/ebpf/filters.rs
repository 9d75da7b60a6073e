//! Filters under clsact qdiscs: ours and those of others, of many interfaces with one run of tc.

use std::collections::HashSet;
use std::io;

use aya::programs::tc::{SchedClassifierLink, TcHandle};
use aya::programs::{Link as _, TcAttachType};
use serde::Deserialize;

use super::attach;
use crate::command;
use crate::error::{Error, Result};

/// Before other filters, with a handle nobody picks by chance.
pub(super) const PRIORITY: u16 = 1;
pub(super) const HANDLE: TcHandle = TcHandle::new(0, OWN_HANDLE);
const OWN_HANDLE: u16 = 0x5a54;

const EINVAL: i32 = 22;

/// Our filter, as if it were attached.
pub(super) fn own(interface: &str, egress: bool) -> io::Result<SchedClassifierLink> {
    let direction = if egress {
        TcAttachType::Egress
    } else {
        TcAttachType::Ingress
    };
    SchedClassifierLink::attached(interface, direction, PRIORITY, HANDLE, None)
}

/// Interfaces that have a clsact qdisc.
pub(crate) fn clsact_interfaces() -> Result<HashSet<String>> {
    let shown = command::run("tc", &["qdisc", "show"])?;
    let name = |line: &str| {
        let rest = line.strip_prefix("qdisc clsact ")?;
        let mut words = rest.split_whitespace().skip_while(|word| *word != "dev");
        words.nth(1).map(str::to_owned)
    };
    Ok(shown.lines().filter_map(name).collect())
}

/// Removes our filter; that it, its qdisc or the interface is gone is fine.
pub(crate) fn remove(interface: &str, egress: bool) -> Result<()> {
    /// Of the filter, the device, its qdisc.
    const GONE: [i32; 3] = [2, 19, EINVAL];
    let Ok(link) = own(interface, egress) else {
        return Ok(());
    };
    match link.detach() {
        Err(error) if !attach::os_error(&error).is_some_and(|code| GONE.contains(&code)) => {
            Err(Error::bpf("remove filter of", interface, &error))
        }
        _ => Ok(()),
    }
}

/// Removes the clsact qdiscs we added, unless someone else has filters there.
pub(crate) fn remove_clsact(interfaces: &[&str]) -> Result<()> {
    let present = clsact_interfaces()?;
    let ours: Vec<&str> = interfaces
        .iter()
        .copied()
        .filter(|name| present.contains(*name))
        .collect();
    if ours.is_empty() {
        return Ok(());
    }
    let used: HashSet<&str> = list(&ours)?
        .into_iter()
        .map(|shown| shown.interface)
        .collect();
    let script: String = ours
        .iter()
        .filter(|name| !used.contains(**name))
        .map(|name| format!("qdisc del dev {name} clsact\n"))
        .collect();
    if script.is_empty() {
        return Ok(());
    }
    command::run_with_input("tc", &["-batch", "-"], &script).map(drop)
}

/// A filter, or what stands for a group of them.
#[derive(Debug)]
pub(super) struct Shown<'a> {
    pub(super) interface: &'a str,
    pub(super) direction: &'static str,
    /// If it is one of ours.
    pub(super) own: Option<Own>,
}

/// A filter of ours: its program's name and number.
#[derive(Debug)]
pub(super) struct Own {
    pub(super) program: String,
    pub(super) id: u32,
}

#[derive(Debug, Deserialize)]
struct Filter {
    #[serde(default)]
    options: Options,
}

#[derive(Debug, Default, Deserialize)]
struct Options {
    #[serde(default)]
    handle: String,
    #[serde(default)]
    bpf_name: String,
    #[serde(default)]
    prog: Program,
}

#[derive(Debug, Default, Deserialize)]
struct Program {
    #[serde(default)]
    id: u32,
}

const DIRECTIONS: [&str; 2] = ["ingress", "egress"];

/// Filters of these interfaces, which have clsact qdiscs.
pub(super) fn list<'a>(interfaces: &[&'a str]) -> Result<Vec<Shown<'a>>> {
    let mut wanted = Vec::new();
    for &interface in interfaces {
        wanted.extend(DIRECTIONS.map(|direction| (interface, direction)));
    }
    let script: String = wanted
        .iter()
        .map(|(interface, direction)| format!("filter show dev {interface} {direction}\n"))
        .collect();
    let shown = command::run_with_input("tc", &["-json", "-batch", "-"], &script)?;
    // One list for each line of the script, in its order.
    let lists = serde_json::Deserializer::from_str(&shown).into_iter::<Vec<Filter>>();
    let lists: Vec<_> = lists.collect::<Result<_, _>>().map_err(|e| unclear(&e))?;
    if lists.len() != wanted.len() {
        return Err(unclear(&format_args!(
            "{} lists for {} questions",
            lists.len(),
            wanted.len()
        )));
    }
    let mut all = Vec::new();
    for ((interface, direction), filters) in wanted.into_iter().zip(lists) {
        all.extend(filters.into_iter().map(|filter| Shown {
            interface,
            direction,
            own: own_of(filter.options),
        }));
    }
    Ok(all)
}

fn own_of(options: Options) -> Option<Own> {
    (options.handle == format!("{OWN_HANDLE:#x}")).then_some(Own {
        program: options.bpf_name,
        id: options.prog.id,
    })
}

fn unclear(reason: &dyn std::fmt::Display) -> Error {
    Error::Command {
        command: "tc -json -batch -".to_owned(),
        outcome: format!("answered what is not understood: {reason}"),
    }
}
