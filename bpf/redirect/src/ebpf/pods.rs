//! Adding and removing pods, many at once.
//!
//! The journal is written once for all of them, before anything is changed; each pod then costs a
//! few system calls. Others are not touched. What fails for one pod leaves it cut off, see
//! `cut_off.rs`.

use std::collections::{HashMap, HashSet};

use super::attach;
use super::capture::{Addition, Capture};
use super::maps::Pods;
use super::{Ebpf, entries, inventory};
use crate::back_end::AttachedBy;
use crate::error::Result;
use crate::settings::Pod;
use crate::status::Failure;
use crate::system::links::Links;
use crate::system::netns::Netns;
use crate::system::tc;

/// Collects what went wrong, pod by pod.
#[derive(Default)]
struct Failures(Vec<Failure>);

impl Failures {
    fn take<T>(&mut self, pod: &Pod, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.0.push(Failure {
                    uid: pod.uid.clone(),
                    error,
                    cut_off: false,
                });
                None
            }
        }
    }
}

impl Ebpf {
    /// Captures them, see [`crate::Redirection::try_pods`].
    pub(super) fn add(&mut self, node: &Netns, pods: &[Pod]) -> Result<Vec<Failure>> {
        let links = Links::read(node)?;
        let mut failures = Failures::default();
        let mut sound = Vec::new();
        for pod in pods {
            let checked = self
                .settings
                .validate_pod(pod)
                .and_then(|()| links.veth("host_interface", &pod.host_interface));
            sound.extend(failures.take(pod, checked).map(|index| (pod, index)));
        }
        self.replace_outdated(node, &links, &sound)?;
        let additions = self.note(node, &sound, &mut failures)?;
        if additions.is_empty() {
            return Ok(failures.0);
        }
        self.journal.begin_expedited(additions.len());
        let captured = self.capture(node, &additions, &mut failures);
        self.journal.end_expedited();
        let open = match captured {
            Ok(open) => open,
            Err(error) => {
                // Nothing was captured; what is new is not to look as if it were.
                let new = additions.iter().filter(|addition| addition.is_new);
                let new: Vec<_> = new.map(|addition| addition.pod.uid.as_str()).collect();
                self.journal.remove_pods(&new)?;
                return Err(error);
            }
        };
        let captured = additions.iter().map(|addition| addition.pod);
        let captured = captured.filter(|pod| !open.contains(&pod.uid.as_str()));
        let interfaces: Vec<_> = captured.map(|pod| pod.host_interface.as_str()).collect();
        if let Err(error) = crate::cut_off::end_filters(&mut self.journal, &interfaces) {
            tracing::warn!(%error, "pods are captured and still cut off");
        }
        for addition in additions {
            if open.contains(&addition.pod.uid.as_str()) {
                self.close(node, &addition, &mut failures);
            }
        }
        Ok(failures.0)
    }

    /// Cuts off a pod whose capture failed.
    fn close(&mut self, node: &Netns, addition: &Addition<'_>, failures: &mut Failures) {
        let pod = addition.pod;
        let result = self.cut_off_one(node, &pod.host_interface, addition.index);
        match result {
            Ok(()) => {
                let failed = failures
                    .0
                    .iter_mut()
                    .rfind(|failure| failure.uid == pod.uid);
                if let Some(failure) = failed {
                    failure.cut_off = true;
                }
            }
            Err(error) => {
                tracing::error!(%error, uid = pod.uid, "neither captured nor cut off");
                if let Err(error) = self.remove(&[&pod.uid]) {
                    tracing::warn!(%error, "not all of a pod's capture was taken back");
                }
            }
        }
    }

