//! How the changes in the journal are taken back: each alone, those of many pods together.

use std::fs;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::system::iptables::{self, Family, Iptables};
use crate::system::netns::Netns;
use crate::system::{command, pins, rcu_expedited, sysctl, tc};

/// How one change is taken back. All are harmless when there is nothing to take back.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "undo")]
pub(crate) enum Undo {
    /// Give a `/proc/sys/` entry its value back.
    Sysctl {
        netns: Netns,
        name: String,
        value: String,
    },
    /// Run `ip`, `ipset` or `tc` with these words.
    Command { netns: Netns, line: String },
    /// Remove our iptables chains and the jumps to them.
    Chains {
        netns: Netns,
        #[serde(default)]
        iptables: Iptables,
        #[serde(default)]
        family: Family,
    },
    /// Remove a pin.
    Pin { path: PathBuf },
    /// Remove our tc filter.
    Filter {
        netns: Netns,
        interface: String,
        egress: bool,
    },
    /// Remove a filter that drops everything.
    DropFilter {
        netns: Netns,
        interface: String,
        egress: bool,
    },
    /// Remove a clsact qdisc of ours unless others use it by now.
    Clsact { netns: Netns, interface: String },
    /// Remove a directory.
    Directory { path: PathBuf },
    /// Let the kernel wait for its readers at leisure again.
    Expedited { before: String },
}

impl Undo {
    pub(crate) fn command(netns: &Netns, line: impl Into<String>) -> Self {
        Self::Command {
            netns: netns.clone(),
            line: line.into(),
        }
    }

    pub(crate) fn netns(&self) -> Option<&Netns> {
        match self {
            Self::Sysctl { netns, .. }
            | Self::Command { netns, .. }
            | Self::Chains { netns, .. }
            | Self::Filter { netns, .. }
            | Self::DropFilter { netns, .. }
            | Self::Clsact { netns, .. } => Some(netns),
            Self::Pin { .. } | Self::Directory { .. } | Self::Expedited { .. } => None,
        }
    }

    /// What it is about, the same for two that are about the same thing; of two, the older knows
    /// the original state.
    pub(crate) fn subject(&self) -> Self {
        match self {
            Self::Sysctl { netns, name, .. } => Self::Sysctl {
                netns: netns.clone(),
                name: name.clone(),
                value: String::new(),
            },
            other => other.clone(),
        }
    }

    fn run(&self) -> Result<()> {
        if self.netns().is_some_and(|netns| !netns.is_alive()) {
            return Ok(());
        }
        match self {
            Self::Sysctl { netns, name, value } => {
                netns.run(|| ignore_missing(sysctl::write(name, value)))
            }
            Self::Command { netns, line } => netns.run(|| {
                let words: Vec<_> = line.split_whitespace().collect();
                match words.split_first() {
                    Some((program, args)) => ignore_missing(command::run(program, args).map(drop)),
                    None => Ok(()),
                }
            }),
            Self::Chains {
                netns,
                iptables,
                family,
            } => netns.run(|| iptables::remove(*family, *iptables)),
            Self::Pin { path } if pins::is_foreign(path) => {
                tracing::warn!(pin = %path.display(), "is another's by now and stays");
                Ok(())
            }
            Self::Pin { path } => {
                let removed = fs::remove_file(path);
                ignore_missing(removed.map_err(|e| Error::file("remove pin", path, e)))
            }
            Self::Filter {
                netns,
                interface,
                egress,
            } => netns.run(|| tc::remove(interface, *egress)),
            Self::DropFilter {
                netns,
                interface,
                egress,
            } => netns.run(|| ignore_missing(tc::remove_drop_filter(interface, *egress))),
            Self::Clsact { netns, interface } => {
                netns.run(|| tc::remove_clsact(&[interface.as_str()]))
            }
            Self::Directory { path } => {
                let removed = fs::remove_dir(path);
                if let Err(error) = &removed
                    && error.kind() == io::ErrorKind::DirectoryNotEmpty
                {
                    tracing::warn!(directory = %path.display(), "has others' files and stays");
                    return Ok(());
                }
                ignore_missing(removed.map_err(|e| Error::file("remove directory", path, e)))
            }
            Self::Expedited { before } => rcu_expedited::write(before),
        }
    }
}

