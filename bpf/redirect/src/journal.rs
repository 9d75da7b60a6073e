//! What has been changed on the system and how to take it back, on disk.
//!
//! A change is written here before it is made, so that after a crash there may be entries for
//! changes that were never made (taking those back finds nothing, which is fine) but no change
//! without an entry. Entries are taken back newest first.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::command;
use crate::ebpf::attach;
use crate::error::{Error, Result};
use crate::iptables_tunnel::tables;
use crate::netns::Netns;
use crate::settings::{Iptables, Pod};
use crate::sysctl;

const FILE: &str = "redirection.json";

/// How one change is taken back. All are harmless when there is nothing to take back.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
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
    },
    /// Remove a pin.
    Pin { path: PathBuf },
    /// Remove our tc filter.
    Filter {
        netns: Netns,
        interface: String,
        egress: bool,
    },
    /// Remove a clsact qdisc of ours unless others use it by now.
    Clsact { netns: Netns, interface: String },
    /// Remove a directory.
    Directory { path: PathBuf },
}

impl Undo {
    pub(crate) fn command(netns: &Netns, line: impl Into<String>) -> Self {
        Self::Command {
            netns: netns.clone(),
            line: line.into(),
        }
    }

    fn netns(&self) -> Option<&Netns> {
        match self {
            Self::Sysctl { netns, .. }
            | Self::Command { netns, .. }
            | Self::Chains { netns, .. }
            | Self::Filter { netns, .. }
            | Self::Clsact { netns, .. } => Some(netns),
            Self::Pin { .. } | Self::Directory { .. } => None,
        }
    }

    /// Whether both are about the same thing; of two, the older knows the original state.
    fn is_same_thing(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Sysctl { netns, name, .. },
                Self::Sysctl {
                    netns: n, name: m, ..
                },
            ) => netns == n && name == m,
            _ => self == other,
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
            Self::Chains { netns, iptables } => netns.run(|| tables::remove(*iptables)),
            Self::Pin { path } => {
                let removed = fs::remove_file(path);
                ignore_missing(removed.map_err(|e| Error::file("remove pin", path, e)))
            }
            Self::Filter {
                netns,
                interface,
                egress,
            } => netns.run(|| attach::remove_filter(interface, *egress)),
            Self::Clsact { netns, interface } => netns.run(|| attach::remove_clsact(interface)),
            Self::Directory { path } => {
                let removed = fs::remove_dir(path);
                ignore_missing(removed.map_err(|e| Error::file("remove directory", path, e)))
            }
        }
    }
}

fn ignore_missing(result: Result<()>) -> Result<()> {
    match result {
        Err(Error::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if command::is_missing(&error) => Ok(()),
        other => other,
    }
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Entry {
    /// UID of the pod it is for.
    owner: Option<String>,
    #[serde(flatten)]
    undo: Undo,
}

/// The journal's file.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Content {
    redirect: String,
    node: Netns,
    /// `tunnel`: its driver and UDP port. `ebpf`: how programs are attached.
    detail: Option<String>,
    pods: Vec<Pod>,
    entries: Vec<Entry>,
}

/// The journal of one node.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    redirect: &'static str,
    content: Option<Content>,
    /// Inside [`Journal::batch`]: the file is written at its end.
    held: bool,
}

impl Journal {
    /// Reads the journal in `state_dir`, which need not exist.
    pub(crate) fn open(state_dir: &Path, redirect: &'static str) -> Result<Self> {
        let path = state_dir.join(FILE);
        let content =
            match fs::read(&path) {
                Ok(bytes) => Some(serde_json::from_slice::<Content>(&bytes).map_err(|error| {
                    Error::Journal {
                        path: path.clone(),
                        reason: error.to_string(),
                    }
                })?),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(Error::file("read", &path, error)),
            };
        Ok(Self {
            path,
            redirect,
            content,
            held: false,
        })
    }

    /// Name of the back end the journal in `state_dir` is of, if there is one.
    pub(crate) fn installed_redirect(&self) -> Option<&str> {
        self.content
            .as_ref()
            .map(|content| content.redirect.as_str())
    }

    pub(crate) fn detail(&self) -> Option<&str> {
        self.content.as_ref()?.detail.as_deref()
    }

