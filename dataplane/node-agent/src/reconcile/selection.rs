//! Which of the listed pods are captured, and why the others are not.
//!
//! A pod is running if its phase does not say otherwise, its network namespace can be entered and
//! its interface is there. Of several with one uid, interface or address the one that started last
//! is captured (a time beats none; of equals, the later in the file).

use std::collections::HashMap;
use std::net::IpAddr;

use redirect::{Pod, Settings, Uncaptured, Why};

use super::Observed;
use crate::desired::{Entry, Listed};

/// What to do about the listed pods.
#[derive(Debug, Default)]
pub(super) struct Selection {
    /// To be captured; no two of them share a uid, an interface or an address.
    pub(super) pods: Vec<Pod>,
    /// The others. None of them is cut off yet.
    pub(super) refused: Vec<Uncaptured>,
}

/// Looks at each entry, whatever the others are.
pub(super) fn select(settings: &Settings, entries: &[Entry], observed: &Observed) -> Selection {
    let mut selection = Selection::default();
    let mut running = Vec::new();
    for (position, entry) in entries.iter().enumerate() {
        let listed = match entry {
            Entry::Pod(listed) => listed,
            Entry::Unreadable(unreadable) => {
                selection.refused.push(Uncaptured {
                    uid: unreadable.uid.clone(),
                    host_interface: unreadable.host_interface.clone(),
                    why: Why::Invalid,
                    reason: unreadable.reason.clone(),
                    cut_off: false,
                });
                continue;
            }
        };
        match not_running(settings, listed, observed) {
            Some((why, reason)) => selection.refused.push(refused(&listed.pod, why, reason)),
            None => running.push((position, &**listed)),
        }
    }
    // `None` is less than any time.
    running.sort_by_key(|&(position, listed)| std::cmp::Reverse((listed.started, position)));
    let mut taken = Taken::default();
    for &(position, listed) in &running {
        if let Some(reason) = taken.conflict(&listed.pod) {
            let refused = refused(&listed.pod, Why::Conflict, reason);
            selection.refused.push(refused);
        } else {
            taken.take(position, &listed.pod);
        }
    }
    selection.pods = taken.in_order();
    selection.refused.sort();
    selection
}

fn refused(pod: &Pod, why: Why, reason: String) -> Uncaptured {
    Uncaptured {
        uid: pod.uid.clone(),
        host_interface: Some(pod.host_interface.clone()),
        why,
        reason,
        cut_off: false,
    }
}

fn not_running(settings: &Settings, listed: &Listed, observed: &Observed) -> Option<(Why, String)> {
    if let Some(phase) = listed.phase.filter(|phase| phase.is_over()) {
        return Some((Why::Ended, format!("pods.phase is {phase:?}")));
    }
    if let Err(error) = settings.validate_pod(&listed.pod) {
        return Some((Why::Invalid, error.to_string()));
    }
    // The interface first: it is what is looked for when a pod is waited for.
    let problem = observed.interfaces.get(&listed.pod.host_interface);
    let problem = problem.or_else(|| observed.namespaces.get(&listed.pod.netns));
    problem.map(|reason| (Why::Absent, reason.clone()))
}

/// What the pods chosen so far have.
#[derive(Default)]
struct Taken<'a> {
    uids: HashMap<&'a str, &'a Pod>,
    interfaces: HashMap<&'a str, &'a Pod>,
    addresses: HashMap<IpAddr, &'a Pod>,
    chosen: Vec<(usize, &'a Pod)>,
}

impl<'a> Taken<'a> {
    fn conflict(&self, pod: &Pod) -> Option<String> {
        if self.uids.contains_key(pod.uid.as_str()) {
            return Some(format!(
                "pods.uid {:?}: is listed twice, and the other is the newer one",
                pod.uid
            ));
        }
        let newer = |field: &str, value: &str, other: &Pod| {
            Some(format!(
                "{field} {value:?}: belongs to pod {}, which is newer",
                other.uid
            ))
        };
        if let Some(other) = self.interfaces.get(pod.host_interface.as_str()) {
            return newer("pods.host_interface", &pod.host_interface, other);
        }
        pod.addresses.iter().find_map(|address| {
            let other = self.addresses.get(address)?;
            newer("pods.addresses", &address.to_string(), other)
        })
    }

    fn take(&mut self, position: usize, pod: &'a Pod) {
        self.uids.insert(&pod.uid, pod);
        self.interfaces.insert(&pod.host_interface, pod);
        let addresses = pod.addresses.iter();
        self.addresses
            .extend(addresses.map(|address| (*address, pod)));
        self.chosen.push((position, pod));
    }

    fn in_order(mut self) -> Vec<Pod> {
        self.chosen.sort_by_key(|&(position, _)| position);
        let chosen = self.chosen.into_iter();
        chosen.map(|(_, pod)| pod.clone()).collect()
    }
}
