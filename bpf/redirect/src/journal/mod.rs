//! What has been changed on the system and how to take it back, on disk.
//!
//! A change is written here before it is made, so that after a crash there may be entries for
//! changes that were never made (taking those back finds nothing, which is fine) but no change
//! without an entry. Entries are taken back newest first.

mod back_end;
mod owners;
#[cfg(test)]
mod tests;
pub(crate) mod undo;

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::back_end::{AttachedBy, BackEnd, Redirect, Tunnels};
use crate::error::{Error, Result};
use crate::pod_table::Writer;
use crate::settings::Pod;
use crate::status::Uncaptured;
use crate::system::iptables::Iptables;
use crate::system::netns::Netns;
use crate::system::trust::check_trusted;
use crate::system::{command, rcu_expedited, sysctl};
use back_end::Installed;
pub(crate) use owners::Owners;
use undo::{Entry, Undo, undo_entries};

const FILE: &str = "redirection.json";
/// Shortening the kernel's waits is not worth it for fewer pods.
const EXPEDITED_PODS_MIN: usize = 8;

/// The journal's file.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Content {
    #[serde(flatten, with = "back_end")]
    back_end: Installed,
    node: Netns,
    pods: Vec<Pod>,
    /// Interfaces that drop everything, because their pods cannot be captured.
    #[serde(default)]
    cut_off: BTreeSet<String>,
    /// Listed pods that are not captured: no change of the system, but what `status` tells.
    #[serde(default)]
    uncaptured: Vec<Uncaptured>,
    /// Connections that were older than their pod's capture and could not be kept.
    #[serde(default)]
    older_broken: u64,
    entries: Vec<Entry>,
}

/// The journal of one node.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    redirect: Redirect,
    content: Option<Content>,
    /// Inside [`Journal::batch`]: the file is written at its end.
    held: bool,
    /// What ztunnel is told of the pods: theirs before they are captured, until they no longer are.
    table: Writer,
    /// Subjects of all entries; None after entries were removed, until it is needed.
    subjects: Option<HashSet<Undo>>,
}