    pub(crate) fn pods(&self) -> &[Pod] {
        self.content.as_ref().map_or(&[], |content| &content.pods)
    }

    /// Prepares for installation by this back end: whatever is left of a node or a ztunnel
    /// namespace that is gone, or is no longer ztunnel's, is dealt with.
    pub(crate) fn begin(&mut self, node: &Netns, ztunnel: &Netns) -> Result<()> {
        if let Some(content) = &self.content {
            if content.redirect != self.redirect {
                return Err(Error::OtherBackEnd {
                    path: self.path.clone(),
                    installed: content.redirect.clone(),
                    wanted: self.redirect.to_owned(),
                });
            }
            if content.node != *node {
                self.undo_all()?;
            }
        }
        self.undo_where(|entry| {
            entry
                .undo
                .netns()
                .is_some_and(|netns| netns != node && netns != ztunnel)
        })?;
        if self.content.is_none() {
            self.content = Some(Content {
                redirect: self.redirect.to_owned(),
                node: node.clone(),
                detail: None,
                pods: Vec::new(),
                entries: Vec::new(),
            });
        }
        let dir = self.path.parent().unwrap_or_else(|| Path::new("/"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| Error::file("make state directory", dir, e))?;
        self.save()
    }

    /// Notes many changes with one write of the file. `work` must not make any of them.
    pub(crate) fn batch(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.held = true;
        let result = work(self);
        self.held = false;
        self.save().and(result)
    }

    /// Whether the change was noted before.
    pub(crate) fn has(&self, undo: &Undo) -> bool {
        let entries = self.content.iter().flat_map(|content| &content.entries);
        entries
            .into_iter()
            .any(|entry| entry.undo.is_same_thing(undo))
    }

    /// Notes a change that is about to be made; false if it was noted before.
    pub(crate) fn record(&mut self, owner: Option<&str>, undo: Undo) -> Result<bool> {
        if self.has(&undo) {
            return Ok(false);
        }
        let entry = Entry {
            owner: owner.map(str::to_owned),
            undo,
        };
        self.content_mut()?.entries.push(entry);
        self.save().map(|()| true)
    }

    /// Sets a sysctl and notes what it was.
    pub(crate) fn set_sysctl(
        &mut self,
        owner: Option<&str>,
        netns: &Netns,
        name: &str,
        value: &str,
    ) -> Result<()> {
        if self.note_sysctl(owner, netns, name, value)? {
            netns.run(|| sysctl::write(name, value))?;
        }
        Ok(())
    }

    /// Notes what a sysctl is; false if it has the value already.
    pub(crate) fn note_sysctl(
        &mut self,
        owner: Option<&str>,
        netns: &Netns,
        name: &str,
        value: &str,
    ) -> Result<bool> {
        let old = netns.run(|| sysctl::read(name))?;
        if old == value {
            return Ok(false);
        }
        let undo = Undo::Sysctl {
            netns: netns.clone(),
            name: name.to_owned(),
            value: old,
        };
        self.record(owner, undo)?;
        Ok(true)
    }

    /// Runs a command that adds something and notes the one that removes it. That it is there
    /// already is fine; if it is not from an earlier run of ours, it is not ours to remove.
    pub(crate) fn add(
        &mut self,
        owner: Option<&str>,
        netns: &Netns,
        add: &str,
        remove: &str,
    ) -> Result<()> {
        let is_new = self.record(owner, Undo::command(netns, remove))?;
        let words: Vec<_> = add.split_whitespace().collect();
        let Some((program, args)) = words.split_first() else {
            return Ok(());
        };
        match netns.run(|| command::run(program, args)) {
            Err(error) if command::is_present(&error) => {
                if is_new {
                    self.content_mut()?.entries.pop();
                    self.save()?;
                }
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Refuses a pod that has an address of another one.
    pub(crate) fn check_address_free(&self, pod: &Pod) -> Result<()> {
        let others = self.pods().iter().filter(|known| known.uid != pod.uid);
        for other in others {
            if let Some(address) = pod.addresses.iter().find(|a| other.addresses.contains(a)) {
                return Err(Error::Setting {
                    field: "pods.addresses",
                    value: address.to_string(),
                    reason: format!("belongs to pod {}", other.uid),
                });
            }
        }
        Ok(())
    }

    pub(crate) fn set_detail(&mut self, detail: &str) -> Result<()> {
        self.content_mut()?.detail = Some(detail.to_owned());
        self.save()
    }

    /// Notes that the pod is about to be captured; false if it was noted before.
    pub(crate) fn set_pod(&mut self, pod: &Pod) -> Result<bool> {
        let pods = &mut self.content_mut()?.pods;
        let before = pods.len();
        pods.retain(|known| known.uid != pod.uid);
        let is_new = pods.len() == before;
        pods.push(pod.clone());
        self.save().map(|()| is_new)
    }

    /// Settings under `/proc/sys` that were changed: where, name, and what they were.
    pub(crate) fn sysctls(&self) -> impl Iterator<Item = (&Netns, &str, &str)> {
        let entries = self.content.iter().flat_map(|content| &content.entries);
        entries.filter_map(|entry| match &entry.undo {
            Undo::Sysctl { netns, name, value } => Some((netns, name.as_str(), value.as_str())),
            _ => None,
        })
    }

    /// Number of entries; for [`Journal::rollback`].
    pub(crate) fn mark(&self) -> usize {
        self.content
            .as_ref()
            .map_or(0, |content| content.entries.len())
    }

    /// Takes back what was recorded after `mark`; failures are logged, as there is an error on
    /// its way to the caller already. Leaves no file if nothing is left.
    pub(crate) fn rollback(&mut self, mark: usize) {
        let Some(content) = &mut self.content else {
            return;
        };
        let newer = content.entries.split_off(mark.min(content.entries.len()));
        let (kept, _) = undo_entries(newer);
        content.entries.extend(kept);
        let nothing_left = content.entries.is_empty();
        let outcome = if nothing_left {
            self.remove_file()
        } else {
            self.save()
        };
        if let Err(error) = outcome {
            tracing::error!(%error, "journal not updated");
        }
    }

    /// Takes back what is there for the pods and forgets them.
    pub(crate) fn remove_pods(&mut self, uids: &[&str]) -> Result<()> {
        let gone: HashSet<&str> = uids.iter().copied().collect();
        let is_gone = |uid: &str| gone.contains(uid);
        let outcome = self.undo_where(|entry| entry.owner.as_deref().is_some_and(is_gone));
        if let Some(content) = &mut self.content {
            content.pods.retain(|pod| !is_gone(&pod.uid));
            self.save()?;
        }
        outcome
    }

    /// Takes back everything. What fails stays in the journal.
    pub(crate) fn undo_all(&mut self) -> Result<()> {
        self.undo_where(|_| true)?;
        self.remove_file()
    }

    /// Removes chains made with another kind of iptables.
    pub(crate) fn retain_chains(&mut self, kind: Iptables) -> Result<()> {
        self.undo_where(
            |entry| matches!(&entry.undo, Undo::Chains { iptables, .. } if *iptables != kind),
        )
    }

    /// Removes filters that belong to no pod and are on none of these interfaces.
    pub(crate) fn retain_filters(&mut self, interfaces: &[&str]) -> Result<()> {
        self.undo_where(|entry| match &entry.undo {
            Undo::Filter { interface, .. } | Undo::Clsact { interface, .. } => {
                entry.owner.is_none() && !interfaces.contains(&interface.as_str())
            }
            _ => false,
        })
    }

    fn undo_where(&mut self, matches: impl Fn(&Entry) -> bool) -> Result<()> {
        let Some(content) = &mut self.content else {
            return Ok(());
        };
        let entries = std::mem::take(&mut content.entries);
        let (chosen, others): (Vec<_>, Vec<_>) = entries.into_iter().partition(matches);
        content.entries = others;
        if chosen.is_empty() {
            return Ok(());
        }
        let (kept, error) = undo_entries(chosen);
        if let Some(content) = &mut self.content {
            content.entries.extend(kept);
        }
        self.save()?;
        error.map_or(Ok(()), Err)
    }

    fn remove_file(&mut self) -> Result<()> {
        self.content = None;
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::file("remove", &self.path, error))
            }
            _ => Ok(()),
        }
    }

    fn content_mut(&mut self) -> Result<&mut Content> {
        self.content.as_mut().ok_or_else(|| Error::Journal {
            path: self.path.clone(),
            reason: "not begun: install must come first".to_owned(),
        })
    }

    /// Replaces the file in one step.
    fn save(&self) -> Result<()> {
        let Some(content) = self.content.as_ref().filter(|_| !self.held) else {
            return Ok(());
        };
        let bytes = serde_json::to_vec_pretty(content).map_err(|error| Error::Journal {
            path: self.path.clone(),
            reason: error.to_string(),
        })?;
        let new = self.path.with_extension("new");
        fs::write(&new, bytes).map_err(|e| Error::file("write", &new, e))?;
        fs::rename(&new, &self.path).map_err(|e| Error::file("replace", &self.path, e))
    }
}

/// Runs newest first; returns those that failed, in their order, and the first error.
fn undo_entries(entries: Vec<Entry>) -> (Vec<Entry>, Option<Error>) {
    let (mut kept, mut first_error) = (Vec::new(), None);
    for entry in entries.into_iter().rev() {
        if let Err(error) = entry.undo.run() {
            tracing::warn!(%error, "not removed");
            first_error.get_or_insert(error);
            kept.push(entry);
        }
    }
    kept.reverse();
    (kept, first_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(dir: &Path) -> Journal {
        let node = Netns::node().unwrap();
        let mut journal = Journal::open(dir, "ebpf").unwrap();
        journal.begin(&node, &node).unwrap();
        journal
    }

    fn touch(path: &Path) -> Undo {
        fs::write(path, "").unwrap();
        Undo::Pin {
            path: path.to_owned(),
        }
    }

    #[test]
    fn rollback_takes_back_only_what_is_newer() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let mut j = journal(dir.path());
        j.record(None, touch(&a)).unwrap();
        let mark = j.mark();
        j.record(Some("pod"), touch(&b)).unwrap();
        j.record(Some("pod"), Undo::Pin { path: a.clone() })
            .unwrap();
        j.rollback(mark);
        assert!(a.exists() && !b.exists());
        drop(j);
        // Another process finds the rest.
        let mut j = Journal::open(dir.path(), "ebpf").unwrap();
        j.undo_all().unwrap();
        assert!(!a.exists() && !dir.path().join(FILE).exists());
    }

    #[test]
    fn what_cannot_be_removed_stays_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let full = dir.path().join("full");
        fs::create_dir(&full).unwrap();
        fs::write(full.join("x"), "").unwrap();
        let mut j = journal(dir.path());
        j.record(None, Undo::Directory { path: full.clone() })
            .unwrap();
        assert!(j.undo_all().is_err());
        fs::remove_file(full.join("x")).unwrap();
        Journal::open(dir.path(), "ebpf")
            .unwrap()
            .undo_all()
            .unwrap();
        assert!(!full.exists());
    }

    #[test]
    fn another_back_end_and_damage_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        journal(dir.path());
        let node = Netns::node().unwrap();
        let mut other = Journal::open(dir.path(), "tunnel").unwrap();
        let error = other.begin(&node, &node).unwrap_err();
        assert!(matches!(error, Error::OtherBackEnd { .. }), "{error}");
        fs::write(dir.path().join(FILE), "{").unwrap();
        let error = Journal::open(dir.path(), "ebpf").unwrap_err().to_string();
        assert!(
            error.contains("damaged") && !error.contains('\n'),
            "{error}"
        );
    }

    #[test]
    fn the_oldest_sysctl_value_is_kept() {
        let node = Netns::node().unwrap();
        let undo = |value: &str| Undo::Sysctl {
            netns: node.clone(),
            name: "net/x".into(),
            value: value.into(),
        };
        assert!(undo("1").is_same_thing(&undo("0")));
        let dir = tempfile::tempdir().unwrap();
        let mut j = journal(dir.path());
        j.record(None, undo("1")).unwrap();
        j.record(None, undo("0")).unwrap();
        assert_eq!(j.mark(), 1);
        assert_eq!(j.content.as_ref().unwrap().entries[0].undo, undo("1"));
    }
}