fn ignore_missing(result: Result<()>) -> Result<()> {
    match result {
        Err(Error::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if command::is_missing(&error) || command::is_present(&error) => Ok(()),
        other => other,
    }
}

/// A change and whom it was made for.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Entry {
    /// UID of the pod it is for.
    pub(crate) owner: Option<String>,
    #[serde(flatten)]
    pub(crate) undo: Undo,
}

/// Fewer are taken back one by one.
const BATCH_MIN: usize = 4;

/// Runs newest first; returns those that failed, in their order, and the first error.
pub(crate) fn undo_entries(entries: Vec<Entry>) -> (Vec<Entry>, Option<Error>) {
    let (mut kept, mut first_error) = (Vec::new(), None);
    for entry in batch_commands(entries).into_iter().rev() {
        if let Err(error) = entry.undo.run() {
            tracing::warn!(%error, "not removed");
            first_error.get_or_insert(error);
            kept.push(entry);
        }
    }
    kept.reverse();
    (kept, first_error)
}

/// Takes back what was made for pods with one process for many of them. What one pod needs does not
/// depend on another's, nor anything else on it. Returns what is left, which includes all of a kind
/// if one of them failed: taken back one by one, what is gone already does no harm.
fn batch_commands(entries: Vec<Entry>) -> Vec<Entry> {
    let mut left = entries;
    for (program, args) in [
        ("ip", &["-batch", "-"][..]),
        ("ipset", &["restore", "-exist"]),
    ] {
        for netns in namespaces(&left) {
            let words = |entry| words_for(program, &netns, entry);
            let lines: Vec<_> = left.iter().rev().filter_map(words).collect();
            if lines.len() < BATCH_MIN {
                continue;
            }
            let script: String = lines
                .iter()
                .map(|line| format!("{}\n", line.trim_end_matches(" -exist")))
                .collect();
            let run = || command::run_with_input(program, args, &script);
            if netns.is_alive() && netns.run(run).is_ok() {
                left.retain(|entry| words_for(program, &netns, entry).is_none());
            }
        }
    }
    batch_filters(left)
}

/// What `program` is to do in the namespace to take back this change for a pod.
fn words_for<'a>(program: &str, netns: &Netns, entry: &'a Entry) -> Option<&'a str> {
    match &entry.undo {
        Undo::Command { netns: n, line } if entry.owner.is_some() && n == netns => {
            line.strip_prefix(program)?.strip_prefix(' ')
        }
        _ => None,
    }
}

fn namespaces(entries: &[Entry]) -> Vec<Netns> {
    let mut all: Vec<Netns> = Vec::new();
    for entry in entries.iter().filter(|entry| entry.owner.is_some()) {
        all.extend(
            entry
                .undo
                .netns()
                .filter(|netns| !all.contains(netns))
                .cloned(),
        );
    }
    all
}

/// Removes many pods' filters and then the qdiscs together.
fn batch_filters(entries: Vec<Entry>) -> Vec<Entry> {
    let is_qdisc = |entry: &Entry| {
        let is_one = matches!(
            entry.undo,
            Undo::Clsact { .. } | Undo::Filter { .. } | Undo::DropFilter { .. }
        );
        entry.owner.is_some() && is_one
    };
    let (chosen, mut left): (Vec<_>, Vec<_>) = entries.into_iter().partition(is_qdisc);
    let mut interfaces = Vec::new();
    for entry in &chosen {
        if let Undo::Clsact { interface, .. } = &entry.undo {
            interfaces.push(interface.as_str());
        }
    }
    let alike = chosen.iter().all(|entry| {
        let netns = entry.undo.netns();
        netns.is_some_and(Netns::is_alive) && netns == chosen[0].undo.netns()
    });
    let removed = interfaces.len() >= BATCH_MIN && alike && {
        let filters = chosen
            .iter()
            .filter(|e| !matches!(e.undo, Undo::Clsact { .. }));
        let gone: Vec<_> = filters.map(|entry| entry.undo.run()).collect();
        let netns = chosen[0].undo.netns();
        gone.iter().all(Result::is_ok)
            && netns.is_some_and(|n| n.run(|| tc::remove_clsact(&interfaces)).is_ok())
    };
    if !removed {
        left.extend(chosen);
    }
    left
}