impl Journal {
    /// Reads the journal in `state_dir`, which need not exist.
    pub(crate) fn open(state_dir: &Path, redirect: Redirect) -> Result<Self> {
        let path = state_dir.join(FILE);
        check_trusted(&path)?;
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
            table: Writer::new(state_dir),
            subjects: None,
        })
    }

    /// Whether there is one, of this back end.
    pub(crate) fn is_installed(&self) -> bool {
        let content = self.content.as_ref();
        content.is_some_and(|content| content.back_end.redirect() == self.redirect)
    }

    /// How programs are attached, once one is.
    pub(crate) fn attached_by(&self) -> Option<AttachedBy> {
        match self.content.as_ref()?.back_end {
            BackEnd::Ebpf(attached_by) => attached_by,
            BackEnd::IptablesTunnel(_) => None,
        }
    }

    /// The tunnels, once they are made.
    pub(crate) fn tunnels(&self) -> Option<Tunnels> {
        match self.content.as_ref()?.back_end {
            BackEnd::IptablesTunnel(tunnels) => tunnels,
            BackEnd::Ebpf(_) => None,
        }
    }

    pub(crate) fn pods(&self) -> &[Pod] {
        self.content.as_ref().map_or(&[], |content| &content.pods)
    }

    /// The captured pod with this interface.
    pub(crate) fn pod_at(&self, interface: &str) -> Option<&Pod> {
        let mut pods = self.pods().iter();
        pods.find(|pod| pod.host_interface == interface)
    }

    /// Interfaces that are cut off.
    pub(crate) fn cut_off(&self) -> impl Iterator<Item = &str> {
        let all = self.content.iter().flat_map(|content| &content.cut_off);
        all.map(String::as_str)
    }

    pub(crate) fn uncaptured(&self) -> &[Uncaptured] {
        let content = self.content.as_ref();
        content.map_or(&[], |content| &content.uncaptured)
    }

    pub(crate) fn older_broken(&self) -> u64 {
        let content = self.content.as_ref();
        content.map_or(0, |content| content.older_broken)
    }

    /// Of the table of pods, for an inventory: nothing if somebody else has changed it.
    pub(crate) fn describe_table(&self) -> Option<String> {
        let pods = self.pods();
        let addresses = pods.iter().map(|pod| pod.addresses.len()).sum::<usize>();
        let is_current = self.table.is_current(pods);
        is_current.then(|| format!("pod table of {addresses} addresses"))
    }

    /// Prepares for installation by this back end: whatever is left of a node or a ztunnel
    /// namespace that is gone, or is no longer ztunnel's, is dealt with.
    pub(crate) fn begin(&mut self, node: &Netns, ztunnel: &Netns) -> Result<()> {
        if let Some(content) = &self.content {
            let installed = content.back_end.redirect();
            if installed != self.redirect {
                return Err(Error::OtherBackEnd {
                    path: self.path.clone(),
                    installed,
                    wanted: self.redirect,
                });
            }
            if content.node != *node {
                self.undo_all()?;
            }
        }
        self.undo_where(|entry| {
            let netns = entry.undo.netns();
            netns.is_some_and(|netns| netns != node && netns != ztunnel)
        })?;
        // Left by a process that was killed while it added pods.
        self.undo_expedited()?;
        if self.content.is_none() {
            self.content = Some(Content {
                back_end: back_end::new(self.redirect),
                node: node.clone(),
                pods: Vec::new(),
                cut_off: BTreeSet::new(),
                uncaptured: Vec::new(),
                older_broken: 0,
                entries: Vec::new(),
            });
        }
        let dir = self.path.parent().unwrap_or_else(|| Path::new("/"));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| Error::file("make state directory", dir, e))?;
        check_trusted(dir)?;
        self.table.forget();
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
    pub(crate) fn has(&mut self, undo: &Undo) -> bool {
        let known = self.subjects.get_or_insert_with(|| {
            let entries = self.content.iter().flat_map(|content| &content.entries);
            entries.map(|entry| entry.undo.subject()).collect()
        });
        known.contains(&undo.subject())
    }

    /// Notes a change that is about to be made; false if it was noted before.
    pub(crate) fn record(&mut self, owner: Option<&str>, undo: Undo) -> Result<bool> {
        if self.has(&undo) {
            return Ok(false);
        }
        if let Some(known) = &mut self.subjects {
            known.insert(undo.subject());
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
                    self.subjects = None;
                    self.save()?;
                }
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Which pod has which address.
    pub(crate) fn owners(&self) -> Owners {
        let mut owners = Owners::default();
        self.pods().iter().for_each(|pod| owners.add(pod));
        owners
    }

    /// Notes how programs are attached.
    pub(crate) fn set_attached_by(&mut self, by: AttachedBy) -> Result<()> {
        self.set_back_end(BackEnd::Ebpf(Some(by)))
    }

    /// Notes how the tunnels are made.
    pub(crate) fn set_tunnels(&mut self, tunnels: Tunnels) -> Result<()> {
        self.set_back_end(BackEnd::IptablesTunnel(Some(tunnels)))
    }

    fn set_back_end(&mut self, back_end: Installed) -> Result<()> {
        let known = &mut self.content_mut()?.back_end;
        if *known == back_end {
            return Ok(());
        }
        *known = back_end;
        self.save()
    }

    /// Notes that the pods are about to be captured. Returns the UIDs of those not noted before.
    pub(crate) fn set_pods<'a>(&mut self, pods: &[&'a Pod]) -> Result<HashSet<&'a str>> {
        let known = &mut self.content_mut()?.pods;
        let mut new: HashSet<&str> = pods.iter().map(|pod| pod.uid.as_str()).collect();
        known.retain(|pod| !new.remove(pod.uid.as_str()));
        known.extend(pods.iter().copied().cloned());
        self.save().map(|()| new)
    }

    /// Notes that an interface is about to be cut off, or is no longer.
    pub(crate) fn set_cut_off(&mut self, interface: &str, is_cut_off: bool) -> Result<()> {
        let cut_off = &mut self.content_mut()?.cut_off;
        let changed = if is_cut_off {
            cut_off.insert(interface.to_owned())
        } else {
            cut_off.remove(interface)
        };
        if changed { self.save() } else { Ok(()) }
    }

    /// Notes which pods are not captured.
    pub(crate) fn set_uncaptured(&mut self, pods: Vec<Uncaptured>) -> Result<()> {
        if self.uncaptured() == pods {
            return Ok(());
        }
        self.content_mut()?.uncaptured = pods;
        self.save()
    }

    /// Counts connections that could not be kept.
    pub(crate) fn count_older_broken(&mut self, more: u64) -> Result<()> {
        if more == 0 {
            return Ok(());
        }
        self.content_mut()?.older_broken += more;
        self.save()
    }

    /// Makes what was changed for `from` be there for `to`.
    pub(crate) fn hand_over(&mut self, from: &str, to: &str) -> Result<()> {
        let entries = &mut self.content_mut()?.entries;
        let of_from = entries
            .iter_mut()
            .filter(|entry| entry.owner.as_deref() == Some(from));
        let mut changed = false;
        for entry in of_from {
            entry.owner = Some(to.to_owned());
            changed = true;
        }
        if changed { self.save() } else { Ok(()) }
    }

    /// Whether anything was changed for `owner`.
    pub(crate) fn has_owner(&self, owner: &str) -> bool {
        let mut entries = self.content.iter().flat_map(|content| &content.entries);
        entries.any(|entry| entry.owner.as_deref() == Some(owner))
    }

    /// Takes back what was changed for these owners, which are no pods.
    pub(crate) fn undo_owners(&mut self, owners: &[String]) -> Result<()> {
        self.undo_where(|entry| entry.owner.as_ref().is_some_and(|own| owners.contains(own)))
    }

    /// Shortens the kernel's waits of what follows, which is about `pods` pods, if that is worth it
    /// and possible: it is about time alone, so that no pod is kept waiting for it.
    /// [`Journal::end_expedited`] ends it, also if this process is killed meanwhile.
    pub(crate) fn begin_expedited(&mut self, pods: usize) {
        let before = rcu_expedited::read();
        // Somebody else's wish, or a kernel without: nothing to do.
        if pods < EXPEDITED_PODS_MIN || before != "0" || self.content.is_none() {
            return;
        }
        // Nothing is noted that could not be taken back.
        let begun = rcu_expedited::check_writable()
            .and_then(|()| self.record(None, Undo::Expedited { before }))
            .and_then(|_| rcu_expedited::write("1"));
        if let Err(error) = begun {
            tracing::info!(%error, "adding or removing many pods takes longer");
        }
    }

    /// Ends [`Journal::begin_expedited`].
    pub(crate) fn end_expedited(&mut self) {
        if let Err(error) = self.undo_expedited() {
            tracing::warn!(%error, "the kernel's waits stay short");
        }
    }

    fn undo_expedited(&mut self) -> Result<()> {
        self.undo_where(|entry| matches!(entry.undo, Undo::Expedited { .. }))
    }

    /// Settings under `/proc/sys` that were changed, as they are now, for people.
    pub(crate) fn describe_sysctls(&self) -> Vec<String> {
        let entries = self.content.iter().flat_map(|content| &content.entries);
        let describe = |entry: &Entry| {
            let Undo::Sysctl { netns, name, value } = &entry.undo else {
                return None;
            };
            let now = netns.run(|| sysctl::read(name)).ok()?;
            let place = netns.describe();
            Some(format!("sysctl {place} {name} = {now} (was {value})"))
        };
        entries.filter_map(describe).collect()
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
        self.subjects = None;
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
        self.subjects = None;
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
        self.subjects = None;
        self.table.remove()?;
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

    /// Replaces the file in one step, and the table of pods if they are others.
    fn save(&mut self) -> Result<()> {
        let Some(content) = self.content.as_ref().filter(|_| !self.held) else {
            return Ok(());
        };
        let bytes = serde_json::to_vec_pretty(content).map_err(|error| Error::Journal {
            path: self.path.clone(),
            reason: error.to_string(),
        })?;
        let new = self.path.with_extension("new");
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| file.write_all(&bytes));
        written.map_err(|e| Error::file("write", &new, e))?;
        fs::rename(&new, &self.path).map_err(|e| Error::file("replace", &self.path, e))?;
        self.table.write(&content.pods)
    }
}