    /// Captures all of them; returns the UIDs of those whose packets nothing stops.
    fn capture<'a>(
        &mut self,
        node: &Netns,
        additions: &[Addition<'a>],
        failures: &mut Failures,
    ) -> Result<Vec<&'a str>> {
        let by_filter = self.journal.attached_by() == Some(AttachedBy::Clsact);
        let ztunnel = self.settings.ztunnel.netns.clone();
        let mut capture = Capture::begin(self.attacher(node)?, &ztunnel)?;
        let mut open = Vec::new();
        for addition in additions {
            let done = capture.add(addition);
            if failures.take(addition.pod, done).is_some() {
                continue;
            }
            let interface = &addition.pod.host_interface;
            let guarded = !addition.is_new && inventory::is_guarded(interface, by_filter);
            if !guarded {
                open.push(addition.pod.uid.as_str());
            }
        }
        let broken = capture.broken();
        self.journal.count_older_broken(broken)?;
        Ok(open)
    }

    /// Those of which anything differs from what is known are captured anew, and cut off meanwhile.
    fn replace_outdated(
        &mut self,
        node: &Netns,
        links: &Links,
        pods: &[(&Pod, u32)],
    ) -> Result<()> {
        let outdated = self.outdated(pods)?;
        let mut gone = Vec::new();
        for uid in outdated {
            let known = self.journal.pods().iter().find(|pod| pod.uid == uid);
            let Some(interface) = known.map(|pod| pod.host_interface.clone()) else {
                continue;
            };
            let index = links.index(&interface);
            let done = index.and_then(|index| self.cut_off_one(node, &interface, index));
            if done.is_err() {
                gone.push(uid);
            }
        }
        if gone.is_empty() {
            return Ok(());
        }
        self.remove(&gone)
    }

    /// UIDs of those of which anything differs from what is known.
    fn outdated<'a>(&self, pods: &[(&'a Pod, u32)]) -> Result<Vec<&'a str>> {
        let map = Pods::open(&self.settings.back_end.bpffs)?;
        let known = self.journal.pods().iter();
        let known: HashMap<_, _> = known.map(|pod| (&pod.uid, pod)).collect();
        let differs = |pod: &Pod, index: u32| {
            let known = known.get(&pod.uid).copied();
            known.is_some_and(|known| {
                !known.is_captured_as(pod) || map.get(known).is_none_or(|[now, _]| now != index)
            })
        };
        let chosen = pods.iter().filter(|(pod, index)| differs(pod, *index));
        Ok(chosen.map(|(pod, _)| pod.uid.as_str()).collect())
    }

    /// Writes all of them into the journal.
    fn note<'a>(
        &mut self,
        node: &Netns,
        pods: &[(&'a Pod, u32)],
        failures: &mut Failures,
    ) -> Result<Vec<Addition<'a>>> {
        let pins = self.settings.back_end.bpffs.clone();
        let by_filter = self.journal.attached_by() == Some(AttachedBy::Clsact);
        let clsact = if by_filter {
            tc::clsact_interfaces()?
        } else {
            HashSet::new()
        };
        let mut additions = Vec::new();
        self.journal.batch(|journal| {
            let mut owners = journal.owners();
            let free = pods.iter().filter(|(pod, _)| {
                let is_free = failures.take(pod, owners.check_free(pod)).is_some();
                if is_free {
                    owners.add(pod);
                }
                is_free
            });
            let free: Vec<_> = free.copied().collect();
            let noted: Vec<_> = free.iter().map(|&(pod, _)| pod).collect();
            let new = journal.set_pods(&noted)?;
            for (pod, index) in free {
                let is_new = new.contains(pod.uid.as_str());
                let addition = Addition { pod, index, is_new };
                let interface = pod.host_interface.as_str();
                if journal.cut_off().any(|name| name == interface) {
                    journal.hand_over(&crate::cut_off::owner(interface), &pod.uid)?;
                    journal.set_cut_off(interface, false)?;
                }
                for hook in addition.hooks() {
                    if by_filter {
                        let has_clsact = clsact.contains(hook.interface);
                        attach::note_filter(journal, node, hook, has_clsact)?;
                    } else {
                        attach::note_link(journal, &pins, hook)?;
                    }
                }
                additions.push(addition);
            }
            Ok(())
        })?;
        Ok(additions)
    }

    /// Ends their capture, see [`crate::Redirection::remove_pods`].
    pub(super) fn remove(&mut self, uids: &[&str]) -> Result<()> {
        self.journal.begin_expedited(uids.len());
        let removed = self.remove_at_once(uids);
        self.journal.end_expedited();
        removed
    }

    /// First the map: until its programs are gone, a pod's packets are dropped as spoofed rather
    /// than let past ztunnel half-way.
    fn remove_at_once(&mut self, uids: &[&str]) -> Result<()> {
        let journal = &self.journal;
        let mapped = entries::forget(&self.settings.back_end.bpffs, journal.pods(), uids);
        let wanted: HashSet<_> = uids.iter().copied().collect();
        let gone = journal
            .pods()
            .iter()
            .filter(|pod| wanted.contains(pod.uid.as_str()));
        let interfaces: Vec<_> = gone.map(|pod| pod.host_interface.clone()).collect();
        let by_link = journal.attached_by() != Some(AttachedBy::Clsact);
        let removed = self.journal.remove_pods(uids);
        if by_link {
            inventory::wait_until_detached(&interfaces);
        }
        removed.and(mapped)
    }
}
