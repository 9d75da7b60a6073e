//! Filters under clsact qdiscs: ours and those of others, of many interfaces with one run of tc.

use std::collections::HashSet;
use std::io;

use aya::programs::tc::{SchedClassifierLink, TcError, TcHandle};
use aya::programs::{Link as _, ProgramError, TcAttachType};
use serde::Deserialize;

use super::command;
use crate::error::{Error, Result};

/// Before other filters, with a handle nobody picks by chance.
pub(crate) const PRIORITY: u16 = 1;
pub(crate) const HANDLE: TcHandle = TcHandle::new(0, OWN_HANDLE);
const OWN_HANDLE: u16 = 0x5a54;

const EINVAL: i32 = 22;

/// Our filter, as if it were attached.
pub(crate) fn own(interface: &str, egress: bool) -> io::Result<SchedClassifierLink> {
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
        Err(error) if !os_error(&error).is_some_and(|code| GONE.contains(&code)) => {
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
pub(crate) struct Shown<'a> {
    pub(crate) interface: &'a str,
    pub(crate) direction: &'static str,
    /// If it is one of ours.
    pub(crate) own: Option<Own>,
}

/// A filter of ours: its program's name and number.
#[derive(Debug)]
pub(crate) struct Own {
    pub(crate) program: String,
    pub(crate) id: u32,
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

/// As tc calls it.
pub(crate) fn direction(egress: bool) -> &'static str {
    DIRECTIONS[usize::from(egress)]
}

/// Filters of these interfaces, which have clsact qdiscs.
pub(crate) fn list<'a>(interfaces: &[&'a str]) -> Result<Vec<Shown<'a>>> {
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

/// What the kernel answered.
pub(crate) fn os_error(error: &ProgramError) -> Option<i32> {
    match error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        ProgramError::NetlinkError(error) | ProgramError::TcError(TcError::NetlinkError(error)) => {
            error.raw_os_error()
        }
        ProgramError::TcError(TcError::IoError(error)) => error.raw_os_error(),
        _ => None,
    }
}

/// Handle of the filters that drop everything, beside that of the capturing ones.
const DROP_HANDLE: &str = "0x5a56";
/// A classic BPF program: return TC_ACT_SHOT (2).
const DROP: &str = "1,6 0 0 2";

/// Adds a clsact qdisc; that there is one is fine.
pub(crate) fn add_clsact(interface: &str) -> Result<()> {
    match command::run("tc", &["qdisc", "add", "dev", interface, "clsact"]) {
        Err(error) if !command::is_present(&error) => Err(error),
        _ => Ok(()),
    }
}

/// Adds the filter that drops everything, or makes it what it should be.
pub(crate) fn add_drop_filter(interface: &str, egress: bool) -> Result<()> {
    let mut words = drop_filter_words("replace", interface, egress);
    words.extend(["da", "bytecode", DROP]);
    command::run("tc", &words).map(drop)
}

/// Removes [`add_drop_filter`]'s.
pub(crate) fn remove_drop_filter(interface: &str, egress: bool) -> Result<()> {
    command::run("tc", &drop_filter_words("del", interface, egress)).map(drop)
}

/// Whether [`add_drop_filter`]'s is there.
pub(crate) fn has_drop_filter(interface: &str, egress: bool) -> Result<bool> {
    let words = ["filter", "show", "dev", interface, direction(egress)];
    let shown = command::run("tc", &words)?;
    Ok(shown.contains(&format!(" handle {DROP_HANDLE} ")))
}

fn drop_filter_words<'a>(verb: &'a str, interface: &'a str, egress: bool) -> Vec<&'a str> {
    let direction = direction(egress);
    let place = [
        interface,
        direction,
        "prio",
        "1",
        "handle",
        DROP_HANDLE,
        "bpf",
    ];
    ["filter", verb, "dev"].into_iter().chain(place).collect()
}
